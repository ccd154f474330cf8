"""The commands of the command line: a function each. Its docstring is its help, which ends with the example."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.checks import check_device, check_number
from fastnull.cli.options import check_given, from_options, option_of, read_fields
from fastnull.distributed import processes as distributed
from fastnull.paths import check_output


def demo(args: argparse.Namespace) -> None:
    """Compare seven ways of finetuning on small images, with a report.

    Train a small ViT on handwritten digits (they come with scikit-learn), finetune it in seven ways at equal cost,
    attack and corrupt it, and write a report. It takes some minutes on two CPU cores; --quick takes about one.

    example:
      fastnull demo --quick --out runs/demo
    """
    from fastnull.experiments.compare import OWN_FILES
    from fastnull.experiments.demo import DemoSettings, run_demo
    from fastnull.report.illustrations import FILE as NOISE

    settings = from_options(DemoSettings.quickly() if args.quick else DemoSettings(), args)
    check_output(args.out, {}, files=("demo.json", NOISE, *OWN_FILES))
    try:
        page = run_demo(args.out, settings, overwrite=args.overwrite, resume=args.resume, jobs=_jobs(args))
    except KeyboardInterrupt:
        words = f"{'--quick ' if args.quick else ''}--seeds {settings.seeds} --out {args.out} --resume"
        raise KeyboardInterrupt(f"continue with: fastnull demo {words}") from None
    _print_report(page)


def compare(args: argparse.Namespace) -> None:
    """Compare augmentations and controls over several seeds at equal compute.

    Finetune a model with every method at equal cost, attack and corrupt it, and write means, standard deviations and
    paired differences with 95 % confidence intervals. Every seed starts from the given weights. If the head is new or
    the weights are random, it first has one clean training, which all its methods share. --resume continues and keeps
    finished runs: methods, recipes and seeds can be added, not removed.

    example:
      fastnull compare --model vit_small_patch16_224 --pretrained --data images --seeds 3 --out runs/images
    """
    from fastnull.experiments.compare import OWN_FILES, run_compare
    from fastnull.experiments.dry_run import dry_run
    from fastnull.experiments.settings import CompareSettings
    from fastnull.finetune.config import FinetuneConfig
    from fastnull.record import read_json
    from fastnull.report.comparison import format_comparison

    recipes = {} if args.recipes is None else read_json(Path(args.recipes))
    common = {} if args.config is None else read_fields(FinetuneConfig, args.config)
    settings = CompareSettings(methods=(*CompareSettings.methods, *recipes), recipes=recipes)
    settings = from_options(settings, args, recipes=recipes, common=common)
    jobs = _jobs(args, settings.where)
    if args.dry_run:
        print(dry_run(settings, jobs=jobs), end="")
        return
    if args.out is None:
        raise ValueError("compare needs a folder for its runs: give --out FOLDER")
    inputs = _inputs(asdict(settings)) | {"--recipes": args.recipes, "--config": args.config}
    check_output(args.out, inputs, files=("comparison.json", "comparison.md", *OWN_FILES))
    try:
        record = run_compare(args.out, settings, overwrite=args.overwrite, resume=args.resume, jobs=jobs)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"continue with the same command and --resume; finished runs are in {args.out}"
        ) from None
    print(format_comparison(record), end="")
    print(f"numbers: {Path(args.out) / 'comparison.json'}; report: {Path(args.out) / 'report' / 'report.html'}")


def _jobs(args: argparse.Namespace, device: str = "cpu") -> int:
    """--jobs; else one process per core, at most 4, and one on a GPU, which several would share."""
    if args.jobs is not None:
        return args.jobs
    if check_device(device).type != "cpu":
        return 1
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def inspect(args: argparse.Namespace) -> None:
    """Show how large the exact nullspace of a model's patch embedding is.

    For each model: the values in a patch, the width of a token, and how many dimensions of the image no token shows.
    The model is built from its configuration with random weights, so nothing is downloaded.

    example:
      fastnull inspect vit_small_patch16_224 vit_base_patch16_224 vit_base_patch32_224
    """
    from fastnull.nullspace.inspection import format_table, inspect_models

    rows = inspect_models(args.models, pretrained=args.pretrained, checkpoint=args.checkpoint, tolerance=args.tolerance)
    print(json.dumps(rows, indent=2) if args.json else format_table(rows).rstrip("\n"))


def analyze(args: argparse.Namespace) -> None:
    """Measure nullspaces: how exact, how approximate, what transfers.

    Write numbers (JSON, CSV) and figures of
      exact        dimensions over model families, energy of pictures in the nullspace, leak in each dtype
      approximate  learned, permuted and random noise over norm and over lambda; norm over training
      spectrum     singular values of the encoder's Jacobian at each depth
      transfer     noise made on one model, tried on others
    Without --model a small ViT is first trained on the embedded data. Each takes less than a minute.

    example:
      fastnull analyze exact spectrum --out runs/analysis
    """
    from fastnull.analysis import AnalysisSettings
    from fastnull.analysis import analyze as run
    from fastnull.analysis.run import check_free, write_analysis

    settings = from_options(AnalysisSettings(), args)
    written = [f"{name}{rest}" for name in args.what for rest in (".json", "-*.csv", ".png", ".svg")]
    check_output(args.out, _inputs(vars(args)), files=written)
    for name in args.what:
        check_free(Path(args.out) / f"{name}.json", args.overwrite)
    if args.others and args.model is None:
        raise ValueError("--others needs --model: the small models that are trained here are others of each other")
    if "transfer" in args.what and args.model is not None and not args.others:
        raise ValueError("transfer with --model needs --others NAME|FILE ..., models for images of the same size")
    label, model, others = _subjects(args, settings.seed)
    train, test = _two_sets(args, model, settings.images, settings.seed)
    for name in args.what:
        found = run(
            name, model, train, test, settings, data=args.data, data_dir=args.data_dir, others=others, label=label
        )
        paths = write_analysis(found, args.out, overwrite=args.overwrite)
        print(f"{name}: {' '.join(found.summary)}")
        print(f"  {', '.join(map(str, paths))}")


def _subjects(args: argparse.Namespace, seed: int) -> tuple[str, nn.Module, dict[str, nn.Module]]:
    """The model to analyse with its name, and further ones for `transfer`."""
    if args.model is not None:
        return args.model, open_model(args).eval(), {name: open_model(args, name).eval() for name in args.others}
    from fastnull.analysis.small import small_family, small_model

    for name in ("checkpoint", "pretrained", "num_classes", "img_size"):
        if getattr(args, name):
            raise ValueError(f"{option_of(name)} needs --model")
    model = small_model(args.data, seed=seed, device=_device(args))
    return f"seed {seed}", model, small_family(args.data, model, seed) if "transfer" in args.what else {}


def finetune(args: argparse.Namespace) -> None:
    """Finetune a model with nullspace noise, or with a control.

    Weights, metrics and settings go to a folder, from which --resume continues exactly. The best epoch is chosen on
    images held out from the training data; the test images are left to `evaluate`. Under
    `torchrun --nproc_per_node N -m fastnull finetune ...` the processes share the images of each step.

    example:
      fastnull finetune --model vit_small_patch16_224 --pretrained --data images --out runs/first
    """
    from fastnull.data.sources import has_test_images
    from fastnull.finetune.checkpoint import RUN_FILES
    from fastnull.finetune.config import FinetuneConfig
    from fastnull.finetune.dry_run import dry_run
    from fastnull.finetune.loop import finetune as run

    base = FinetuneConfig if args.preset is None else FinetuneConfig.published(args.preset)
    file = None if args.config is None else read_fields(FinetuneConfig, args.config)
    config: FinetuneConfig = from_options(base, args, file)
    given = config.to_dict()
    check_given(given)  # the fields of the file too
    if config.device is not None:
        check_device(config.device)
    if config.out is not None:
        check_output(
            config.out, _inputs({**given, "config": args.config, "model": None, "noise": None}), files=RUN_FILES
        )
    if args.dry_run:
        print(_together(lambda: dry_run(config)) or "", end="")
        return
    if config.out is None:
        raise ValueError("finetune needs a folder for what it learns: give --out FOLDER")
    try:
        result = _together(lambda: run(config))
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None  # it has said how to continue
    if result is None:
        return
    if result.best_accuracy is not None:
        print(f"held-out images: {result.best_accuracy:.1f} % in epoch {result.best_epoch} (the best)")
    seconds = result.seconds
    print(
        f"{result.plan.steps} steps, {result.cost['spent']:g} forward passes, {seconds['total']:.1f} s "
        f"({100 * seconds['synthesis_fraction']:.0f} % of it synthesis)"
    )
    after = ["fastnull", "evaluate", "--model", str(result.last_path), "--data", config.data]
    after += ["--data-dir", str(config.data_dir)] if config.data_dir else []
    print(f"weights: {result.last_path}")
    if not has_test_images(config.data):
        print(f"next: test images in {Path(config.data) / 'val'}, for fastnull evaluate")
        return
    print(f"next: {shlex.join([*after, '--out', str(Path(config.out) / 'results.json')])}")


def _together(work: Callable[[], Any]) -> Any:
    """What the work returns in all processes of torchrun; None in those that print nothing."""
    distributed.join()
    result = work()
    first = distributed.Processes().first
    distributed.leave()
    return result if first else None


def evaluate(args: argparse.Namespace) -> None:
    """Measure accuracy: clean, under attack, under corruptions, on published test sets.

    Measure a model on test images and print a table. With --out the results go to a file as they come in. `report`
    reads it, and --resume completes it after an interruption. Under `torchrun -m fastnull evaluate ...` the processes
    share the images.

    example:
      fastnull evaluate --model runs/first/last.safetensors --data images --eps 1/255 2/255 --out results.json
    """
    from fastnull.data.sources import evaluation_data
    from fastnull.noise import Noise
    from fastnull.robustness import evaluate as run
    from fastnull.robustness import format_published, format_table
    from fastnull.robustness.metrics import ALEXNET_ERRORS
    from fastnull.robustness.settings import EvaluationSettings

    if args.resume and args.overwrite:
        raise ValueError("--resume completes the file and --overwrite replaces it: give one of them")
    for option in ("resume", "overwrite"):
        if getattr(args, option) and args.out is None:
            raise ValueError(f"--{option} needs --out FILE")
    if args.out is not None:
        check_output(args.out, _inputs(vars(args)))
        if Path(args.out).exists() and not (args.overwrite or args.resume):
            raise ValueError(f"{args.out} exists: --resume completes it, --overwrite replaces it")
    if getattr(args, "corruptions", None) == ["all"]:
        args.corruptions = list(ALEXNET_ERRORS)
    settings = from_options(EvaluationSettings(), args, device=None)  # where the model is
    model = open_model(args)
    data: Any = None
    if args.data != "imagenet-val" and settings.on_data:
        where = {"data_dir": args.data_dir, "download": args.download, "skip_bad": settings.skip_bad}
        data = evaluation_data(args.data, model, **where)
    source = None if args.source is None else _model_file(args.source, "--source takes")
    noise = None if args.noise is None else Noise.load(args.noise)
    found = _together(lambda: run(model, data, settings, source=source, noise=noise))
    if found is None:
        return
    print(format_table(found), end="")
    skipped = [name for about in found["images"].values() for name in about.get("skipped", ())]
    if skipped:
        names = ", ".join(sorted(set(skipped))[:5])
        print(f"\n{len(skipped)} times a file was left out because it cannot be read: {names}")
    if any(part.startswith(("imagenet", "damagenet")) for part in settings.folders):
        print(f"\n{format_published({'this model': found})}", end="")


def report(args: argparse.Namespace) -> None:
    """Write an HTML and Markdown report from results.

    Read results of `evaluate` (and the settings of the finetuning run they lie in), group runs that differ only in
    their seed, and write tables, plots and what holds between the methods.

    example:
      fastnull report runs/none runs/boundary --out report
    """
    from fastnull.report import write_report

    # folders of results may hold the report: it replaces none of their files
    inputs = {"RESULTS": [source for source in args.sources if os.path.isfile(source)]}
    check_output(args.out, inputs, files=("report.html", "report.md", "figures/*.png"))
    _print_report(write_report(args.sources, args.out, overwrite=args.overwrite))


def _print_report(page: Path) -> None:
    print(f"report: {page} (and {page.with_name('report.md').name} beside it)")


def tune(args: argparse.Namespace) -> None:
    """Try limits and eps of the noise on one batch, before a training run.

    Synthesise noise for every limit and eps on one batch, and print its norm, its influence (the mean over images of
    the sum over classes of (p - p~)^2) and the fraction of predictions that stay. The lines without synthesis are the
    random starts: if the influence of a start is far above or below eps, choose other limits.

    example:
      fastnull tune --model runs/first/last.safetensors --data digits --site pixels --out runs/tune
    """
    from fastnull.experiments.noise_tuning import format_tried, try_settings, write_tried
    from fastnull.synthesis.config import recommended_site

    check_number("images", args.images, 1)
    if args.out is not None:
        check_output(args.out, _inputs(vars(args)), files=("tune.json", "tune.png"))
    args.site = args.site or recommended_site(args.mode)
    model = open_model(args).eval()
    images, _ = _two_sets(args, model, args.images, args.seed)
    about = {name: getattr(args, name) for name in ("mode", "site", "limits", "eps", "steps", "seed")}
    rows = try_settings(model, images, progress=True, **about)
    print(format_tried(rows, args.site), end="")
    if args.out is not None:
        about |= {"model": args.model, "data": args.data, "images": len(images)}
        about["subset"] = "drawn evenly over the classes by the seed"
        print(f"written: {', '.join(map(str, write_tried(rows, args.out, about, str(images.device))))}")


def synthesize(args: argparse.Namespace) -> None:
    """Learn noise that a model does not see.

    Learn noise on training images, write it, and print its influence on images it was not learned on: the mean over
    images of the sum over classes of (p - p~)^2. The permuted noise beside it is the control of equal norm.

    example:
      fastnull synthesize --model runs/first/last.safetensors --data digits --out noise.safetensors --limit 1
    """
    from fastnull.noise import Noise
    from fastnull.synthesis.config import MODES, SynthesisConfig
    from fastnull.synthesis.run import EpsilonNotMetError, SynthesisInterrupted, SynthesisOutOfMemoryError, check_mode
    from fastnull.synthesis.run import synthesize as run

    check_mode(getattr(args, "mode", MODES[0]))  # before its site, which is that of the training
    base = SynthesisConfig if args.preset is None else SynthesisConfig.published(args.preset)
    config: SynthesisConfig = from_options(base, args)
    out = Path(args.out)
    check_output(out, _inputs(vars(args)))
    if out.exists() and not args.overwrite:
        raise ValueError(f"{out} exists: --overwrite replaces it")
    check_number("images", args.images, 1)
    check_number("batch_size", args.batch_size, 1)
    model = open_model(args).eval()
    images, held_out = _two_sets(args, model, args.images, config.seed)
    start = None if args.start is None else Noise.load(args.start)

    def keep(noise: Noise, why: str) -> Path:
        beside = out.with_name(f"{out.stem}.{why}{out.suffix}")
        noise.save(beside)
        return beside

    try:
        noise = run(model, images.split(args.batch_size), config, start=start, progress=True)
    except SynthesisInterrupted as stop:
        beside = keep(stop.noise, "partial")
        how = f"continue with --start {beside}" if config.mode == "universal" else "it has the images done so far"
        raise KeyboardInterrupt(f"the noise so far is in {beside}; {how}") from None
    except (EpsilonNotMetError, SynthesisOutOfMemoryError) as error:
        if error.noise is None:
            raise
        beside = keep(error.noise, "unmet" if isinstance(error, EpsilonNotMetError) else "partial")
        raise ValueError(f"{error}; the noise is in {beside}") from error
    noise.save(out)
    _print_noise(model, noise, held_out if config.mode == "universal" else images, args.batch_size)
    print(f"noise: {out}")


def bench(args: argparse.Namespace) -> None:
    """Measure how fast it is here, against the published loop and frozen autograd.

    Run the benchmark suites of the source checkout: variants of one task interleaved in one run, medians, and the limit
    that the machine sets. It takes less than ten minutes on two CPU cores, with --quick less than two. Or compare two
    results.

    example:
      fastnull bench --quick --only encoder
    """
    from fastnull.bench.run import bench as run

    run(args)


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
    dtype = "auto" if args.dtype is None else getattr(torch, args.dtype)
    model = create_model(args.model).to(device)
    encoder = FrozenEncoder(model, dtype, backend=device.type, selftest="off")
    found = encoder.check_kernels(args.batch, args.tiles)
    print(format_table(table(found)))
    if args.json is not None:
        plain = {problem: {name: asdict(outcome) for name, outcome in of.items()} for problem, of in found.items()}
        write_json(args.json, {"results": plain, "provenance": provenance(device)})
        print(f"written: {args.json}")


def open_model(args: argparse.Namespace, name: str | None = None) -> nn.Module:
    """The model that a name, or a file of `save_checkpoint`, and --checkpoint give, on --device.

    Args:
        args: the parsed command line.
        name: in place of --model.

    Raises:
        FileNotFoundError, ValueError: no such file or name, or no such device here.
    """
    from fastnull.models import create_model

    device, name = _device(args), args.model if name is None else name
    given = {key: getattr(args, key) for key in ("num_classes", "img_size", "pretrained", "checkpoint")}
    if Path(name).is_file():
        takes, advice = "--others takes names and", ""
        if name == args.model:
            takes, advice = "--model takes a name or", f". Give the architecture: --model NAME --checkpoint {name}"
        model = _model_file(name, takes, advice)
        for key, value in given.items():
            if value is not None and value is not False:
                raise ValueError(
                    f"{option_of(key)} is for a model by name; {name} is a file that has weights, classes and size"
                )
        return model.to(device)
    if Path(name).suffix in (".safetensors", ".pth", ".pt"):
        raise FileNotFoundError(f"there is no file {name}")
    if args.checkpoint is None and not args.pretrained:
        print("note: no --checkpoint and no --pretrained, so the weights are random", file=sys.stderr)
    return create_model(name, **given).to(device)


def _model_file(path: str, takes: str, advice: str = "") -> nn.Module:
    """The model in a file of `save_checkpoint`; the error for another file is in terms of options."""
    from fastnull.models import ForeignFileError, load_model

    try:
        return load_model(path)
    except ForeignFileError as error:
        raise ValueError(
            f"{takes} a file of fastnull finetune; {path} is another and does not name its model{advice}"
        ) from error


def _device(args: argparse.Namespace) -> torch.device:
    """--device, or the GPU of this process if there is one: torchrun starts one process per GPU."""
    local = os.environ.get("LOCAL_RANK", "0")
    return check_device(args.device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))


def _inputs(given: Mapping[str, Any]) -> dict[str, Any]:
    """The files and folders that a command reads, by option; names of models and data sets are none."""
    from fastnull.data.sources import EMBEDDED

    found: dict[str, Any] = {}
    for name in ("model", "checkpoint", "source", "noise", "start", "others", "config"):
        value = given.get(name)
        texts = [value] if isinstance(value, str) else value or []
        found[option_of(name)] = [text for text in texts if os.path.isfile(text)]
    for name in ("data", "data_dir", "root", "frost_folder"):
        found[option_of(name)] = None if given.get(name) in EMBEDDED else given.get(name)
    return found


def _two_sets(args: argparse.Namespace, model: nn.Module, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Up to `count` training images to learn from, and test images to judge on, drawn by the seed evenly over their
    classes (if those are known without reading the images), in a random order; [n, C, H, W] in [0, 1]."""
    from fastnull.data.image_files import to_pixels
    from fastnull.data.sources import Samples, embedded, evaluation_data, open_source
    from fastnull.data.subset import even_subset, labels_of
    from fastnull.data.view import View
    from fastnull.rng import generator

    view = View.of(model)
    where: dict[str, Any] = {"data_dir": args.data_dir, "download": args.download}
    source = open_source(args.data, **where)
    train: Any = embedded(args.data, model)[0] if source.train is None else source.train
    if source.transforms:
        train = Samples(train, view.evaluation(), view.channels)
    test: Any = evaluation_data(args.data, model, **where, labelled=False)  # for the images alone
    sets = []
    for data, key in ((train, 0), (test, 1)):
        # in the order of a draw: a batch of class-sorted images would hold few classes
        drawn = torch.randperm(len(data), generator=generator(seed, key))
        labels = labels_of(data)
        some = drawn if labels is None else drawn[torch.isin(drawn, even_subset(labels, count, seed))]
        sets.append(torch.stack([to_pixels(data[index][0]) for index in some[:count].tolist()]))
    return sets[0], sets[1]


