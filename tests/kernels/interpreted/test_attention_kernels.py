"""Attention kernels and their packed gradient against float64, through the public functions."""

from __future__ import annotations

import pytest
import torch

from fastnull import ops
from fastnull.kernels import attention as attention_kernels
from tests.kernels.interpreted.inputs import DEVICE, DTYPES, nan, randn
from tests.ops import checks

# N: 1 = CLS alone; 50 = B/32, one tile of keys; 65 = one key over a tile of 64, in a second one of 16; 197 = /16, whole
# rows of 256 keys or four blocks with a tail of 5; 257 = /14, 256 + 16 keys.
# d: 64 and 32 = ViTs; 20 = padded to 32; 80 = ViT-H, padded to 128.
CASES = [
    (2, 1, 2, 64),
    (2, 50, 3, 64),
    (1, 65, 2, 32),
    (1, 197, 1, 64),
    (1, 257, 1, 32),
    (1, 70, 1, 80),
    (1, 33, 2, 20),
]


def inputs(B: int, N: int, H: int, d: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return randn((B, N, 3, H, d), dtype, seed), randn((B, N, H, d), dtype, seed + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradient(case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    checks.attention(*inputs(*case, dtype), case[3] ** -0.5)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has its own tiles alone")
@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("tokens", [65, 197, 257])
def test_tiles_of_newer_gpus(tokens: int, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows of 64 queries in the forward, and on sm_100 in dq; the cases above run sm_80's tiles."""
    monkeypatch.setattr(attention_kernels, "generation_of", lambda x: capability)
    checks.attention(*inputs(1, tokens, 1, 32, torch.float16, seed=3), 0.2)


def test_every_tile_of_the_tables_is_reached() -> None:
    """An entry behind a wider one would never run."""
    for entries in (attention_kernels.FORWARD, attention_kernels.GRADIENT):
        for index, tile in enumerate(entries):
            wider = [
                t for t in entries[:index] if t.head >= tile.head and t.tokens >= tile.tokens and t.since <= tile.since
            ]
            assert not wider, (tile, wider)
    qkv, grad_o = inputs(1, 2, 1, 16, torch.float16)
    ops.attention_dqkv(qkv, grad_o)


def test_many_tokens() -> None:
    """577 = /16 at 384 pixels: tiles of 128 in the forward, ten blocks in the backward."""
    checks.attention(*inputs(1, 577, 1, 64, torch.float16, seed=2), 0.125)


@pytest.mark.parametrize("scale", [1.0, -0.4])
def test_scale_is_an_argument(scale: float) -> None:
    """1.0 = folded into the weights: large scores, nearly one-hot rows; negative: the maximum moves."""
    checks.attention(*inputs(1, 70, 1, 32, torch.float32, seed=4), scale)


def test_rows_sum_to_one() -> None:
    checks.attention_rows_sum_to_one(*inputs(1, 70, 1, 32, torch.float32, seed=6))


def test_large_scores() -> None:
    qkv, grad_o = inputs(1, 33, 1, 32, torch.float32, seed=8)
    assert ops.attention(qkv, 100.0).isfinite().all()
    assert ops.attention_dqkv(qkv, grad_o, 100.0).isfinite().all()


def test_images_and_heads_are_apart_and_runs_repeat() -> None:
    checks.attention_of_images_and_heads_alone(*inputs(2, 50, 2, 32, torch.float16, seed=10))


@pytest.mark.filterwarnings("ignore:All-NaN", "ignore:invalid value")
@pytest.mark.parametrize("part", [0, 1, 2])
def test_nan_propagates_within_its_head(part: int) -> None:
    checks.attention_of_nan(*inputs(1, 70, 2, 32, torch.float32, seed=12), part)


def test_nothing_is_written_beside_the_outputs() -> None:
    """Outputs are slices of larger tensors, as the buffers of an encoder; only their last dimension is dense."""
    qkv, grad_o = inputs(1, 5, 2, 20, torch.float32, seed=14)
    whole_o, whole_dqkv = nan(3, 7, 4, 28), nan(3, 7, 5, 4, 28)
    ops.attention(qkv, out=whole_o[1:2, 1:6, 1:3, 4:24])
    ops.attention_dqkv(qkv, grad_o, out=whole_dqkv[1:2, 1:6, 1:4, 1:3, 4:24])
    assert int(whole_o.isfinite().sum()) == grad_o.numel()
    assert int(whole_dqkv.isfinite().sum()) == qkv.numel()


def test_wide_heads_are_refused_by_the_launcher() -> None:
    """Over 128 columns a tile would not fit; the public function takes torch's attention on a GPU."""
    qkv, grad_o = inputs(1, 3, 1, 130, torch.float32, seed=16)
    for call in (
        lambda: torch.ops.fastnull.attention_out(qkv, 0.1, nan(*grad_o.shape)),
        lambda: torch.ops.fastnull.attention_dqkv_out(qkv, grad_o, 0.1, nan(*qkv.shape)),
    ):
        with pytest.raises(ValueError, match="heads must be at most 128 wide"):
            call()


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 8), (2, 0, 3, 2, 8), (2, 5, 3, 0, 8)])
def test_empty(shape: tuple[int, ...]) -> None:
    checks.attention_of_nothing(torch.empty(shape, device=DEVICE))
