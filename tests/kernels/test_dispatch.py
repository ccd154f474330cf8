"""Which tensors use the Triton kernels, also on machines without Triton."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastnull import _C, ops, testing
from fastnull.ops import common, dispatch
from fastnull.ops.layer_norm import layer_norm_ref


def _forget() -> None:
    for known in (common.gpu_problem, common.triton_problem, common._gpu_serves):
        known.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """A CUDA tensor without memory, on a pretended sm_90."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install fastnull[triton]")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    _forget()
    with FakeTensorMode():
        yield torch.empty(2, 8, device="cuda", dtype=torch.float16)
    _forget()


def test_cuda_tensors_go_to_triton(hopper: torch.Tensor) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert common.use_native("layer_norm", hopper.to(dtype), None)
    assert not common.use_native("layer_norm", hopper.double())
    assert not common.use_native("layer_norm", hopper, torch.empty(2, device="cpu"))
    with _C.disabled():
        assert not common.use_native("layer_norm", hopper)


@pytest.mark.parametrize("names", [(), ("layer_norm",), ("layer_norm", "attention"), ("attention",)])
def test_references_switch_ops_off_by_name(hopper: torch.Tensor, names: tuple[str, ...]) -> None:
    with ops.references(*names):
        for op in ops.OPS:
            assert common.use_native(op, hopper) == (bool(names) and op not in names)
        with ops.references("noise_step"):
            assert not common.use_native("noise_step", hopper)
        assert common.use_native("noise_step", hopper) == bool(names)
    assert common.use_native("layer_norm", hopper)


def test_a_device_without_kernels_takes_the_reference() -> None:
    assert not any(common.use_native(op, torch.empty(2, 8, device="meta")) for op in ops.OPS), "as on mps"


def test_a_switched_off_op_runs_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that would fail are not called, and an unknown name is refused."""
    x = torch.randn(3, 8)
    monkeypatch.setattr(_C, "cpu_available", lambda: True)
    monkeypatch.setattr(torch.ops.fastnull, "layer_norm_out", None)
    with ops.references("layer_norm"):
        assert ops.layer_norm(x).equal(layer_norm_ref(x)[0])
    with pytest.raises(ValueError, match=r"op must be one of .*; got 'layernorm'\. Did you mean 'layer_norm'"):
        ops.references("layernorm").__enter__()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", "[]"),
        ("attention, layer_norm", "['attention', 'layer_norm']"),
        ("atention", "FASTNULL_REFERENCE_OPS must be one of"),
    ],
)
def test_reference_ops_from_the_environment(value: str, expected: str) -> None:
    words = [sys.executable, "-c", "from fastnull.ops import common; print(sorted(common._on_reference))"]
    environment = {**os.environ, "FASTNULL_REFERENCE_OPS": value}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert expected in done.stdout + done.stderr


def test_older_gpus_and_the_switch_take_the_reference(hopper: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTNULL_NATIVE", "0")
    assert not common.use_native("layer_norm", hopper)
    monkeypatch.delenv("FASTNULL_NATIVE")
    _forget()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.warns(
        RuntimeWarning, match="references on cuda:0, slower: .* at least sm_80, this one is sm_75"
    ) as warned:
        served = [common.use_native("layer_norm", hopper) for _ in range(2)]
    assert served == [False, False]
    assert len(warned) == 1


def test_an_older_gpu_is_reported_once(hopper: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(common, "told", {hopper.device})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not common.use_native("layer_norm", hopper)


def test_every_kernel_is_registered_for_cuda(hopper: torch.Tensor) -> None:
    from fastnull.kernels import LAUNCHERS

    assert len(LAUNCHERS) == 13
    for name in LAUNCHERS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnull::{name}", "CUDA"), name


def test_a_missing_triton_is_explained_once(hopper: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastnull.kernels", None)  # importing it now raises ImportError
    monkeypatch.setattr(_C.cuda, "load", lambda: False)
    with pytest.warns(RuntimeWarning, match=r"the kernels need Triton .*`pip install fastnull\[triton\]") as warned:
        served = [common.use_native("layer_norm", hopper) for _ in range(2)]
    assert served == [False, False]
    assert len(warned) == 1


def test_without_triton_the_kernels_of_csrc_serve(hopper: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are checked and chosen beside the library's ways; there is nothing to warn of."""
    monkeypatch.setitem(sys.modules, "fastnull.kernels", None)
    monkeypatch.setattr(_C.cuda, "load", lambda: True)
    monkeypatch.setattr(dispatch, "CUDA_NAMESPACE", "fastnull")  # csrc/cuda's ops are not registered here
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(common.use_native(op, hopper) for op in ops.OPS)
    for op, cuda in (("noise_objective_out", {"cuda"}), ("layer_norm_out", set())):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnull::{op}", "CUDA")
        assert dispatch.implementations(op, hopper.device).keys() == {"library"} | cuda


def test_cpu_tensors_never_import_triton() -> None:
    code = (
        "import sys, torch; from fastnull import ops;"
        "ops.layer_norm(torch.ones(2, 8)); ops.attention(torch.ones(1, 3, 3, 1, 8));"
        "sys.exit(any(name == 'fastnull.kernels' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_references_of_the_fused_products() -> None:
    """On the CPU `linear_gelu_out` and `linear_dgelu_out` are what the public functions do in two steps."""
    g = torch.Generator().manual_seed(0)
    x, w, bias = torch.randn(3, 8, generator=g), torch.randn(6, 8, generator=g), torch.randn(6, generator=g)
    h, derivative, dz = torch.empty(3, 6), torch.empty(3, 6), torch.empty(3, 6)
    torch.ops.fastnull.linear_gelu_out(x, w, bias, True, h, derivative)
    torch.ops.fastnull.linear_dgelu_out(x, w.t(), derivative, dz)
    expected, expected_derivative = ops.linear_gelu_derivative(x, w, bias, "tanh")
    torch.testing.assert_close(h, expected)
    torch.testing.assert_close(derivative, expected_derivative)
    torch.testing.assert_close(dz, ops.linear_dgelu(x, w.t(), expected_derivative))
    testing.opcheck("linear_gelu_out", (x, w, bias, True, h, derivative))
    testing.opcheck("linear_dgelu_out", (x, w.t().contiguous(), derivative, dz))
