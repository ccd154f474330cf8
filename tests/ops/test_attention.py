"""Attention and its packed backward, every CPU backend against float64."""

from __future__ import annotations

import pytest
import torch

from fastnull import ops, testing
from fastnull.ops.attention import attention_dqkv_ref, attention_dqkv_sdpa, attention_ref, attention_sdpa
from tests.ops import checks

DTYPES = [torch.float32, torch.bfloat16]
# N: 1 = CLS alone; 7 = less than a vector of AVX2; 50 = B/32, one query block, tail of 2 in a vector; 64 = whole
# vectors; 73 = one more than a query block holds, so two blocks that add into dk and dv; 197 = B/16, three
# blocks, odd tail. Dropped: 65, 257 and 577 (as 73 and 197; 257 once below).
# d: 64 and 32 = ViTs; 20 = tail in a vector; 5 = less than one; 80 = ViT-H, more than one tile of columns.
CASES = [
    (2, 1, 2, 64),
    (2, 7, 3, 5),
    (2, 50, 3, 64),
    (1, 64, 2, 32),
    (1, 73, 2, 20),
    (2, 197, 2, 64),
    (1, 50, 1, 80),
]


def inputs(B: int, N: int, H: int, d: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return testing.randn((B, N, 3, H, d), dtype, g), testing.randn((B, N, H, d), dtype, g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradient(backend: str, case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    checks.attention(*inputs(*case, dtype), case[3] ** -0.5)


@pytest.mark.parametrize("N", [257, 577])
def test_long_sequences_on_the_level_in_use(N: int) -> None:
    """/14 and 384-pixel models; four and nine query blocks."""
    checks.attention(*inputs(1, N, 1, 64, torch.float32), 0.125)


@pytest.mark.parametrize("scale", [1.0, 0.03, -0.4])
def test_scale_is_an_argument(backend: str, scale: float) -> None:
    """1.0 = folded into the weights: large scores, nearly one-hot rows; negative: the maximum moves."""
    checks.attention(*inputs(1, 19, 2, 32, torch.float32, seed=1), scale)


def test_rows_sum_to_one(backend: str) -> None:
    checks.attention_rows_sum_to_one(*inputs(2, 50, 2, 64, torch.float32, seed=2))


def test_shift_of_the_scores_and_large_scores(backend: str) -> None:
    """A constant added to every key moves no softmax; scores of a thousand do not overflow."""
    qkv, _ = inputs(1, 33, 1, 32, torch.float32, seed=3)
    shifted = qkv.clone()
    shifted[:, :, 1] += 1.5
    torch.testing.assert_close(ops.attention(shifted), ops.attention(qkv), rtol=0, atol=2e-6)
    assert ops.attention(qkv, 100.0).isfinite().all()


def test_images_and_heads_are_apart(backend: str) -> None:
    checks.attention_of_images_and_heads_alone(*inputs(3, 50, 2, 32, torch.bfloat16, seed=4))


@pytest.mark.parametrize("part", [0, 1, 2])
def test_nan_propagates_within_its_head(backend: str, part: int) -> None:
    checks.attention_of_nan(*inputs(1, 50, 2, 64, torch.float32, seed=5), part)


def test_autograd_and_given_outputs(backend: str) -> None:
    qkv, grad_o = inputs(2, 10, 2, 16, torch.float32, seed=6)
    out, dout = torch.full((2, 10, 2, 16), float("nan")), torch.full((2, 10, 3, 2, 16), float("nan"))
    leaf = qkv.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ops.attention(leaf), leaf, grad_o)
    assert ops.attention(qkv, out=out) is out
    assert ops.attention_dqkv(qkv, grad_o, out=dout) is dout
    assert out.equal(ops.attention(qkv))
    assert dout.equal(grad)
    with pytest.raises(ValueError, match="out cannot be given"):
        ops.attention(leaf, out=out)


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 8), (2, 0, 3, 2, 8), (2, 5, 3, 0, 8)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    checks.attention_of_nothing(torch.empty(shape))


def test_transposed_heads_are_copied_and_right() -> None:
    """The head dimension is not dense: the one case that copies."""
    qkv = torch.randn(1, 6, 3, 8, 2, generator=torch.Generator().manual_seed(7)).transpose(-1, -2)
    torch.testing.assert_close(ops.attention(qkv), attention_ref(qkv, 8**-0.5), rtol=1e-5, atol=1e-6)


def test_bad_arguments_are_named() -> None:
    qkv = torch.zeros(2, 4, 3, 2, 8)
    with pytest.raises(ValueError, match=r"qkv must have shape \[B, N, 3, H, d\]"):
        ops.attention(qkv[:, :, :2])
    with pytest.raises(ValueError, match="grad_o must be"):
        ops.attention_dqkv(qkv, torch.zeros(2, 4, 2, 7))
    with pytest.raises(ValueError, match="out must be"):
        ops.attention(qkv, out=torch.zeros(2, 4, 16))


def test_opcheck(backend: str) -> None:
    qkv, grad_o = inputs(2, 5, 2, 8, torch.float32, seed=8)
    testing.opcheck("attention_out", (qkv, 0.3, torch.empty(2, 5, 2, 8)))
    testing.opcheck("attention_dqkv_out", (qkv, grad_o, 0.3, torch.empty(2, 5, 3, 2, 8)))
    # A dense permuted output: what a fake that invents strides would get wrong.
    testing.opcheck("attention_out", (qkv, 0.3, torch.empty(2, 2, 5, 8).transpose(1, 2)))


@pytest.mark.parametrize("shape", [(2, 50, 3, 2, 64), (1, 5, 3, 1, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_attention_is_the_fallback_of_wide_heads(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The fallback of a GPU, on CPU tensors: the same forward and packed gradient, also without grad mode."""
    source = torch.Generator().manual_seed(0)
    qkv, grad_o = testing.randn(shape, dtype, source), testing.randn((*shape[:2], *shape[3:]), dtype, source)
    with torch.no_grad():
        o, dqkv = attention_sdpa(qkv, 0.2), attention_dqkv_sdpa(qkv, grad_o, 0.2)
    with torch.inference_mode():
        torch.testing.assert_close(attention_dqkv_sdpa(qkv * 1, grad_o * 1, 0.2), dqkv)
    assert not dqkv.requires_grad
    testing.assert_within_budget(o, attention_ref(qkv.double(), 0.2), attention_ref(qkv, 0.2), "o")
    reference = attention_dqkv_ref(qkv.double(), grad_o.double(), 0.2)
    testing.assert_gradient_close(dqkv, reference, attention_dqkv_ref(qkv, grad_o, 0.2), "dqkv")
