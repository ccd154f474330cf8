"""Training images per second of a folder of images: decoded for each batch, and kept in memory.

    python -m benchmarks.loading_times --data cifar10 --size 98

Both ways take turns, batch by batch, in one process with one thread, so that other programs slow down both. A batch is
timed up to its bytes [B, 3, size, size]. Numbers are medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch

from fastnull.data import EpochBatches, ImageFolder, Samples, View, loader
from fastnull.data.cache import keep, plan_cache
from fastnull.finetune import FinetuneConfig
from fastnull.record import provenance, write_json


def endless(data: Any, batch_size: int) -> Iterator[Any]:
    """Batches of one epoch after another."""
    order = EpochBatches(len(data), batch_size, len(data) // batch_size, seed=0)
    while True:
        yield from loader(data, order)
        order.epoch += 1


def main() -> None:
    """Measure, print a line per setting and, with --out, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="with train/CLASS/ in it")
    parser.add_argument("--size", type=int, default=98, metavar="N", help="pixels (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--batches", type=int, default=40, metavar="N", help="of each way (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="file for the numbers (.json)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    view = View((args.size, args.size), 3, "bicubic", 1.0, (0.5,) * 3, (0.5,) * 3)
    rows = []
    for color_jitter in (0.4, 0.0):
        settings = FinetuneConfig(color_jitter=color_jitter).image_settings()
        files = Samples(ImageFolder(f"{args.data}/train"), view.training(**settings), 3)
        batched, device = view.batched(0, **settings), torch.device("cpu")
        plan = plan_cache("ram", files, None, batched, device)
        started = time.perf_counter()
        kept = keep(plan, files, None, device)
        assert kept is not None, "the images have several sizes"
        decoding = time.perf_counter() - started
        ways = {"files": endless(files, args.batch_size), "memory": endless(kept[0], args.batch_size)}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(args.batches + 2):
            for name, batches in ways.items():
                started = time.perf_counter()
                next(batches)
                if turn >= 2:  # without the first ones
                    seconds[name].append(time.perf_counter() - started)
        speeds = {name: args.batch_size / median(times) for name, times in seconds.items()}
        ratio = median(one / other for one, other in zip(*seconds.values(), strict=True))
        rows.append({"color_jitter": color_jitter, **speeds, "ratio": ratio, "decoding": decoding, "cache": str(plan)})
        print(
            f"color_jitter {color_jitter}: {speeds['files']:.0f} images per second from files, {speeds['memory']:.0f} "
            f"from memory ({ratio:.1f}x); {len(files)} images decoded in {decoding:.1f} s, {plan}",
            flush=True,
        )
    if args.out:
        write_json(args.out, {"loading": rows, "size": args.size, "provenance": provenance()})


if __name__ == "__main__":
    main()
