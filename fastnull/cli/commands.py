"""What the commands of the command line do, each a function of its parsed arguments that returns nothing or raises."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.checks import check_device, check_number
from fastnull.cli.options import check_given, from_options, read_fields
from fastnull.distributed import processes as distributed
from fastnull.paths import check_output

SUBSET = "drawn evenly over the classes by the seed"
"""What a record says of the images that `tune` and `analyze` take."""


class InterruptedWork(KeyboardInterrupt):
    """Ctrl-C, after what was done has been kept; the message says how to go on."""


def demo(args: argparse.Namespace) -> None:
    """Run the demo and say where its report is."""
    from fastnull.experiments.compare import OWN_FILES
    from fastnull.experiments.demo import DemoSettings, run_demo
    from fastnull.report.illustrations import FILE as NOISE

    settings = DemoSettings.quickly() if args.quick else DemoSettings()
    if args.seeds is not None:
        settings = replace(settings, seeds=args.seeds)
    jobs = min(4, _cores()) if args.jobs is None else args.jobs
    check_output(args.out, {}, files=("demo.json", NOISE, *OWN_FILES))
    try:
        page = run_demo(args.out, settings, overwrite=args.overwrite, resume=args.resume, jobs=jobs)
    except KeyboardInterrupt:
        quick, seeds = " --quick" if args.quick else "", f" --seeds {args.seeds}" if args.seeds else ""
        raise InterruptedWork(f"go on with: fastnull demo{quick}{seeds} --out {args.out} --resume") from None
    print(f"report: {page} (and {page.with_name('report.md').name} beside it)")


def compare(args: argparse.Namespace) -> None:
    """Compare ways of finetuning, print the tables and say where the report is."""
    from fastnull.experiments.compare import OWN_FILES, CompareSettings, run_compare
    from fastnull.record import read_json
    from fastnull.report.comparison import format_comparison

    check_output(
        args.out, {"--recipes": args.recipes}, files=("comparison.json", "comparison.md", *OWN_FILES)
    )  # fmt: skip
    recipes = {} if args.recipes is None else read_json(Path(args.recipes))
    settings = CompareSettings(methods=(*CompareSettings.methods, *recipes), recipes=recipes)
    settings = from_options(settings, args, recipes=recipes)
    jobs = min(4, _cores()) if args.jobs is None else args.jobs
    try:
        record = run_compare(args.out, settings, overwrite=args.overwrite, resume=args.resume, jobs=jobs)
    except KeyboardInterrupt:
        raise InterruptedWork(f"go on with the same command and --resume; the runs so far are in {args.out}") from None
    print(format_comparison(record), end="")
    print(f"numbers: {Path(args.out) / 'comparison.json'}; report: {Path(args.out) / 'report' / 'report.html'}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def inspect(args: argparse.Namespace) -> None:
    """Print the nullspaces of models as a table or as JSON."""
    from fastnull.nullspace.inspection import format_table, inspect_models

    rows = inspect_models(args.models, pretrained=args.pretrained, checkpoint=args.checkpoint, tolerance=args.tolerance)
    print(json.dumps(rows, indent=2) if args.json else format_table(rows).rstrip("\n"))


def analyze(args: argparse.Namespace) -> None:
    """Run analyses, print what they say and where their files are."""
    from fastnull.analysis import AnalysisSettings
    from fastnull.analysis import analyze as run
    from fastnull.analysis.run import check_free, write_analysis

    settings = from_options(AnalysisSettings(), args)
    written = [f"{name}{rest}" for name in args.what for rest in (".json", "-*.csv", ".png", ".svg")]
    check_output(args.out, _inputs(args), files=written)
    for name in args.what:
        check_free(Path(args.out) / f"{name}.json", args.overwrite)
    if args.others and args.model is None:
        raise ValueError("--others needs --model: the small models that are trained here are others of each other")
    if "transfer" in args.what and args.model is not None and not args.others:
        raise ValueError("transfer with --model needs --others NAME|FILE ..., models for images of the same size")
    args.images, args.seed = settings.images, settings.seed
    label, model, others = _subjects(args)
    train, test = _two_sets(args, model)
    for name in args.what:
        found = run(
            name, model, train, test, settings, data=args.data, data_dir=args.data_dir, others=others, label=label
        )
        paths = write_analysis(found, args.out, overwrite=args.overwrite)
        print(f"{name}: {' '.join(found.summary)}")
        print(f"  {', '.join(map(str, paths))}")


def _subjects(args: argparse.Namespace) -> tuple[str, nn.Module, dict[str, nn.Module]]:
    """The model to analyse with its name, and further ones for `transfer`."""
    if args.model is not None:
        given = {name: argparse.Namespace(**{**vars(args), "model": name}) for name in args.others}
        return args.model, open_model(args).eval(), {name: open_model(each).eval() for name, each in given.items()}
    from fastnull.analysis.small import small_family, small_model

    for option in ("checkpoint", "pretrained", "num_classes"):
        if getattr(args, option):
            raise ValueError(f"--{option.replace('_', '-')} needs --model")
    model = small_model(args.data, seed=args.seed, device=_device(args))
    return f"seed {args.seed}", model, small_family(args.data, model, args.seed) if "transfer" in args.what else {}


def finetune(args: argparse.Namespace) -> None:
    """Finetune as the options say; the settings and weights lie in the output folder."""
    from fastnull.finetune.checkpoint import RUN_FILES
    from fastnull.finetune.config import FinetuneConfig
    from fastnull.finetune.loop import finetune as run

    base = FinetuneConfig if args.preset is None else FinetuneConfig.published(args.preset)
    file = None if args.config is None else read_fields(FinetuneConfig, args.config)
    config: FinetuneConfig = from_options(base, args, file)
    given = config.to_dict()
    check_given(given)  # those of the file too
    if config.device is not None:
        check_device(config.device)
    if config.out is not None:
        read = argparse.Namespace(**{**vars(args), **given, "model": None})
        check_output(config.out, _inputs(read), files=RUN_FILES)
    if args.dry_run:
        from fastnull.finetune.dry_run import dry_run

        distributed.join()
        described = dry_run(config)
        if distributed.Processes().first:
            print(described, end="")
        distributed.leave()
        return
    if config.out is None:
        raise ValueError("finetune needs a folder for what it learns: give --out FOLDER")
    distributed.join()
    try:
        result = run(config)
    except KeyboardInterrupt:
        raise InterruptedWork from None  # it has said how to go on
    first = distributed.Processes().first
    distributed.leave()
    if not first:
        return
    if result.best_accuracy is not None:
        print(f"held-out images: {result.best_accuracy:.1f} % in epoch {result.best_epoch} (the best)")
    seconds = result.seconds
    print(
        f"{result.plan.steps} steps, {result.cost['spent']:g} forward passes, {seconds['total']:.1f} s "
        f"({100 * seconds['synthesis_share']:.0f} % of it synthesis)"
    )
    data = f"--data {config.data}" + (f" --data-dir {config.data_dir}" if config.data_dir else "")
    print(f"weights: {result.last_path}")
    print(f"next: fastnull evaluate --model {result.last_path} {data} --out {Path(config.out) / 'results.json'}")


def evaluate(args: argparse.Namespace) -> None:
    """Measure a model on test images, print the table and write the results; under torchrun shared out."""
    from fastnull.data.sources import evaluation_data
    from fastnull.models import load_model
    from fastnull.noise import Noise
    from fastnull.robustness import evaluate as run
    from fastnull.robustness import format_published, format_table
    from fastnull.robustness.metrics import ALEXNET_ERRORS
    from fastnull.robustness.suites import FOLDER_SUITES

    if args.resume and args.overwrite:
        raise ValueError("--resume completes the file and --overwrite replaces it: give one of them")
    for option in ("resume", "overwrite"):
        if getattr(args, option) and args.out is None:
            raise ValueError(f"--{option} needs --out FILE")
    if args.out is not None:
        check_output(args.out, _inputs(args))
        if Path(args.out).exists() and not (args.overwrite or args.resume):
            raise ValueError(f"{args.out} exists: --resume completes it, --overwrite replaces it")
    model = open_model(args)
    data: Any = None
    if args.data != "imagenet-val" and set(args.suite) - set(FOLDER_SUITES):
        where = {"data_dir": args.data_dir, "download": args.download, "skip_bad": args.skip_bad}
        data = evaluation_data(args.data, model, **where)
    distributed.join()
    found = run(
        model,
        data,
        suites=args.suite,
        eps=args.eps,
        norm=args.norm,
        steps=args.steps,
        restarts=args.restarts,
        corruptions=list(ALEXNET_ERRORS) if args.corruptions == ["all"] else args.corruptions,
        severities=args.severities,
        root=args.root,
        source=None if args.source is None else load_model(args.source),
        noise=None if args.noise is None else Noise.load(args.noise),
        frost_folder=args.frost,
        skip_bad=args.skip_bad,
        batch_size=args.batch_size,
        workers=args.workers,
        seed=args.seed,
        out=args.out,
        resume=args.resume,
        limit=args.limit,
    )
    first = distributed.Processes().first
    distributed.leave()
    if not first:
        return
    print(format_table(found), end="")
    skipped = [name for about in found["images"].values() for name in about.get("skipped", ())]
    if skipped:
        print(f"\n{len(skipped)} times a file that cannot be read was left out: {', '.join(sorted(set(skipped))[:5])}")
    if set(args.suite) & set(FOLDER_SUITES):
        print(f"\n{format_published({'this model': found})}", end="")


def report(args: argparse.Namespace) -> None:
    """Write a report from results."""
    from fastnull.report import write_report

    # folders of results may hold the report: it replaces none of their files
    inputs = {"RESULTS": [source for source in args.sources if os.path.isfile(source)]}
    check_output(args.out, inputs, files=("report.html", "report.md", "figures/*.png"))
    page = write_report(args.sources, args.out, overwrite=args.overwrite)
    print(f"report: {page} (and {page.with_name('report.md').name} beside it)")


def tune(args: argparse.Namespace) -> None:
    """Try settings of the noise on a batch of training images; print the table, draw it where a folder is given."""
    from fastnull.experiments.noise_tuning import format_tried, try_settings, write_tried
    from fastnull.synthesis.config import recommended_site

    check_number("images", args.images, 1)
    if args.out is not None:
        check_output(args.out, _inputs(args), files=("tune.json", "tune.png"))
    args.site = args.site or recommended_site(args.mode)
    model = open_model(args).eval()
    images, _ = _two_sets(args, model)
    about = {name: getattr(args, name) for name in ("mode", "site", "limits", "eps", "steps", "seed")}
    rows = try_settings(model, images, progress=True, **about)
    print(format_tried(rows, args.site), end="")
    if args.out is not None:
        about |= {"model": args.model, "data": args.data, "images": len(images), "subset": SUBSET}
        print(f"written: {', '.join(map(str, write_tried(rows, args.out, about, str(images.device))))}")


def synthesize(args: argparse.Namespace) -> None:
    """Learn noise, write it, and print how it compares with a permutation of itself."""
    from fastnull.synthesis.config import SynthesisConfig
    from fastnull.synthesis.run import EpsilonNotMetError, SynthesisInterrupted, SynthesisOutOfMemoryError
    from fastnull.synthesis.run import synthesize as run

    base = SynthesisConfig if args.preset is None else SynthesisConfig.published(args.preset)
    config: SynthesisConfig = from_options(base, args)
    out = Path(args.out)
    check_output(out, _inputs(args))
    if out.exists() and not args.overwrite:
        raise ValueError(f"{out} exists: --overwrite replaces it")
    check_number("images", args.images, 1)
    check_number("batch_size", args.batch_size, 1)
    model = open_model(args).eval()
    images, held_out = _two_sets(args, model)
    start = None
    if args.start is not None:
        from fastnull.noise import Noise

        start = Noise.load(args.start)
    try:
        noise = run(model, images.split(args.batch_size), config, start=start, progress=True)
    except SynthesisInterrupted as stop:
        beside = out.with_name(f"{out.stem}.partial{out.suffix}")
        stop.noise.save(beside)
        how = f"go on from it with --start {beside}" if config.mode == "universal" else "it has the images done so far"
        raise InterruptedWork(f"the noise so far is in {beside}; {how}") from None
    except (EpsilonNotMetError, SynthesisOutOfMemoryError) as error:
        if error.noise is None:
            raise
        what = "unmet" if isinstance(error, EpsilonNotMetError) else "partial"
        beside = out.with_name(f"{out.stem}.{what}{out.suffix}")
        error.noise.save(beside)
        raise ValueError(f"{error}; the noise is in {beside}") from error
    noise.save(out)
    shared = config.mode == "universal"
    _print_noise(model, noise, held_out if shared else images, args.batch_size, shared=shared)
    print(f"noise: {out}")


def selftest(args: argparse.Namespace) -> None:
    """Check and time every implementation of every op on this machine, at the sizes of a model.

    Run the kernels of this package and torch's own calls in a child process, compare them with float64, and print which
    are right and how fast. On a GPU the fastest right one of each op serves from then on. An encoder does the same by
    itself where nothing is stored.

    example:
      fastnull selftest vit_small_patch16_224 --json selftest.json
    """
    from fastnull.bench.run import format_table
    from fastnull.encoder import FrozenEncoder
    from fastnull.models import create_model
    from fastnull.record import provenance, write_json
    from fastnull.selftest import table

    device = _device(args)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be a CPU or a CUDA device; got {device}, which has no kernels to check")
    if args.batch is not None:
        check_number("batch", args.batch, 1)
    if args.json is not None:
        check_output(args.json, {}, name="--json")
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    model = create_model(args.model).to(device)
    encoder = FrozenEncoder(model, dtype, backend=device.type, selftest="off")
    found = encoder.check_kernels(args.batch, args.tiles)
    print(format_table(table(found)))
    if args.json is not None:
        plain = {problem: {name: asdict(outcome) for name, outcome in of.items()} for problem, of in found.items()}
        write_json(args.json, {"results": plain, "provenance": provenance(device)})
        print(f"written: {args.json}")


def open_model(args: argparse.Namespace) -> nn.Module:
    """The model that --model (a name, or a file of `save_checkpoint`) and --checkpoint give, on --device.

    Raises:
        FileNotFoundError, ValueError: no such file or name, or no such device here.
    """
    from fastnull.models import create_model, load_model

    device = _device(args)
    if Path(args.model).is_file():
        if args.checkpoint is not None:
            raise ValueError(f"--checkpoint is for a model by name; {args.model} is a file that holds weights itself")
        for option, given in (("pretrained", args.pretrained), ("num-classes", args.num_classes is not None)):
            if given:
                raise ValueError(f"--{option} is for a model by name; {args.model} is a file, which says that itself")
        model: nn.Module = load_model(args.model)
    elif Path(args.model).suffix in (".safetensors", ".pth", ".pt"):
        raise FileNotFoundError(f"there is no file {args.model}")
    else:
        if args.checkpoint is None and not args.pretrained:
            print("note: no --checkpoint and no --pretrained, so the weights are random", file=sys.stderr)
        model = create_model(
            args.model, num_classes=args.num_classes, pretrained=args.pretrained, checkpoint=args.checkpoint
        )
    return model.to(device)


def _device(args: argparse.Namespace) -> torch.device:
    """--device, or the GPU of this process where there is one: torchrun starts one process a GPU."""
    local = os.environ.get("LOCAL_RANK", "0")
    return check_device(args.device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))


def _inputs(args: argparse.Namespace) -> dict[str, Any]:
    """The files and folders that a command reads, by option; names of models and data sets are none."""
    from fastnull.data.sources import EMBEDDED

    found: dict[str, Any] = {}
    for name in ("model", "checkpoint", "source", "noise", "start", "others", "config", "sources"):
        given = getattr(args, name, None)
        texts = [given] if isinstance(given, str) else given or []
        found[f"--{name}"] = [text for text in texts if os.path.isfile(text)]
    for name in ("data", "data_dir", "root", "frost"):
        given = getattr(args, name, None)
        found[f"--{name.replace('_', '-')}"] = None if given in EMBEDDED else given
    return found


def _two_sets(args: argparse.Namespace, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Up to --images training images to learn from, and test images to judge on, drawn by the seed evenly over their
    classes (where those are known without reading the images), in a random order; [n, C, H, W] in [0, 1]."""
    from fastnull.data.image_files import to_pixels
    from fastnull.data.sources import Samples, embedded, evaluation_data, open_source
    from fastnull.data.subset import even_subset, labels_of
    from fastnull.data.view import View
    from fastnull.rng import generator

    view = View.of(model)
    source = open_source(args.data, data_dir=args.data_dir, download=args.download)
    train: Any = source.train
    if train is None:
        train = embedded(args.data, model)[0]
    elif source.transforms:
        train = Samples(train, view.evaluation(), view.channels)
    where = {"data_dir": args.data_dir, "download": args.download}
    test: Any = evaluation_data(args.data, model, **where, labelled=False)  # for the images alone
    seed = getattr(args, "seed", 0)
    sets = []
    for data, key in ((train, 0), (test, 1)):
        # in the order of a draw: a batch of class-sorted images would hold few classes
        drawn = torch.randperm(len(data), generator=generator(seed, key))
        labels = labels_of(data)
        some = drawn if labels is None else drawn[torch.isin(drawn, even_subset(labels, args.images, seed))]
        chosen = some[: args.images].tolist()
        sets.append(torch.stack([to_pixels(data[index][0]) for index in chosen]))
    return sets[0], sets[1]


