"""evaluate(): accuracy on clean, attacked and corrupted images and on published test sets, with the protocol.

Results are saved after each measurement, and partial counts every 30 seconds, so a killed run can be resumed. A file
with another protocol raises an error. Under torchrun the images are split over the processes.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset

from fastnull.checks import check_device, is_out_of_memory
from fastnull.data.classes import check_same_classes
from fastnull.data.image_files import ImageFiles, to_pixels
from fastnull.data.sources import Samples
from fastnull.data.view import View
from fastnull.noise import Noise
from fastnull.paths import check_output
from fastnull.progress import progress_bar
from fastnull.record import provenance, remove_left_over, write_json
from fastnull.rng import preserved
from fastnull.robustness.attacks.auto import attacks_for
from fastnull.robustness.attacks.base import check_logits, is_broken, model_logits
from fastnull.robustness.batches import Batch, EvaluationData
from fastnull.robustness.corruptions import frost_source
from fastnull.robustness.measurements import (
    GRADIENT_ATTACKS,
    Measurement,
    clean_and_attacked,
    corrupted,
    noisy,
    pixel_encoder,
    plain,
)
from fastnull.robustness.metrics import Accuracy
from fastnull.robustness.protocol import (
    AS_GIVEN,
    data_digest,
    dtype_name,
    normalisation,
    resumed,
    tensor_digest,
    weights_digest,
)
from fastnull.robustness.settings import ATTACKS, EvaluationSettings
from fastnull.robustness.suites import FOLDER_SUITES, open_suite, suite_classes
from fastnull.robustness.table import eps_name, summarize
from fastnull.vit import frozen

if TYPE_CHECKING:
    from fastnull.encoder.frozen import FrozenEncoder

SAVE_SECONDS = 30.0
"""Seconds between two saves of the counts within a measurement."""
WORST = "correctly classified images, each until the first point that fools the model (worst iterate)"
SYNC_ROUNDS = 8
"""Batches per process between two synchronisations."""


# iterating a DataLoader draws from the global generators
@preserved()
def evaluate(
    model: nn.Module,
    data: tuple[Tensor, Tensor] | Dataset | DataLoader | None = None,
    settings: EvaluationSettings | None = None,
    *,
    source: nn.Module | None = None,
    noise: Noise | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Measure a model's accuracy (in %) on clean, attacked and corrupted images and on published test sets.

    Noise is keyed by (seed, index of the image), so results do not depend on batch size, number of processes or the
    global random state. The random state and the modes of the model's modules are restored. An image counts as robust
    if it and every point that the attack tried are classified correctly (see `final_iterate`). If a torch.distributed
    group exists, every process must make the same call; all return the whole result, and rank 0 writes it.

    Args:
        model: pixels in [0, 1] → logits [B, K] (or an output with `.logits`); evaluated in eval mode, in its own dtype.
        data: images [n, C, H, W] in [0, 1] and classes [n]; or a map-style data set of such pairs; or a DataLoader of
            such batches, in a fixed order. None: root/imagenet-val, if a suite needs it.
        settings: what to measure and how; None: the defaults.
        source: for transfer attacks, which are computed on this model and tested on `model`; same classes.
        noise: for suite `noise`, from any model whose site has the same shape. Image i gets noise i mod M. Its
            permutation, which has the same norm, is measured too.
        changes: fields of EvaluationSettings that override `settings`: evaluate(model, data, suites=("pgd",)).

    Returns:
        {"protocol": what was measured and how, "results": {"clean": %, "clean_top5": %, "fgsm": {"1/255": %, …},
        "pgd": {…}, …, "cw": %, "noise": {"learned": %, "permuted": %}, "corruptions": {name: {"1": %, …}},
        "imagenet-a": %, …, "imagenet-c": {name: {"1": %, …}}}, "images": {measurement: {"n", "skipped": [file, …]}},
        "summary": see fastnull.robustness.table.summarize}.

    Raises:
        TypeError: data of an unknown kind, or a setting that does not exist or is of another type.
        ValueError: no images, a shuffled DataLoader, pixels outside [0, 1], labels out of range, NaN logits (the
            message names the suite), an unknown suite or corruption, eps out of range, a test set that is missing or
            has another layout, a file that cannot be read, a DataLoader with several processes, or `out` with another
            protocol (the message names the differences).
    """
    settings = replace(settings or EvaluationSettings(), **changes)
    device = _on_device(model, source, settings)
    _check_folders(model, settings)
    if "noise" in settings.suites and noise is None:
        raise ValueError("suite noise needs a noise")
    main, transform = _images(model, data, settings, device)
    small = main if settings.corruption_size is None else _before_resizing(model, main, settings, device)
    worst = source is None and not settings.final_iterate
    encoder = pixel_encoder(model) if worst and set(GRADIENT_ATTACKS) & set(settings.suites) else None
    protocol = _protocol(model, source, noise, settings, main, transform, device) | {
        "attacked": WORST if worst else "all images, to the last step",
        "backend": "autograd" if encoder is None else f"FrozenEncoder, {encoder.backend}",
    }
    if set(ATTACKS) & set(settings.suites) and " float16" in f" {protocol['dtype']}":
        warnings.warn("gradients of sure predictions vanish in float16: attacks look weak; use bfloat16", stacklevel=3)
    record: dict[str, Any] = {"protocol": protocol, "results": {}, "images": {}, "summary": {}}
    out = None if settings.out is None else Path(settings.out)
    if out is not None and settings.resume and out.exists():
        record = resumed(out, protocol)
    todo = _measurements(model, source, noise, settings, worst, encoder)
    todo = [measurement for measurement in todo if _lookup(record["results"], measurement.path) is None]
    first = not _is_distributed() or distributed.get_rank() == 0
    if out is not None and first:
        remove_left_over(out)
    on_main = sum(measurement.suite is None for measurement in todo)
    known = main.total if main is not None and on_main else 0
    total = None if known is None else on_main * known
    with progress_bar(total, show=settings.progress and first, unit="image") as bar:
        run = _Run(record, out if first else None, bar)
        for measurement in todo:
            bar.set_description(measurement.name)
            images, mask = small if measurement.path[0] == "corruptions" else main, None
            if measurement.suite is not None and settings.root is not None:
                found = open_suite(measurement.suite, settings.root, model, skip_bad=settings.skip_bad)
                images, mask = _batches(found.images, settings, device), found.mask
                if bar.total is not None and images.total is not None:
                    bar.total += images.total  # a folder's images are counted when it is opened
            assert images is not None
            run.measure(model, measurement, images, mask)
    record["summary"] = summarize(record["results"])
    return record


