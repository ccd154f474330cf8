"""Objective and steps of the noise, emulated, against float64."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from fastnull import testing
from fastnull.ops.noise_objective import noise_objective_ref
from fastnull.ops.noise_step import adamw_step_ref, direct_step_ref
from tests.cuda.emulated import backwards, guarded, guarded_nan, randn
from tests.ops import checks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# K: 1000 = ImageNet, no multiple of 256; 10 = less than a warp; 1; B0 < B: several noises over the same images.
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B0", "B", "K"), [(3, 6, 1000), (5, 5, 10), (1, 3, 1)])
def test_objective(kernels: Any, B0: int, B: int, K: int, dtype: torch.dtype, squared: bool) -> None:
    clean, noisy = randn(B0, K, seed=1, dtype=dtype), randn(B, K, seed=2, dtype=torch.float32)
    noisy[0] = clean[0].float()  # no difference: no direction either
    outputs = guarded_nan(B), guarded_nan(B, K), guarded_nan(B)
    kernels.noise_objective_out(clean, noisy, squared, 0.25, *outputs)
    kind = "l2_squared" if squared else "l2"
    reference = noise_objective_ref(clean.double(), noisy.double(), kind, 0.25)
    baseline = noise_objective_ref(clean, noisy, kind, 0.25)
    for name, out, ref, base in zip(("loss", "cotangent", "influence"), outputs, reference, baseline, strict=True):
        testing.assert_within_budget(out, ref, base, name)
    assert not outputs[1][0].any()


@pytest.mark.parametrize("groups", [1, 3])
def test_means_in_the_same_launch(kernels: Any, groups: int) -> None:
    """In both orders of threads: the same bits."""
    B, K = 6, 40
    clean, noisy = randn(B, K, seed=3), randn(B, K, seed=4)
    results = []
    for order in (backwards, nullcontext):
        outputs, means = (guarded_nan(B), guarded_nan(B, K), guarded_nan(B)), (guarded_nan(groups), guarded_nan(groups))
        with order():
            kernels.noise_objective_means_out(clean, noisy, False, 1.0, *outputs, *means)
        torch.testing.assert_close(means[0], outputs[0].view(groups, -1).mean(1))
        torch.testing.assert_close(means[1], outputs[2].view(groups, -1).mean(1))
        results.append(torch.cat([*means, outputs[1].flatten()]))
    assert results[0].equal(results[1])
    with pytest.raises(RuntimeError, match="which must divide the 6 rows"):
        kernels.noise_objective_means_out(clean, noisy, False, 1.0, *outputs, *[guarded_nan(4)] * 2)
    kernels.noise_objective_means_out(clean[:0], noisy[:0], False, 1.0, *(x[:0] for x in outputs), *means)
    assert torch.cat(means).isnan().all(), "no mean of nothing"


# n: 2049 * 4 = more than two chunks, in fours; 2051 = odd, one by one; 5 = less than a warp
NOISES = [(3, 2049, 4), (2, 2051), (1, 5)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", NOISES)
def test_adamw(kernels: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Three steps; one noise descends, one pauses in the middle, one ascends."""
    M = shape[0]
    noise = randn(*shape, seed=5)
    state = [guarded(torch.zeros(shape)), guarded(torch.zeros(shape)), guarded(torch.zeros(M, dtype=torch.int64))]
    wide = [t.double() if t.is_floating_point() else t.clone() for t in (noise, *state)]
    narrow = [t.clone() for t in (noise, *state)]
    lr = guarded(torch.tensor([0.1, 0.02, 0.3], dtype=torch.float64)[:M])
    for step in range(3):
        grad = randn(*shape, seed=6 + step, dtype=dtype)
        gate = guarded(torch.tensor([1.0, 0.0 if step == 1 else 1.0, -1.0])[:M])
        before = noise.clone()
        kernels.adamw_step_(noise, grad, *state, gate, lr, 0.9, 0.99, 1e-8, 0.01)
        for mine in (wide, narrow):
            adamw_step_ref(mine[0], grad, mine[1], mine[2], mine[3], gate, lr, 0.9, 0.99, 1e-8, 0.01)
        stays = gate == 0
        assert noise[stays].equal(before[stays])
    for name, mine, ref, base in zip(("noise", "m", "s"), (noise, *state), wide, narrow, strict=False):
        testing.assert_within_budget(mine, ref, base, name)
    assert state[2].equal(wide[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", NOISES)
@pytest.mark.parametrize("sign", [False, True])
def test_direct_steps(kernels: Any, shape: tuple[int, ...], dtype: torch.dtype, sign: bool) -> None:
    M = shape[0]
    noise, grad = randn(*shape, seed=9), randn(*shape, seed=10, dtype=dtype)
    grad[0].view(-1)[0] = 0
    gate, lr = guarded(torch.tensor([-1.0, 1.0, 0.0])[:M]), guarded(torch.tensor([0.5, 0.2, 0.1]).double()[:M])
    wide, narrow, before = noise.double(), noise.clone(), noise.clone()
    kernels.direct_step_(noise, grad, gate, lr, sign)
    direct_step_ref(wide, grad.double(), gate, lr, sign)
    direct_step_ref(narrow, grad.float(), gate, lr, sign)
    testing.assert_within_budget(noise, wide, narrow)
    assert noise[gate == 0].equal(before[gate == 0])
    again = guarded(before)
    with backwards():
        kernels.direct_step_(again, grad, gate, lr, sign)
    assert again.equal(noise)


@pytest.mark.parametrize("sign", [False, True])
def test_zero_and_nan_gradients(kernels: Any, sign: bool) -> None:
    """No step along a gradient of 0; NaN goes through, in its own noise only."""
    noise, grad = randn(3, 40, seed=11), randn(3, 40, seed=12)
    grad[0] = 0
    grad[1, 7] = float("nan")
    before, ones = noise.clone(), torch.ones(3)
    kernels.direct_step_(noise, grad, ones, ones.double(), sign)
    assert noise[0].equal(before[0])
    assert noise[1, 7].isnan()
    assert noise[2].isfinite().all()


@pytest.mark.parametrize("size", checks.SIZES)
def test_a_normalised_step_has_its_length_for_gradients_of_any_size(kernels: Any, size: float) -> None:
    grad, expected = checks.gradient_of_size(size, 2050)  # more than a chunk
    noise, ones = guarded(torch.zeros(2, 2050)), torch.ones(2)
    kernels.direct_step_(noise, guarded(grad), ones, 0.5 * ones.double(), False)
    checks.normalized_step_of_length(noise, expected)


def test_bad_input(kernels: Any) -> None:
    noise, gate, lr = torch.zeros(2, 8), torch.ones(2), torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="grad must be dense with 16 elements, it has 8"):
        kernels.direct_step_(noise, noise[:1], gate, lr, True)
    with pytest.raises(RuntimeError, match="gate has the wrong dtype"):
        kernels.direct_step_(noise, noise, gate.double(), lr, True)
    with pytest.raises(RuntimeError, match="at most 65535 noises at once, not 65536"):
        kernels.direct_step_(torch.zeros(65536, 1), torch.zeros(65536, 1), gate, lr, True)
    with pytest.raises(RuntimeError, match="multiple of those of clean"):
        kernels.noise_objective_out(noise, torch.zeros(3, 8), True, 1.0, gate, noise, gate)
    with pytest.raises(RuntimeError, match="clean must be float32, bfloat16 or float16"):
        kernels.noise_objective_out(noise.double(), noise, True, 1.0, gate, noise, gate)