@torch.no_grad()
def _print_noise(model: nn.Module, noise: Any, images: Tensor, batch_size: int, *, shared: bool) -> None:
    """Influence, norm and agreement of the noise and of its permutation; the mean over noises."""
    from fastnull.encoder.frozen import FrozenEncoder

    encoder = FrozenEncoder(model, site=noise.site)
    judged = f"{len(images)} held-out images" if shared else "its own images"
    unmet = int((~noise.converged).sum())
    print(f"{len(noise)} noise{'s' if len(noise) > 1 else ''}, {unmet} not within eps, {int(noise.steps.max())} steps")
    print(f"{'on ' + judged:<28}{'influence':>12}{'norm':>10}{'same prediction':>18}")
    for label, candidate in (("learned", noise), ("permuted (same norm)", noise.permuted())):
        seen, same = _measured(encoder, candidate.tokens, images, batch_size, shared)
        print(f"{label:<28}{seen:>12.4g}{float(candidate.norm.mean()):>10.4g}{100 * same:>16.1f} %")


def _measured(encoder: Any, tokens: Tensor, images: Tensor, batch_size: int, shared: bool) -> tuple[float, float]:
    """Mean influence and share of equal predictions; every noise on all images, or each on its own."""
    from fastnull.synthesis.objective import influence
    from fastnull.synthesis.solvers import perturb

    seen: list[Tensor] = []
    same: list[Tensor] = []
    for begin in range(0, len(images), batch_size):
        embedded = encoder.embed(images[begin : begin + batch_size].to(encoder.device))
        clean = encoder(embedded)
        noises: Iterable[Tensor] = tokens if shared else (tokens[begin : begin + batch_size],)
        for one in noises:
            noisy = encoder(perturb(encoder, embedded, one.to(encoder.device)))
            seen.append(influence(clean, noisy))
            same.append(clean.argmax(1) == noisy.argmax(1))
    return float(torch.cat(seen).mean()), float(torch.cat(same).float().mean())
