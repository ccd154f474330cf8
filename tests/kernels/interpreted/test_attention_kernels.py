"""Attention kernels and their packed gradient against float64, through the public functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastnull import ops, testing
from fastnull.kernels import attention as attention_kernels
from fastnull.ops.attention import attention_dqkv_ref, attention_ref
from tests.kernels.interpreted.inputs import DEVICE, DTYPES, nan, randn

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


def torch_attention(qkv: torch.Tensor, scale: float) -> torch.Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def torch_gradient(qkv: torch.Tensor, grad_o: torch.Tensor, scale: float) -> torch.Tensor:
    leaf = qkv.clone().requires_grad_()
    return torch.autograd.grad(torch_attention(leaf, scale), leaf, grad_o)[0]


def assert_right(qkv: torch.Tensor, grad_o: torch.Tensor, scale: float) -> None:
    with testing.poisoned():
        o, dqkv = ops.attention(qkv, scale), ops.attention_dqkv(qkv, grad_o, scale)
    testing.assert_within_budget(o, torch_attention(qkv.double(), scale), torch_attention(qkv, scale), "o")
    reference, baseline = torch_gradient(qkv.double(), grad_o.double(), scale), torch_gradient(qkv, grad_o, scale)
    for part, name in enumerate(("dq", "dk", "dv")):
        if qkv.shape[1] == 1 and name != "dv":  # one token: the softmax is constant
            assert dqkv[:, :, part].abs().max() <= 1e-6
            continue
        testing.assert_gradient_close(dqkv[:, :, part], reference[:, :, part], baseline[:, :, part], name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradient(case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_right(*inputs(*case, dtype), case[3] ** -0.5)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has its own tiles alone")
@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("tokens", [197, 257])
def test_tiles_of_newer_gpus(tokens: int, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows of 64 queries in the forward, and on sm_100 in dq; the cases above run sm_80's tiles."""
    monkeypatch.setattr(attention_kernels, "generation_of", lambda x: capability)
    assert_right(*inputs(1, tokens, 1, 32, torch.float16, seed=3), 0.2)


def test_every_tile_of_the_tables_is_reached() -> None:
    """An entry behind a wider one would never run."""
    for entries in (attention_kernels.FORWARD, attention_kernels.QUERY_GRADIENT, attention_kernels.KEY_GRADIENT):
        for index, tile in enumerate(entries):
            wider = [
                t for t in entries[:index] if t.head >= tile.head and t.tokens >= tile.tokens and t.since <= tile.since
            ]
            assert not wider, (tile, wider)
    qkv, grad_o = inputs(1, 2, 1, 16, torch.float16)
    ops.attention_dqkv(qkv, grad_o)


def test_many_tokens() -> None:
    """577 = /16 at 384 pixels: tiles of 128 in the forward, ten blocks in the backward."""
    assert_right(*inputs(1, 577, 1, 64, torch.float16, seed=2), 0.125)


@pytest.mark.parametrize("scale", [1.0, -0.4])
def test_scale_is_an_argument(scale: float) -> None:
    """1.0 = folded into the weights: large scores, nearly one-hot rows; negative: the maximum moves."""
    assert_right(*inputs(1, 70, 1, 32, torch.float32, seed=4), scale)


def test_rows_sum_to_one() -> None:
    """With v = 1 the output is the row sum of the softmax, and nothing flows back into q and k."""
    qkv, grad_o = inputs(1, 70, 1, 32, torch.float32, seed=6)
    qkv[:, :, 2] = 1
    o, dqkv = ops.attention(qkv), ops.attention_dqkv(qkv, grad_o)
    torch.testing.assert_close(o, torch.ones_like(o), rtol=0, atol=1e-6)
    torch.testing.assert_close(dqkv[:, :, :2], torch.zeros_like(dqkv[:, :, :2]), rtol=0, atol=1e-5)


def test_large_scores() -> None:
    qkv, grad_o = inputs(1, 33, 1, 32, torch.float32, seed=8)
    assert ops.attention(qkv, 100.0).isfinite().all()
    assert ops.attention_dqkv(qkv, grad_o, 100.0).isfinite().all()


def test_images_and_heads_are_apart_and_runs_repeat() -> None:
    qkv, grad_o = inputs(2, 50, 2, 32, torch.float16, seed=10)
    o, dqkv = ops.attention(qkv), ops.attention_dqkv(qkv, grad_o)
    assert ops.attention(qkv.flip(0)).equal(o.flip(0))
    assert ops.attention(qkv[:, :, :, 1:]).equal(o[:, :, 1:])
    assert ops.attention_dqkv(qkv[:, :, :, 1:], grad_o[:, :, 1:]).equal(dqkv[:, :, :, 1:])
    assert ops.attention_dqkv(qkv, grad_o).equal(dqkv)


@pytest.mark.filterwarnings("ignore:All-NaN", "ignore:invalid value")
@pytest.mark.parametrize("part", [0, 1, 2])
def test_nan_propagates_within_its_head(part: int) -> None:
    qkv, grad_o = inputs(1, 70, 2, 32, torch.float32, seed=12)
    qkv[0, 69, part, 1, 31] = float("nan")
    o, dqkv = ops.attention(qkv), ops.attention_dqkv(qkv, grad_o)
    # A NaN in q reaches its own row alone, in k every row, in v one column of every row.
    assert o.isnan().equal(attention_ref(qkv, 32**-0.5).isnan())
    assert dqkv.isnan().equal(attention_dqkv_ref(qkv, grad_o, 32**-0.5).isnan())


def test_nothing_is_written_beside_the_outputs() -> None:
    """Outputs are slices of bigger tensors, as the buffers of an encoder are; their last dimension alone is dense."""
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
    B, N, _, H, d = shape
    assert ops.attention(torch.empty(shape, device=DEVICE)).shape == (B, N, H, d)
    grad_o = torch.empty(B, N, H, d, device=DEVICE)
    assert ops.attention_dqkv(torch.empty(shape, device=DEVICE), grad_o).shape == shape
