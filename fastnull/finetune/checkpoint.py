"""The folder of a run: its configuration, metrics, and the training states from which it resumes exactly.

A state is one file: the output of torch.save, a mark and a SHA-256. It is written to a temporary file and renamed, so a
crash keeps the previous state. A damaged state is detected, and the previous one is used. States hold tensors and plain
values and are read with weights_only=True, so a file with code in it is refused. The shards of a sharded run are in a
folder beside the file, which holds their checksums.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.checks import refuse_renamed
from fastnull.distributed.sharded import whole_state_dict
from fastnull.distributed.sharded_state import check_shards
from fastnull.finetune.config import RENAMED
from fastnull.finetune.logs import Log
from fastnull.folder_lock import check_unlocked, locked
from fastnull.paths import same_setting
from fastnull.record import provenance, replacing, write_json
from fastnull.tensor_files import write_tensors
from fastnull.vit import NormalizedModel, unwrap

MARK = b"fastnull-state-1"
_DIGEST = hashlib.sha256().digest_size
_STATE = re.compile(r"state-(\d{9})\.pt")
_OWN_FILES = ("config.json", "metrics.jsonl", "best.safetensors", "last.safetensors")
RUN_FILES = (*_OWN_FILES, "state-*.pt", "state-*.shards")
"""Patterns of all files that a run writes in its folder."""

FREE_KEYS = frozenset(
    {"out", "overwrite", "resume", "checkpoint_every", "keep_last", "log_every", "progress", "workers", "device"}
    | {"label", "log", "cache", "accumulate", "channels_last", "compile", "shard", "force", "noise.seed"}
)
"""Settings that a resumed run may change, because they do not change what it computes. (Another device, `accumulate` or
`compile` may change the rounding.)"""
TIED_KEYS = frozenset({"model", "num_classes", "img_size", "opt", "start_fraction"})
"""Settings that `force` cannot change: a state cannot be read with other values, or the weights that were saved before
would not fit them."""
TIED_SWITCHES = frozenset({"ema_decay", "layer_decay", "weight_decay"})
"""Settings that `force` may change but not switch on or off, because a state would have other tensors or groups."""


class RunFolder:
    """The folder of a run.

    Args:
        path: the folder; `open` creates it.
        config: JSON-able settings of the run.
        overwrite: remove the files of an existing run, and nothing else.
        resume: resume the run in the folder; a folder without one starts a new run.
        force: with resume, allow other settings; `describe` records the changes.

    Attributes:
        changed: setting → `was` and `now`.
        run: identifier of the run in config.json and in its states; None before either exists.

    Raises:
        ValueError: the folder holds a run and neither overwrite nor resume is set (a run with these settings that wrote
            only its configuration does not count); a resumed run has other settings without `force`, or ones that
            `force` cannot change; another process writes in the folder.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: dict[str, Any],
        *,
        overwrite: bool = False,
        resume: bool = False,
        force: bool = False,
    ) -> None:
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self._config_file = self.path / "config.json"
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out must be a folder; {self.path} is a file")
        check_unlocked(self.path)
        self._config, self._overwrite, self._resume, self._force = config, overwrite, resume, force
        self.changed: dict[str, dict[str, Any]] = {}
        self.run: str | None = None
        self._check()
        self._log: Log | None = None
        self._lines = 0  # of metrics.jsonl

    def _check(self) -> None:
        held = self._held()
        if held and not (self._overwrite or self._resume or self._is_unstarted(held)):
            raise ValueError(
                f"out {self.path} holds a run already: resume=True resumes it, overwrite=True starts again"
            )
        if held and self._resume:
            self._compare(self._config)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and lock it for this process inside the block.

        Raises:
            ValueError: another process writes there, or has started a run there since the constructor's check.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path):
            self._check()  # another process may have written there in the meantime
            yield

    def open(self) -> None:
        """Create the folder, or remove the run that is overwritten. Call it when the new run is about to start."""
        self.path.mkdir(parents=True, exist_ok=True)
        held = self._held()
        if self._overwrite or (not self._resume and self._is_unstarted(held)):
            for file in held:
                file.unlink()
        for name in (*_OWN_FILES, "state-*.pt"):  # left by a killed process
            for half in self.path.glob(f".{name}.*.tmp"):
                half.unlink()
        for half in self.path.glob(".state-*.shards.tmp"):
            shutil.rmtree(half)
        for shards in self.path.glob("state-*.shards"):
            if not shards.with_suffix(".pt").exists():  # written before the state, which is missing
                shutil.rmtree(shards)

    def describe(
        self, config: dict[str, Any], device: torch.device | str, *, step: int = 0, data: Any = None, **extra: Any
    ) -> None:
        """Write config.json with the resolved settings and their provenance. A resumed run does not change it.

        Settings changed by `force` are recorded there under `changes`, with the step from which they hold, and in
        metrics.jsonl.

        Args:
            config, device, extra: contents of the file.
            step: last step before the run starts or resumes.
            data: description of the data, as JSON; a resumed run must have the same, and the same `classes` (in extra).

        Raises:
            ValueError: a resumed run has other data, without `force`.
        """
        before = self._written() if self._config_file.exists() else {}
        # the same number of images of other classes is other data
        for key, now in (("data", data), ("classes", extra.get("classes"))):
            if before.get(key) is not None and before[key] != now:
                self.changed[key] = {"was": before[key], "now": now}
        self._refuse()
        if before and not self.changed:
            return
        self.run = self.run or uuid.uuid4().hex
        about = {"run": self.run, "config": config, "data": data, **extra, "provenance": provenance(device)}
        if self.changed:
            about["changes"] = [*before.get("changes", ()), {"step": step, "changed": self.changed}]
        write_json(self._config_file, about)
        if self.changed:
            self.log({"kind": "settings", "step": step, "changed": self.changed})

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl, and send it to the log of `log_to`."""
        if self._log is not None:
            self._log(record)
        line = json.dumps(record, allow_nan=False) + "\n"
        self._lines += 1
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(self.metrics)) from error

    def log_to(self, log: Log) -> None:
        """Send later records to this log too."""
        self._log = log

    def rewind(self, step: int, epochs: Sequence[dict[str, Any]] = (), lines: int = 0) -> None:
        """Drop the metrics after `step` and an incomplete last line; the resumed run writes them again.

        If earlier lines are missing, warn and restore the records of epochs from the state.

        Args:
            step: of the state from which the run resumes.
            epochs: records of the epochs up to this step, from the state.
            lines: number of lines in metrics.jsonl when the state was written.
        """
        if not self.metrics.exists() and not (epochs or lines):
            return
        kept = [record for record in self._read_metrics() if record["step"] <= step]
        there = {record["step"] for record in kept if record.get("kind") == "epoch"}
        lost = [record for record in epochs if record["step"] not in there]
        if lost or len(kept) < lines:
            back = f"; those of {len(lost)} epochs are restored from the training state" if lost else ""
            count = max(lines - len(kept), len(lost))
            warnings.warn(
                f"{self.metrics} lacks {count} records up to step {step}{back}; the others are lost", stacklevel=2
            )
            kept = sorted([*kept, *lost], key=lambda record: record["step"])  # stable: keeps the order of the log
        with replacing(self.metrics) as beside:
            beside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._lines = len(kept)

    def _read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; warns about invalid lines, except an incomplete last one."""
        if not self.metrics.exists():
            return []
        *whole, rest = self.metrics.read_bytes().split(b"\n")
        found = []
        for number, line in enumerate([*whole, rest], start=1):
            try:
                record = json.loads(line)
                if isinstance(record, dict) and type(record.get("step")) is int:
                    found.append(record)
                    continue
            except ValueError:  # not JSON, or not UTF-8
                pass
            if number <= len(whole):
                warnings.warn(
                    f"{self.metrics}, line {number}, is not a record with a step and is ignored: {line[:80]!r}",
                    stacklevel=3,
                )
        return found

    def save_state(self, state: dict[str, Any], step: int, keep: int) -> Path:
        """Write the training state of a step and remove older states except the newest `keep` - 1."""
        path = state_path(self.path, step)
        write_state(path, {**state, "run": self.run, "lines": self._lines})
        # a damaged state of a later step is kept and does not count
        for old in [other for other in self.states() if other.name <= path.name][keep:]:
            old.unlink()
            shutil.rmtree(old.with_suffix(".shards"), ignore_errors=True)
        return path

    def load_state(self) -> dict[str, Any] | None:
        """The newest readable training state; None if there are no states.

        Raises:
            ValueError: no state can be read, or the newest is of another run.
        """
        problems = []
        for path in self.states():
            try:
                state = read_state(path)
                if not isinstance(state, dict) or type(state.get("step")) is not int:
                    raise ValueError(f"training state {path} has no step")
                if "shards" in state:
                    check_shards(path.with_suffix(".shards"), state["shards"])
            except ValueError as error:
                problems.append(str(error))
                warnings.warn(f"{error}; using the previous state", stacklevel=2)
                continue
            if self._config_file.exists() and state.get("run") != self.run:
                raise ValueError(
                    f"training state {path} is of another run ({state.get('run')}) than {self._config_file} "
                    f"({self.run}): move it to the folder of its run"
                )
            self.run = state.get("run")
            return state
        if problems:
            raise ValueError(f"no training state in {self.path} can be read: {'; '.join(problems)}")
        return None

    def weights(self) -> tuple[Path | None, Path | None]:
        """The files of the best and the last weights; None where there is none."""
        best, last = (self.path / f"{name}.safetensors" for name in ("best", "last"))
        return best if best.exists() else None, last if last.exists() else None

    def states(self) -> list[Path]:
        """The files of training states, newest first."""
        return sorted((path for path in self.path.glob("state-*.pt") if _STATE.fullmatch(path.name)), reverse=True)

    def _is_unstarted(self, held: list[Path]) -> bool:
        """Whether the folder holds only the configuration of a run with these settings that failed before it had a
        result, at an unreadable image for example."""
        if any(file not in (self._config_file, self.metrics) for file in held) or not self._config_file.exists():
            return False
        if self.metrics.exists() and self.metrics.stat().st_size:
            return False
        try:
            written = self._written()
        except ValueError:  # of another program
            return False
        return "run" in written and not self._differences(written["config"], self._config)

    def _held(self) -> list[Path]:
        return [self.path / name for name in _OWN_FILES if (self.path / name).exists()] + self.states()

    def _written(self) -> dict[str, Any]:
        try:
            written = json.loads(self._config_file.read_text(encoding="utf-8"))
            if not isinstance(written["config"], dict):
                raise TypeError("its config is not a mapping")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._config_file} is not the configuration of a run: {error}") from error
        return written

    def _compare(self, config: dict[str, Any]) -> None:
        """Find changed settings; raise for those that may not change."""
        if not self._config_file.exists():
            return
        written = self._written()
        refuse_renamed(f"{self._config_file}, of an earlier version,", written["config"], RENAMED, ValueError)
        self.run = written.get("run")
        self.changed = self._differences(written["config"], config)
        self._refuse()

    @staticmethod
    def _differences(written: dict[str, Any], config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        before, now = flat(written), flat(json.loads(json.dumps(config)))  # tuples become lists, as in the file
        keys = sorted((before.keys() | now.keys()) - FREE_KEYS)
        pairs = {key: {"was": before.get(key), "now": now.get(key)} for key in keys}
        return {key: pair for key, pair in pairs.items() if not same_setting(pair["was"], pair["now"])}

    def _refuse(self) -> None:
        """Raise for settings that changed without force, or that force cannot change."""
        tied = {
            key: pair
            for key, pair in self.changed.items()
            if key in TIED_KEYS or (key in TIED_SWITCHES and bool(pair["was"]) != bool(pair["now"]))
        }
        if tied:
            raise ValueError(
                f"cannot resume {self.path} with another value of {_listed(tied)}: start a new run from its weights "
                "(checkpoint)"
            )
        if self.changed and not self._force:
            raise ValueError(
                f"cannot resume {self.path} with other settings: {_listed(self.changed)}. force=True uses the new ones"
            )


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with nested settings named `noise.eps`."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return found


def _listed(changed: dict[str, dict[str, Any]]) -> str:
    return ", ".join(f"{key} (was {pair['was']!r}, now {pair['now']!r})" for key, pair in changed.items())


def state_path(folder: str | os.PathLike[str], step: int) -> Path:
    """The file of a run's training state; its shards are in the folder of the same name that ends with .shards."""
    return Path(folder) / f"state-{step:09d}.pt"


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state with its checksum, completely or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    with replacing(path) as beside, open(beside, "wb") as file:
        file.write(payload)
        file.write(MARK)
        file.write(hashlib.sha256(payload).digest())


def read_state(path: Path) -> dict[str, Any]:
    """Read a state of `write_state`.

    Raises:
        ValueError: truncated, damaged, not written by fastnull, or with other contents than tensors and plain values.
    """
    size = path.stat().st_size - len(MARK) - _DIGEST
    with open(path, "rb") as file:
        payload = file.read(max(0, size))
        mark, digest = file.read(len(MARK)), file.read(_DIGEST)
    if mark != MARK:
        raise ValueError(f"training state {path} is truncated or was not written by fastnull")
    if hashlib.sha256(payload).digest() != digest:
        raise ValueError(f"training state {path} is damaged: its checksum differs")
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"training state {path} cannot be read: {error}") from error


