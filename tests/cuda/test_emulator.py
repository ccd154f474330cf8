"""The emulator itself: it runs a correct kernel and finds each kind of bug."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.cuda.emulated import ROOT, backwards, build, guarded

BUGS = {  # by their number in broken_kernels.cu
    2: "an access beyond the memory given",
    3: "a write beyond shared memory",
    4: "deadlock",
    5: "deadlock",
    6: "asynchronous copies that it never waited for",
    7: "a misaligned copy",
}


@pytest.fixture(scope="module")
def library(kernels: object) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(build("broken", [ROOT / "tests" / "cuda" / "broken_kernels.cu"])))
    loaded.run_reverse.restype = ctypes.c_char_p
    loaded.add_products.restype = ctypes.c_float
    return loaded


def reverse(library: ctypes.CDLL, bug: int) -> tuple[torch.Tensor, str]:
    x = guarded(torch.arange(64.0))
    error = library.run_reverse(ctypes.c_void_p(x.data_ptr()), bug).decode()
    return x, error


def test_a_right_kernel_runs_in_both_orders(library: ctypes.CDLL) -> None:
    for _ in range(2):
        x, error = reverse(library, 0)
        assert error == ""
        assert x.equal(torch.arange(64.0).flip(0))
    with backwards():
        assert reverse(library, 0)[0].equal(x)


def test_a_missing_barrier_shows_in_one_of_the_orders(library: ctypes.CDLL) -> None:
    """Threads that run first read NaN, the initial value of shared memory."""
    forward = reverse(library, 1)[0]
    with backwards():
        reverse_order = reverse(library, 1)[0]
    assert forward.isnan().any()
    assert not forward.equal(reverse_order)


@pytest.mark.parametrize(("bug", "message"), BUGS.items())
def test_bugs_are_found(library: ctypes.CDLL, bug: int, message: str) -> None:
    assert message in reverse(library, bug)[1]
    assert reverse(library, 0)[1] == "", "the emulator must recover"


def test_sums_are_cut_off_not_rounded(library: ctypes.CDLL) -> None:
    """One bit below float's last remains of each addend; the sum is cut off towards 0."""

    def total(c: float, *products: float) -> float:
        array = (ctypes.c_double * len(products))(*products)
        return library.add_products(ctypes.c_float(c), array, len(products))

    ulp = 2.0**-23
    assert total(1.0, 2.0, 4.0) == 7.0
    assert total(1.0, 0.75 * ulp) == 1.0  # to the nearest: 1 + ulp
    assert total(-1.0, -0.75 * ulp) == -1.0
    assert total(1.0, 0.5 * ulp, 0.5 * ulp) == 1.0 + ulp  # the bit that is kept
    assert total(1.0, *[0.25 * ulp] * 8) == 1.0  # exactly: 1 + 2 ulp
