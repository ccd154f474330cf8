"""The finetuning loop: open the data, train, validate, save; stop and resume at any step."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from fastnull.checks import as_labels, check_images
from fastnull.data.classes import classes_of, match_classes, model_names, names_of, shortened
from fastnull.data.image_files import to_pixels
from fastnull.data.sources import (
    EpochBatches,
    Samples,
    Source,
    embedded,
    hold_out,
    loader,
    open_source,
    seed_everything,
)
from fastnull.data.subset import even_subset, labels_of
from fastnull.data.view import View
from fastnull.distributed.processes import Processes, explained
from fastnull.distributed.sharded_state import write_shares
from fastnull.finetune.checkpoint import RunFolder, gathered_weights, save_weights, state_path
from fastnull.finetune.config import FinetuneConfig, recommended_lr
from fastnull.finetune.logs import Log
from fastnull.finetune.plan import make_plan
from fastnull.finetune.training import DivergenceError, FinetuneResult, Training
from fastnull.progress import progress_bar
from fastnull.rng import preserved
from fastnull.vit import NormalizedModel, unwrap

__all__ = ["DivergenceError", "FinetuneConfig", "FinetuneResult", "finetune"]

Data: TypeAlias = "Dataset[Any] | Sequence[Any]"

CHECK_BATCHES = 4
"""Batches of held-out images that judge the influence of a universal noise."""
_INIT_KEY = 0  # with the seed the key of a new head's weights


def finetune(
    config: FinetuneConfig,
    model: nn.Module | None = None,
    train_data: Data | None = None,
    val_data: Data | None = None,
) -> FinetuneResult:
    """Finetune a model as the configuration says.

    Ctrl-C (or SIGTERM) ends the run after the step it is in, saves its state and prints how to go on; a second one
    ends it at once. The global random generators are afterwards as before.

    Where a torch.distributed group exists, every process calls this and they train together: each takes its rows of
    every batch, and noise, losses and weights are those of one process up to rounding (drop path apart, which each
    draws for itself). The first one writes the files. With config.shard the model, trained in place, is afterwards
    sharded (torch's FSDP2), and `out` must be one folder for all processes.

    Args:
        config: the run.
        model: takes pixels in [0, 1] and returns logits [B, K]; trained in place. None makes the one that `config`
            names; with one given, the configuration's own model settings are only recorded.
        train_data: a dataset of (image, label), images [C, H, W] as bytes or floats in [0, 1], or a pair (images,
            labels) of tensors or NumPy arrays; None opens `config.data`. A label is a class number, or K probabilities
            (one-hot, or soft labels).
        val_data: as train_data, chooses the best epoch; None holds out config.val_fraction of the training data.

    Raises:
        ValueError, TypeError: bad settings or data; a folder with a run in it; settings changed on resume.
        DivergenceError: the loss or a weight became NaN or Inf.
        KeyboardInterrupt: on Ctrl-C, after saving.
        PeerError: another process of the run has ended.
    """
    if config.lr is None:  # a model that is handed over is not the one that the configuration names
        made = config.model if model is None else getattr(unwrap(model), "recipe", {}).get("name")
        config = replace(config, lr=recommended_lr(made))
    processes = Processes()
    device = processes.device(config.device)
    if config.shard and processes.alone:
        warnings.warn("shard: there is one process, which holds everything; torchrun starts several", stacklevel=2)
    folder = processes.from_first(lambda: _folder(config))
    folder = folder if processes.first else None
    with ExitStack() as stack:
        stack.enter_context(preserved())
        if device.type == "cuda":
            stack.enter_context(torch.random.fork_rng(devices=[device]))
        seed_everything(config.seed, _INIT_KEY)
        ready = prepare(config, device, model, train_data, val_data)
        train, validation = ready.train, ready.validation
        plan = make_plan(config, len(train), processes.world)
        training = Training(config, ready.model, plan, ready.num_classes, device, processes)
        state = processes.from_first(lambda: None if folder is None else _open(folder, config, stack))
        if state is not None:
            assert config.out is not None
            try:
                training.load_state_dict(state, state_path(config.out, state["step"]).with_suffix(".shares"))
            except (LookupError, TypeError, AttributeError) as error:
                raise ValueError(f"a state in {config.out} is damaged or of another version: {error!r}") from error
        if folder is not None:
            folder.rewind(training.step, training.history, 0 if state is None else state.get("lines", 0))
            if config.log is not None:
                log = Log(config.log, folder.path, config.to_dict())
                stack.callback(log.close)
                folder.log_to(log)
            synthesis = config.synthesis()
            folder.describe(
                config.to_dict(),
                device,
                step=training.step,
                plan=asdict(plan),
                synthesis=None if synthesis is None else asdict(synthesis),
                data={"train": len(train), "validation": 0 if validation is None else len(validation)},
                classes=ready.classes,
                processes=processes.world,
            )
        stop = stack.enter_context(_StopRequest(processes))
        with explained(processes):
            _train(training, train, validation, ready.num_classes, folder, stop)
    return training.result(*(None, None) if folder is None else folder.weights())


@dataclass(frozen=True)
class Prepared:
    """What a run starts from: data, and a model that takes it. `num_classes` are those of its logits, which `classes`
    names."""

    model: nn.Module
    train: Samples
    validation: Samples | None
    num_classes: int
    classes: list[str] | None


def prepare(
    config: FinetuneConfig,
    device: torch.device,
    model: nn.Module | None = None,
    train_data: Data | None = None,
    val_data: Data | None = None,
) -> Prepared:
    """Open the data, make the model and show it an image. Arguments and errors are those of `finetune`."""
    source = _source(config, train_data)
    if source.classes is not None and len(source.classes) < 2:
        raise ValueError(f"training data must have at least two classes; it has only {shortened(source.classes)}")
    model = (_create_model(config, source) if model is None else model).to(device)
    labels = _match_classes(model, source)
    train, validation = _datasets(config, source, labels, val_data, model)
    num_classes = _try_out(model, train, validation, device)
    if num_classes < 2:
        raise ValueError(f"the model must have at least two classes to learn; its logits have {num_classes}")
    known = classes_of(model)
    return Prepared(model, train, validation, num_classes, known if isinstance(known, list) else source.classes)


def _train(
    training: Training,
    train: Samples,
    validation: Samples | None,
    num_classes: int,
    folder: RunFolder | None,
    stop: _StopRequest,
) -> None:
    """The loop: epochs of steps, each closed by validation."""
    config, plan, processes = training.config, training.plan, training.processes
    rows = processes.rows(plan.batch_size, pairs=config.mixing)
    order = EpochBatches(len(train), plan.batch_size, plan.steps_per_epoch, config.seed, rows)
    batches = loader(train, order, workers=config.workers, device=training.device, persistent=True)
    held_out = check = None
    if validation is not None:
        share, size = _share(validation, processes), -(-config.batch_size // processes.world)
        held_out = loader(share, size, workers=config.workers, device=training.device)
        if config.augment == "universal":
            even = _even(share, CHECK_BATCHES * size, config.seed)
            check = loader(even, size, workers=config.workers, device=training.device)
    bar = progress_bar(plan.steps, show=config.progress and processes.first, initial=training.step, desc=config.augment)
    with bar:
        while training.step < plan.steps:
            order.epoch, order.start = divmod(training.step, plan.steps_per_epoch)
            if training.lacks_bank:
                refreshing = _RefreshBatches(train, training, stop)
                _log(folder, training.refresh(refreshing, refreshing.check_images(check)))
            training.model.train()
            for images, labels in batches:
                training.train_step(images, _checked(images, labels, num_classes))
                bar.update()
                ends_epoch = training.step % plan.steps_per_epoch == 0 or training.step == plan.steps
                if training.step % config.log_every == 0 or ends_epoch:
                    record = training.step_record()
                    bar.set_postfix(_shown(record, training), refresh=False)
                    _log(folder, record)
                if ends_epoch:
                    break
                stop.agree()
                if stop.requested or (config.checkpoint_every and training.step % config.checkpoint_every == 0):
                    _save(training, folder)
                stop.leave_if_requested(training)
            accuracy = None if held_out is None else _accuracy(training, held_out, num_classes)
            _log(folder, training.end_epoch(accuracy))
            _save(training, folder, best=training.best_epoch == training.epoch)
            stop.agree()
            stop.leave_if_requested(training)


def _even(data: Dataset[Any], count: int, seed: int) -> Subset[Any]:
    """`count` images, drawn evenly over the classes where these are known: the first ones may be of a few alone."""
    labels = labels_of(data)
    if labels is None:
        labels = torch.zeros(len(data), dtype=torch.long)  # type: ignore[arg-type]
    return Subset(data, even_subset(labels, count, seed).tolist())


def _folder(config: FinetuneConfig) -> RunFolder | None:
    if config.out is None:
        return None
    return RunFolder(config.out, config.to_dict(), overwrite=config.overwrite, resume=config.resume, force=config.force)


def _open(folder: RunFolder, config: FinetuneConfig, stack: ExitStack) -> dict[str, Any] | None:
    """Make the folder ready, and this process's alone until the end; the state to go on from, where there is one."""
    stack.enter_context(folder.locked())
    folder.open()
    return folder.load_state() if config.resume else None


def _share(validation: Samples, processes: Processes) -> Dataset[Any]:
    """The held-out images of this process: every world-th, so that the first of all are shared out too."""
    if processes.alone:
        return validation
    if len(validation) < processes.world:
        raise ValueError(f"{processes.world} processes need a held-out image each; there are {len(validation)}")
    return Subset(validation, range(processes.rank, len(validation), processes.world))


def _source(config: FinetuneConfig, train_data: Data | None) -> Source:
    if train_data is None:
        return open_source(config.data, data_dir=config.data_dir, download=config.download)
    data = _as_dataset("train_data", train_data)
    names = names_of(data)
    return Source(data, config.num_classes if names is None else len(names), names)


def _create_model(config: FinetuneConfig, source: Source) -> nn.Module:
    from fastnull.models import create_model

    num_classes = config.num_classes or source.num_classes
    if num_classes is None:
        raise ValueError("num_classes is needed: the data does not say how many classes it has")
    # not every architecture has drop path
    regularised: dict[str, Any] = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    model = create_model(
        config.model,
        num_classes=num_classes,
        pretrained=config.pretrained,
        checkpoint=config.checkpoint,
        img_size=config.img_size,
        **regularised,
    )
    if model.classes is None or source.classes is None:
        return model
    try:
        match_classes(model.classes, source.classes)
    except ValueError:
        warnings.warn(
            f"{config.checkpoint}: its head is for other classes ({shortened(model.classes)}); the model's new head "
            f"for {shortened(source.classes)} starts fresh",
            UserWarning,
            stacklevel=4,
        )
        model.network.reset_classifier(num_classes)
        model.classes = None
    return model


def _match_classes(model: nn.Module, source: Source) -> list[int] | None:
    """The label of each of the data's classes; a model without names of its classes gets them from the data."""
    if source.classes is None:
        return None
    labels = match_classes(classes_of(model), source.classes, name="the training data")
    inner = unwrap(model)
    if isinstance(inner, NormalizedModel):
        inner.classes = model_names(classes_of(model), source.classes)
    return labels


def _datasets(
    config: FinetuneConfig, source: Source, labels: list[int] | None, val_data: Data | None, model: nn.Module
) -> tuple[Samples, Samples | None]:
    """Training images through random transforms, held-out ones through evaluation's; tensors stay as they are."""
    if not source.transforms and (config.auto_augment or config.reprob):
        raise ValueError("auto_augment and reprob are for image files; these images are tensors and stay as they are")
    augmented = plain = channels = None
    train = source.train
    if train is None:
        train = embedded(config.data, model)[0]
    elif source.transforms:
        view = View.of(model)
        augmented, plain, channels = (
            view.training(
                crop_scale=config.crop_scale,
                hflip=config.hflip,
                color_jitter=config.color_jitter,
                auto_augment=config.auto_augment,
                reprob=config.reprob,
            ),
            view.evaluation(),
            view.channels,
        )
    if val_data is not None:
        held_out = _as_dataset("val_data", val_data)
        names = names_of(held_out)
        known = classes_of(model)
        if names is None:
            matched = labels  # whoever gives none numbers as in the training data
        else:
            matched = match_classes(known if isinstance(known, list) else source.classes, names, name="val_data")
        return Samples(train, augmented, channels, config.seed, labels), Samples(held_out, classes=matched)
    kept, held = hold_out(train, config.val_fraction, config.val_seed)
    validation = None if held is None else Samples(held, plain, channels, config.seed, labels)
    return Samples(kept, augmented, channels, config.seed, labels), validation


def _as_dataset(name: str, data: Data) -> Dataset[Any]:
    if isinstance(data, (tuple, list)) and data and hasattr(data[0], "dtype"):  # the images as one array
        data = _pair(name, data)
    if isinstance(data, DataLoader) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise TypeError(
            f"{name} must be a dataset with a length and an index, or a pair of tensors, so that its order can be "
            f"resumed; got {type(data).__name__}"
        )
    if len(data) == 0:
        raise ValueError(f"{name} must hold at least one image; it is empty")
    return data  # type: ignore[return-value]


def _pair(name: str, pair: Sequence[Any]) -> TensorDataset:
    """(images, labels), each a tensor, an array or a list, as a dataset."""
    if len(pair) != 2:
        raise ValueError(f"{name} must be a pair of tensors, images and labels; got {len(pair)}")
    try:
        images, labels = (torch.as_tensor(part) for part in pair)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a pair of tensors, images and labels: {error}") from error
    if images.ndim == 0 or labels.ndim == 0 or len(images) != len(labels):
        raise ValueError(
            f"{name} must hold a label for each image; got images {list(images.shape)}, labels {list(labels.shape)}"
        )
    return TensorDataset(images, labels)


@torch.no_grad()
def _try_out(model: nn.Module, train: Samples, validation: Samples | None, device: torch.device) -> int:
    """Show the model an image of each set, so that a wrong size or label is told before anything is written; returns
    its classes."""
    classes = _classes(model, "training", *_first(train, "training"), device)
    if validation is not None:
        _classes(model, "held-out", *_first(validation, "held-out"), device)
    return classes


def _first(data: Samples, which: str) -> tuple[Tensor, Any]:
    sample = data.base[0]
    if not isinstance(sample, Sequence) or len(sample) != 2:
        what = f"{len(sample)} values" if isinstance(sample, Sequence) else type(sample).__name__
        raise TypeError(f"the {which} data must yield pairs (image, label); got {what}")
    return data[0]


def _classes(model: nn.Module, which: str, image: Tensor, label: Any, device: torch.device) -> int:
    """Classes of the logits for an image [C, H, W], with which its label must go."""
    if not isinstance(image, Tensor):
        raise TypeError(f"the {which} images must be tensors [C, H, W]; got {type(image).__name__}")
    images = to_pixels(image.unsqueeze(0), device)
    # a grey image would pass for a coloured one: the mean and the standard deviation broadcast
    channels = model.mean.shape[1] if isinstance(model, NormalizedModel) else None
    check_images(images, name=f"{which} images", channels=channels)
    training = model.training
    try:
        logits = model.eval()(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"the model does not take the {which} images {list(image.shape)}: {error}") from error
    finally:
        model.train(training)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise TypeError(f"model must return logits [B, K]; got {type(logits).__name__}")
    as_labels(default_collate([label]), logits.shape[1], 1, name=f"{which} labels")
    return logits.shape[1]


def _checked(images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The labels as training takes them. On the host, before the batch travels: no step waits for the device."""
    if images.dtype != torch.uint8:
        check_images(images)
    return as_labels(labels, num_classes, len(images))


@torch.no_grad()  # no inference_mode: what FSDP2 gathers into would be of no use for training
def _accuracy(training: Training, batches: DataLoader[Any], num_classes: int) -> float:
    """Top-1 accuracy in %, in eval mode."""
    model = training.evaluated
    model.eval()
    correct, total = torch.zeros((), dtype=torch.long, device=training.device), 0
    # all gather the weights as often as the process with the most batches: there the last images count no more
    more = training.processes.greatest(len(batches)) - len(batches) if training.sharded else 0
    for images, labels in batches:
        labels = _checked(images, labels, num_classes)
        classes = labels.argmax(1) if labels.ndim == 2 else labels  # of soft labels the likeliest
        with training.autocast():
            logits = model(to_pixels(images, training.device))
        correct += (logits.argmax(1) == classes.to(training.device)).sum()
        total += len(labels)
    for _ in range(more):
        with training.autocast():
            model(to_pixels(images, training.device))
    counts = training.processes.total(torch.stack([correct, torch.full_like(correct, total)]))
    return 100 * int(counts[0]) / int(counts[1])


class _RefreshBatches:
    """Training batches for universal synthesis: in a new order each round, apart from that of the training steps."""

    def __init__(self, train: Samples, training: Training, stop: _StopRequest) -> None:
        self._train, self._training, self._stop = train, training, stop
        self._batch_size = training.plan.batch_size
        self._round = 0

    def __len__(self) -> int:
        return len(self._train) // self._batch_size

    def __iter__(self) -> Iterator[Tensor]:
        training = self._training
        # beyond any epoch, so that no image is drawn as a training step draws it
        rows = training.processes.rows(self._batch_size)
        order = EpochBatches(len(self._train), self._batch_size, len(self), training.config.seed, rows)
        order.epoch = 2**32 + training.step * 2**16 + self._round
        self._round += 1
        for images, _ in loader(self._train, order, workers=training.config.workers, device=training.device):
            # the state at the start of this epoch is saved already, and the bank will be learned from it again
            self._stop.agree()
            self._stop.leave_if_requested(training)
            yield to_pixels(images, training.device)

    def check_images(self, held_out: DataLoader[Any] | None) -> list[Tensor]:
        """Images to judge the influence on: held-out ones, or without those a further round's."""
        source = self if held_out is None else (to_pixels(images, self._training.device) for images, _ in held_out)
        return [images for images, _ in zip(source, range(CHECK_BATCHES), strict=False)]


class _StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request that the loop meets between steps; a second one interrupts.

    A signal to one process is a request to all, after the same step: `agree` tells them.

    Attributes:
        requested: number of the signal, 0 without one.
    """

    def __init__(self, processes: Processes) -> None:
        self.requested = 0
        self._processes = processes
        self._seen = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._seen:
            raise KeyboardInterrupt
        self._seen = number

    def agree(self) -> None:
        """Fill `requested` with what any process has seen; all call this after the same step."""
        self.requested = self._processes.greatest(self._seen)

    def leave_if_requested(self, training: Training) -> None:
        """Raise KeyboardInterrupt (SystemExit after SIGTERM) with a line that says how to go on."""
        if not self.requested:
            return
        line = f"stopped after step {training.step} of {training.plan.steps}"
        if training.config.out is not None:
            line += f"; go on with resume=True, out={training.config.out!r} (fastnull finetune: --resume)"
        if self._processes.first:
            print(f"\n{line}", file=sys.stderr)
        if self.requested == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt(line)


def _shown(record: dict[str, Any], training: Training) -> dict[str, str]:
    shown: dict[str, str] = {name: f"{record[name]:.3g}" for name in ("loss", "influence", "norm") if name in record}
    if training.history and "val_accuracy" in training.history[-1]:
        shown["val"] = f"{training.history[-1]['val_accuracy']:.1f} %"
    return shown


def _log(folder: RunFolder | None, record: dict[str, Any]) -> None:
    if folder is not None:
        with _telling_what_is_left(folder, f"cannot log step {record['step']}"):
            folder.log(record)


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


def _save(training: Training, folder: RunFolder | None, *, best: bool = False) -> None:
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
