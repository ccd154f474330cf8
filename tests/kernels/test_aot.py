"""Every kernel and tile compiled for GPUs that are not there: no spills, shared memory that fits, tensor cores used,
and operands of products that are loaded 16 bytes at a time while the product before runs.

Sizes are ViT-B's at a batch of 256; only divisibility by 16 and the choice of the tile depend on them. REGISTERS holds
what Triton RECORDED_WITH compiled: a rise is a regression to look at, a new Triton a reason to record anew.
`pytest tests/kernels/test_aot.py -s` prints what the table of docs/kernels.md holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install fastnull[triton]")

from fastnull.kernels import LAUNCHERS  # noqa: E402
from fastnull.kernels import attention as attention_kernels  # noqa: E402
from fastnull.kernels import layer_norm as layer_norm_kernels  # noqa: E402
from fastnull.kernels.common import generation  # noqa: E402
from tests.kernels.ahead_of_time import Compiled, Launch, compile_for, launches_of  # noqa: E402

SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Compute capability → bytes of shared memory that a block may have."""
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""By generation."""
ROWS = 256 * 197
F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def layer_norm(width: int) -> None:
    x, stat = meta(1, ROWS, width), meta(ROWS, dtype=F32)
    LAUNCHERS["layer_norm_out"](x, None, None, meta(width, dtype=F32), 1e-6, x, None, stat)
    LAUNCHERS["layer_norm_dx_out"](x, x, None, stat, x, x)


def gelu(tanh: bool) -> None:
    z, code = meta(1, ROWS, 3072), meta(ROWS, 3072, dtype=U8)
    LAUNCHERS["gelu_out"](z, meta(3072), tanh, z, code)
    LAUNCHERS["dgelu_"](z, code)


def linear_gelu(tanh: bool, width: int, hidden: int) -> None:
    x, w, h, code = meta(ROWS, width), meta(hidden, width), meta(ROWS, hidden), meta(ROWS, hidden, dtype=U8)
    LAUNCHERS["linear_gelu_out"](x, w, meta(hidden, dtype=F32), tanh, h, code)
    LAUNCHERS["linear_dgelu_out"](x, meta(width, hidden), code, h)


def attention(tokens: int, head: int, dtype: torch.dtype = BF16) -> None:
    qkv, o = meta(256, tokens, 3, 12, head, dtype=dtype), meta(256, tokens, 12, head, dtype=dtype)
    LAUNCHERS["attention_out"](qkv, 0.125, o)
    LAUNCHERS["attention_dqkv_out"](qkv, o, 0.125, qkv)


def patch_project() -> None:
    images = meta(256, 3, 224, 224, dtype=F32)
    LAUNCHERS["patch_project_out"](images, meta(768, 384, dtype=F32), 16, True, images, images)


def noise() -> None:
    logits, per_image = meta(256, 1000), meta(256, dtype=F32)
    LAUNCHERS["noise_objective_out"](logits, logits, False, 0.1, per_image, meta(256, 1000, dtype=F32), per_image)
    v, gate, lr = meta(8, 197, 768, dtype=F32), meta(8, dtype=F32), meta(8, dtype=torch.float64)
    LAUNCHERS["adamw_step_"](v, v, v, v, meta(8, dtype=torch.int64), gate, lr, 0.9, 0.999, 1e-8, 0.0)
    LAUNCHERS["direct_step_"](v, v, gate, lr, False)


# Name: what to launch. float16 takes the tiles of bfloat16: one case shows that it needs no more.
CASES: dict[str, Callable[[], None]] = {
    **{f"layer_norm, width {w}": lambda w=w: layer_norm(w) for w in (384, 768, 1280, 3072, 16384)},
    "gelu, erf": lambda: gelu(False),
    "gelu, tanh": lambda: gelu(True),
    "linear_gelu, erf": lambda: linear_gelu(False, 768, 3072),
    "linear_gelu, tanh": lambda: linear_gelu(True, 1152, 4304),  # SO400M: the last tile of columns is not full
    **{f"attention, {n} tokens": lambda n=n: attention(n, 64) for n in (50, 65, 197, 257, 577)},
    **{f"attention, {n} tokens, heads of 32": lambda n=n: attention(n, 32) for n in (50, 65, 197, 257, 577)},
    "attention, 257 tokens, heads of 80": lambda: attention(257, 80),
    "attention, 197 tokens, float16": lambda: attention(197, 64, torch.float16),
    "attention, 197 tokens, float32": lambda: attention(197, 64, F32),
    "attention, 257 tokens, heads of 80, float32": lambda: attention(257, 80, F32),
    "patch_project": patch_project,
    "noise": noise,
}
RECORDED_WITH, RECORDED = "3.9.0", (80, 90, 100)
# Case: of each kernel in order of launch, registers per thread on the GPUs of RECORDED.
REGISTERS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "attention, 50 tokens, heads of 32": ((72, 59, 60), (126, 118, 126)),
    "attention, 65 tokens, heads of 32": ((79, 71, 64), (128, 123, 113)),
    "attention, 197 tokens, heads of 32": ((106, 182, 194), (178, 166, 208)),
    "attention, 257 tokens, heads of 32": ((220, 192, 192), (178, 166, 194)),
    "attention, 577 tokens, heads of 32": ((146, 140, 169), (180, 166, 124)),
    "layer_norm, width 384": ((40, 40, 48), (56, 60, 57)),
    "layer_norm, width 768": ((40, 40, 42), (54, 48, 52)),
    "layer_norm, width 1280": ((38, 32, 35), (50, 48, 48)),
    "layer_norm, width 3072": ((38, 32, 35), (50, 48, 50)),
    "layer_norm, width 16384": ((58, 51, 56), (98, 100, 98)),
    "gelu, erf": ((40, 40, 44), (24, 21, 22)),
    "gelu, tanh": ((40, 40, 40), (24, 21, 22)),
    "linear_gelu, erf": ((182, 194, 162), (186, 150, 125)),
    "linear_gelu, tanh": ((182, 128, 212), (186, 150, 128)),
    "attention, 50 tokens": ((106, 82, 56), (178, 152, 124)),
    "attention, 65 tokens": ((134, 78, 65), (232, 152, 116)),
    "attention, 197 tokens": ((162, 188, 192), (178, 202, 208)),
    "attention, 257 tokens": ((168, 185, 219), (173, 202, 201)),
    "attention, 577 tokens": ((242, 164, 177), (188, 202, 123)),
    "attention, 257 tokens, heads of 80": ((192, 190, 200), (199, 215, 162)),
    "attention, 197 tokens, float16": ((162, 188, 192), (178, 202, 208)),
    "attention, 197 tokens, float32": ((62, 66, 64), (79, 74, 72)),
    "attention, 257 tokens, heads of 80, float32": ((96, 94, 94), (128, 128, 128)),
    "patch_project": ((108, 106, 106), (130, 128, 128)),
    "noise": ((80, 84, 88), (61, 61, 61), (32, 32, 32), (40, 40, 40)),
}


def launches_for(case: str, capability: int) -> list[Launch]:
    """Launches on a GPU of this capability; some table entries are only for some capabilities."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_kernels, "generation_of", lambda x: generation(capability // 10))
        return launches_of(CASES[case])


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compile anew, and leave nothing behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compiled_for() -> Iterator[Any]:
    """Each case with the GPUs that it is compiled for. sm_86 and sm_89 have the same limits and instructions, so they
    take turns. float16 shows once for a generation that it needs no more than bfloat16."""
    for number, case in enumerate(CASES):
        for capability in SHARED:
            twin = capability in (86, 89) and capability != (86, 89)[number % 2]
            if not twin and ("float16" not in case or capability in RECORDED):
                yield pytest.param(case, capability, marks=[] if capability == 90 else pytest.mark.slow)


