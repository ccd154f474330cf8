"""Training images per second of a folder of images: decoded for each batch, and kept in memory.

    python -m benchmarks.loading_times --data cifar10 --size 98

Both ways take turns, batch by batch, in one process with one thread, so that other programs slow down both. A batch is
timed up to its bytes [B, 3, size, size]. Numbers are medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from operator import truediv
from statistics import median
from typing import Any

import torch

from fastnull.data import EpochBatches, ImageFolder, Samples, View, loader
from fastnull.data.cache import keep, plan_cache
from fastnull.finetune import FinetuneConfig


def endless(data: Any, batch_size: int) -> Iterator[Any]:
    """Batches of one epoch after another."""
    order = EpochBatches(len(data), batch_size, len(data) // batch_size, seed=0)
    while True:
        yield from loader(data, order)
        order.epoch += 1


def main() -> None:
    """Measure, and print a line per setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="with train/CLASS/ in it")
    parser.add_argument("--size", type=int, default=98, metavar="N", help="pixels (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--batches", type=int, default=40, metavar="N", help="of each way (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    view = View((args.size, args.size), 3, "bicubic", 1.0, (0.5,) * 3, (0.5,) * 3)
    device = torch.device("cpu")
    for color_jitter in (0.4, 0.0):
        settings = FinetuneConfig(color_jitter=color_jitter).image_settings()
        files = Samples(ImageFolder(f"{args.data}/train"), view.training(**settings), 3)
        started = time.perf_counter()
        plan = plan_cache("ram", files, None, view.batched(0, **settings), device)
        kept = keep(plan, files, None, device)
        assert kept is not None, "the images have several sizes"
        decoding = time.perf_counter() - started
        ways = [endless(files, args.batch_size), endless(kept[0], args.batch_size)]
        seconds: list[list[float]] = [[], []]
        for _ in range(args.batches + 2):
            for times, batches in zip(seconds, ways, strict=True):
                started = time.perf_counter()
                next(batches)
                times.append(time.perf_counter() - started)
        one, other = (times[2:] for times in seconds)  # without the first batches
        print(
            f"color_jitter {color_jitter}: {args.batch_size / median(one):.0f} images per second from files, "
            f"{args.batch_size / median(other):.0f} from memory ({median(map(truediv, one, other)):.1f}x); "
            f"{len(files)} images decoded in {decoding:.1f} s, {plan}",
            flush=True,
        )


if __name__ == "__main__":
    main()
