"""Parts of scripts/gpu_check.sh: `python3 scripts/gpu_parts.py probe | gradient | small KIND ...`.

On a machine without a GPU they run tiny, on the CPU; small triton there needs TRITON_INTERPRET=1.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import COSINE_MARGIN, measure_ceilings
from benchmarks.models import make_images, make_model
from fastnull.bench import BenchSettings
from fastnull.encoder import FrozenEncoder
from fastnull.ops.dispatch import implementations
from fastnull.record import version_of
from fastnull.selftest.problems import Problem
from fastnull.selftest.store import identity
from fastnull.synthesis import SynthesisConfig, synthesize

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF = torch.bfloat16
SETTINGS = BenchSettings(batch=8, dtypes=("bfloat16",), device=DEVICE, seconds=1.0 if GPU else 0.0)
MODELS = ("base_patch16_224", "small_patch16_224", "base_patch32_224", "large_patch16_224") if GPU else ("digits",)
# op and sizes, as the self-test names its problems: small, and tails of every kind
SMALL = (
    "layer_norm_out 192 3", "layer_norm_out 7 2", "layer_norm_dx_out 192 0", "layer_norm_dx_out 7 1", "gelu_out 600 0",
    "dgelu_ 600", "linear_gelu_out 140 96 1", "linear_dgelu_out 96 140", "attention_out 1 32",
    "attention_dqkv_out 1 32", "patch_project_out 4 48 1", "noise_objective_out 10", "noise_objective_means_out 10",
    "adamw_step_", "direct_step_ 0", "direct_step_ 1",
    *(f"{op} {size}" for size in ("50 64", "65 32", "197 64", "257 32", "300 64") for op in (
        "attention_out", "attention_dqkv_out") if GPU),
)  # fmt: skip


def probe() -> int:
    """What is here and how fast it is at best; 1, with the reason, where the fast encoder would not run."""
    packages = ("timm", "numpy", "setuptools", "pytest", "pytest-xdist")
    print("python", platform.python_version(), *(f"{name} {version_of(name)}" for name in packages))
    print(*(f"{key} {value}" for key, value in identity(torch.device(DEVICE)).items() if key != "build"))
    if GPU:
        card = torch.cuda.get_device_properties(0)
        sizes = ("total_memory", "multi_processor_count", "L2_cache_size", "shared_memory_per_block_optin")
        print(*(f"{name} {getattr(card, name, '?')}" for name in sizes))
    print(measure_ceilings(SETTINGS))
    small("triton", "cuda", names=("layer_norm_out 192 3", "noise_objective_out 10"))
    try:
        encoder = FrozenEncoder(make_model("vit_digits", SETTINGS), HALF, backend=DEVICE, selftest="off")
    except ValueError as problem:
        print(f"the encoder would not run on this GPU: {problem}")
        return 1
    print(f"backend {encoder.backend}")
    return 0


def gradient() -> int:
    """Input gradients against float64, and a graph's noise against the eager loop's; the number of models that fail."""
    failed = 0
    print("model, 1 - cosine with float64 (torch's own bfloat16), a graph's noise is the eager one's")
    for name in MODELS:
        try:
            off, own, same = _gradient(f"vit_{name}")
            right, text = off <= max(COSINE_MARGIN[HALF], 4 * own) and same, f"{off:.1e} ({own:.1e}) {same}"
        except Exception as error:  # the next model may do better
            right, text = False, _first(error)
        failed += not right
        print(f"{name:18} {'ok' if right else 'WRONG'} {text}", flush=True)
    return failed


def _gradient(name: str) -> tuple[float, float, bool]:
    model = make_model(name, SETTINGS)
    images = make_images(model, SETTINGS.batch, SETTINGS)
    kinds = ((torch.float64, "reference"), (HALF, "reference"), (HALF, DEVICE))
    exact, torchs, encoder = (FrozenEncoder(model, dtype, backend) for dtype, backend in kinds)
    tokens = encoder.embed(images)
    cotangent = torch.randn(encoder(tokens).shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    right, own, mine = (
        each.input_gradient(tokens.to(each.dtype), cotangent.to(each.dtype))[1].double().flatten(1)
        for each in (exact, torchs, encoder)
    )
    own_off, off = (float(1 - torch.cosine_similarity(right, each).min()) for each in (own, mine))
    config = SynthesisConfig(limit=1.0, contrast=0.0, lr=0.02, steps=16, stop="never", graph=False)
    eager, graph = (synthesize(encoder, [images], replace(config, graph=each)).tokens for each in (False, GPU))
    return off, own_off, eager.equal(graph)


def small(*kinds: str, names: tuple[str, ...] = SMALL) -> int:
    """Run each kernel once at small, odd sizes. Tensors are dense and end where the kernel must stop, so that a read or
    write beyond is one beside the allocation. Each must fill its outputs with finite values."""
    dtype = "bfloat16" if GPU or kinds == ("cpu",) else "float16"  # no bfloat16 in the interpreter
    ran: dict[str, int] = dict.fromkeys(kinds, 0)
    failed = 0
    for name in names:
        op, *sizes = name.split()
        problem = Problem.named(" ".join([op, dtype, *sizes]))
        for kind, each in implementations(op, torch.device(DEVICE)).items():
            drawn = problem.arguments(1, 0, torch.device("cpu"))  # so that no kernel but ours runs under a sanitizer
            arguments: list[Any] = [given.to(DEVICE) if isinstance(given, Tensor) else given for given in drawn]
            if kind not in kinds or not each.serves(*arguments):
                continue
            try:
                each.run(*arguments)
                finite = all(bool(given.cpu().float().isfinite().all()) for given in problem.written(tuple(arguments)))
                wrong = "" if finite else "leaves values that are not finite"
            except Exception as error:  # the next kernel may do better
                wrong = _first(error)
            ran[kind] += not wrong
            failed += bool(wrong)
            if wrong:
                print(f"{kind} {problem.name}: {wrong}")
    print("kernels that fill their outputs at small sizes:", *(f"{count} {kind}" for kind, count in ran.items()))
    return failed


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    part, *given = sys.argv[1:]
    sys.exit({"probe": probe, "gradient": gradient, "small": small}[part](*given))
