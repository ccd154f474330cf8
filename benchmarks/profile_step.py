"""Where the time of a finetuning step goes: `python -m benchmarks.profile_step --model vit_small_patch16_224`.

Prints each phase's fraction and the operators that take most, from torch.profiler, and how often a step makes the host
wait for the device. The phases: `views` are the forward passes with their graph, `noise` the synthesis in
them, `backward`, `optimizer`. On a GPU times are those of its kernels.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.models import make_images, make_model
from fastnull.augment import NullspaceAugment
from fastnull.bench import BenchSettings
from fastnull.record import provenance, write_json

PHASES = ("views", "noise", "backward", "optimizer")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
"""Of the profile's names, what makes the host wait; the profiler's own end is one of them."""


class _Marked(NullspaceAugment):
    """Names its phases in the profile."""

    def _call(self, *given: Any) -> Any:
        with record_function("views"):
            return super()._call(*given)

    def draw(self, tokens: torch.Tensor) -> torch.Tensor:
        with record_function("noise"):
            return super().draw(tokens)


def profile_step(
    model: nn.Module, images: torch.Tensor, *, site: str, noise_steps: int, dtype: torch.dtype, steps: int
) -> dict[str, Any]:
    """Profile `steps` training steps with boundary noise after two to warm up.

    Returns:
        seconds per step of each phase, milliseconds of the ten operators that take most themselves, and on a GPU how
        often the host waited for it a step.
    """
    model = model.train().requires_grad_(True)
    augment = _Marked(model, "boundary", site=site, steps=noise_steps, fraction=0.0, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    labels = torch.arange(len(images), device=images.device) % 10

    def step() -> None:
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss, _ = augment.loss(images, labels, lambda logits, y: nn.functional.cross_entropy(logits.float(), y))
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(2):
        step()
    cuda = images.is_cuda
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        for _ in range(steps):
            step()
    events = profiler.key_averages()
    total = {event.key: event.device_time_total if cuda else event.cpu_time_total for event in events}
    own = {event.key: event.self_device_time_total if cuda else event.self_cpu_time_total for event in events}
    phases = {name: total.get(name, 0.0) / steps / 1e6 for name in PHASES}
    phases["views"] -= phases["noise"]  # drawn in their hook
    operators = sorted((name for name in own if name not in PHASES), key=lambda name: own[name], reverse=True)[:10]
    return {
        "phases": phases,
        "operators": {name: own[name] / steps / 1e3 for name in operators},
        "waits": sum(event.count for event in events if event.key in WAITS) / steps if cuda else None,
    }


def main(words: Sequence[str] | None = None) -> None:
    """Profile as the command line says; print, and write JSON where a file is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="timm model, random weights")
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--site", default="patch", help="patch, block0 or pixels")
    parser.add_argument("--noise-steps", type=int, default=3, help="updates of the noise")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of autocast")
    parser.add_argument("--steps", type=int, default=3, help="that are profiled")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args(words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = BenchSettings(batch=args.batch, device=device)
    model = make_model(args.model, settings)
    found = profile_step(
        model, make_images(model, args.batch, settings), site=args.site, noise_steps=args.noise_steps,
        dtype=getattr(torch, args.dtype), steps=args.steps,
    )  # fmt: skip
    whole = sum(found["phases"].values())
    print(f"{args.model}, batch {args.batch}, {args.dtype}, boundary in {args.noise_steps} steps: {1e3 * whole:.0f} ms")
    for name, seconds in found["phases"].items():
        print(f"  {name:12} {1e3 * seconds:9.1f} ms {100 * seconds / whole:5.1f} %")
    for name, milliseconds in found["operators"].items():
        print(f"  {name[:60]:60} {milliseconds:9.1f} ms")
    if found["waits"] is not None:
        print(f"  the host waits for the device {found['waits']:g} times a step")
    if args.out:
        about = {"settings": vars(args), "provenance": provenance(torch.device(device))}
        write_json(Path(args.out), {**found, **about})


if __name__ == "__main__":
    main()
