"""Attention and its backward, emulated, against float64."""

from __future__ import annotations

from typing import Any

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
    (1, 110, 1, 32),
]


def inputs(case: tuple[int, ...], dtype: torch.dtype, loud: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    B, N, H, d = case
    generator = torch.Generator().manual_seed(N)
    qkv = torch.randn(B, N, 3, H, d, generator=generator) * loud
    return guarded(qkv.to(dtype)), guarded(torch.randn(B, N, H, d, generator=generator).to(dtype))


def run(kernels: Any, qkv: torch.Tensor, grad_o: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    o, dqkv = guarded_nan(*grad_o.shape, dtype=qkv.dtype), guarded_nan(*qkv.shape, dtype=qkv.dtype)
    kernels.attention_out(qkv, scale, o)
    kernels.attention_dqkv_out(qkv, grad_o, scale, dqkv)
    return o, dqkv


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(kernels: Any, case: tuple[int, ...], dtype: torch.dtype) -> None:
    (qkv, grad_o), scale = inputs(case, dtype), case[3] ** -0.5
    o, dqkv = run(kernels, qkv, grad_o, scale)
    testing.assert_within_budget(o, attention_ref(qkv.double(), scale), attention_ref(qkv, scale), "o")
    reference = attention_dqkv_ref(qkv.double(), grad_o.double(), scale)
    baseline = attention_dqkv_ref(qkv, grad_o, scale)
    for part, name in enumerate(("dq", "dk", "dv")):
        if case[1] > 1 or name == "dv":  # dq and dk of one token are 0: there is no direction to compare
            testing.assert_gradient_close(dqkv[:, :, part], reference[:, :, part], baseline[:, :, part], name)
        else:
            assert dqkv[:, :, part].abs().max() < 1e-2


@pytest.mark.parametrize("case", [(2, 50, 1, 64), (1, 197, 1, 32)])
def test_threads_may_run_in_any_order(kernels: Any, case: tuple[int, ...]) -> None:
    """A missing barrier, or a result that depends on which thread is first, would show."""
    qkv, grad_o = inputs(case, torch.bfloat16)
    with backwards():
        reverse = run(kernels, qkv, grad_o, 0.2)
    for one, other in zip(reverse, run(kernels, qkv, grad_o, 0.2), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
def test_scales_and_loud_scores(kernels: Any, scale: float) -> None:
    """Scores of some hundreds: the softmax is nearly one-hot, and its largest score is in either group of tiles."""
    qkv, grad_o = inputs((1, 197, 1, 32), torch.float16, loud=3.0)
    o, dqkv = run(kernels, qkv, grad_o, scale)
    testing.assert_within_budget(o, attention_ref(qkv.double(), scale), attention_ref(qkv, scale))
    reference = attention_dqkv_ref(qkv.double(), grad_o.double(), scale)
    testing.assert_within_budget(dqkv, reference, attention_dqkv_ref(qkv, grad_o, scale))


def test_strides(kernels: Any) -> None:
    """Slices of bigger tensors, with NaN around them, are read and written in place."""
    qkv, grad_o = inputs((2, 33, 2, 32), torch.bfloat16)
    o, dqkv = run(kernels, qkv, grad_o, 0.2)

    def window(shape: torch.Size) -> torch.Tensor:
        whole = torch.full([n + 2 for n in shape[:-1]] + [shape[-1] + 16], float("nan"), dtype=torch.bfloat16)
        return whole[tuple(slice(1, 1 + n) for n in shape[:-1])][..., 8 : 8 + shape[-1]]

    x, dy, y, dx = (window(t.shape) for t in (qkv, grad_o, o, dqkv))
    kernels.attention_out(x.copy_(qkv), 0.2, y)
    kernels.attention_dqkv_out(x, dy.copy_(grad_o), 0.2, dx)
    assert y.equal(o)
    assert dx.equal(dqkv)
    assert dx._base.isnan().sum() == dx._base.numel() - dqkv.numel()


@pytest.mark.parametrize("head", [32, 64])
@pytest.mark.parametrize(("tokens", "rows"), [(1, 64), (65, 80), (81, 208), (257, 272)])
def test_shared_memory(kernels: Any, tokens: int, rows: int, head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v of a head, in the backward grad_o too, and two floats per query; a byte less is refused."""
    qkv, grad_o = inputs((1, tokens, 1, head), torch.float16)
    o, dqkv = torch.zeros_like(grad_o), torch.zeros_like(qkv)
    forward, backward = rows * 3 * 2 * head, rows * (4 * 2 * head + 8)
    for call, needed in (
        (lambda: kernels.attention_out(qkv, 1.0, o), forward),
        (lambda: kernels.attention_dqkv_out(qkv, grad_o, 1.0, dqkv), backward),
    ):
        monkeypatch.setenv("FASTNULL_EMULATOR_SHARED", str(needed))
        call()
        monkeypatch.setenv("FASTNULL_EMULATOR_SHARED", str(needed - 1))
        with pytest.raises(RuntimeError, match="shared memory that no device takes"):
            call()


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 273, 3, 1, 64), torch.bfloat16, "1 to 272 tokens, not 273"),
        ((1, 4, 3, 1, 80), torch.bfloat16, "heads of 32 or 64, not 80"),
        ((1, 4, 3, 1, 64), torch.float32, "bfloat16 or float16"),
        ((1, 4, 2, 1, 64), torch.bfloat16, r"shape \[B, N, 3, H, d\]"),
    ],
)
def test_bad_qkv(kernels: Any, shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        kernels.attention_out(torch.zeros(shape, dtype=dtype), 1.0, torch.zeros(*shape[:2], *shape[3:], dtype=dtype))


def test_bad_outputs(kernels: Any) -> None:
    qkv = torch.zeros(1, 4, 3, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="o must have shape"):
        kernels.attention_out(qkv, 1.0, qkv.new_zeros(1, 4, 1, 32))
    with pytest.raises(RuntimeError, match="o must be dense in its last dimension"):
        kernels.attention_out(qkv, 1.0, qkv.new_zeros(1, 4, 1, 65)[..., 1:])
    kernels.attention_out(qkv[:0], 1.0, qkv.new_zeros(0, 4, 1, 64))  # nothing to do
