"""Which implementation a CUDA tensor gets, with implementations that only say they were asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastnull import _C, choices
from fastnull.choices import Outcome
from fastnull.ops import dispatch
from fastnull.ops.common import REFERENCES
from fastnull.ops.dispatch import Implementation, dispatcher, implementations, problem_name
from fastnull.record import provenance
from fastnull.selftest.problems import OPS, Problem

GPU = "NVIDIA H100"
PROBLEM = "attention_out bfloat16 5 8"
CUDA = torch.device("cuda")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the implementations in the order in which they were run; `cuda` takes even batches alone."""
    ran: list[str] = []

    def implementation(name: str) -> Implementation:
        serves = (lambda qkv, *_: len(qkv) % 2 == 0) if name == "cuda" else (lambda *_: True)
        return Implementation(lambda *args: ran.append(name), serves)

    names = ("library", "flash", "triton", "cuda")
    monkeypatch.setattr(dispatch, "implementations", lambda *_, tiles: {name: implementation(name) for name in names})
    monkeypatch.setattr(dispatch, "_name", lambda device: GPU)
    for name in ("_found", "_pinned", "_used"):
        monkeypatch.setattr(choices, name, {})
    monkeypatch.setattr(choices, "_listeners", [])
    monkeypatch.delenv(choices.SWITCH, raising=False)
    monkeypatch.delenv(choices.FORCED, raising=False)
    return ran


def qkv(batch: int = 2) -> Tensor:
    return torch.empty(batch, 5, 3, 2, 8, dtype=torch.bfloat16, device="meta")


def found(**ms: float | None) -> dict[str, dict[str, Outcome]]:
    return {PROBLEM: {name: Outcome(ms=value, problem="" if value else "wrong") for name, value in ms.items()}}


def test_an_unproven_kernel_never_runs(asked: list[str]) -> None:
    launch = dispatcher("attention_out")
    launch(qkv(), 0.2, None)
    assert choices.in_use() == {PROBLEM: "library"}
    choices.add("another GPU", found(cuda=1.0))
    launch(qkv(), 0.2, None)
    choices.add(GPU, found(cuda=None, triton=None))
    launch(qkv(), 0.2, None)
    assert asked == ["library"] * 3


def test_the_fastest_right_one_that_takes_the_tensors_runs(asked: list[str]) -> None:
    launch = dispatcher("attention_out")
    choices.add(GPU, found(library=3.0, flash=2.0, cuda=1.0, triton=None))
    for batch in (2, 3, 2):
        launch(qkv(batch), 0.2, None)
    assert asked == ["cuda", "flash", "cuda"]
    assert choices.in_use() == {PROBLEM: "cuda"}


def test_a_resumed_run_keeps_what_it_had(asked: list[str]) -> None:
    launch = dispatcher("attention_out")
    choices.add(GPU, found(library=3.0, flash=2.0, cuda=1.0))
    launch(qkv(), 0.2, None)
    assert choices.pin({PROBLEM: "flash"}, GPU) == []
    launch(qkv(), 0.2, None)
    assert asked == ["cuda", "flash"]
    assert choices.in_use() == {PROBLEM: "flash"}
    assert provenance()["implementations"] == {PROBLEM: "flash"}, "in every record"


