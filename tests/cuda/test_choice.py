"""Kernel for a CUDA tensor: Triton, unless the table or FASTNULL_CUDA_OPS names the C++ kernel and it exists."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install fastnull[triton]")

from fastnull import _C
from fastnull.kernels import LAUNCHERS, choice


def triton(*args: object) -> None:
    raise LookupError("Triton was asked")


@pytest.fixture
def built(kernels: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated kernels in the place of the built library."""
    monkeypatch.setattr(_C.cuda, "load", lambda: True)
    monkeypatch.setattr(choice, "NAMESPACE", "fastnull_emulated")
    monkeypatch.setattr(choice, "_gpu", lambda device: "sm_90")


def test_the_table_names_known_ops_and_every_op() -> None:
    assert {c.op for c in choice.CHOICES} == set(choice.OPS)
    for op, names in choice.OPS.items():
        assert set(names) <= set(LAUNCHERS)
        assert [c for c in choice.CHOICES if c.op == op][-1].gpu == "any", "there must be an answer for every GPU"
    assert {c.kernel for c in choice.CHOICES} <= {"triton", "cuda"}


def test_by_default_triton_itself_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    assert all(choice.launcher(name, triton) is triton for name in LAUNCHERS)


@pytest.mark.parametrize(("value", "ops"), [("all", set(choice.OPS)), ("none", set()), ("attention, noise_step", None)])
def test_the_variable(value: str, ops: set[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, value)
    assert choice.asked() == ({"attention", "noise_step"} if ops is None else ops)


def test_a_wrong_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, "atention")
    with pytest.raises(ValueError, match=r"FASTNULL_CUDA_OPS must be one of .* Did you mean 'attention'"):
        choice.launcher("attention_out", triton)


def test_kernels_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error if requested by name; silence if only the table names them."""
    monkeypatch.setattr(_C.cuda, "load", lambda: False)
    monkeypatch.setattr(_C.cuda, "error", "not built: no nvcc was found")
    monkeypatch.setenv(choice.VARIABLE, "attention")
    with pytest.raises(RuntimeError, match=r"the CUDA C\+\+ kernel of attention, but there is none: not built"):
        choice.launcher("attention_out", triton)
    assert choice.launcher("adamw_step_", triton) is triton
    monkeypatch.delenv(choice.VARIABLE)
    monkeypatch.setattr(choice, "CHOICES", (choice.Choice("attention", "any", choice.ANY, "cuda", "test"),))
    assert choice.launcher("attention_out", triton) is triton


def run(launch: Callable[..., None], qkv: torch.Tensor) -> str:
    B, N, _, H, d = qkv.shape
    o = torch.full((B, N, H, d), float("nan"), dtype=qkv.dtype)
    try:
        launch(qkv, 0.2, o)
    except LookupError:
        return "triton"
    assert o.isfinite().all()
    return "cuda"


def test_shapes_that_the_kernel_does_not_take_go_to_triton(built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, "attention")
    launch, half = choice.launcher("attention_out", triton), torch.bfloat16
    assert run(launch, torch.zeros(1, 5, 3, 2, 32, dtype=half)) == "cuda"
    assert run(launch, torch.zeros(1, 273, 3, 1, 32, dtype=half)) == "triton"
    assert run(launch, torch.zeros(1, 5, 3, 2, 80, dtype=half)) == "triton"
    assert run(launch, torch.zeros(1, 5, 3, 2, 32)) == "triton"
    assert run(launch, torch.zeros(1, 5, 3, 2, 40, dtype=half)[..., 4:36]) == "triton"  # misaligned


def test_the_table_decides_by_gpu_and_tokens(built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    table = (
        choice.Choice("attention", "sm_90", 64, "cuda", "test"),
        choice.Choice("attention", "any", choice.ANY, "triton", "test"),
    )
    monkeypatch.setattr(choice, "CHOICES", table)
    launch = choice.launcher("attention_out", triton)
    assert run(launch, torch.zeros(1, 64, 3, 1, 32, dtype=torch.float16)) == "cuda"
    assert run(launch, torch.zeros(1, 65, 3, 1, 32, dtype=torch.float16)) == "triton"
    monkeypatch.setattr(choice, "_gpu", lambda device: "sm_80")
    assert run(launch, torch.zeros(1, 64, 3, 1, 32, dtype=torch.float16)) == "triton"
