"""The files of a run for the loop: open, resume, log and save."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

from torch import Tensor

from fastnull.distributed.processes import Processes
from fastnull.distributed.sharded_state import write_shards
from fastnull.finetune.checkpoint import RunFolder, gathered_weights, save_weights, state_path
from fastnull.finetune.config import FinetuneConfig
from fastnull.finetune.logs import Log
from fastnull.finetune.prepare import Prepared
from fastnull.finetune.training import Training


def run_folder(config: FinetuneConfig, processes: Processes) -> RunFolder | None:
    """The folder of a run, checked but not yet written; None without a folder, and if rank > 0."""

    def make() -> RunFolder | None:
        modes = {"overwrite": config.overwrite, "resume": config.resume, "force": config.force}
        return None if config.out is None else RunFolder(config.out, config.to_dict(), **modes)

    folder = processes.from_first(make)
    return folder if processes.first else None


def resume_or_begin(training: Training, folder: RunFolder | None, ready: Prepared, stack: ExitStack) -> None:
    """Load the state in `folder` if the configuration resumes, and write config.json.

    The folder is locked, and its log open, until `stack` ends.
    """
    config = training.config
    state = training.processes.from_first(lambda: None if folder is None else _open(folder, config, stack))
    if state is not None:
        assert config.out is not None
        try:
            training.load_state_dict(state, state_path(config.out, state["step"]).with_suffix(".shards"))
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"a state in {config.out} is damaged or of another version: {error!r}") from error
    if folder is None:
        return
    folder.rewind(training.step, training.history, 0 if state is None else state.get("lines", 0))
    if config.log is not None:
        sink = Log(config.log, folder.path, config.to_dict())
        stack.callback(sink.close)
        folder.log_to(sink)
    synthesis, cache = config.synthesis(), ready.cache
    encoder = getattr(training.augment, "encoder", None)
    folder.describe(
        config.to_dict(),
        training.device,
        step=training.step,
        plan=asdict(training.plan),
        synthesis=None if synthesis is None else asdict(synthesis),
        encoder=None if encoder is None else encoder.about(),
        data={
            "train": len(ready.train),
            "validation": 0 if ready.validation is None else len(ready.validation),
            # a cache has other random numbers
            **({"cached": list(cache.size)} if cache is not None and cache.view is not None else {}),
        },
        cache=None if cache is None else str(cache),
        classes=ready.classes,
        processes=training.processes.world,
    )


def log(folder: RunFolder | None, record: dict[str, Any]) -> None:
    """Write a line of metrics, if there is a folder."""
    if folder is not None:
        with _naming_the_last_state(folder, f"cannot log step {record['step']}"):
            folder.log(record)


def save(training: Training, folder: RunFolder | None, *, best: bool = False) -> None:
    """Write the last weights, those of a new best epoch, and then the state, which refers to them."""
    if training.config.out is None:
        return
    training.check_finite()
    weights = None
    naming = nullcontext() if folder is None else _naming_the_last_state(folder, f"cannot save step {training.step}")
    with naming:
        state = training.state_dict()
        if training.sharded:
            shards = state_path(training.config.out, training.step).with_suffix(".shards")
            state["shards"] = write_shards(shards, training.shards(), training.processes)
            weights = gathered_weights(training.evaluated)
        if folder is not None:  # the first process writes the rest
            _write(training, folder, state, weights, best=best)


def _write(
    training: Training, folder: RunFolder, state: dict[str, Any], weights: dict[str, Tensor] | None, *, best: bool
) -> None:
    about = {"step": training.step, "epoch": training.epoch, "augment": training.config.augment}
    if best:
        path = folder.path / "best.safetensors"
        save_weights(training.evaluated, path, weights, **about, val_accuracy=training.best_accuracy)
    save_weights(training.evaluated, folder.path / "last.safetensors", weights, **about)
    folder.save_state(state, training.step, training.config.keep_last)


@contextmanager
def _naming_the_last_state(folder: RunFolder, what: str) -> Iterator[None]:
    """Add to an error of writing the state from which the run can resume."""
    try:
        yield
    except OSError as error:
        kept = folder.states()
        left = (
            f"the state of step {int(kept[0].stem[6:])} is complete: resume=True resumes from it"
            if kept
            else "there is no state yet"
        )
        file = f" ({error.filename})" if error.filename else ""
        raise OSError(error.errno, f"{what}: {error.strerror or error}{file}; {left}") from error


def _open(folder: RunFolder, config: FinetuneConfig, stack: ExitStack) -> dict[str, Any] | None:
    """Lock and prepare the folder until the end of `stack`; return the state to resume from, if any."""
    stack.enter_context(folder.locked())
    folder.open()
    return folder.load_state() if config.resume else None
