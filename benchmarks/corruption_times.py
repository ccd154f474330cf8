"""Seconds that a full set of each corruption takes: five severities of a number of 224x224 photographs.

    python -m benchmarks.corruption_times --images 1000

With fewer images (the default) the time for 1000 is the time per image times 1000: images do not depend on each other.
"""

from __future__ import annotations

import argparse
import time

import torch

from fastnull.record import provenance, write_json
from fastnull.robustness.corruptions import CORRUPTIONS, SEVERITIES, corrupt

SIZE, FULL = 224, 1000


def make_photographs(count: int) -> torch.Tensor:
    """Overlapping crops of scikit-image's astronaut, [count, 3, 224, 224] in [0, 1]."""
    from skimage.data import astronaut

    picture = torch.from_numpy(astronaut().copy()).permute(2, 0, 1).float() / 255
    room = picture.shape[1] - SIZE
    places = [(37 * k % room, 101 * k % room) for k in range(count)]
    return torch.stack([picture[:, top : top + SIZE, left : left + SIZE] for top, left in places])


def main() -> None:
    """Measure, print a table and, with --out, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16, metavar="N", help="images measured (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch (default: its own choice)")
    parser.add_argument("--only", nargs="+", default=list(CORRUPTIONS), metavar="NAME", help="corruptions")
    parser.add_argument("--out", metavar="FILE", help="file for the numbers (.json)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    images = make_photographs(args.images)
    rows = {}
    for name in args.only:
        corrupt(images[:2], name, 3)  # pictures, matrices and libraries are made once
        started = time.perf_counter()
        for severity in SEVERITIES:
            corrupt(images, name, severity)
        seconds = time.perf_counter() - started
        rows[name] = {"seconds": seconds, "seconds_for_1000": seconds * FULL / args.images}
        print(f"{name:<20}{seconds:>8.2f} s{rows[name]['seconds_for_1000']:>10.1f} s for {FULL} images", flush=True)
    slowest = max(rows, key=lambda name: rows[name]["seconds"])
    print(f"slowest: {slowest}, {rows[slowest]['seconds_for_1000']:.0f} s for {FULL} images at 5 severities")
    if args.out:
        about = {"images": args.images, "threads": torch.get_num_threads(), "size": SIZE}
        write_json(args.out, {"corruptions": rows, **about, "provenance": provenance()})


if __name__ == "__main__":
    main()
