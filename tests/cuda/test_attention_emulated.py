"""Attention and its backward, emulated, against float64."""

from __future__ import annotations

import pytest
import torch

from fastnull import testing
from fastnull.ops.attention import attention_dqkv_ref, attention_ref
from tests.cuda.emulated import backwards, guarded, guarded_nan

DTYPES = [torch.bfloat16, torch.float16]
# (B, N, H, d). N: 50 = B/32, a tail of 2 in 4 tiles; 65 = a tail of 1, odd batch; 197 = B/16, two groups of key tiles;
# 257 = /14, 17 tiles; 1; 64 = no tail; 110 = the second group of tiles begins with keys beyond the last.
# Dropped: 80, 208, 272 (as 64), other N (same tiles, more padding).
CASES = [
    (2, 50, 2, 64),
    (3, 65, 1, 32),
    (1, 197, 1, 64),
    (1, 257, 1, 64),
    (1, 257, 1, 32),
    (2, 1, 1, 32),
    (1, 64, 1, 64),
]
CASES += [(1, 110, 1, 32)]


def inputs(case: tuple[int, ...], dtype: torch.dtype, loud: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    B, N, H, d = case
    generator = torch.Generator().manual_seed(N)
    qkv = torch.randn(B, N, 3, H, d, generator=generator) * loud
    return guarded(qkv.to(dtype)), guarded(torch.randn(B, N, H, d, generator=generator).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(kernels: torch._ops._OpNamespace, case: tuple[int, ...], dtype: torch.dtype) -> None:
    B, N, H, d = case
    (qkv, grad_o), scale = inputs(case, dtype), d**-0.5
    o, dqkv = guarded_nan(B, N, H, d, dtype=dtype), guarded_nan(B, N, 3, H, d, dtype=dtype)
    kernels.attention_out(qkv, scale, o)
    testing.assert_within_budget(o, attention_ref(qkv.double(), scale), attention_ref(qkv, scale), "o")
    kernels.attention_dqkv_out(qkv, grad_o, scale, dqkv)
    reference = attention_dqkv_ref(qkv.double(), grad_o.double(), scale)
    baseline = attention_dqkv_ref(qkv, grad_o, scale)
    for part, name in enumerate(("dq", "dk", "dv")):
        if N > 1 or name == "dv":  # dq and dk of one token are 0: there is no direction to compare
            testing.assert_gradient_close(dqkv[:, :, part], reference[:, :, part], baseline[:, :, part], name)
        else:
            assert dqkv[:, :, part].abs().max() < 1e-2


@pytest.mark.parametrize("case", [(2, 50, 1, 64), (1, 197, 1, 32)])
def test_threads_may_run_in_any_order(kernels: torch._ops._OpNamespace, case: tuple[int, ...]) -> None:
    """A missing barrier, or a result that depends on who is first, would show."""
    B, N, H, d = case
    qkv, grad_o = inputs(case, torch.bfloat16)
    results = []
    for order in (backwards, testing.poisoned):  # the second changes nothing here
        o, dqkv = guarded_nan(B, N, H, d, dtype=qkv.dtype), guarded_nan(B, N, 3, H, d, dtype=qkv.dtype)
        with order():
            kernels.attention_out(qkv, 0.2, o)
            kernels.attention_dqkv_out(qkv, grad_o, 0.2, dqkv)
        results.append((o, dqkv))
    assert results[0][0].equal(results[1][0])
    assert results[0][1].equal(results[1][1])


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
def test_scales_and_loud_scores(kernels: torch._ops._OpNamespace, scale: float) -> None:
    """Scores of some hundreds: the softmax is nearly one-hot, and its largest score lies in either group of tiles."""
    case = (1, 197, 1, 32)
    qkv, grad_o = inputs(case, torch.float16, loud=3.0)
    o, dqkv = guarded_nan(1, 197, 1, 32, dtype=qkv.dtype), guarded_nan(1, 197, 3, 1, 32, dtype=qkv.dtype)
    kernels.attention_out(qkv, scale, o)
    testing.assert_within_budget(o, attention_ref(qkv.double(), scale), attention_ref(qkv, scale))
    kernels.attention_dqkv_out(qkv, grad_o, scale, dqkv)
    reference = attention_dqkv_ref(qkv.double(), grad_o.double(), scale)
    testing.assert_within_budget(dqkv, reference, attention_dqkv_ref(qkv, grad_o, scale))


def test_strides(kernels: torch._ops._OpNamespace) -> None:
    """Slices of bigger tensors, with NaN around them, are read and written in place."""
    B, N, H, d = 2, 33, 2, 32
    qkv, grad_o = inputs((B, N, H, d), torch.bfloat16)

    def window(shape: tuple[int, ...]) -> torch.Tensor:
        whole = torch.full([n + 2 for n in shape[:-1]] + [shape[-1] + 16], float("nan"), dtype=torch.bfloat16)
        return whole[tuple(slice(1, 1 + n) for n in shape[:-1])][..., 8 : 8 + shape[-1]]

    o, dqkv = guarded_nan(B, N, H, d, dtype=qkv.dtype), guarded_nan(B, N, 3, H, d, dtype=qkv.dtype)
    kernels.attention_out(qkv, 0.2, o)
    kernels.attention_dqkv_out(qkv, grad_o, 0.2, dqkv)
    strided = [window(tuple(t.shape)) for t in (qkv, grad_o, o, dqkv)]
    strided[0].copy_(qkv)
    strided[1].copy_(grad_o)
    kernels.attention_out(strided[0], 0.2, strided[2])
    kernels.attention_dqkv_out(strided[0], strided[1], 0.2, strided[3])
    assert strided[2].equal(o)
    assert strided[3].equal(dqkv)
    assert strided[3]._base.isnan().sum() == strided[3]._base.numel() - dqkv.numel()


def test_bad_input(kernels: torch._ops._OpNamespace) -> None:
    def attention(*shape: int, dtype: torch.dtype = torch.bfloat16, o: torch.Tensor | None = None) -> None:
        qkv = torch.zeros(shape, dtype=dtype)
        out = torch.zeros(shape[0], shape[1], *shape[3:], dtype=dtype) if o is None else o
        kernels.attention_out(qkv, 1.0, out)

    with pytest.raises(RuntimeError, match=r"1 to 272 tokens, not 273"):
        attention(1, 273, 3, 1, 64)
    with pytest.raises(RuntimeError, match=r"heads of 32 or 64, not 80"):
        attention(1, 4, 3, 1, 80)
    with pytest.raises(RuntimeError, match=r"bfloat16 or float16"):
        attention(1, 4, 3, 1, 64, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"shape \[B, N, 3, H, d\]"):
        attention(1, 4, 2, 1, 64)
    with pytest.raises(RuntimeError, match=r"o must have shape"):
        attention(1, 4, 3, 1, 64, o=torch.zeros(1, 4, 1, 32, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"o must be dense in its last dimension"):
        attention(1, 4, 3, 1, 64, o=torch.zeros(1, 4, 1, 65, dtype=torch.bfloat16)[..., 1:])
    attention(0, 4, 3, 1, 64)  # nothing to do