def _print_noise(model: nn.Module, noise: Any, images: Tensor, batch_size: int) -> None:
    """Print influence, norm and agreement of the noise and of its permutation, as means over the noises.

    Universal noise is measured on all images, other noise on the image that it belongs to.
    """
    from fastnull.analysis.measure import measure
    from fastnull.encoder.frozen import FrozenEncoder
    from fastnull.synthesis.batches import embed_batch

    encoder = FrozenEncoder(model, site=noise.site)
    shared = noise.metadata["config"]["mode"] == "universal"
    judged = f"{len(images)} held-out images" if shared else "its own images"
    unmet = int((~noise.converged).sum())
    print(f"{len(noise)} noise{'s' if len(noise) > 1 else ''}, {unmet} not within eps, {int(noise.steps.max())} steps")
    print(f"{'on ' + judged:<28}{'influence':>12}{'norm':>10}{'same prediction':>18}")
    for label, candidate in (("learned", noise), ("permuted (same norm)", noise.permuted())):
        pairs = (embed_batch(encoder, batch) for batch in images.split(batch_size))
        seen, same = measure(encoder, candidate.tokens, pairs, shared=shared)
        print(f"{label:<28}{seen:>12.4g}{float(candidate.norm.mean()):>10.4g}{100 * same:>16.1f} %")
