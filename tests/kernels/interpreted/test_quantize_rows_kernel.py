"""The kernel that rounds rows to eight bits, against its reference."""

from __future__ import annotations

import pytest
import torch

from fastnull import ops, testing
from fastnull.ops.quantize_rows import quantize_rows_ref
from tests.kernels.interpreted.inputs import DEVICE, DTYPES, randn

if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
    pytest.skip("float8 needs a GPU of at least sm_89", allow_module_level=True)


# 9 rows leave a tail in tiles of 4 and 2; 7 = under the least width; 1280 = the third tile, one row
SHAPES = [(9, 192), (9, 768), (3, 7), (2, 1280)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_that_need_no_rounding_come_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """In the interpreter too, whose own rounding to float8 forgets the carry of 1.95 to 2."""
    x = randn(shape, dtype, 0)
    exact = quantize_rows_ref(x)[0].float()
    exact[exact.abs() < 2**-6] = 0  # its subnormals are wrong as well
    exact[:, 0] = -448
    x.copy_(exact / 64)
    x[0] = 0
    x[1] /= 16
    with testing.poisoned():
        q, scale = ops.quantize_rows(x)
    assert (q.float()[1:]).equal(exact[1:])
    assert not q[0].float().any()
    assert scale[:, 0].equal(torch.tensor([1, 2**-10, *[2**-6] * (shape[0] - 2)], device=DEVICE)[: shape[0]])


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's rounding to float8 is wrong")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = randn(shape, dtype, 0)
    x[1] *= 1e-3
    with testing.poisoned():
        q, scale = ops.quantize_rows(x)
    expected, expected_scale = quantize_rows_ref(x)
    torch.testing.assert_close(scale[:, 0], expected_scale, rtol=1e-6, atol=0)
    # a quotient beside a midpoint may be rounded to either side
    steps = (q.view(torch.int8).int() - expected.view(torch.int8).int()).abs()
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < 0.01


def test_nan_stays_in_its_row() -> None:
    x = randn((3, 40), torch.float32, 1)
    x[1, 7] = float("nan")
    q, scale = ops.quantize_rows(x)
    back = q.float() * scale
    assert back[1].isnan().all()
    assert back[::2].isfinite().all()
