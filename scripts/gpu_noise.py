"""Influence and norm of a universal noise after 100 steps in bfloat16, against the same steps in float32.

    python3 scripts/gpu_noise.py OUT.json

Both noises are judged by the float32 encoder. On a machine without a GPU: a tiny model and ten steps.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.bench import BenchSettings
from fastnull.bench.run import ROOT
from fastnull.encoder import FrozenEncoder
from fastnull.record import provenance, write_json
from fastnull.synthesis import SynthesisConfig, measure_influence, synthesize

sys.path.insert(0, str(ROOT))
from benchmarks.models import make_images, make_model

ALLOWED = 0.02

Ends = dict[str, dict[str, float]]


def ends(
    model: nn.Module, encoders: Mapping[str, FrozenEncoder], batches: Sequence[Tensor], config: SynthesisConfig
) -> Ends:
    """Influence and norm of the noise that each encoder ends with, from one start, judged in float32."""
    judge = FrozenEncoder(model, dtype=torch.float32)
    found: Ends = {}
    for name, encoder in encoders.items():
        noise = synthesize(encoder, batches, config)
        influence = float(measure_influence(judge, noise, batches).mean())
        found[name] = {"influence": influence, "norm": float(noise.tokens.float().norm())}
    return found


def relative(mine: Mapping[str, float], exact: Mapping[str, float]) -> dict[str, float]:
    """Relative difference of each number."""
    return {key: abs(mine[key] - exact[key]) / exact[key] for key in exact}


def main(out: str) -> int:
    """Measure, write the JSON; 1 if a relative difference is above ALLOWED on a GPU, else 0."""
    gpu = torch.cuda.is_available()
    device, name, batch, steps = ("cuda", "vit_small_patch16_224", 64, 100) if gpu else ("cpu", "vit_digits", 8, 10)
    settings = BenchSettings(models=(name,), device=device)
    model: Any = make_model(name, settings)
    batches = [make_images(model, batch, settings, key) for key in range(2)]
    config = SynthesisConfig(limit=1.0, lr=0.02, eps=1e-9, steps=steps, stop="never", image_fraction=1.0)
    encoders = {str(dtype)[6:]: FrozenEncoder(model, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    found = ends(model, encoders, batches, config)
    differences = relative(found["bfloat16"], found["float32"])
    about = provenance(device, model=name, batch=batch, steps=steps)
    write_json(out, {"provenance": about, "ends": found, "relative": differences, "allowed": ALLOWED})
    print(f"{name}, {steps} steps: {found}; relative differences {differences}")
    return int(gpu and max(differences.values()) > ALLOWED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
