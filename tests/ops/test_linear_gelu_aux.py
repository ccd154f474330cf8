"""Products with GELU that keep z, as torch computes them, and the encoder on them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fastnull import ops, testing
from fastnull.encoder import FrozenEncoder
from fastnull.encoder.explicit import block
from fastnull.ops.linear_gelu import gelu_ref
from fastnull.ops.linear_gelu_aux import keeps_z
from fastnull.vit import NormalizedModel
from tests.encoder.test_frozen import cosines, exact, loud, relative


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(0)
    x, w, w2, dy = (torch.randn(s, generator=source).to(dtype) for s in ((5, 16), (24, 16), (16, 24), (5, 16)))
    bias = torch.randn(24, generator=source).to(dtype)
    h, z, dz = (torch.full((5, 24), float("nan"), dtype=dtype) for _ in range(3))
    assert ops.linear_gelu_aux(x, w, bias, h=h, z=z) is h
    assert ops.linear_dgelu_aux(dy, w2, z, out=dz) is dz
    wide, torchs = F.linear(x.double(), w.double(), bias.double()), F.linear(x, w, bias)
    testing.assert_within_budget(z, wide, torchs, "z")
    testing.assert_within_budget(h, gelu_ref(wide, None, "tanh")[0], F.gelu(torchs, approximate="tanh"), "h")
    reference = dy.double() @ w2.double() * gelu_ref(z.double(), None, "tanh")[1]
    baseline = torch.ops.aten.gelu_backward(dy @ w2, z, approximate="tanh")
    testing.assert_gradient_close(dz, reference, baseline, "dz")
    testing.opcheck("linear_gelu_aux_out", (x, w, bias, h, z))
    testing.opcheck("linear_dgelu_aux_out", (dy, w2, z, dz))


def test_the_encoder_on_them(make_vit: Callable[..., NormalizedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "keeps_z", lambda approximate, dtype, device: approximate == "tanh")
    model = loud(make_vit(depth=3, act_layer="gelu_tanh"))
    images, cotangent = torch.rand(4, 3, 16, 16), torch.randn(4, 10)
    tokens, logits, gradient = exact(model, images, cotangent, "patch")
    frozen = FrozenEncoder(model, dtype=torch.float32, backend="cpu")
    got = frozen.input_gradient(tokens.float(), cotangent)
    assert frozen._encoder._saved[0].derivative.dtype == torch.float32
    assert relative(got[0], logits) < 1e-5
    assert cosines(got[1], gradient).min() > 1 - 1e-9


def test_only_a_gpu_that_asks_for_them_takes_them() -> None:
    half = torch.bfloat16
    assert not keeps_z("tanh", half, torch.device("cpu"))
    assert not keeps_z("none", half, torch.device("cuda"))
    assert not keeps_z("tanh", torch.float32, torch.device("cuda"))
