"""`fastnull bench --tune`: which tile of each launch table is the fastest on this GPU; FASTNULL_TILES takes the result.

Each entry of a table that fits this GPU is timed at sizes of its own class, against the candidates listed beside the
table. One that does not compile, does not fit or gives another result is out; an entry changes only for a gain above
MARGIN, so that noise changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastnull.bench import format_table
from fastnull.record import provenance, write_json

MARGIN = 0.03
"""Least gain in time for which an entry is replaced."""
ROWS = 256 * 197
"""Tokens of a batch of ViT-B/16."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.uint8: 1.0}
"""Largest difference between two tiles' results, over the largest value; a byte is a code and may round to its
neighbour."""
Tile = Any


@dataclass(frozen=True)
class Problem:
    """A launch whose time an entry decides.

    Attributes:
        call: launches with the tables as they are.
        outputs: what it writes.
    """

    call: Callable[[], None]
    outputs: Sequence[Tensor]


def tune(out: str | Path) -> Path:
    """Measure every table, print what changed, and write `tiles-<gpu>.json` into the folder `out`."""
    from triton.testing import do_bench

    def milliseconds(call: Callable[[], None]) -> float:
        return float(do_bench(call, warmup=20, rep=60, return_mode="median"))

    capability = torch.cuda.get_device_capability()
    device = torch.cuda.get_device_name()
    path = Path(out) / f"tiles-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    found: dict[str, list[dict[str, Any]]] = {}
    times: list[tuple[str, ...]] = []
    for name, entries, lines in tuned(_tables(), 10 * capability[0] + capability[1], milliseconds):
        found[name] = entries
        times += lines
        # after each table, so that a run that is stopped keeps what it measured
        write_json(path, {"device": device, "tables": found, "times": times, "provenance": provenance("cuda")})
        print(format_table([("table", "entry", "was ms", "is ms", "tile"), *lines]), flush=True)
    return path


def tuned(
    tables: Iterable[tuple[ModuleType, str, Callable[[Tile], Problem]]],
    capability: int,
    milliseconds: Callable[[Callable[[], None]], float],
) -> Iterator[tuple[str, list[dict[str, Any]], list[tuple[str, ...]]]]:
    """Of one table after the other its name, its entries with their fastest tiles as JSON, and a line an entry.

    Args:
        tables: module of kernels, name of its table, and entry → the problem to time it by.
        capability: 80, 90, ...: entries for newer GPUs are left as they are.
        milliseconds: times a call.
    """
    for module, attribute, problem_of in tables:
        name = f"{module.__name__.rsplit('.', 1)[-1]}.{attribute}"
        lines: list[tuple[str, ...]] = []
        entries = list(getattr(module, attribute))
        for index, entry in enumerate(entries):
            if getattr(entry, "since", 0) > capability or _hidden(entries, index, capability):
                continue
            times = timed(module, attribute, entry, problem_of(entry), milliseconds)
            best = fastest(entry, times)
            entries[index] = best
            lines.append((name, str(index), f"{times[entry]:.4f}", f"{times[best]:.4f}", str(best)))
        yield name, [asdict(tile) for tile in entries], lines


def _hidden(entries: Sequence[Tile], index: int, capability: int) -> bool:
    """Whether an earlier entry for this GPU takes the same sizes: the table holds it for older GPUs."""
    entry = entries[index]
    if not hasattr(entry, "since"):
        return False
    return any(e.since <= capability and e.head >= entry.head and e.tokens >= entry.tokens for e in entries[:index])


def timed(
    module: ModuleType,
    attribute: str,
    entry: Tile,
    problem: Problem,
    milliseconds: Callable[[Callable[[], None]], float],
) -> dict[Tile, float]:
    """Milliseconds of the entry and of every candidate that runs and is right."""
    with only(module, attribute, entry):
        problem.call()
        expected = [output.clone() for output in problem.outputs]
        times = {entry: milliseconds(problem.call)}
    for change in module.CANDIDATES:
        tile = replace(entry, **change)
        if tile in times:
            continue
        with only(module, attribute, tile):
            try:
                for output in problem.outputs:
                    output.zero_()
                problem.call()
                if all(_same(a, b) for a, b in zip(problem.outputs, expected, strict=True)):
                    times[tile] = milliseconds(problem.call)
            except Exception as reason:  # whatever the compiler or the launch refuses: the tile is out
                print(f"{module.__name__} {tile}: {type(reason).__name__}", flush=True)
    return times


