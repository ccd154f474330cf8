"""The changes that `fastnull selftest --tiles` tries: each fits its tables, and reaches the launch it is for alone."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install fastnull[triton]")

import torch

from fastnull.kernels import CANDIDATES, LAUNCHERS, attention, gelu, layer_norm, linear_gelu, patch_project
from fastnull.kernels.tiles import change_name, changed, with_change
from fastnull.ops import dispatch

TABLES = (
    [(attention, table) for table in (attention.FORWARD, attention.GRADIENT)]
    + [(module, module.TILES) for module in (gelu, layer_norm, linear_gelu, patch_project)]
)  # fmt: skip


def test_every_change_fits_every_entry_of_its_tables() -> None:
    """A misspelt field would only show on a GPU."""
    for module, table in TABLES:
        names = {change_name(change) for change in module.CANDIDATES}
        assert len(names) == len(module.CANDIDATES), "results tell them apart by name"
        for entry in table:
            assert all(replace(entry, **change) for change in module.CANDIDATES)
    assert {id(changes) for changes in CANDIDATES.values()} == {id(module.CANDIDATES) for module, _ in TABLES}
    assert CANDIDATES.keys() <= LAUNCHERS.keys()


def test_a_change_holds_for_its_launch_alone() -> None:
    seen: list[layer_norm.RowTile] = []
    tile = layer_norm.TILES[0]

    def launcher(fails: bool) -> None:
        seen.append(layer_norm.row_tile(8)[1])
        other = threading.Thread(target=lambda: seen.append(changed(tile)))
        other.start()
        other.join()
        if fails:
            raise RuntimeError("out of resources")

    with_change(launcher, {"rows": 7, "warps": 2})(False)
    with pytest.raises(RuntimeError):
        with_change(launcher, {"rows": 5})(True)
    seen.append(changed(tile))
    assert seen == [replace(tile, rows=7, warps=2), tile, replace(tile, rows=5), tile, tile]


def test_tiles_are_implementations_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried where they are asked for; a result that names one finds it."""
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    cpu = torch.device("cpu")
    assert "triton" in dispatch.implementations("dgelu_", cpu)
    assert len(dispatch.implementations("dgelu_", cpu)) <= 3
    named = {f"triton {change_name(change)}" for change in gelu.CANDIDATES}
    assert named <= dispatch.implementations("dgelu_", cpu, tiles=True).keys()