def _on_device(model: nn.Module, source: nn.Module | None, settings: EvaluationSettings) -> torch.device:
    """Check the models, move them to the device of the settings and return it."""
    for name, module in (("model", model), ("source", source)):
        if not isinstance(module, nn.Module) and not (name == "source" and module is None):
            raise TypeError(f"{name} must be a torch.nn.Module; got {type(module).__name__}")
    if source is not None:
        check_same_classes(model, source, name="source")
    if settings.out is not None:
        check_output(settings.out, {}, name="out")
    device = settings.device
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    device = check_device(device)
    model.to(device)
    if source is not None:
        source.to(device)
    return device


def _check_folders(model: nn.Module, settings: EvaluationSettings) -> None:
    """Check that every suite's folder exists, with classes that the model has."""
    for part in settings.folders:
        if settings.root is None:
            raise ValueError(f"suite {part.partition('/')[0]} needs root, the folder of the published test sets")
        suite_classes(part, settings.root, model)


def _images(
    model: nn.Module,
    data: tuple[Tensor, Tensor] | Dataset | DataLoader | None,
    settings: EvaluationSettings,
    device: torch.device,
) -> tuple[EvaluationData | None, str]:
    """The images of all suites without a folder (None if there is no such suite), and their transform."""
    transform = getattr(data, "shown", None) or AS_GIVEN
    if not settings.on_data:
        return None, transform
    if data is None:
        if settings.root is None:
            raise ValueError(f"suites {', '.join(settings.suites)} need data, or a root with imagenet-val")
        found = open_suite("imagenet-val", settings.root, model, skip_bad=settings.skip_bad)
        data, transform = found.images, f"imagenet-val, {found.transform}"
    images = _batches(data, settings, device)
    world = distributed.get_world_size() if _is_distributed() else 1
    if world > 1 and not images.indexed:
        raise ValueError("a DataLoader cannot be split over processes: give the data set, which has an index")
    return images, transform


def _before_resizing(
    model: nn.Module, main: EvaluationData | None, settings: EvaluationSettings, device: torch.device
) -> EvaluationData | None:
    """The images at the size at which they are corrupted."""
    if main is None or "corruptions" not in settings.suites:
        return main
    if not isinstance(main.data, (ImageFiles, Samples)):
        raise ValueError(
            f"corruption_size needs image files, a folder or a data set of timm, to resize them after the corruption; "
            f"got {type(main.data).__name__}"
        )
    assert settings.corruption_size is not None
    show = replace(View.of(model), size=(settings.corruption_size,) * 2, crop=1.0).evaluation()
    files = copy.copy(main.data)
    files.transform = lambda image: to_pixels(show(image))
    return _batches(files, settings, device)