def fastest(entry: Tile, times: dict[Tile, float]) -> Tile:
    """The tile of the least time; the entry itself where the gain is not above MARGIN."""
    best = min(times, key=lambda tile: times[tile])
    return best if times[best] < (1 - MARGIN) * times[entry] else entry


@contextmanager
def only(module: ModuleType, attribute: str, tile: Tile) -> Iterator[None]:
    """Run the block with a table of this tile alone."""
    before = getattr(module, attribute)
    setattr(module, attribute, (tile,))
    try:
        yield
    finally:
        setattr(module, attribute, before)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype == torch.uint8:
        return bool((a.int() - b.int()).abs().max() <= TOLERANCE[a.dtype])
    return bool((a.float() - b.float()).abs().max() <= TOLERANCE[a.dtype] * b.float().abs().max())


def _randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def _layer_norm(tile: Tile) -> Problem:
    from fastnull.kernels import layer_norm

    x, y, dx = (_randn(1, ROWS, tile.width) for _ in range(3))
    shift, rstd = _randn(tile.width, dtype=torch.float32), torch.empty(ROWS, device="cuda")

    def call() -> None:
        layer_norm.layer_norm_out(x, None, None, shift, 1e-6, y, None, rstd)
        layer_norm.layer_norm_dx_out(x, y, None, rstd, x, dx)

    return Problem(call, [y, dx])


def _gelu(tile: Tile) -> Problem:
    from fastnull.kernels import gelu

    z, h = _randn(1, ROWS, 3072), _randn(1, ROWS, 3072)
    code, bias = torch.empty(ROWS, 3072, device="cuda", dtype=torch.uint8), _randn(3072, dtype=torch.float32)

    def call() -> None:
        gelu.gelu_out(z, bias, False, h, code)
        gelu.dgelu_(h, code)

    return Problem(call, [h, code])


def _linear_gelu(tile: Tile) -> Problem:
    from fastnull.kernels import linear_gelu

    x, w, h = _randn(ROWS, 768), _randn(3072, 768) / 768**0.5, _randn(ROWS, 3072)
    w2, dz = _randn(768, 3072) / 768**0.5, _randn(ROWS, 3072)
    code, bias = torch.empty(ROWS, 3072, device="cuda", dtype=torch.uint8), _randn(3072, dtype=torch.float32)

    def call() -> None:
        linear_gelu.linear_gelu_out(x, w, bias, False, h, code)
        linear_gelu.linear_dgelu_out(x, w2, code, dz)

    return Problem(call, [h, code, dz])


def _attention(tile: Tile, backward: bool) -> Problem:
    from fastnull.kernels import attention

    tokens = {64: 50, 80: 65, 256: 197, 272: 257}.get(tile.tokens, 577)
    batch, head = max(16, 256 * 197 // tokens // 4), tile.head if tile.head <= 64 else 80
    qkv, dqkv = _randn(batch, tokens, 3, 12, head), _randn(batch, tokens, 3, 12, head)
    o, do = _randn(batch, tokens, 12, head), _randn(batch, tokens, 12, head)
    if backward:
        return Problem(lambda: attention.attention_dqkv_out(qkv, do, head**-0.5, dqkv), [dqkv])
    return Problem(lambda: attention.attention_out(qkv, head**-0.5, o), [o])


def _patch_project(tile: Tile) -> Problem:
    from fastnull.kernels import patch_project

    noise, out = _randn(64, 3, 224, 224, dtype=torch.float32), _randn(64, 3, 224, 224, dtype=torch.float32)
    basis = torch.linalg.qr(_randn(3072, 768, dtype=torch.float32)).Q.contiguous()
    return Problem(lambda: patch_project.patch_project_out(noise, basis, 32, True, None, out), [out])


def _tables() -> Iterator[tuple[ModuleType, str, Callable[[Tile], Problem]]]:
    from fastnull.kernels import attention, gelu, layer_norm, linear_gelu, patch_project

    yield layer_norm, "TILES", _layer_norm
    yield gelu, "TILES", _gelu
    yield linear_gelu, "TILES", _linear_gelu
    yield attention, "FORWARD", lambda tile: _attention(tile, backward=False)
    yield attention, "QUERY_GRADIENT", lambda tile: _attention(tile, backward=True)
    yield attention, "KEY_GRADIENT", lambda tile: _attention(tile, backward=True)
    yield patch_project, "TILES", _patch_project
