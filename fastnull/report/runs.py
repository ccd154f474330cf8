"""Reading evaluated runs: results, and the settings and costs of their finetuning."""

from __future__ import annotations

import json
import os
import statistics
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastnull.checks import as_type, check_choice, check_number
from fastnull.finetune.checkpoint import FREE_KEYS, flat
from fastnull.finetune.config import FinetuneConfig
from fastnull.paths import check_readable
from fastnull.record import read_json
from fastnull.robustness.protocol import read_result
from fastnull.synthesis.config import SynthesisConfig

RESULTS, SETTINGS, METRICS = "results.json", "config.json", "metrics.jsonl"

_NAMES = {
    # augmentation (the label in tables and legends): name in a sentence
    "none": "finetuning on clean images",
    "random": "random noise",
    "universal": "universal noise",
    "per_image": "noise per image",
    "boundary": "boundary noise",
    "free": "free noise",
    "adversarial": "adversarial training",
    "trades": "TRADES",
}
_SITES = {"patch": "tokens", "block0": "block 0", "pixels": "pixels"}
_NO_SITE = ("none", "free", "adversarial", "trades")
_PROTOCOL: dict[str, Any] = {
    "n": int | None, "norm": str, "steps": int, "restarts": int, "severities": tuple[int, ...], "subset": Any,
    "data": Any, "step_size": Any, "seed": Any, "corruption_source": Any, "dtype": Any,
}  # fmt: skip
"""Entries of a protocol that reports read, with types."""
_SHOWN = (
    "augment", "site", "seed", "epochs", "opt", "lr", "batch_size", "trades_beta", "attack_steps", "attack_eps",
    "attack_step_size",
)  # fmt: skip
"""Settings of a run's configuration that reports read."""


@dataclass(frozen=True)
class Run:
    """One evaluated model.

    Attributes:
        method: label; runs with the same one differ only in their seed.
        record: result of `evaluate`.
        settings: the finetuning's config.json; empty for a result without one.
        spent: of the finetuning: forward_passes (per training image), steps, seconds, synthesis_percent, and the mean
            influence of its noise in the second half, if there is noise.
    """

    method: str
    seed: int
    record: Mapping[str, Any]
    settings: Mapping[str, Any]
    spent: Mapping[str, float]

    @property
    def config(self) -> Mapping[str, Any]:
        """The finetuning's configuration; empty for a result without one."""
        return self.settings.get("config", {})


def load_runs(sources: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """The runs in files and folders, sorted by augmentation and site. Raises as `write_report`."""
    runs = []
    for source in map(Path, sources):
        if not source.exists():
            raise FileNotFoundError(f"there are no results at {source}")
        found = sorted(source.rglob(RESULTS)) if source.is_dir() else [source]
        if not found:
            raise FileNotFoundError(f"{source} holds no {RESULTS}: run `fastnull evaluate` or `fastnull demo` first")
        runs += [_load_run(path) for path in found]
    augments, sites = list(_NAMES), list(_SITES)
    runs.sort(
        key=lambda run: (
            (augments.index(run.config["augment"]), sites.index(run.config["site"]))
            if run.config
            else (len(augments), 0)
        )
    )
    return _told_apart(runs)


def _load_run(path: Path) -> Run:
    record = read_result(path)
    with _about(path):
        _check(record["protocol"], "protocol", _PROTOCOL)
        _check(record["protocol"], "protocol", {"provenance": Mapping[str, Any]}, ())
    about = path.parent / SETTINGS
    if not about.exists() or path.name != RESULTS:
        return Run(path.stem if path.name != RESULTS else path.parent.name, 0, record, {}, {})
    settings = read_json(about)
    with _about(about):
        _check_settings(settings)
    config = settings["config"]
    return Run(method_label(config), config["seed"], record, settings, _spent(path.parent, settings))


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Add the file to errors inside the block."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _check(
    values: Mapping[str, Any], where: str, kinds: Mapping[str, Any], needed: Collection[str] | None = None
) -> None:
    """Raise TypeError or ValueError unless `values` has all `needed` names (default: all) with the right types."""
    for name, kind in kinds.items():
        if name in values:
            as_type(f"{where}[{name!r}]", values[name], kind)
        elif needed is None or name in needed:
            raise ValueError(f"{where} lacks {name}")


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError unless the settings that reports read are valid."""
    _check(settings, "it", {"config": Mapping[str, Any], "data": Mapping[str, Any]})
    _check(settings, "it", {"plan": Mapping[str, Any], "synthesis": Mapping[str, Any] | None}, ())
    config, synthesis = settings["config"], settings.get("synthesis")
    # other versions may have more or fewer settings
    _check(config, "config", {**typing.get_type_hints(FinetuneConfig), "noise": Mapping[str, Any] | None}, _SHOWN)
    check_choice("config['augment']", config["augment"], _NAMES)
    check_choice("config['site']", config["site"], _SITES)
    if synthesis is not None:
        _check(synthesis, "synthesis", typing.get_type_hints(SynthesisConfig), ("limit", "eps"))
    elif config["augment"] not in _NO_SITE:
        raise ValueError(f"synthesis must be a mapping where augment is {config['augment']!r}; got None")
    _check(settings["data"], "data", {"train": int})
    check_number("data['train']", settings["data"]["train"], 1)


def method_label(config: Mapping[str, Any]) -> str:
    """Label of a configuration's augmentation in tables and legends."""
    if config.get("label"):
        return config["label"]
    label = config["augment"]
    return label if config["augment"] in _NO_SITE else f"{label}, {_SITES[config['site']]}"


