"""The training state of a sharded run, through torch.distributed.checkpoint (DCP): a folder with a file per process.

Every process writes its shards, and any number of processes can read them. The files are safetensors, because DCP's own
format has a pickle, which could run code. Everything that is not sharded (step counts, buffers, settings) is in the
state file beside the folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.distributed.processes import Processes
from fastnull.distributed.sharded import is_sharded

Tables = dict[str, dict[str, Any]]
"""`model`, `ema` (if any) and `optimizer.<parameter>` → name → tensor or plain value."""


def state_of(
    model: nn.Module, average: nn.Module | None, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The sharded tensors by name, and the rest: tensors and plain values, equal in all processes."""
    tables, moments = _tables(model, average, optimizer)
    shards = {f"{table}.{name}": value for table, name, value in _entries(tables) if is_sharded(value)}
    rest: Tables = {table: {} for table in tables}
    for table, name, value in _entries(tables):
        if not is_sharded(value):
            rest[table][name] = value
    return shards, {"tables": rest, "param_groups": moments["param_groups"]}


def load_state_of(
    folder: Path,
    rest: dict[str, Any],
    model: nn.Module,
    average: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    processes: Processes,
) -> None:
    """Load a state of `state_of`, with the shards from the folder of `write_shards`. The model may be unsharded.

    Raises:
        ValueError: the state is of another model or optimiser.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

    tables, moments = _tables(model, average, optimizer)
    reader = dcp.HuggingFaceStorageReader(str(folder))
    written = reader.read_metadata().state_dict_metadata
    targets = {f"{table}.{name}": value for table, name, value in _entries(tables)}
    here = {f"{table}.{name}" for table, name, _ in _entries(rest["tables"])}
    missing = sorted((written.keys() | here) ^ targets.keys())
    if missing:
        raise ValueError(f"{len(missing)} tensors are only in the model or only in the state ({missing[0]}, ...)")
    for name, about in written.items():
        if about.size != targets[name].shape:
            raise ValueError(f"{name} is {list(about.size)} in the state and {list(targets[name].shape)} in the model")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended: one process
            dcp.load({name: targets[name] for name in written}, storage_reader=reader, no_dist=processes.alone)
    except CheckpointException as error:
        raise _first_of(error) from error
    for table, values in rest["tables"].items():
        tables[table].update(values)
    moments["param_groups"] = rest["param_groups"]
    set_model_state_dict(model, tables["model"])
    if average is not None:
        set_model_state_dict(average, tables["ema"])
    set_optimizer_state_dict(model, optimizer, moments)


def load_whole_state(
    state: dict[str, Any], model: nn.Module, average: nn.Module | None, optimizer: torch.optim.Optimizer
) -> None:
    """Load the state of a run that was not sharded: every process takes its shards of the whole tensors.

    Raises:
        KeyError, RuntimeError, ValueError: the state is of another model or optimiser.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    whole = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, state["model"], options=whole)
    if average is not None:
        set_model_state_dict(average, state["ema"], options=whole)
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    moments = state["optimizer"]
    named: dict[str, Any] = {
        "state": {order[index]: values for index, values in moments["state"].items()},
        "param_groups": [
            {**group, "params": [order[index] for index in group["params"]]} for group in moments["param_groups"]
        ],
    }
    set_optimizer_state_dict(model, optimizer, named, options=whole)


def write_shards(folder: Path, shards: dict[str, Tensor], processes: Processes) -> dict[str, str]:
    """Write the shards of `state_of` and return the SHA-256 of each file. All processes must call it.

    Raises:
        OSError: in all processes, if one could not write.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    beside = folder.with_name(f".{folder.name}.tmp")
    processes.from_first(lambda: shutil.rmtree(beside, ignore_errors=True))
    try:
        dcp.save(shards, storage_writer=dcp.HuggingFaceStorageWriter(str(beside), save_distributed=True))
    except CheckpointException as error:
        raise _first_of(error) from error
    mine = sorted(os.listdir(beside))[processes.rank :: processes.world]
    digests = processes.gathered({name: _digest(beside / name) for name in mine})

    def rename() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)

    processes.from_first(rename)
    return {name: digest for part in digests for name, digest in part.items()}


def check_shards(folder: Path, files: dict[str, str]) -> None:
    """Raise ValueError unless the folder holds exactly these files, each with its SHA-256."""
    held = sorted(os.listdir(folder)) if folder.is_dir() else []
    if held != sorted(files):
        raise ValueError(f"training state {folder} is incomplete: it holds {len(held)} files of {len(files)}")
    for name, digest in files.items():
        if _digest(folder / name) != digest:
            raise ValueError(f"training state {folder / name} is damaged: its checksum differs")


def _tables(
    model: nn.Module, average: nn.Module | None, optimizer: torch.optim.Optimizer
) -> tuple[Tables, dict[str, Any]]:
    """The tensors of the state (missing moments are created), and the optimiser's state_dict with them."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    moments: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    tables: Tables = {"model": get_model_state_dict(model)}
    if average is not None:
        tables["ema"] = get_model_state_dict(average)
    return tables | {f"optimizer.{name}": values for name, values in moments["state"].items()}, moments


def _entries(tables: Tables) -> list[tuple[str, str, Any]]:
    return [(table, name, value) for table, values in tables.items() for name, value in values.items()]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _first_of(error: Any) -> Exception:
    """The error of the first process that failed; DCP's own error is not an Exception."""
    rank, (cause, _) = next(iter(error.failures.items()))
    if isinstance(cause, OSError):
        return OSError(cause.errno, f"process {rank}: {cause.strerror or cause}")
    return RuntimeError(f"process {rank}: {cause}")