def _batches(data: Any, settings: EvaluationSettings, device: torch.device) -> EvaluationData:
    return EvaluationData(data, settings.batch_size, settings.limit, device, settings.workers, settings.seed)


def _protocol(
    model: nn.Module,
    source: nn.Module | None,
    noise: Noise | None,
    settings: EvaluationSettings,
    main: EvaluationData | None,
    transform: str,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that the results depend on. A file contains results of one protocol only."""
    suites, limit = settings.suites, settings.limit
    return {
        "suites": list(suites),
        "subset": "all" if limit is None else f"{limit}, drawn evenly over the classes by the seed",
        "n": None if main is None else main.total,
        "data": None if main is None else _digest(main),
        "transform": transform,
        "folders": {name: _described(name, model) for name in suites if name in FOLDER_SUITES},
        "skip_bad": settings.skip_bad,
        **normalisation(model),
        "weights": weights_digest(model),
        "attacked_model": "itself" if source is None else weights_digest(source),
        "noise": None if noise is None else f"{len(noise)} at {noise.site}, {tensor_digest(noise.tokens)}",
        "eps": [eps_name(value, settings.norm) for value in settings.eps],
        "norm": settings.norm,
        "steps": settings.steps,
        "step_size": "eps / 4",
        "restarts": settings.restarts,
        "random_start": True,
        "autoattack": _autoattack(source or model, main) if main is not None and "autoattack" in suites else None,
        "corruptions": list(settings.corruptions),
        "severities": [int(severity) for severity in settings.severities],
        "corruption_source": "computed in memory in float32, not the published files",
        "corruption_size": settings.corruption_size,
        "frost": frost_source(settings.frost_folder),
        "seed": settings.seed,
        "dtype": dtype_name(model, device),
        "provenance": provenance(device),
    }


def _measurements(
    model: nn.Module, source: nn.Module | None, noise: Noise | None, settings: EvaluationSettings, worst: bool,
    encoder: FrozenEncoder | None,
) -> list[Measurement]:  # fmt: skip
    """All measurements of the settings, in the order of the results."""
    found = clean_and_attacked(model, source or model, settings, worst, encoder)
    if noise is not None and "noise" in settings.suites:
        found += noisy(model, noise)
    if "corruptions" in settings.suites:
        found += corrupted(model, settings)
    return found + [Measurement(tuple(part.split("/")), plain(model), part) for part in settings.folders]


class _Run:
    """The record of a run, and the file that it is saved to."""

    def __init__(self, record: dict[str, Any], out: Path | None, bar: Any) -> None:
        self.record, self.out, self.bar = record, out, bar
        self._saved = time.monotonic()

    def measure(self, model: nn.Module, measurement: Measurement, data: EvaluationData, mask: Tensor | None) -> None:
        """Measure one number, resuming where a killed run stopped, and save it."""
        path, results = measurement.path, self.record["results"]
        started = self.record.pop("partial", None)
        if started is None or started["measurement"] != measurement.name:
            started = {"measurement": measurement.name, "position": 0, "images": 0, "top1": 0, "top5": 0, "skipped": []}
        accuracy, skipped = self._counted(model, measurement, data, mask, started)
        if accuracy.images == 0:
            raise ValueError("data must hold at least one image that can be read; got none")
        if measurement.suite is None:
            self._check_same_images(measurement, accuracy.images)
        _store(results, path, accuracy.top1)
        if path == ("clean",):
            results["clean_top5"] = accuracy.top5
        if measurement.suite is not None or skipped:
            self.record["images"][measurement.name] = {"n": accuracy.images, "skipped": skipped}
        self.record.pop("partial", None)
        self.record["summary"] = summarize(results)
        self._write()

    def _counted(
        self, model: nn.Module, measurement: Measurement, data: EvaluationData, mask: Tensor | None,
        started: Mapping[str, Any],
    ) -> tuple[Accuracy, list[str]]:  # fmt: skip
        """Counts over all images and processes, and names of the files that could not be read."""
        rank, world = (distributed.get_rank(), distributed.get_world_size()) if _is_distributed() else (0, 1)
        position = started["position"]
        if self.bar.total is not None:
            self.bar.total -= position
        rounds = math.inf
        if world > 1:
            assert data.total is not None
            rounds = math.ceil((data.total - position) / (world * data.batch_size))
        mine = Accuracy()
        skipped: list[str] = []
        batches = data.batches(position, rank, world)
        for done in itertools.count(1):
            try:
                batch = next(batches, None) if done <= rounds else None
                if batch is not None:
                    _count(mine, model, measurement, batch, mask)
            except (KeyboardInterrupt, MemoryError, OSError, RuntimeError) as error:
                if world == 1 and position > started["position"]:
                    self._keep(measurement, position, mine, [*started["skipped"], *skipped], started)
                if not is_out_of_memory(error):
                    raise
                kept = "" if self.out is None else f"; finished results are in {self.out}, for resuming"
                raise torch.OutOfMemoryError(
                    f"{measurement.name}: {data.device} has no memory left; smaller batches need less{kept} "
                    f"({_first_line(error)})"
                ) from error
            if batch is not None:
                skipped += [data.name(index) for index in batch.bad]
            before = position
            if world > 1:
                position = min(started["position"] + done * world * data.batch_size, data.total or 0)
            elif batch is not None:
                position += len(batch.labels) + len(batch.bad)
            self.bar.update(position - before)
            ended = done >= rounds if world > 1 else batch is None
            due = self.out is not None and time.monotonic() - self._saved >= SAVE_SECONDS
            if ended or (due if world == 1 else done % SYNC_ROUNDS == 0):
                counts, names = _gathered(mine, skipped)
                names = started["skipped"] + names
                if ended:
                    counts.add(started)
                    return counts, names
                self._keep(measurement, position, counts, names, started)
        raise AssertionError("unreachable")

    def _keep(
        self, measurement: Measurement, position: int, accuracy: Accuracy, skipped: list[str],
        started: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Save the counts up to a position, including those from before a resume."""
        counts = Accuracy()
        counts.add(accuracy.counts())
        counts.add(started)
        self.record["partial"] = {
            "measurement": measurement.name, "position": position, **counts.counts(), "skipped": skipped,
        }  # fmt: skip
        self._write()

    def _check_same_images(self, measurement: Measurement, images: int) -> None:
        protocol = self.record["protocol"]
        before = self.record["images"].get("all", {}).get("n")
        if before is None:
            self.record["images"]["all"] = {"n": images}
            if protocol["n"] is None:
                protocol["n"] = images
        elif before != images:
            raise ValueError(f"data must yield the same images every time; {measurement.name} saw {images} of {before}")

    def _write(self) -> None:
        if self.out is not None:
            write_json(self.out, self.record)
            self._saved = time.monotonic()


def _count(accuracy: Accuracy, model: nn.Module, measurement: Measurement, batch: Batch, mask: Tensor | None) -> None:
    if len(batch.labels) == 0:
        return
    try:
        with torch.no_grad(), frozen(model):
            logits = measurement.respond(batch.images, batch.labels, batch.indices)
        check_logits(is_broken(logits))
        if mask is not None:
            if logits.shape[1] != len(mask):
                raise ValueError(f"the model must have ImageNet's {len(mask)} classes; it has {logits.shape[1]}")
            logits = logits.masked_fill(~mask.to(logits.device), -math.inf)
        accuracy.update(logits, batch.labels)
    except ValueError as error:
        raise ValueError(f"{measurement.name}: {error}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _gathered(accuracy: Accuracy, skipped: list[str]) -> tuple[Accuracy, list[str]]:
    """Counts and names of all processes."""
    everyone: list[Any] = [(accuracy.counts(), skipped)]
    if _is_distributed():
        everyone = [None] * distributed.get_world_size()
        distributed.all_gather_object(everyone, (accuracy.counts(), skipped))
    total, names = Accuracy(), []
    for counts, theirs in everyone:
        total.add(counts)
        names += theirs
    return total, names


def _autoattack(model: nn.Module, data: EvaluationData) -> list[str]:
    """The attacks that AutoAttack runs for the model's number of classes."""
    some = next(data.batches()).images[:1]
    with torch.no_grad(), frozen(model):
        return list(attacks_for(model_logits(model, some).shape[1]))


def _digest(data: EvaluationData) -> str:
    """Digest of the first images. A DataLoader is read twice, to detect random order or random transforms."""
    digest = data_digest(data)
    if not data.indexed and data_digest(data) != digest:
        raise ValueError(
            "data must yield the same images in the same order every time; the first ones of this DataLoader differ "
            "between passes"
        )
    return digest


def _described(name: str, model: nn.Module) -> str:
    """Description of a folder suite in the protocol: its transform and number of classes."""
    layout, view = FOLDER_SUITES[name], View.of(model)
    size = f"{view.size[0]}x{view.size[1]}"
    how = f"as published, {size}" if layout.as_is else f"resized, crop {view.crop:g}, {view.interpolation}, {size}"
    masked = layout.classes < 1000 and not layout.arrays
    return f"{how}; {layout.classes} classes{', the others masked out' if masked else ''}"


def _lookup(results: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = results
    for key in path:
        value = value.get(key, {})
    return value if value != {} else None


def _store(results: dict[str, Any], path: tuple[str, ...], value: float) -> None:
    for key in path[:-1]:
        results = results.setdefault(key, {})
    results[path[-1]] = value