def phrase(run: Run) -> str:
    """Name of a run's method in a sentence."""
    if not run.config:
        return run.method
    if run.config.get("label"):
        return run.config["label"]
    label, name = run.config["augment"], _NAMES[run.config["augment"]]
    detail = run.method.removeprefix(label).removeprefix(",").strip()
    return f"{name} in {detail}" if detail and run.config["augment"] not in _NO_SITE else f"{name} {detail}".strip()


def _spent(folder: Path, settings: Mapping[str, Any]) -> dict[str, float]:
    """Cost and time of a run, from the last epoch in metrics.jsonl; empty without one."""
    records = read_metrics(folder / METRICS)
    epochs = [record for record in records if record.get("kind") == "epoch"]
    if not epochs:
        return {}
    last = epochs[-1]
    with _about(folder / METRICS):
        _check(last, "an epoch", {"cost": float, "step": float, "seconds": Mapping[str, Any]})
        seconds = {name.replace("_share", "_fraction"): value for name, value in last["seconds"].items()}  # 0.1's name
        _check(seconds, "an epoch's seconds", {"total": float, "synthesis_fraction": float})
        for record in records:
            _check(record, "a record", {"step": float, "influence": float}, ())
    late = [
        record["influence"] for record in records if "influence" in record and record.get("step", 0) >= last["step"] / 2
    ]
    return {
        "forward_passes": last["cost"] / settings["data"]["train"],
        "steps": last["step"],
        "seconds": seconds["total"],
        "synthesis_percent": 100 * seconds["synthesis_fraction"],
        **({"influence": statistics.fmean(late)} if late else {}),
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records in a metrics.jsonl, [] if it does not exist. Raises ValueError with file and line."""
    if not path.exists():
        return []
    check_readable("metrics", path)
    records = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}, must hold a record; it holds a {type(record).__name__}")
        records.append(record)
    return records


def _told_apart(runs: list[Run]) -> list[Run]:
    """Add to a method's label the settings in which its runs differ: means are over seeds only.

    Labels from the user do not change.
    """
    named = []
    for run in runs:
        own = flat(run.config)
        same = [flat(other.config) for other in runs if other.method == run.method]
        free = FREE_KEYS | {"seed", "checkpoint"}
        keys = [] if run.config.get("label") else [key for key in own if key not in free]
        differing = [key for key in keys if any(config.get(key) != own[key] for config in same)]
        label = ", ".join([run.method, *(f"{key} {own[key]}" for key in differing)])
        named.append(replace(run, method=label))
    counts: dict[tuple[str, int], int] = {}
    unique = []
    for run in named:
        count = counts[run.method, run.seed] = counts.get((run.method, run.seed), 0) + 1
        unique.append(run if count == 1 else replace(run, method=f"{run.method} ({count})"))
    return unique
