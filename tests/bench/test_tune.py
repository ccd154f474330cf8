"""`fastnull bench --tune` without a GPU: what it chooses from measured times, and what FASTNULL_TILES does with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastnull.bench import run as bench
from fastnull.cli import main

tuner: Any = bench._suite("tune")


@dataclass(frozen=True)
class Tile:
    size: int
    warps: int = 4
    head: int = 64
    tokens: int = 64
    since: int = 80


@pytest.fixture
def kernels() -> ModuleType:
    """A module with a table; its launch writes 1 into every output, and what 5 warps compute is wrong."""
    module = ModuleType("fastnull.kernels.pretend")
    module.TABLE = (Tile(1), Tile(2, tokens=256), Tile(3, tokens=256, since=100), Tile(4, tokens=200))
    module.CANDIDATES = ({"warps": 2}, {"warps": 4}, {"warps": 5}, {"warps": 8}, {"warps": 16})
    return module


def problem_of(module: ModuleType) -> Callable[[Tile], Any]:
    def problem(entry: Tile) -> Any:
        output = torch.zeros(3)

        def call() -> None:
            (tile,) = module.TABLE
            assert tile.size == entry.size
            if tile.warps == 16:
                raise RuntimeError("out of resources")
            output.fill_(2.0 if tile.warps == 5 else 1.0)

        return tuner.Problem(call, [output])

    return problem


def test_the_fastest_right_tile_is_taken(kernels: ModuleType) -> None:
    before = kernels.TABLE
    timer = {2: 0.5, 4: 1.0, 5: 0.1, 8: 0.98, 16: 0.1}

    def milliseconds(call: Callable[[], None]) -> float:
        call()
        return timer[kernels.TABLE[0].warps]

    ((name, found, lines),) = tuner.tuned([(kernels, "TABLE", problem_of(kernels))], 90, milliseconds)
    assert name == "pretend.TABLE"
    # entry 2 is for newer GPUs; entry 3 lies behind entry 1, for older ones: both stay
    assert [entry["warps"] for entry in found] == [2, 2, 4, 4]
    assert [line[:4] for line in lines] == [
        ("pretend.TABLE", "0", "1.0000", "0.5000"),
        ("pretend.TABLE", "1", "1.0000", "0.5000"),
    ]
    assert kernels.TABLE is before


def test_a_run_that_is_stopped_keeps_the_tables_it_measured(
    kernels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install fastnull[triton]")

    def tables() -> Any:
        yield kernels, "TABLE", problem_of(kernels)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(tuner, "provenance", lambda device: {})
    monkeypatch.setattr("triton.testing.do_bench", lambda call, **options: 1.0)
    monkeypatch.setattr(tuner, "_tables", tables)
    with pytest.raises(KeyboardInterrupt):
        tuner.tune(tmp_path)
    written = json.loads((tmp_path / "tiles-nvidia-h200.json").read_text())
    assert written["device"] == "NVIDIA H200"
    assert [entry["warps"] for entry in written["tables"]["pretend.TABLE"]] == [4, 4, 4, 4]


def test_a_gain_within_the_noise_changes_nothing() -> None:
    entry, other = Tile(1), Tile(1, warps=8)
    assert tuner.fastest(entry, {entry: 1.0, other: 0.98}) == entry
    assert tuner.fastest(entry, {entry: 1.0, other: 0.96}) == other


def test_tuning_needs_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--tune"]) == 2
    assert "--tune needs a CUDA device: torch sees none" in capsys.readouterr().err


triton = pytest.importorskip("triton", reason="Triton is not installed: pip install fastnull[triton]")


def loaded(path: Path) -> subprocess.CompletedProcess[str]:
    """The forward's tiles of attention in a process whose FASTNULL_TILES is this file, on a pretended H200."""
    code = (
        "import torch; torch.cuda.is_available = lambda: True; torch.cuda.get_device_name = lambda: 'NVIDIA H200';"
        "from fastnull.kernels import attention, gelu; print(attention.FORWARD, len(gelu.TILES))"
    )
    environment = {**os.environ, "FASTNULL_TILES": str(path)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_measured_tables_replace_those_they_name(tmp_path: Path) -> None:
    from fastnull.kernels.attention import AttentionTile

    path = tmp_path / "tiles.json"
    tile = AttentionTile(64, 64, 16, 32, 2)
    path.write_text(json.dumps({"device": "NVIDIA H200", "tables": {"attention.FORWARD": [asdict(tile)]}}))
    assert loaded(path).stdout.strip() == f"({tile},) 1"
    path.write_text(json.dumps({"device": "NVIDIA A100", "tables": {"attention.FORWARD": [asdict(tile)]}}))
    done = loaded(path)
    assert "measured on NVIDIA A100, not on NVIDIA H200" in done.stderr
    assert str(tile) not in done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no file of `fastnull bench --tune`"),
        ('{"tables": {}}', "is no file of `fastnull bench --tune`"),
        (
            '{"device": "NVIDIA H200", "tables": {"gelu.TILES": [{"wide": 1}]}}',
            "table gelu.TILES does not fit Pointwise",
        ),
        ('{"device": "NVIDIA H200", "tables": {"gelu.TILES": []}}', "table gelu.TILES is empty"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tiles.json").write_text(text)
    assert message in loaded(tmp_path / "tiles.json").stderr


def test_every_table_is_tuned() -> None:
    sources = (path.read_text() for path in (Path(bench.ROOT) / "kernels").glob("*.py"))
    named = {name for source in sources for name in re.findall(r'= table\(\s*"(\w+\.\w+)"', source)}
    assert named == {f"{module.__name__.rsplit('.', 1)[-1]}.{attribute}" for module, attribute, _ in tuner._tables()}
    assert len(named) == 7


def test_every_candidate_fits_its_table() -> None:
    """A misspelt field would only show on a GPU."""
    from dataclasses import replace

    for module, attribute, _ in tuner._tables():
        for entry in getattr(module, attribute):
            assert {replace(entry, **change) for change in module.CANDIDATES}
