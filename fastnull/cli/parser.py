"""The command line: `fastnull demo | compare | inspect | analyze | tune | synthesize | finetune | evaluate | ...`.

Errors that a user can mend are one line and exit code 2 (`--debug` shows the traceback); Ctrl-C is 130.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fastnull import __version__
from fastnull.cli import commands
from fastnull.cli.options import add_options, check_given, number
from fastnull.cli.streams import lasting_streams

_PLAIN = (ValueError, TypeError, ImportError, OSError)
"""Errors whose text is for users."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 2 for an error, 130 for Ctrl-C.

    A closed standard output or error, or one whose reader has left, changes nothing of the work and its exit code.

    Args:
        argv: words after the program's name; None takes the process's own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with lasting_streams() as failed:
        code = _run(words)
    if failed and code == 0:
        return _tell(OSError(f"the work is done, but its output cannot be written: {failed[0]}"))
    return code


def _run(words: Sequence[str]) -> int:
    try:
        args = _parser().parse_args(words)
        check_given(args)
        args.run(args)
    except KeyboardInterrupt as stop:
        print(f"\nfastnull: interrupted{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in words:
            raise
        return _tell(error)
    return 0


def _tell(error: Exception) -> int:
    """Print an error in one line; returns the exit code."""
    text = " ".join(str(error).split())
    kind = type(error)
    # torch tells of most things by RuntimeError; other kinds that are not ours say little without their names
    if not (isinstance(error, _PLAIN) or kind.__module__.startswith("fastnull.")) or not text:
        text = f"{'' if kind is RuntimeError and text else f'{kind.__name__}: '}{text} (--debug shows where)"
    # the functions behind name their arguments, the user has options
    text = re.sub(r"\b(resume|overwrite|force)=True\b", r"--\1", text)
    # torchrun mixes what its processes write
    rank = os.environ.get("RANK", "0")
    if sys.stderr is not None:
        print(f"fastnull: error: {'' if rank == '0' else f'process {rank}: '}{text}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """Tells its errors in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastnull: error: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    """Prints what was built and what is in use."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print version, build and what is in use, and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from fastnull.build_info import build_info

        print(f"fastnull {__version__}\n{json.dumps(build_info(), indent=2)}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastnull",
        description="Finetune Vision Transformers with noise they cannot see, and measure how robust they get.",
        epilog="New here? `fastnull demo --quick` shows everything on small images in a minute or two.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], None], what: str, text: str, example: str) -> _Parser:
        added = subparsers.add_parser(
            name,
            help=what,
            description=text,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        added.set_defaults(run=run)
        return added

    _demo(command)
    _compare(command)
    _inspect(command)
    _analyze(command)
    _tune(command)
    _synthesize(command)
    _finetune(command)
    _evaluate(command)
    _report(command)
    _bench(command)
    _selftest(command)
    return parser


Command = Callable[..., _Parser]


def _demo(command: Command) -> None:
    parser = command(
        "demo",
        commands.demo,
        "compare six ways of finetuning on small images, with a report",
        "Train a small ViT on handwritten digits (they come with scikit-learn), finetune it in six ways at equal\n"
        "cost, attack and corrupt it, and write a report. Some minutes on two CPU cores; --quick about one.",
        "fastnull demo --quick --out runs/demo",
    )
    parser.add_argument("--quick", action="store_true", help="one seed, shorter training, fewer attacks")
    parser.add_argument("--out", default="runs/demo", metavar="FOLDER", help="where it goes (default: %(default)s)")
    parser.add_argument("--seeds", type=int, metavar="N", help="repetitions (default: 3, with --quick 1)")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one a CPU core, at most 4)")
    parser.add_argument("--overwrite", action="store_true", help="start over in a folder that holds a demo")
    parser.add_argument("--resume", action="store_true", help="go on in it; what is finished is not done again")


def _compare(command: Command) -> None:
    from fastnull.experiments.compare import RECIPES, CompareSettings

    parser = command(
        "compare",
        commands.compare,
        "compare augmentations and controls over several seeds at equal compute",
        "Pretrain a small model for each seed, finetune it with every method at equal cost, attack and corrupt it,\n"
        "and write means, standard deviations and paired differences with 95 % confidence intervals. Runs that are\n"
        "finished are kept: --resume goes on. The methods are\n"
        f"  {', '.join(RECIPES)}.",
        "fastnull compare --data digits --seeds 5 --out runs/digits",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where it goes")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one a CPU core, at most 4)")
    parser.add_argument("--overwrite", action="store_true", help="start over in a folder that holds a comparison")
    parser.add_argument("--resume", action="store_true", help="go on in it; what is finished is not done again")
    parser.add_argument(
        "--recipes", metavar="FILE",
        help='more methods, JSON: {"name": {"augment": "boundary", "noise": {"eps": 0.5}}, ...}, fields of finetune',
    )  # fmt: skip
    add_options(parser, CompareSettings, skip=("recipes",), title="the comparison")


def _inspect(command: Command) -> None:
    parser = command(
        "inspect",
        commands.inspect,
        "show how large the exact nullspace of a model's patch embedding is",
        "For each model: the values of a patch, the width of a token, and how many dimensions of the image no token\n"
        "shows. Built from the configuration with random weights, so nothing is downloaded.",
        "fastnull inspect vit_small_patch16_224 vit_base_patch16_224 vit_base_patch32_224",
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="timm model name, vit_digits, or torchvision:NAME, open_clip:NAME, transformers:FOLDER",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--pretrained", action="store_true", help="measure timm's pretrained weights (downloads them)")
    parser.add_argument("--checkpoint", metavar="FILE", help="measure the weights in a file (one model)")
    parser.add_argument(
        "--tolerance", type=number, metavar="NUMBER", help="singular values up to this share of the largest are zero"
    )


def _analyze(command: Command) -> None:
    from fastnull.analysis import ANALYSES, AnalysisSettings

    parser = command(
        "analyze",
        commands.analyze,
        "measure nullspaces: how exact, how approximate, what transfers",
        "Write numbers (JSON, CSV) and figures of\n"
        "  exact        dimensions over model families, energy of pictures in it, leak in each dtype\n"
        "  approximate  learned, permuted and random noise over norm and over lambda; norm over training\n"
        "  spectrum     singular values of the encoder's Jacobian at each depth\n"
        "  transfer     noise made on one model, tried on others\n"
        "Without --model a small ViT is trained on the embedded data first. Less than a minute each.",
        "fastnull analyze exact spectrum --out runs/analysis",
    )
    parser.add_argument("what", nargs="+", choices=ANALYSES, metavar="WHAT", help=f"any of {', '.join(ANALYSES)}")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where it goes")
    parser.add_argument("--overwrite", action="store_true", help="replace analyses that are there")
    parser.add_argument(
        "--others", nargs="+", default=[], metavar="NAME|FILE", help="transfer: further models, as --model takes them"
    )
    _model_options(parser, required=False)
    _data_options(parser)
    parser.set_defaults(data="photos")
    add_options(parser, AnalysisSettings, title="the analysis")


def _tune(command: Command) -> None:
    from fastnull.experiments import noise_tuning
    from fastnull.vit import SITES

    parser = command(
        "tune",
        commands.tune,
        "try limits and eps of the noise on one batch, before a training run",
        "Synthesise noise for every limit and eps on one batch, and print its norm, its influence (the mean over\n"
        "images of the sum over classes of (p - p~)^2) and the share of predictions that stay. The lines without\n"
        "synthesis are the random starts: limits whose start is far above or below eps ask for other settings.",
        "fastnull tune --model runs/first/last.safetensors --data digits --site pixels --out runs/tune",
    )
    _model_options(parser)
    _data_options(parser)
    group = parser.add_argument_group("the noise")
    group.add_argument("--mode", default="boundary", choices=noise_tuning.MODES, help="default: %(default)s")
    group.add_argument("--site", choices=SITES, help="default: pixels for boundary, else patch")
    group.add_argument("--limits", nargs="+", type=float, metavar="L", help="default: around that of mode and site")
    group.add_argument(
        "--eps", nargs="+", type=float, default=noise_tuning.EPS, metavar="E", help="default: %(default)s"
    )
    group.add_argument("--steps", type=int, metavar="N", help="of a synthesis (default: that of mode and site)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the starts")
    parser.add_argument("--images", type=int, default=64, metavar="N", help="of the batch (default: %(default)s)")
    parser.add_argument("--out", metavar="FOLDER", help="where tune.json and tune.png go; default: nowhere")


def _synthesize(command: Command) -> None:
    from fastnull.synthesis.config import SynthesisConfig

    parser = command(
        "synthesize",
        commands.synthesize,
        "learn noise that a model does not see",
        "Learn noise on training images, write it, and print its influence on images it was not learned on: the mean\n"
        "over images of the sum over classes of (p - p~)^2. The permuted noise beside it is the control of equal norm.",
        "fastnull synthesize --model runs/first/last.safetensors --data digits --out noise.safetensors --limit 1",
    )
    _model_options(parser)
    _data_options(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="file for the noise (.safetensors)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    parser.add_argument("--start", metavar="FILE", help="noise to start from, in place of a random one")
    parser.add_argument("--images", type=int, default=1024, metavar="N", help="images at most (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="images a step (default: %(default)s)")
    parser.add_argument(
        "--preset", metavar="NAME", help="published constants to start from: finetune, first or single_gpu"
    )
    add_options(parser, SynthesisConfig, title="the noise (without --preset the defaults hold)")


def _finetune(command: Command) -> None:
    from fastnull.finetune.config import OF_THE_RUN, FinetuneConfig

    parser = command(
        "finetune",
        commands.finetune,
        "finetune a model with nullspace noise, or with a control",
        "Finetune a model; weights, metrics and settings go to a folder, from which --resume goes on exactly. The\n"
        "best epoch is chosen on images held out from the training data; the test images are left to `evaluate`.\n"
        "Under `torchrun --nproc_per_node N -m fastnull finetune ...` the images of a step are shared out.",
        "fastnull finetune --model vit_small_patch16_224 --pretrained --data images --out runs/first",
    )
    parser.add_argument("--preset", metavar="NAME", help="published recipe to start from: vit_s, vit_b or madry")
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with fields of the run (batch_size: 64); options go before it"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, its memory and cost, and stop")
    add_options(
        parser,
        FinetuneConfig,
        skip=[f"noise.{name}" for name in OF_THE_RUN],
        title="the run (without --preset the defaults hold)",
    )
    parser.add_argument(
        "--noise.preset",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="universal: published constants of the noise to start from: finetune, first or single_gpu",
    )


def _evaluate(command: Command) -> None:
    from fastnull.robustness import CORRUPTIONS, DEMO_CORRUPTIONS
    from fastnull.robustness.settings import SUITES

    parser = command(
        "evaluate",
        commands.evaluate,
        "measure accuracy: clean, under attack, under corruptions, on published test sets",
        "Measure a model on test images and print a table. With --out the results go to a file as they come in, which\n"
        "`report` reads and an interrupted run completes with --resume. Under `torchrun -m fastnull evaluate ...` the\n"
        "images are shared out over the processes.",
        "fastnull evaluate --model runs/first/last.safetensors --data images --eps 1/255 2/255 --out results.json",
    )
    _model_options(parser)
    _data_options(parser)
    shown = "(default: %(default)s)"
    parser.add_argument("--out", metavar="FILE", help="file for the results (.json)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    parser.add_argument("--resume", action="store_true", help="complete the file")
    parser.add_argument(
        "--suite", nargs="+", default=["clean", "fgsm", "pgd", "corruptions"], metavar="NAME",
        help=f"any of {', '.join(SUITES)} (default: clean fgsm pgd corruptions)",
    )  # fmt: skip
    parser.add_argument(
        "--eps", nargs="+", type=number, default=[1 / 255, 2 / 255, 4 / 255, 8 / 255], metavar="E",
        help="radii of the attacks, pixels in [0, 1], fractions too (default: 1/255 2/255 4/255 8/255)",
    )  # fmt: skip
    parser.add_argument("--norm", default="linf", metavar="NORM", help=f"of the attacks: linf or l2 {shown}")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help=f"of PGD and APGD {shown}")
    parser.add_argument("--restarts", type=int, default=1, metavar="N", help=f"of PGD and APGD {shown}")
    parser.add_argument(
        "--corruptions", nargs="+", default=list(DEMO_CORRUPTIONS), metavar="NAME",
        help=f"all (the 15 of ImageNet-C), or any of {', '.join(CORRUPTIONS)} (default: {' '.join(DEMO_CORRUPTIONS)})",
    )  # fmt: skip
    parser.add_argument(
        "--severities",
        nargs="+",
        type=int,
        default=[1, 2, 3, 4, 5],
        metavar="N",
        help="of the corruptions (default: 1 2 3 4 5)",
    )
    parser.add_argument(
        "--root", metavar="FOLDER", help="where the published test sets lie, ROOT/imagenet-a/n01498041/... "
        "(--data imagenet-val takes the images of clean, attacks and corruptions from there too)",
    )  # fmt: skip
    parser.add_argument("--source", metavar="FILE", help="transfer: attack this model (of finetune), try it on --model")
    parser.add_argument("--noise", metavar="FILE", help="noise of `synthesize`, for suite noise")
    parser.add_argument("--frost", metavar="FOLDER", help="pictures for the corruption frost (default: made here)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out image files that cannot be read, count them")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help=f"processes that load images {shown}")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help=f"images at once {shown}")
    parser.add_argument("--limit", type=int, metavar="N", help="use N images only, drawn evenly over the classes")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=f"of starts and corruptions {shown}")


def _report(command: Command) -> None:
    parser = command(
        "report",
        commands.report,
        "write an HTML and Markdown report from results",
        "Read results of `evaluate` (and the settings of the finetuning run they lie in), put runs together that\n"
        "differ in their seed alone, and write tables, plots and what holds between the methods.",
        "fastnull report runs/none runs/boundary --out report",
    )
    parser.add_argument("sources", nargs="+", metavar="RESULTS", help="files of results, or folders that hold some")
    parser.add_argument("--out", default="report", metavar="FOLDER", help="where it goes (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a report that is there")


def _bench(command: Command) -> None:
    from fastnull.bench.run import add_bench_options, bench

    parser = command(
        "bench",
        bench,
        "measure how fast it is here, against the published loop and frozen autograd",
        "Run the benchmark suites of the source checkout: variants of one task interleaved in one run, medians, and\n"
        "the floor that the machine sets. Under ten minutes on two CPU cores, --quick under two. Or compare\n"
        "two results.",
        "fastnull bench --quick --only encoder",
    )
    add_bench_options(parser)


def _selftest(command: Command) -> None:
    parser = command(
        "selftest",
        commands.selftest,
        "check and time every implementation of every op on this machine",
        "Run the kernels of this package and torch's own calls in a child process, at the sizes of a model, compare\n"
        "them with float64, and print which are right and how fast. On a GPU the fastest right one then serves.",
        "fastnull selftest vit_small_patch16_224 --json selftest.json",
    )
    option = parser.add_argument
    option(
        "model", nargs="?", default="vit_base_patch16_224", metavar="MODEL", help="timm model (default: %(default)s)"
    )
    option("--batch", type=int, metavar="N", help="images in the batch (default: 64, on a CPU 2)")
    option("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16, on a CPU float32")
    option("--device", metavar="DEVICE", help="torch device (default: cuda where there is one, else cpu)")
    option("--tiles", action="store_true", help="also try the Triton kernels with other tiles: some minutes")
    option("--json", metavar="FILE", help="file for the results")


def _model_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--model", required=required, metavar="NAME|FILE", help="timm model, or a file that finetune wrote"
    )
    group.add_argument("--checkpoint", metavar="FILE", help="weights for a model given by name (.safetensors, .pth)")
    group.add_argument("--pretrained", action="store_true", help="timm's pretrained weights")
    group.add_argument("--num-classes", type=int, metavar="N", help="classes of the head (default: the model's own)")
    group.add_argument("--device", metavar="DEVICE", help="torch device (default: cuda where there is one, else cpu)")


def _data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the data")
    group.add_argument(
        "--data", default="digits", help="digits, photos, a folder with train/ and val/, or torch/... or hfds/... "
        "(default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--data-dir", metavar="FOLDER", help="where timm keeps the data set")
    group.add_argument("--download", action="store_true", help="let timm download the data set")