def gathered_weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights of a sharded model for `save_weights`, in the first process. All processes must call it."""
    return whole_state_dict(network_of(model))


def save_weights(model: nn.Module, path: Path, weights: dict[str, Tensor] | None = None, **about: Any) -> None:
    """Write a model's weights as safetensors; for models of `create_model`, with the settings that rebuild it.

    Names are those of the network inside a NormalizedModel, as in timm. `weights` (of `gathered_weights`) replace the
    model's own.
    """
    model = unwrap(model)
    network = network_of(model)
    with _state_dict_is(network, weights):
        if hasattr(model, "recipe"):
            from fastnull.models import save_checkpoint

            save_checkpoint(model, path, **about)
        else:
            write_tensors(path, network.state_dict(), {"about": json.dumps(about)})


@contextmanager
def _state_dict_is(network: nn.Module, weights: dict[str, Tensor] | None) -> Iterator[None]:
    """Replace tensors of the network's state_dict inside the block."""

    def put(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        state.update(weights or {})

    handle = network.register_state_dict_post_hook(put)
    try:
        yield
    finally:
        handle.remove()


def network_of(model: nn.Module) -> nn.Module:
    """The module whose weights `save_weights` writes."""
    model = unwrap(model)
    return unwrap(model.network) if isinstance(model, NormalizedModel) else model
