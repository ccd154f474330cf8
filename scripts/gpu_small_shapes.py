"""Launch every kernel once at small, odd sizes: what `scripts/gpu_check.sh` runs under compute-sanitizer.

Tensors are dense and end where the kernel must stop, so a write or read beyond is one beside the allocation.
On a machine without a GPU it runs in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastnull import _C
from fastnull.kernels import LAUNCHERS

GPU = torch.cuda.is_available()
DEVICE, HALF = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float16)


def randn(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    """A dense tensor of normal values."""
    return torch.randn(shape, device=DEVICE).to(dtype)


def nan(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    """A dense tensor of NaN, to be overwritten."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def launches() -> list[tuple[str, tuple[object, ...], list[Tensor]]]:
    """Name of an op, its arguments, and which of them it fills."""
    found: list[tuple[str, tuple[object, ...], list[Tensor]]] = []

    def add(name: str, *arguments: object, fills: list[Tensor]) -> None:
        found.append((name, arguments, fills))

    f32 = torch.float32
    for width in (7, 192):
        x, y, mean, rstd = randn(1, 9, width), nan(1, 9, width), nan(9, dtype=f32), nan(9, dtype=f32)
        add("layer_norm_out", x, None, None, randn(width, dtype=f32), 1e-6, y, mean, rstd, fills=[y, mean, rstd])
        dx = nan(1, 9, width)
        add("layer_norm_dx_out", randn(1, 9, width), y, None, rstd, x, dx, fills=[dx])
    z, h, code = randn(1, 5, 600), nan(1, 5, 600), torch.zeros(5, 600, dtype=torch.uint8, device=DEVICE)
    add("gelu_out", z, randn(600, dtype=f32), False, h, code, fills=[h])
    add("dgelu_", z, code, fills=[z])
    x, w, h, dz = randn(130, 96), randn(140, 96), nan(130, 140), nan(130, 96)
    code = torch.zeros(130, 140, dtype=torch.uint8, device=DEVICE)
    add("linear_gelu_out", x, w, randn(140, dtype=f32), True, h, code, fills=[h])
    add("linear_dgelu_out", randn(130, 140), w, torch.zeros_like(dz, dtype=torch.uint8), dz, fills=[dz])
    for tokens, width in ((1, 32), (50, 64), (65, 32), (197, 64), (257, 32), (300, 64)):
        qkv, o, dqkv = randn(1, tokens, 3, 2, width), nan(1, tokens, 2, width), nan(1, tokens, 3, 2, width)
        add("attention_out", qkv, 0.2, o, fills=[o])
        add("attention_dqkv_out", qkv, randn(1, tokens, 2, width), 0.2, dqkv, fills=[dqkv])
    images, out = randn(1, 3, 12, 8, dtype=f32), nan(1, 3, 12, 8, dtype=f32)
    add("patch_project_out", images, randn(48, 13, dtype=f32), 4, True, images, out, fills=[out])
    rows = [nan(5, dtype=f32), nan(5, 10, dtype=f32), nan(5, dtype=f32)]
    add("noise_objective_out", randn(5, 10), randn(5, 10), False, 0.2, *rows, fills=rows)
    rows = [nan(6, dtype=f32), nan(6, 10, dtype=f32), nan(6, dtype=f32), nan(2, dtype=f32), nan(2, dtype=f32)]
    add("noise_objective_means_out", randn(3, 10), randn(6, 10), False, 0.2, *rows, fills=rows)
    v, g, gate = randn(2, 1030, dtype=f32), randn(2, 1030, dtype=f32), torch.tensor([1.0, 0.0], device=DEVICE)
    lr, steps = (
        torch.full((2,), 0.1, dtype=torch.float64, device=DEVICE),
        torch.zeros(2, dtype=torch.int64, device=DEVICE),
    )
    add(
        "adamw_step_", v, g, torch.zeros_like(v), torch.zeros_like(v), steps, gate, lr, 0.9, 0.999, 1e-8, 0.0, fills=[v]
    )
    add("direct_step_", v, g, gate, lr, False, fills=[v])
    return found


def run(kind: str, implementation_of: Callable[[str], Callable[..., None] | None]) -> None:
    """Every launch of one kind of kernels that takes these sizes; each must fill its outputs with finite values."""
    for name, arguments, fills in launches():
        launch = implementation_of(name)
        if launch is None:
            continue
        try:
            launch(*arguments)
        except (ValueError, RuntimeError) as refused:
            if kind == "triton" or "CUDA error" in str(refused):
                raise
            print(f"ok {kind} {name} refuses the size: {str(refused).splitlines()[0]}", flush=True)
            continue
        if not all(bool(torch.isfinite(tensor.float()).all()) for tensor in fills):
            raise AssertionError(f"{kind} {name} left values that are not finite")
        print(f"ok {kind} {name}", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    run("triton", LAUNCHERS.get)
    if GPU and _C.cuda.load():
        built = torch.ops.fastnull_cuda
        run("cuda", lambda name: getattr(built, name, None))
