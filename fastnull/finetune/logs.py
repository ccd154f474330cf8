"""Logging to TensorBoard, Weights & Biases, Trackio or MLflow, in addition to metrics.jsonl.

The library is imported when the run starts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOGS = ("tensorboard", "wandb", "trackio", "mlflow")
PROJECT = "fastnull"

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}


class Log:
    """Sends the numbers of records to one of LOGS, named `kind/number` (step/loss, epoch/val_accuracy, ...).

    Args:
        kind: one of LOGS.
        folder: of the run; gives the run's name and holds TensorBoard's files.
        config: settings of the run, JSON-able.

    Raises:
        ImportError: the library is not installed.
    """

    def __init__(self, kind: str, folder: Path, config: dict[str, Any]) -> None:
        try:
            library: Any = importlib.import_module(_MODULES[kind])
        except ImportError as error:
            raise ImportError(f"log={kind!r} needs {kind} (pip install {kind}): {error}") from error
        self._send, self._finish = _OPENERS[kind](library, folder, config)

    def __call__(self, record: dict[str, Any]) -> None:
        """Send the numbers of one record of metrics.jsonl."""
        kind = record.get("kind", "run")
        numbers = {
            f"{kind}/{name}": float(value)
            for name, value in record.items()
            if name not in ("kind", "step") and isinstance(value, (int, float))
        }
        self._send(numbers, record["step"])

    def close(self) -> None:
        """Finish the log."""
        self._finish()


Opened = tuple[Callable[[dict[str, float], int], None], Callable[[], None]]


def _tensorboard(library: Any, folder: Path, config: dict[str, Any]) -> Opened:
    writer = library.SummaryWriter(str(folder / "tensorboard"))

    def send(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return send, writer.close


def _wandb(library: Any, folder: Path, config: dict[str, Any]) -> Opened:
    # trackio has the same interface
    run = library.init(project=PROJECT, name=folder.name, config=config)
    return lambda numbers, step: run.log(numbers, step=step), run.finish


def _mlflow(library: Any, folder: Path, config: dict[str, Any]) -> Opened:
    library.set_experiment(PROJECT)
    library.start_run(run_name=folder.name)
    library.log_params(config)
    return lambda numbers, step: library.log_metrics(numbers, step=step), library.end_run


_OPENERS: dict[str, Callable[[Any, Path, dict[str, Any]], Opened]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _wandb,
    "mlflow": _mlflow,
}
