"""Rows in eight bits: what is left of a value, rows without scale, NaN."""

from __future__ import annotations

import pytest
import torch

from fastnull import ops, testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 192), (3, 7), (1, 1)])
def test_what_is_left_of_a_value(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Half a step of 2^-3 at the leading bit, and below 2^-6 / 448 of the row's largest value a fixed step."""
    x = testing.randn(shape, dtype, torch.Generator().manual_seed(0))
    x[0] *= 1e-3  # every row has its own scale
    with testing.poisoned():
        q, scale = ops.quantize_rows(x)
    assert (q.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert (q.shape, scale.shape) == (shape, (shape[0], 1))
    back, wide = q.double() * scale.double(), x.double()
    allowed = torch.maximum(wide.abs() * 2**-4, scale.double() * 2**-10) * (1 + 1e-5)
    assert ((back - wide).abs() <= allowed).all()
    torch.testing.assert_close(q.float().abs().amax(1), torch.full((shape[0],), 448.0))


def test_a_row_of_zeros_stays_and_nan_stays_in_its_row() -> None:
    x = torch.randn(4, 16)
    x[0] = 0
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    q, scale = ops.quantize_rows(x)
    assert scale[0] == 1
    assert not q[0].float().any()
    back = q.float() * scale
    assert back[1:3].isnan().any(1).all()
    assert back[3].isfinite().all()


def test_bad_input_and_opcheck() -> None:
    for shape in ((3,), (2, 3, 4), (3, 0)):
        with pytest.raises(ValueError, match=r"x must have shape \[M, D\] with D > 0; got"):
            ops.quantize_rows(torch.zeros(shape))
    assert ops.quantize_rows(torch.zeros(0, 4))[0].shape == (0, 4)
    q, scale = torch.empty(3, 8, dtype=torch.float8_e4m3fn), torch.empty(3)
    # test_schema compares outputs by arithmetic that torch does not have in float8
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.fastnull.quantize_rows_out.default
    torch.library.opcheck(op, (torch.randn(1, 3, 8), q, scale), test_utils=utils)
