"""How much less time attacks take than with `final_iterate`: every image, all steps, by autograd.

    python -m benchmarks.attack_times runs/none/last.safetensors runs/boundary/last.safetensors --data images

Rounds of both ways are interleaved. Ratios are medians over the rounds, on a CPU of the process's CPU time, which other
processes hardly change. Accuracies of both ways are shown beside them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.data.sources import evaluation_data
from fastnull.data.subset import even_subset, labels_of
from fastnull.models import load_model
from fastnull.record import provenance, write_json
from fastnull.robustness import evaluate

RADII = (1 / 255, 2 / 255, 4 / 255)
WAYS: dict[str, dict[str, Any]] = {"final iterate": {"final_iterate": True}, "worst iterate": {"final_iterate": False}}


def main() -> None:
    """Measure, print a table and, with --out, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="FILE", help="models that finetune wrote")
    parser.add_argument("--data", required=True, help="as of `fastnull evaluate`")
    parser.add_argument("--images", type=int, default=64, metavar="N", help="drawn evenly (%(default)s)")
    parser.add_argument("--suites", nargs="+", default=["pgd", "apgd"], metavar="NAME", help="attacks")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="of each attack (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch (default: its own choice)")
    parser.add_argument("--out", metavar="FILE", help="file for the numbers (.json)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    for path in args.models:
        model = load_model(path)
        images = evaluation_data(args.data, model)
        labels = labels_of(images)
        assert labels is not None, "the data set must have a list of its labels"
        chosen = [images[int(index)] for index in even_subset(labels, args.images, 0)]
        data = torch.stack([image for image, _ in chosen]), torch.tensor([label for _, label in chosen])
        clean = evaluate(model, data, suites=("clean",), progress=False)["results"]["clean"]
        rows.append({"model": path, "suite": "clean", "accuracy": clean})
        print(f"{path}: clean {clean:.1f} %", flush=True)
        for suite in args.suites:
            row = {"model": path, "suite": suite, **_compared(model, data, suite, args.steps, args.rounds)}
            rows.append(row)
            print(f"{suite:<8}{row['ratio']:>6.2f}x  {row['ratios']} {row['accuracy']}", flush=True)
    if args.out:
        about = {"images": args.images, "steps": args.steps, "rounds": args.rounds, "threads": torch.get_num_threads()}
        write_json(args.out, {"rows": rows, **about, "provenance": provenance()})


def _compared(model: nn.Module, data: tuple[Tensor, Tensor], suite: str, steps: int, rounds: int) -> dict[str, Any]:
    """Median ratio of the times of both ways, which take turns to be first, and their accuracies."""
    settings: dict[str, Any] = {"suites": (suite,), "eps": RADII, "steps": steps, "progress": False}
    clock = time.process_time if next(model.parameters()).device.type == "cpu" else time.perf_counter
    ratios, accuracy = [], {}
    for number in range(rounds):
        seconds = {}
        for name in list(WAYS)[:: -1 if number % 2 else 1]:
            started = clock()
            accuracy[name] = evaluate(model, data, **settings, **WAYS[name])["results"][suite]
            seconds[name] = clock() - started
        ratios.append(seconds["final iterate"] / seconds["worst iterate"])
    return {"ratio": statistics.median(ratios), "ratios": ratios, "accuracy": accuracy}


if __name__ == "__main__":
    main()
