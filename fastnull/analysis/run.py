"""Runs an analysis and writes its files: <name>.json with the protocol, a CSV per table, and the figure."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastnull.analysis import approximate, exact, spectrum, transfer
from fastnull.analysis.measure import Row
from fastnull.checks import check_choice, check_fields, check_images, check_number
from fastnull.encoder.frozen import FrozenEncoder
from fastnull.nullspace.patch import PatchNullspace
from fastnull.record import provenance, replacing, write_json
from fastnull.robustness.protocol import tensor_digest, weights_digest
from fastnull.synthesis.config import SynthesisConfig
from fastnull.synthesis.run import synthesize

ANALYSES = ("exact", "approximate", "spectrum", "transfer")


@dataclass(frozen=True)
class AnalysisSettings:
    """Size of an analysis. The defaults take less than a minute on one core with the small models.

    Attributes:
        images: at most so many training images to learn noise on, and test images to measure on.
        batch_size: of images.
        seed: of images, noise and small models.
        families: exact: timm models whose patch embeddings are compared.
        eps: approximate, transfer: target influence of learned noise.
        limit: approximate, transfer: token noise starts in U(-limit, limit), in standard deviations of the tokens.
        steps: approximate, transfer: maximum number of updates of a learned noise.
        finetune_epochs: approximate: epochs of finetuning over which the noise is measured; 0 skips it.
        rank: spectrum: singular values at each depth.
        spectrum_images: spectrum: images in the Jacobian.

    Raises:
        ValueError: a number out of range, or no families.
    """

    images: int = 256
    batch_size: int = 64
    seed: int = 0
    families: tuple[str, ...] = exact.FAMILIES
    eps: float = 0.03
    limit: float = 3.0
    steps: int = 100
    finetune_epochs: int = 4
    rank: int = 64
    spectrum_images: int = 32

    def __post_init__(self) -> None:
        check_fields(self)
        for name, low in (("images", 2), ("batch_size", 1), ("steps", 1), ("finetune_epochs", 0), ("rank", 1)):
            check_number(name, getattr(self, name), low)
        check_number("spectrum_images", self.spectrum_images, 1)
        check_number("eps", self.eps, 0, 2, exclusive=True)
        check_number("limit", self.limit, 0, exclusive=True)
        if not self.families:
            raise ValueError("families must name at least one model")

    def synthesis(self) -> SynthesisConfig:
        """Settings of learned token noise."""
        return SynthesisConfig(eps=self.eps, limit=self.limit, steps=self.steps, seed=self.seed)


@dataclass(frozen=True)
class Analysis:
    """Result of an analysis.

    Attributes:
        name: one of ANALYSES.
        protocol: what was measured and how, as JSON values.
        tables: name → rows of plain numbers.
        summary: sentences about the numbers.
    """

    name: str
    protocol: dict[str, Any]
    tables: dict[str, list[Row]]
    summary: list[str]


def analyze(
    name: str,
    model: nn.Module,
    train: Tensor,
    test: Tensor,
    settings: AnalysisSettings | None = None,
    *,
    data: str = "given",
    data_dir: str | None = None,
    others: Mapping[str, nn.Module] | None = None,
    label: str = "model",
) -> Analysis:
    """Run one analysis.

    Args:
        name: `exact`, `approximate`, `spectrum` or `transfer`.
        model: takes pixels in [0, 1], returns logits [B, K].
        train: images [n, C, H, W] to learn noise on.
        test: images [n, C, H, W] to measure on.
        settings: see AnalysisSettings.
        data, data_dir: source of the images, as in FinetuneConfig. `approximate` finetunes on it, except for `given`.
        others: transfer: name → further models, for images of the same size.
        label: of the model, in tables and protocol.

    Raises:
        ValueError: an unknown name, invalid images, an unsupported model (no adapter, no blocks), or transfer without
            others.
        ImportError: a package for data or models is missing.
    """
    check_choice("analysis", name, ANALYSES)
    settings = settings or AnalysisSettings()
    for what, images in (("train", train), ("test", test)):
        check_images(images, name=f"{what} images")
    device = next(model.parameters()).device
    train, test = train.to(device), test[: settings.images].to(device)
    work = {"exact": _exact, "approximate": _approximate, "spectrum": _spectrum, "transfer": _transfer}[name]
    job = _Job(model, train[: settings.images], test, settings, data, data_dir, {label: model, **(others or {})})
    tables, summary, more = work(job)
    protocol = {
        "settings": asdict(settings),
        "data": data,
        "images": {"train": len(train), "test": len(test), "test_digest": tensor_digest(test)},
        "model": label,
        "weights": weights_digest(model),
        **more,
        "provenance": provenance(
            device, dtype=str(next(model.parameters()).dtype), seed=settings.seed,
            backend=more.get("backend", "reference"),
        ),
    }  # fmt: skip
    return Analysis(name, protocol, {key: _finite(rows) for key, rows in tables.items()}, summary)


def write_analysis(found: Analysis, folder: str | os.PathLike[str], *, overwrite: bool = False) -> list[Path]:
    """Write <name>.json, <name>-<table>.csv for each table, <name>.png and <name>.svg; return their paths.

    Raises:
        ValueError: the folder contains that analysis and `overwrite` is not set.
        ImportError: matplotlib is not installed; the numbers are written anyway.
    """
    folder = Path(folder)
    record = folder / f"{found.name}.json"
    check_free(record, overwrite)
    write_json(
        record, {"analysis": found.name, **{key: getattr(found, key) for key in ("protocol", "tables", "summary")}}
    )
    paths = [record]
    for name, rows in found.tables.items():
        paths.append(folder / f"{found.name}-{name}.csv")
        _write(paths[-1], _as_csv(rows).encode())
    from fastnull.analysis.figures import draw

    figure = draw(found.name, found.tables, " ".join(found.summary))
    for suffix, content in (("png", figure.png), ("svg", figure.svg.encode())):
        paths.append(folder / f"{found.name}.{suffix}")
        _write(paths[-1], content)
    return paths


def check_free(record: Path, overwrite: bool) -> None:
    """Raise ValueError if the analysis exists and must not be replaced."""
    if record.exists() and not overwrite:
        raise ValueError(f"{record} exists: overwrite=True replaces it")


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as beside:
        beside.write_bytes(content)


def _as_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def _finite(rows: list[Row]) -> list[Row]:
    """Replace NaN and Inf (possible in float16), which JSON lacks, by None."""
    return [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        for row in rows
    ]


@dataclass(frozen=True)
class _Job:
    model: nn.Module
    train: Tensor
    test: Tensor
    settings: AnalysisSettings
    data: str
    data_dir: str | None
    models: dict[str, nn.Module]


Work = tuple[dict[str, list[Row]], list[str], dict[str, Any]]
"""Tables, summary, and additional entries of the protocol."""


def _exact(job: _Job) -> Work:
    model, settings = job.model, job.settings
    space = PatchNullspace.from_model(model)
    tables: dict[str, list[Row]] = {"dimensions": exact.dimensions(settings.families), "energy": [], "leak": []}
    measured = [row for row in tables["dimensions"] if row["reason"] is None]
    with_one = sum(row["nullity"] > 0 for row in measured)
    skipped = len(settings.families) - len(measured)
    summary = [
        f"{with_one} of {len(measured)} patch embeddings have an exact nullspace; {skipped} other models have no "
        "linear patch embedding."
    ]
    more: dict[str, Any] = {"nullspace": {"dim": space.dim, "rank": space.rank, "tolerance": space.tolerance}}
    if space.dim == 0:
        summary.append(f"The one of this model (width {space.width}) has none, so there is no energy and no leak.")
        return tables, summary, more
    images = {"test images": job.test.cpu()}
    try:
        images["pictures"] = exact.natural_pictures((job.test.shape[2], job.test.shape[3]), job.test.shape[1])
    except ImportError as error:
        summary.append(f"Natural pictures are left out: {error}.")
    tables["energy"] = exact.energy(space, images, settings.seed)
    tables["leak"] = exact.leak(model, job.test, seed=settings.seed)
    for label in images:
        own, random = (row for row in tables["energy"] if row["images"] == label)
        summary.append(
            f"Of the contrast of {label} {100 * own['contrast']:.2g} % is in this model's nullspace, "
            f"{100 * random['contrast']:.2g} % in that of random weights; it has {100 * own['expected']:.0f} % of the "
            "dimensions."
        )
    at_one = {(row["dtype"], row["noise"]): row["logits"] for row in tables["leak"] if row["rms"] == 1}
    changes = (f"{dtype} {change:.1e}" for (dtype, noise), change in at_one.items() if noise == "exact")
    summary.append(f"Noise of rms 1 in the nullspace changes the logits by a relative {', '.join(changes)}.")
    return tables, summary, more


def _approximate(job: _Job) -> Work:
    model, settings = job.model, job.settings
    encoder = FrozenEncoder(model)
    config, batches = settings.synthesis(), job.train.split(settings.batch_size)
    noise = synthesize(encoder, batches, config)
    how: dict[str, Any] = {"batch_size": settings.batch_size}
    tables = {
        "norm": approximate.over_norm(encoder, noise, job.test, seed=settings.seed, **how),
        "lambda": approximate.over_lambda(encoder, batches, job.test, config, **how),
        "synthesis": noise.history,
        "finetuning": [],
    }
    if job.data != "given" and settings.finetune_epochs:
        tables["finetuning"] = approximate.over_finetuning(
            model, job.data, config, settings.finetune_epochs, data_dir=job.data_dir
        )
    at_one = {row["kind"]: row for row in tables["norm"] if row["factor"] == 1}
    learned = at_one["learned"]
    kept = ", ".join(f"{kind} {100 * row['agreement']:.1f} %" for kind, row in at_one.items())
    summary = [
        f"The learned noise (norm {learned['norm']:.3g}, {'below' if bool(noise.converged[0]) else 'not below'} "
        f"eps {settings.eps:g} on held-out training images) has an influence of {learned['influence']:.2g} on test "
        f"images, permuted {at_one['permuted']['influence']:.2g}, random {at_one['random']['influence']:.2g}; "
        f"unchanged predictions: {kept}."
    ]
    long = [row for row in tables["lambda"] if row["kind"] == "learned"]
    summary.append(
        f"From λ = {long[0]['lambda']:g} to {long[-1]['lambda']:g} the norm goes from {long[0]['norm']:.3g} to "
        f"{long[-1]['norm']:.3g} and the influence from {long[0]['influence']:.2g} to {long[-1]['influence']:.2g}."
    )
    return tables, summary, {"backend": encoder.backend, "synthesis": asdict(config)}


def _spectrum(job: _Job) -> Work:
    model, settings = job.model, job.settings
    spectra = spectrum.jacobian_spectra(model, job.test[: settings.spectrum_images], settings.rank, seed=settings.seed)
    last = spectra[-1]
    size = last.directions.shape[1]
    norms = [length * math.sqrt(size) for length in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)]
    encoder = FrozenEncoder(model)
    own = min(settings.spectrum_images, len(job.test))
    sets = {"its images": job.test[:own], "other images": job.test[own:]}
    how: dict[str, Any] = {"batch_size": settings.batch_size, "seed": settings.seed}
    tables = {
        "values": spectrum.spectrum_rows(spectra),
        "along": [
            {"on": on, **row}
            for on, images in sets.items()
            if len(images)
            for row in spectrum.along(encoder, last, images, norms, **how)
        ],
    }
    summary = []
    for found in (spectra[0], last):
        inside = float(found.values.square().sum())
        whole = inside + (size - len(found.values)) * found.rest**2
        where = "the logits" if found.depth == spectrum.LOGITS else f"block {found.depth}"
        summary.append(
            f"Towards {where} the {len(found.values)} strongest of {size} directions carry "
            f"{100 * inside / whole:.0f} % of the squared response; singular values from "
            f"{float(found.values[0]):.2g} to {float(found.values[-1]):.2g}, rms of the others {found.rest:.2g}."
        )
    more = {"site": "patch", "size": size, "iterations": spectrum.ITERATIONS, "backend": "reference"}
    return tables, summary, more


def _transfer(job: _Job) -> Work:
    model, settings = job.model, job.settings
    tokens = settings.synthesis()
    pixels = replace(tokens, site="pixels", contrast=0.0, limit=PIXEL_LIMIT, lr=PIXEL_LR)
    rows = transfer.transfer(
        job.models, job.train.split(settings.batch_size), job.test, {"token": tokens, "pixel": pixels},
        batch_size=settings.batch_size,
    )  # fmt: skip
    summary = []
    for kind in ("exact", "token", "pixel"):
        found = [row for row in rows if row["kind"] == kind and row["reason"] is None]
        own = [row for row in found if row["source"] == row["target"]]
        other = [row for row in found if row["source"] != row["target"]]
        if own and other:
            summary.append(
                f"With {kind} noise {_percent(own)} of the predictions are unchanged on its own model and "
                f"{_percent(other)} on others (mean influence {_mean(own, 'influence'):.2g} and "
                f"{_mean(other, 'influence'):.2g}; permuted {_mean(own, 'control'):.2g} and "
                f"{_mean(other, 'control'):.2g})."
            )
    digests = {name: weights_digest(other) for name, other in job.models.items()}
    return {"matrix": rows}, summary, {"models": digests, "backend": FrozenEncoder(model, site="pixels").backend}


PIXEL_LIMIT, PIXEL_LR = 0.25, 0.02
"""Start and learning rate of pixel noise, pixels in [0, 1]."""


def _mean(rows: list[Row], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def _percent(rows: list[Row]) -> str:
    return f"{100 * _mean(rows, 'agreement'):.1f} %"