def test_switches(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Off: library calls, whatever is proven; forced: a kernel that nobody has checked, for tests of the kernels."""
    choices.add(GPU, found(triton=1.0))
    launch = dispatcher("attention_out")
    with choices.library_calls():
        launch(qkv(), 0.2, None)
    launch(qkv(), 0.2, None)
    assert asked == ["library", "triton"]
    monkeypatch.setenv(choices.SWITCH, "off")
    dispatcher("attention_out")(qkv(), 0.2, None)
    monkeypatch.setenv(choices.SWITCH, "auto")
    monkeypatch.setenv(choices.FORCED, "cuda")
    launch = dispatcher("attention_out")
    launch(qkv(), 0.2, None)
    launch(qkv(3), 0.2, None)
    assert asked[2:] == ["library", "cuda", "triton"]
    monkeypatch.setenv(choices.FORCED, "tritn")
    with pytest.raises(ValueError, match=r"FASTNULL_KERNELS must be one of 'triton', 'cuda'; got 'tritn'"):
        dispatcher("attention_out")(qkv(), 0.2, None)


def test_every_kernel_and_op_has_its_problem() -> None:
    """What is registered for CUDA tensors can be chosen, checked and timed, and has its reference."""
    kernels = set(_C.KERNELS["_C_cuda"][2].split()) | set(_C.KERNELS["_C_cpu"][2].split())
    assert set(dispatch.SIGNATURES) == set(OPS)
    assert kernels <= set(OPS) <= set(REFERENCES)
    triton = pytest.importorskip("fastnull.kernels", reason="Triton is not installed: pip install fastnull[triton]")
    assert set(triton.LAUNCHERS) == set(OPS)


SIZES: dict[str, tuple[int, ...]] = {
    "layer_norm_out": (8, 1), "layer_norm_dx_out": (8, 0), "gelu_out": (8, 1), "dgelu_": (8,),
    "linear_gelu_out": (8, 4, 0), "linear_dgelu_out": (4, 8), "attention_out": (5, 8), "attention_dqkv_out": (5, 8),
    "patch_project_out": (2, 12, 1), "noise_objective_out": (4,), "noise_objective_means_out": (4,), "adamw_step_": (),
    "direct_step_": (1,),
}  # fmt: skip


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_problem_s_name_and_arguments_are_of_the_problem(op: str, dtype: torch.dtype) -> None:
    problem = Problem(op, (dtype, SIZES[op]))
    assert Problem.named(problem.name) == problem
    arguments = problem.arguments(1, 0, torch.device("cpu"))
    assert dispatch.SIGNATURES[op](*arguments) == problem.signature
    assert problem.written(arguments)
    assert all(part.op in OPS and Problem.named(part.name) == part for part in problem.parts)


@pytest.mark.parametrize(
    ("op", "sizes"),
    [("layer_norm_out", (8, given)) for given in range(4)]
    + [("layer_norm_dx_out", (8, 0)), ("layer_norm_dx_out", (8, 1))]
    + [(op, SIZES[op]) for op in ("linear_gelu_out", "linear_dgelu_out", "attention_out", "attention_dqkv_out")],
)
def test_the_library_s_way_of_a_gpu_is_right(op: str, sizes: tuple[int, ...]) -> None:
    """Here in float32, on the CPU: in 16 bits torch's LayerNorm rounds its statistics there."""
    from fastnull.selftest.check import Judge

    judge = Judge(Problem(op, (torch.float32, sizes)), 1, torch.device("cpu"))
    assert judge(Implementation(dispatch._LIBRARY[op])).problem == ""


def attention_arguments(tokens: int, head: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    packed, o = torch.empty(1, tokens, 3, 2, head, dtype=dtype), torch.empty(1, tokens, 2, head, dtype=dtype)
    return (packed, 0.2, o), (packed, o, 0.2, packed.clone())


@pytest.mark.parametrize(
    ("shared", "tokens", "head", "dtype", "served"),
    [
        (227, 197, 64, torch.bfloat16, (True, True)),
        (227, 272, 64, torch.float16, (True, True)),
        (227, 273, 64, torch.bfloat16, (False, False)),
        (227, 197, 64, torch.float32, (False, False)),
        (227, 197, 48, torch.bfloat16, (False, False)),
        (99, 257, 64, torch.bfloat16, (False, False)),  # 102 and 138 KB: not on sm_86, 89 and 120
        (99, 197, 64, torch.bfloat16, (True, False)),  # 78 and 106 KB
        (99, 257, 32, torch.bfloat16, (True, True)),
    ],
)
def test_the_attention_of_csrc_says_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, shared: int, tokens: int, head: int, dtype: torch.dtype, served: tuple[bool, bool]
) -> None:
    monkeypatch.setattr(dispatch, "shared_memory", lambda device: shared * 1024)
    assert tuple(dispatch._cuda_attends(*given) for given in attention_arguments(tokens, head, dtype)) == served


def test_the_attention_of_csrc_reads_16_bytes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "shared_memory", lambda device: 227 * 1024)
    (packed, scale, o), _ = attention_arguments(5, 64, torch.bfloat16)
    assert dispatch._cuda_attends(packed, scale, o)
    shifted = torch.empty(packed.numel() + 1, dtype=packed.dtype)[1:].view(packed.shape)
    assert not dispatch._cuda_attends(shifted, scale, o)
    assert not dispatch._cuda_attends(packed.transpose(-1, -2), scale, o)


def test_old_cudnn_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads beyond lengths that are no multiple of 128."""
    monkeypatch.setattr(dispatch, "_triton", lambda op, **_: {})
    monkeypatch.setattr(_C.cuda, "load", lambda: False)
    for version, served in ((91400, False), (91501, True)):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        assert implementations("attention_out", CUDA)["cudnn"].serves(qkv()) == served


@pytest.mark.parametrize(("triton", "nvcc"), [(False, False), (False, True), (True, False)])
def test_what_is_not_installed_or_built_is_not_offered(
    monkeypatch: pytest.MonkeyPatch, triton: bool, nvcc: bool
) -> None:
    kernels = {"triton": Implementation(print)} if triton else {}
    monkeypatch.setattr(dispatch, "_triton", lambda op, **_: kernels)
    monkeypatch.setattr(_C.cuda, "load", lambda: nvcc)
    monkeypatch.setattr(dispatch, "CUDA_NAMESPACE", "fastnull")
    torchs = {"flash", "cudnn", "efficient", "math"}
    ours = {name for name, there in (("triton", triton), ("cuda", nvcc)) if there}
    assert implementations("attention_dqkv_out", CUDA).keys() == {"library"} | torchs | ours
    assert implementations("dgelu_", CUDA).keys() == {"library"} | ours - {"cuda"}, "csrc/cuda has none"


def test_problems_are_named_by_what_decides() -> None:
    batch = torch.empty(7, 5, 3, 2, 8, dtype=torch.bfloat16)
    assert problem_name("attention_out", dispatch.SIGNATURES["attention_out"](batch, 0.2, None)) == PROBLEM
