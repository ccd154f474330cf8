"""MLPs in eight bits, as a CPU computes them: products, the encoder's gradient, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastnull import ops
from fastnull.encoder import FrozenEncoder
from fastnull.encoder.explicit import float8
from fastnull.encoder.explicit.float8 import Float8Linear, check_float8
from fastnull.synthesis import SynthesisConfig, measure_influence, synthesize
from fastnull.vit import NormalizedModel
from tests.encoder.test_frozen import cosines, exact, loud, relative

Factory = Callable[..., NormalizedModel]
FLOAT8 = torch.float8_e4m3fn

try:
    check_float8(FLOAT8, torch.bfloat16, torch.device("cpu"))
except ValueError as missing:  # a torch whose CPU has no such products
    pytest.skip(str(missing), allow_module_level=True)


def rounded(x: Tensor) -> Tensor:
    """What x is in eight bits, in float64."""
    q, scale = ops.quantize_rows(x)
    return q.double() * scale.double()


def test_products_are_those_of_the_rounded_operands() -> None:
    """Bias, residual, both directions."""
    linear = nn.Linear(32, 48).requires_grad_(False)
    mine = Float8Linear(linear, torch.bfloat16)
    mine.sync()
    x, dy, residual = (torch.randn(5, size).bfloat16() for size in (32, 48, 48))
    weight, bias = linear.weight, mine.bias.double()
    forward = rounded(x) @ rounded(weight).t()
    backward = rounded(dy) @ rounded(weight.t().contiguous()).t()
    out = torch.empty_like(residual)
    for got, expected in (
        (mine(x), forward + bias),
        (mine.without_bias(x, out), forward),
        (mine.add_to(residual, x, out), forward + bias + residual.double()),
        (mine.input_gradient(dy), backward),
    ):
        assert relative(got, expected) < 2 * torch.finfo(torch.bfloat16).eps
    assert sum(t.numel() * t.element_size() for t in mine.tensors()) == 2 * 32 * 48 + 4 * (32 + 48) + 2 * 48


@pytest.mark.parametrize("settings", [{}, {"global_pool": "avg"}, {"act_layer": "gelu_tanh"}, {"init_values": 0.5}])
def test_the_gradient_keeps_its_direction(make_vit: Factory, settings: dict[str, Any]) -> None:
    model = loud(make_vit(depth=3, **settings))
    images, cotangent = torch.rand(4, 3, 16, 16), torch.randn(4, 10)
    tokens, logits, gradient = exact(model, images, cotangent, "patch")
    frozen = FrozenEncoder(model, dtype=torch.bfloat16, backend="cpu", mlp_dtype=FLOAT8)
    plain = FrozenEncoder(model, dtype=torch.bfloat16, backend="cpu")
    assert frozen.mlp_dtype == FLOAT8
    mine, theirs = (each.input_gradient(tokens.bfloat16(), cotangent) for each in (frozen, plain))
    assert relative(mine[0], logits) < 0.1
    assert cosines(mine[1], gradient).min() > 0.98
    assert cosines(mine[1], gradient).min() < cosines(theirs[1], gradient).min(), "it was not in eight bits"


def test_sync_is_in_place_and_what_a_new_encoder_has(make_vit: Factory, images: Tensor) -> None:
    model = loud(make_vit())
    frozen = FrozenEncoder(model, dtype=torch.bfloat16, backend="cpu", mlp_dtype=FLOAT8)
    held = [tensor.data_ptr() for block in frozen._encoder.blocks for tensor in block.fc1.tensors()]
    loud(model)
    frozen.sync()
    fresh = FrozenEncoder(model, dtype=torch.bfloat16, backend="cpu", mlp_dtype=FLOAT8)
    assert torch.equal(frozen(frozen.embed(images)), fresh(fresh.embed(images)))
    assert held == [tensor.data_ptr() for block in frozen._encoder.blocks for tensor in block.fc1.tensors()]


def test_synthesis_ends_where_bfloat16_does(make_vit: Factory) -> None:
    """Influence and norm after 20 steps, judged in float32; the record says what was multiplied in eight bits."""
    model = make_vit(depth=3)
    batches = [torch.rand(8, 3, 16, 16) for _ in range(2)]
    config = SynthesisConfig(limit=1.0, lr=0.05, steps=20, stop="never")
    judge, ends = FrozenEncoder(model), []
    for mlp_dtype in (None, FLOAT8):
        noise = synthesize(FrozenEncoder(model, dtype=torch.bfloat16, mlp_dtype=mlp_dtype), batches, config)
        ends.append((measure_influence(judge, noise, batches).item(), noise.norm.item()))
    assert noise.metadata["mlp_dtype"] == "torch.float8_e4m3fn"
    assert ends[1][0] == pytest.approx(ends[0][0], rel=0.1)
    assert ends[1][1] == pytest.approx(ends[0][1], rel=0.02)


def test_what_cannot_be_is_refused(make_vit: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    model, half = make_vit(), torch.bfloat16
    with pytest.raises(ValueError, match=r"mlp_dtype must be None or torch.float8_e4m3fn; got torch.float8_e5m2"):
        FrozenEncoder(model, dtype=half, mlp_dtype=torch.float8_e5m2)
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(ValueError, match=rf"needs a bfloat16 encoder .*; got {dtype}"):
            FrozenEncoder(model, dtype=dtype, backend="cpu", mlp_dtype=FLOAT8)
    with pytest.raises(ValueError, match=r"needs the backend 'cuda' \(or 'cpu'\); the model runs on 'reference'"):
        FrozenEncoder(model, dtype=half, backend="reference", mlp_dtype=FLOAT8)
    with pytest.raises(ValueError, match=r"widths that are multiples of 16; a linear has 27 inputs and 108 outputs"):
        FrozenEncoder(make_vit(embed_dim=27, num_heads=3), dtype=half, backend="cpu", mlp_dtype=FLOAT8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"needs a GPU of at least sm_90 \(Hopper\); this one is sm_80"):
        check_float8(FLOAT8, half, torch.device("cuda", 0))

    def missing(*args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("Could not run it\n" + 60 * "backend\n")

    monkeypatch.setattr(float8, "product", missing)
    with pytest.raises(ValueError, match=r"has no 8-bit products on cpu \(Could not run it\)$"):
        check_float8(FLOAT8, half, torch.device("cpu"))
