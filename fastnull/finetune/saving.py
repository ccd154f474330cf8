"""The files of a run as the loop uses them: opened, gone on from, logged to and saved in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

from torch import Tensor

from fastnull.distributed.processes import Processes
from fastnull.distributed.sharded_state import write_shares
from fastnull.finetune.checkpoint import RunFolder, gathered_weights, save_weights, state_path
from fastnull.finetune.config import FinetuneConfig
from fastnull.finetune.logs import Log
from fastnull.finetune.prepare import Prepared
from fastnull.finetune.training import Training


def run_folder(config: FinetuneConfig, processes: Processes) -> RunFolder | None:
    """The folder of a run, checked but not yet written to; None without one, and in all processes but the first."""
    folder = processes.from_first(lambda: _folder(config))
    return folder if processes.first else None


def resume_or_begin(training: Training, folder: RunFolder | None, ready: Prepared, stack: ExitStack) -> None:
    """Take over the state that `folder` holds, where the configuration says resume, and describe the run in it.

    The folder is this process's alone, and its log open, until `stack` ends.
    """
    config = training.config
    state = training.processes.from_first(lambda: None if folder is None else _open(folder, config, stack))
    if state is not None:
        assert config.out is not None
        try:
            training.load_state_dict(state, state_path(config.out, state["step"]).with_suffix(".shares"))
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"a state in {config.out} is damaged or of another version: {error!r}") from error
    if folder is None:
        return
    folder.rewind(training.step, training.history, 0 if state is None else state.get("lines", 0))
    if config.log is not None:
        sink = Log(config.log, folder.path, config.to_dict())
        stack.callback(sink.close)
        folder.log_to(sink)
    synthesis = config.synthesis()
    encoder = getattr(training.augment, "encoder", None)
    folder.describe(
        config.to_dict(),
        training.device,
        step=training.step,
        plan=asdict(training.plan),
        synthesis=None if synthesis is None else asdict(synthesis),
        encoder=None if encoder is None else encoder.about(),
        data={"train": len(ready.train), "validation": 0 if ready.validation is None else len(ready.validation)},
        classes=ready.classes,
        processes=training.processes.world,
    )


def log(folder: RunFolder | None, record: dict[str, Any]) -> None:
    """Write a line of metrics, where there is a folder."""
    if folder is not None:
        with _telling_what_is_left(folder, f"cannot log step {record['step']}"):
            folder.log(record)


def save(training: Training, folder: RunFolder | None, *, best: bool = False) -> None:
    """Write the last weights, those of a new best epoch, and then the state: what it says was done, was done."""
    if training.config.out is None:
        return
    training.check_finite()
    weights = None
    telling = nullcontext() if folder is None else _telling_what_is_left(folder, f"cannot save step {training.step}")
    with telling:
        state = training.state_dict()
        if training.sharded:
            shares = state_path(training.config.out, training.step).with_suffix(".shares")
            state["shares"] = write_shares(shares, training.shares(), training.processes)
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
def _telling_what_is_left(folder: RunFolder, what: str) -> Iterator[None]:
    """Adds to the error of a write from which state the run can go on."""
    try:
        yield
    except OSError as error:
        kept = folder.states()
        left = (
            f"the state of step {int(kept[0].stem[6:])} is whole: resume=True goes on from it"
            if kept
            else "there is no state yet"
        )
        file = f" ({error.filename})" if error.filename else ""
        raise OSError(error.errno, f"{what}: {error.strerror or error}{file}; {left}") from error


def _folder(config: FinetuneConfig) -> RunFolder | None:
    if config.out is None:
        return None
    return RunFolder(config.out, config.to_dict(), overwrite=config.overwrite, resume=config.resume, force=config.force)


def _open(folder: RunFolder, config: FinetuneConfig, stack: ExitStack) -> dict[str, Any] | None:
    """Make the folder ready, and this process's alone until the end; the state to go on from, where there is one."""
    stack.enter_context(folder.locked())
    folder.open()
    return folder.load_state() if config.resume else None
