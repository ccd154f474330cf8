"""The whole encoder on the kernels: forward and input gradient against the model's own autograd in float64."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastnull.encoder import FrozenEncoder
from fastnull.ops import references
from tests.kernels.interpreted.inputs import DEVICE, DTYPES

linear_gelu = importlib.import_module("fastnull.ops.linear_gelu")  # fastnull.ops has a function of that name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("settings", "fused"),
    [({}, True), ({"global_pool": "avg", "init_values": 0.5}, True), ({"qk_norm": True}, False)],
)
def test_the_encoder_is_the_model(
    make_vit: Callable[..., Any],
    settings: dict[str, Any],
    fused: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two blocks, 17 tokens: every kernel of a step in the order and on the buffers of a step."""
    model = make_vit(**settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model = model.to(DEVICE)
    images, cotangent = torch.rand(2, 3, 16, 16, device=DEVICE), torch.randn(2, 10, device=DEVICE)
    exact = FrozenEncoder(copy.deepcopy(model).double(), backend="reference")
    tokens = exact.embed(images.double())
    truth = exact.input_gradient(tokens, cotangent.double())

    frozen = FrozenEncoder(model, dtype=dtype, backend=DEVICE)
    # the products of the last block are float32, for which there is no fused kernel
    monkeypatch.setattr(linear_gelu, "_in_one_op", lambda x, weight: fused and x.dtype.itemsize == 2)
    if frozen._encoder.last is not None:
        frozen._encoder.last.tokens = dtype  # as on a GPU
    theirs = FrozenEncoder(model, dtype=dtype, backend="reference").input_gradient(tokens.to(dtype), cotangent)
    mine = frozen.input_gradient(tokens.to(dtype), cotangent)
    eps = torch.finfo(dtype).eps
    for got, torchs, true in zip(mine, theirs, truth, strict=True):
        budget = 2 * ((torchs.double() - true).abs().max() + 2 * eps * true.abs().max())
        assert (got.double() - true).abs().max() <= budget
    cosine = torch.nn.functional.cosine_similarity(mine[1].double().flatten(1), truth[1].flatten(1))
    assert cosine.min() > (0.999 if dtype != torch.float32 else 1 - 1e-9)
    with references():
        switched = frozen.input_gradient(tokens.to(dtype), cotangent)
    torch.testing.assert_close(switched[1], mine[1], rtol=0.1 if dtype != torch.float32 else 1e-3, atol=1e-2)
