"""evaluate(): clean accuracy, accuracy under attack and under corruptions, with the protocol beside the numbers.

Every number is written as soon as it is known, so a killed run continues where it was; a file made under another
protocol is refused.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastnull.checks import check_choice, check_number
from fastnull.progress import progress_bar
from fastnull.record import provenance, write_json
from fastnull.robustness.attacks import apgd, fgsm, pgd
from fastnull.robustness.attacks.base import NORMS, check_logits, is_broken, model_logits
from fastnull.robustness.corruptions import CORRUPTIONS, DEMO_CORRUPTIONS, SEVERITIES, corrupt
from fastnull.robustness.metrics import Accuracy
from fastnull.robustness.protocol import (
    Batches,
    data_digest,
    dtype_name,
    normalisation,
    open_data,
    resumed,
    weights_digest,
)
from fastnull.robustness.table import eps_name, summarize
from fastnull.vit import frozen

SUITES = ("clean", "fgsm", "pgd", "apgd", "corruptions")

Change = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images, labels, indices) → the images that are classified."""


# iterating a DataLoader draws a seed from the global generator
@torch.random.fork_rng(devices=[])
def evaluate(
    model: nn.Module,
    data: tuple[Tensor, Tensor] | Dataset | DataLoader,
    *,
    suites: Sequence[str] = ("clean", "fgsm", "pgd", "corruptions"),
    eps: Sequence[float] = (1 / 255, 2 / 255, 4 / 255, 8 / 255),
    norm: str = "linf",
    steps: int = 10,
    restarts: int = 1,
    corruptions: Sequence[str] = DEMO_CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure a model's accuracy (in %) clean, under attack and under corruptions.

    Noise is keyed by (seed, number of the image in the data), so results do not depend on batch size or global random
    state, which is as before afterwards, as are the modes of the model's modules. Attacks run on all images, also on
    those that are misclassified already.

    Args:
        model: pixels in [0, 1] → logits [B, K] (or an output with `.logits`); evaluated in eval mode, in its own dtype.
        data: images [n, C, H, W] in [0, 1] and classes [n]; or a map-style data set of such pairs; or a DataLoader of
            such batches, in a fixed order.
        suites: any of `clean`, `fgsm`, `pgd`, `apgd` (cross entropy), `corruptions`.
        eps: radii of the attacks, in units of pixels in [0, 1]; results are keyed "8/255" (`linf`) or "0.5" (`l2`).
        norm: `linf` or `l2`.
        steps: of PGD and APGD; PGD's step size is eps / 4, its start random.
        restarts: of PGD and APGD.
        corruptions: names of fastnull.robustness.CORRUPTIONS.
        severities: any of 1 .. 5.
        batch_size: of tensors and data sets; a DataLoader has its own.
        seed: of the random starts and corruptions.
        device: where to run; the model is moved there, as by `model.to`. None is where the model is.
        out: file for the result (JSON), written after every number.
        resume: take over what `out` holds already; False starts anew.
        progress: show a progress bar.
        limit: use the first `limit` images only.

    Returns:
        {"protocol": what was measured and how, "results": {"clean": %, "clean_top5": %, "fgsm": {"1/255": %, …},
        "pgd": {…}, "corruptions": {name: {"1": %, …}}}, "summary": {"clean", "adversarial_mean" (over all entries of
        fgsm and pgd), "corruption_mean", "mce" (if all 15 are there)}}; summary entries without data are None.

    Raises:
        TypeError: data of an unknown kind.
        ValueError: no images, a shuffled DataLoader, pixels outside [0, 1], labels out of range, NaN logits (the
            message names the suite), an unknown suite or corruption, or `out` made under another protocol (the message
            names what differs).
    """
    _check(suites, eps, norm, steps, restarts, corruptions, severities, batch_size, limit)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    device = torch.device(device)
    model.to(device)
    batches, total = open_data(data, batch_size, limit, device)
    protocol: dict[str, Any] = {
        "suites": list(suites),
        "subset": "all" if limit is None else f"first {limit}",
        "n": total,
        "data": data_digest(batches),
        "transform": "none: the images as given, pixels in [0, 1]",
        **normalisation(model),
        "weights": weights_digest(model),
        "eps": [eps_name(value, norm) for value in eps],
        "norm": norm,
        "steps": steps,
        "step_size": "eps / 4",
        "restarts": restarts,
        "random_start": True,
        "attacked": "all images",
        "corruptions": list(corruptions),
        "severities": [int(severity) for severity in severities],
        "corruption_source": "computed in memory in float32, not the published JPEG files",
        "seed": seed,
        "backend": "autograd",
        "dtype": dtype_name(model, device),
        "provenance": provenance(device),
    }
    if {"fgsm", "pgd", "apgd"} & set(suites) and " float16" in f" {protocol['dtype']}":
        warnings.warn("gradients of sure predictions vanish in float16: attacks look weak; use bfloat16", stacklevel=3)
    record: dict[str, Any] = {"protocol": protocol, "results": {}, "summary": {}}
    if out is not None and resume and Path(out).exists():
        record = resumed(out, protocol)
    results = record["results"]

    tasks = _tasks(model, suites, eps, norm, steps, restarts, corruptions, severities, seed)
    todo = [(path, change) for path, change in tasks if _lookup(results, path) is None]
    with progress_bar(len(todo), show=progress, unit="measurement") as bar:
        for path, change in todo:
            bar.set_description("/".join(path))
            accuracy = _measure(model, batches, change, path)
            if record["protocol"]["n"] is None:
                record["protocol"]["n"] = accuracy.images
            elif record["protocol"]["n"] != accuracy.images:
                raise ValueError(
                    f"data must yield the same images every time; {'/'.join(path)} saw {accuracy.images} of "
                    f"{record['protocol']['n']}"
                )
            _store(results, path, accuracy.top1)
            if path == ("clean",):
                results["clean_top5"] = accuracy.top5
            record["summary"] = summarize(results)
            if out is not None:
                write_json(out, record)
            bar.update()
    record["summary"] = summarize(results)
    return record


def _check(
    suites: Sequence[str], eps: Sequence[float], norm: str, steps: int, restarts: int, corruptions: Sequence[str],
    severities: Sequence[int], batch_size: int, limit: int | None,
) -> None:  # fmt: skip
    for name, values in (("suites", suites), ("corruptions", corruptions)):
        if isinstance(values, str):
            raise TypeError(f"{name} must be a sequence of names; got the string {values!r}")
    if not suites:
        raise ValueError(f"suites must name at least one of {', '.join(SUITES)}")
    for suite in suites:
        check_choice("suite", suite, SUITES)
    check_choice("norm", norm, NORMS)
    for radius in eps:
        check_number("eps", radius, 0, 1 if norm == "linf" else None)
    for corruption in corruptions:
        check_choice("corruption", corruption, CORRUPTIONS)
    for severity in severities:
        if severity not in SEVERITIES:
            raise ValueError(f"severities must be among 1, 2, 3, 4, 5; got {severity!r}")
    for name, value in (("steps", steps), ("restarts", restarts), ("batch_size", batch_size)):
        check_number(name, value, 1)
    if limit is not None:
        check_number("limit", limit, 1)


def _tasks(
    model: nn.Module, suites: Sequence[str], eps: Sequence[float], norm: str, steps: int, restarts: int,
    corruptions: Sequence[str], severities: Sequence[int], seed: int,
) -> Iterator[tuple[tuple[str, ...], Change]]:  # fmt: skip
    """(where the number goes in the results, what is done to the images), in the order in which they run."""

    def single(radius: float) -> Change:
        return lambda images, labels, indices: fgsm(model, images, labels, radius, norm)

    def iterated(attack: Callable[..., Tensor], radius: float) -> Change:
        return lambda images, labels, indices: attack(
            model, images, labels, radius, norm=norm, steps=steps, restarts=restarts, seed=seed, indices=indices
        )

    def corrupted(name: str, severity: int) -> Change:
        return lambda images, labels, indices: corrupt(images, name, severity, seed=seed, indices=indices)

    if "clean" in suites:
        yield ("clean",), lambda images, labels, indices: images
    if "fgsm" in suites:
        for radius in eps:
            yield ("fgsm", eps_name(radius, norm)), single(radius)
    for suite, attack in (("pgd", pgd), ("apgd", apgd)):
        if suite in suites:
            for radius in eps:
                yield (suite, eps_name(radius, norm)), iterated(attack, radius)
    if "corruptions" in suites:
        for name in corruptions:
            for severity in severities:
                yield ("corruptions", name, str(int(severity))), corrupted(name, int(severity))


def _measure(model: nn.Module, batches: Batches, change: Change, path: tuple[str, ...]) -> Accuracy:
    accuracy = Accuracy()
    for images, labels, indices in batches():
        try:
            changed = change(images, labels, indices)
            with torch.no_grad(), frozen(model):
                logits = model_logits(model, changed)
            check_logits(is_broken(logits))
            accuracy.update(logits, labels)
        except ValueError as error:
            raise ValueError(f"{'/'.join(path)}: {error}") from error
    if accuracy.images == 0:
        raise ValueError("data must hold at least one image; got none")
    return accuracy


def _lookup(results: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = results
    for key in path:
        value = value.get(key, {})
    return value if value != {} else None


def _store(results: dict[str, Any], path: tuple[str, ...], value: float) -> None:
    for key in path[:-1]:
        results = results.setdefault(key, {})
    results[path[-1]] = value