@pytest.mark.parametrize(("case", "capability"), compiled_for())
def test_resources(case: str, capability: int) -> None:
    launches, cores = launches_for(case, capability), TENSOR_CORES[generation(capability // 10)]
    for launch, recorded in zip(launches, REGISTERS[case], strict=True):
        built = compile_for(launch, capability)
        print(f"{case}: {launch.name} sm_{capability} {built.registers} registers, {built.shared} bytes shared")
        assert built.stack == 0, f"{launch.name} spills {built.stack} bytes"
        assert built.shared <= SHARED[capability]
        if triton.__version__ == RECORDED_WITH and capability in RECORDED:
            limit = recorded[RECORDED.index(capability)]
            assert built.registers <= limit, f"{launch.name}: {built.registers} registers, recorded {limit}"
        if "float32" not in case and launch.name.startswith(("attention", "linear")):
            assert cores in built.ptx, f"{launch.name} does not use the tensor cores"
            # and no product of it falls back to Ampere's
            assert cores == TENSOR_CORES[80] or TENSOR_CORES[80] not in built.ptx
        if launch.name.startswith("linear"):
            assert_pipelined(launch, built)


def assert_pipelined(launch: Launch, built: Compiled) -> None:
    """Both operands of the product go to shared memory by asynchronous copies of 16 bytes, `num_stages` tiles of them.

    A load that the compiler cannot prove to be contiguous becomes loads of single values, which it does not pipeline.
    """
    m, n, k = (launch.arguments[f"TILE_{size}"] for size in "MNK")
    stages, threads = launch.options["num_stages"], 32 * launch.options["num_warps"]
    sizes = re.findall(r"cp\.async\.\w+\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x\w+|\d+)", built.ptx)
    assert {int(size, 0) for size in sizes} == {16}, f"{launch.name} copies other than 16 bytes"
    assert len(sizes) >= stages * (m + n) * k * 2 / (16 * threads), f"{launch.name} copies one operand alone"
    for scalar in ("ld.global.b16", "st.shared.b16"):
        assert scalar not in built.ptx, f"{launch.name} moves single values: {scalar}"


def test_every_tile_of_the_tables_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some case takes each entry on some GPU. The other tables have one entry, or none."""
    taken: list[object] = []
    of_attention, of_norm = attention_kernels._tile, layer_norm_kernels.row_tile

    def attention_tile(*arguments: Any) -> Any:
        taken.append(of_attention(*arguments))
        return taken[-1]

    def norm_tile(width: int) -> Any:
        constants, tile = of_norm(width)
        taken.append(tile)
        return constants, tile

    monkeypatch.setattr(attention_kernels, "_tile", attention_tile)
    monkeypatch.setattr(layer_norm_kernels, "row_tile", norm_tile)
    for capability in SHARED:
        for case in CASES:
            launches_for(case, capability)
    tables = (attention_kernels.FORWARD, attention_kernels.GRADIENT)
    for entries in (*tables, attention_kernels.FLOAT32, layer_norm_kernels.TILES):
        for entry in entries:
            assert any(entry is tile for tile in taken), f"no case compiles {entry}"


def test_sizes_of_one_compile() -> None:
    """Triton makes an integer argument of 1 a constant: other code, which the interpreter does not run."""
    x, per_row, code = meta(1, 1, 1), meta(1, dtype=F32), meta(1, 1, dtype=U8)
    v, lr = meta(1, 1, dtype=F32), meta(1, dtype=torch.float64)

    def call() -> None:
        LAUNCHERS["layer_norm_out"](x, per_row, per_row, per_row, 1e-6, x, per_row, per_row)
        LAUNCHERS["layer_norm_dx_out"](x, x, per_row, per_row, None, x)
        LAUNCHERS["gelu_out"](x, per_row, False, x, None)
        LAUNCHERS["dgelu_"](x, code)
        LAUNCHERS["linear_gelu_out"](x[0], x[0], None, False, x[0], None)
        LAUNCHERS["linear_dgelu_out"](x[0], x[0], code, x[0])
        LAUNCHERS["attention_out"](meta(1, 1, 3, 1, 1), 0.125, meta(1, 1, 1, 1))
        LAUNCHERS["attention_dqkv_out"](meta(1, 1, 3, 1, 1), meta(1, 1, 1, 1), 0.125, meta(1, 1, 3, 1, 1))
        LAUNCHERS["patch_project_out"](meta(1, 1, 1, 1), v, 1, False, None, meta(1, 1, 1, 1))
        LAUNCHERS["noise_objective_out"](x[0], x[0], True, 0.1, per_row, v, per_row)
        LAUNCHERS["adamw_step_"](v, v, v, v, meta(1, dtype=torch.int64), per_row, lr, 0.9, 0.999, 1e-8, 0.0)
        LAUNCHERS["direct_step_"](v, v, per_row, lr, True)

    for launch in launches_of(call):
        compile_for(launch, 90)


def test_the_halves_of_attention_s_backward_are_apart() -> None:
    """The second reads what other threads stored in the first: a barrier that the interpreter would not miss."""
    built = compile_for(launches_for("attention, 50 tokens", 90)[1], 90)
    first, second = re.split(r"\bbarrier\b", built.ir)
    assert first.count("tt.store ") == 3, "dq, logs, deltas"
    assert second.count("tt.store ") == 2, "dk, dv"


def test_spills_are_found() -> None:
    """The resource reader against a kernel that must spill: 64 x 256 scores and their gradient, with 4 warps."""
    launch = launches_for("attention, 197 tokens", 90)[1]
    too_large = {**launch.arguments, "KEYS": 256, "WHOLE": True}
    built = compile_for(type(launch)(launch.kernel, too_large, launch.options), 90)
    assert built.stack > 0
