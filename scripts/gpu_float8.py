"""What 8-bit products in the MLPs gain and cost: a step's time with and without, its gradient, the noise at the end.

    python3 scripts/gpu_float8.py OUT.json [--models NAME ...] [--batch B] [--steps N] [--seconds S]

The gradient is that of one noise shared by the images, and each image's own, against the model's in float64; the noises
are judged in float32. `digits` is the digits ViT, trained for this. Without a GPU the CPU computes the products: as
exact, but the times say nothing, and by default the model is tiny.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from typing import Any

import torch
from gpu_noise import ends, relative
from torch import Tensor, nn

from fastnull.bench import BenchSettings
from fastnull.bench.run import ROOT
from fastnull.encoder import FrozenEncoder
from fastnull.record import provenance, write_json
from fastnull.synthesis import SynthesisConfig
from fastnull.synthesis.solvers import own_gradients, shared_gradient

sys.path.insert(0, str(ROOT))
from benchmarks.baselines import fastnull_step
from benchmarks.common import Variant, interleaved, timer_for
from benchmarks.models import make_images, make_model, make_start, trained_digits

WANTED = 0.10
"""The share of a step's time that has to be gained for the option to stay."""
JUDGED = 8
"""Images of the gradients: float64 is slow."""
EIGHT, SIXTEEN = "float8 MLP", "bfloat16"


def measure(name: str, settings: BenchSettings, steps: int) -> dict[str, Any]:
    """All of it for one model."""
    if name == "digits":
        model, every = trained_digits(settings)
        images = [every[: settings.batch], every[settings.batch : 2 * settings.batch]]
        start = torch.empty(0)  # nobody needs its time
    else:
        model = make_model(name, settings)
        images = [make_images(model, settings.batch, settings, key) for key in range(2)]
        start = make_start(model, settings)
    encoders = {
        SIXTEEN: FrozenEncoder(model, dtype=torch.bfloat16),
        EIGHT: FrozenEncoder(model, dtype=torch.bfloat16, mlp_dtype=torch.float8_e4m3fn),
    }
    found: dict[str, Any] = {"model": name, "batch": settings.batch, "backend": encoders[EIGHT].backend}
    found["cosines"] = cosines(model, encoders, images[0][:JUDGED], settings.seed)
    if steps:
        config = SynthesisConfig(limit=1.0, lr=0.02, eps=1e-9, steps=steps, stop="never")
        at_end = ends(model, {"float32": FrozenEncoder(model, dtype=torch.float32), **encoders}, images, config)
        found |= {"steps": steps, "ends": at_end}
        found["relative"] = {kind: relative(at_end[kind], at_end["float32"]) for kind in encoders}
    if len(start):
        graph = settings.device == "cuda"
        runs = {kind: fastnull_step(encoder, images[0], start) for kind, encoder in encoders.items()}
        variants = [Variant(kind, torch.bfloat16, lambda i, run=run: run(), graph=graph) for kind, run in runs.items()]
        timer = timer_for(settings.device)
        prepared = [timer.prepare(variant, 1) for variant in variants]
        columns = interleaved(prepared, 1, settings.seconds, settings.rounds, timer)
        found["ms"] = {kind: statistics.median(column) for kind, column in zip(runs, columns, strict=True)}
        found["gain"] = 1 - found["ms"][EIGHT] / found["ms"][SIXTEEN]
    return found


def cosines(
    model: nn.Module, encoders: Mapping[str, FrozenEncoder], images: Tensor, seed: int
) -> dict[str, dict[str, float]]:
    """Of each encoder's gradient and float64's: of a noise that the images share, and the worst of one an image."""
    exact = FrozenEncoder(model, dtype=torch.float64, backend="reference")
    tokens = exact.embed(images)
    clean = exact(tokens)
    source = torch.Generator().manual_seed(seed)
    noise = (2 * torch.rand(tokens.shape, generator=source) - 1).to(tokens)

    def gradients(encoder: FrozenEncoder) -> tuple[Tensor, Tensor]:
        given = tokens.to(encoder.dtype), clean.to(torch.promote_types(encoder.dtype, torch.float32))
        kept = noise.to(given[1].dtype)
        _, _, shared = shared_gradient(encoder, *given, kept[:1], "l2")
        _, own = own_gradients(encoder, given[0], kept, given[1], "l2")
        return shared.double().flatten(1), own.double().flatten(1)

    wanted = gradients(exact)
    found = {}
    for kind, encoder in encoders.items():
        shared, own = (
            torch.nn.functional.cosine_similarity(a, b) for a, b in zip(gradients(encoder), wanted, strict=True)
        )
        found[kind] = {"shared": float(shared), "worst image": float(own.min())}
    return found


def main() -> int:
    """Measure, write the JSON, and say what was found."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    sizes = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224") if gpu else ("vit_digits",)
    parser.add_argument("--models", nargs="+", default=sizes)
    parser.add_argument("--batch", type=int, default=256 if gpu else 4)
    parser.add_argument("--steps", type=int, default=100 if gpu else 5)
    parser.add_argument("--seconds", type=float, default=1.0 if gpu else 0.0)
    given = parser.parse_args()
    device = "cuda" if gpu else "cpu"
    settings = BenchSettings(batch=given.batch, device=device, seconds=given.seconds, rounds=3)
    rows: list[dict[str, Any]] = []
    for index, name in enumerate(given.models):
        try:
            # the noise of the first model alone: it takes the time of hundreds of steps
            rows.append(measure(name, settings, given.steps if index == 0 else 0))
        except ValueError as refused:
            rows.append({"model": name, "skipped": str(refused)})
        about = provenance(device, batch=given.batch)
        write_json(
            given.out, {"provenance": about, "wanted": WANTED, "rows": rows}
        )  # what there is, should time run out
        print(rows[-1], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
