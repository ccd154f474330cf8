"""The command line: `fastnull demo | compare | inspect | analyze | tune | synthesize | finetune | evaluate | ...`.

The help of a command is the docstring of its function in `commands`. An error that the user can correct is one line,
and the exit code is 2 (`--debug` shows the traceback); after Ctrl-C it is 130.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from fastnull import __version__
from fastnull.cli import commands
from fastnull.cli.options import Help, add_options, check_given, number
from fastnull.cli.streams import lasting_streams


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 2 for an error, 130 for Ctrl-C.

    If standard output or error is closed, or its reader has left, the work and the exit code stay the same.

    Args:
        argv: words after the program's name; None takes the process's own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with lasting_streams() as failed:
        code = _run(words)
    if failed and code == 0:
        return _print_error(OSError(f"the work is done, but its output cannot be written: {failed[0]}"))
    return code


def _run(words: Sequence[str]) -> int:
    try:
        args = _parser().parse_args(words)
        check_given(vars(args))
        args.run(args)
    except KeyboardInterrupt as stop:
        print(f"\nfastnull: interrupted{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in words:
            raise
        return _print_error(error)
    return 0


def _print_error(error: Exception) -> int:
    """Print an error in one line; returns the exit code."""
    text = " ".join(str(error).split())
    kind = type(error)
    plain = isinstance(error, (ValueError, TypeError, ImportError, OSError)) or kind.__module__.startswith("fastnull.")
    # torch raises RuntimeError for most things; other kinds that are not ours say little without their names
    if not plain or not text:
        text = f"{'' if kind is RuntimeError and text else f'{kind.__name__}: '}{text} (--debug shows where)"
    # the functions behind name their arguments, the user has options
    text = re.sub(r"\b(resume|overwrite|force)=True\b", r"--\1", text)
    text = text.replace("resume=False", "--overwrite")
    # torchrun mixes what its processes write
    rank = os.environ.get("RANK", "0")
    if sys.stderr is not None:
        print(f"fastnull: error: {'' if rank == '0' else f'process {rank}: '}{text}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """Prints its errors in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastnull: error: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    """Prints what was built and what is in use."""

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
    parser.add_argument("--version", action=_Version, nargs=0, help="print version, build and what is in use, and exit")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for name, add in COMMANDS.items():
        run = getattr(commands, name)
        summary, _, text = (inspect.getdoc(run) or "").partition("\n\n")
        text, _, example = text.partition("\n\nexample:")
        added = subparsers.add_parser(
            name, help=summary[:1].lower() + summary[1:].rstrip("."), description=f"{summary}\n\n{text}",
            epilog=f"example:{example}", formatter_class=Help, allow_abbrev=False,
        )  # fmt: skip
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        added.set_defaults(run=run)
        add(added)
    return parser


def _demo(parser: _Parser) -> None:
    option = parser.add_argument
    option("--quick", action="store_true", help="one seed, shorter training, fewer attacks")
    what = "repetitions (default: 3, with --quick 1)"
    option("--seeds", type=int, default=argparse.SUPPRESS, metavar="N", help=what)
    _folder(parser, "a demo", default="runs/demo")


def _compare(parser: _Parser) -> None:
    from fastnull.experiments.settings import RECIPES, CompareSettings

    parser.description = f"{parser.description} The methods are\n{_listed(RECIPES)}."
    _folder(parser, "a comparison")
    option = parser.add_argument
    option("--dry-run", action="store_true", help="print how long it will take here, and stop")
    what = "YAML file with fields of finetune that all trainings share (crop_scale: 0.5)"
    option("--config", metavar="FILE", help=what)
    option(
        "--recipes", metavar="FILE",
        help='more methods, JSON: {"name": {"augment": "boundary", "noise": {"eps": 0.5}}, ...}, fields of finetune',
    )  # fmt: skip
    add_options(parser, CompareSettings, skip=("recipes", "common"), title="the comparison")


def _listed(names: Iterable[str]) -> str:
    return textwrap.fill(", ".join(names), 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _folder(parser: _Parser, what: str, **how: Any) -> None:
    """Options of a command whose finished runs are kept."""
    option = parser.add_argument
    option("--out", metavar="FOLDER", help="folder for the runs and the report", **how)
    option("--jobs", type=int, metavar="N", help="processes (default: one per core, at most 4; on a GPU 1)")
    option("--overwrite", action="store_true", help=f"start over in a folder that holds {what}")
    what = "continue in such a folder: finished runs are kept, and must still be asked for, others are added"
    option("--resume", action="store_true", help=what)


def _inspect(parser: _Parser) -> None:
    option = parser.add_argument
    names = "timm model name, vit_digits, or torchvision:NAME, open_clip:NAME, transformers:FOLDER"
    option("models", nargs="+", metavar="MODEL", help=names)
    option("--json", action="store_true", help="print JSON instead of a table")
    option("--pretrained", action="store_true", help="measure timm's pretrained weights (downloads them)")
    option("--checkpoint", metavar="FILE", help="measure the weights in a file (one model)")
    what = "singular values up to this fraction of the largest count as zero"
    option("--tolerance", type=number, metavar="NUMBER", help=what)


def _analyze(parser: _Parser) -> None:
    from fastnull.analysis import ANALYSES, AnalysisSettings

    option = parser.add_argument
    option("what", nargs="+", choices=ANALYSES, metavar="WHAT", help=f"any of {', '.join(ANALYSES)}")
    option("--out", required=True, metavar="FOLDER", help="folder for numbers and figures")
    option("--overwrite", action="store_true", help="replace analyses that are there")
    what = "transfer: further models, given as for --model"
    option("--others", nargs="+", default=[], metavar="NAME|FILE", help=what)
    _model_and_data(parser, required=False)
    parser.set_defaults(data="photos")
    add_options(parser, AnalysisSettings, title="the analysis")


def _tune(parser: _Parser) -> None:
    from fastnull.experiments.noise_tuning import EPS, MODES
    from fastnull.vit import SITES

    _model_and_data(parser)
    option = parser.add_argument_group("the noise").add_argument
    option("--mode", default="boundary", choices=MODES, help="way of making noise")
    option("--site", choices=SITES, help="where it is added (default: pixels for boundary, else patch)")
    what = "limits of the uniform start (default: around that of mode and site)"
    option("--limits", nargs="+", type=number, metavar="L", help=what)
    option("--eps", nargs="+", type=number, default=EPS, metavar="E", help="influences to aim at")
    option("--steps", type=int, metavar="N", help="steps of a synthesis (default: that of mode and site)")
    option("--seed", type=int, default=0, metavar="N", help="seed of the starts")
    parser.add_argument("--images", type=int, default=64, metavar="N", help="images in the batch")
    parser.add_argument("--out", metavar="FOLDER", help="folder for tune.json and tune.png (default: none)")


def _synthesize(parser: _Parser) -> None:
    from fastnull.synthesis.config import SynthesisConfig

    _model_and_data(parser)
    option = parser.add_argument
    option("--out", required=True, metavar="FILE", help="file for the noise (.safetensors)")
    option("--overwrite", action="store_true", help="replace the file")
    option("--start", metavar="FILE", help="noise to start from, instead of a random one")
    option("--images", type=int, default=1024, metavar="N", help="images at most")
    option("--batch-size", type=int, default=128, metavar="N", help="images per step")
    option("--preset", metavar="NAME", help="published constants to start from: finetune, first or single_gpu")
    add_options(parser, SynthesisConfig, title="the noise (the defaults are those without --preset)")


def _finetune(parser: _Parser) -> None:
    from fastnull.finetune.config import OF_THE_RUN, FinetuneConfig

    option = parser.add_argument
    option("--preset", metavar="NAME", help="published recipe to start from: vit_s, vit_b or madry")
    option("--config", metavar="FILE", help="YAML file with fields of the run (batch_size: 64); options override it")
    option("--dry-run", action="store_true", help="print what would run, its memory and cost, and stop")
    what = "universal: published constants of the noise to start from: finetune, first or single_gpu"
    option("--noise.preset", metavar="NAME", default=argparse.SUPPRESS, help=what)
    own = [f"noise.{name}" for name in OF_THE_RUN]
    add_options(parser, FinetuneConfig, skip=own, title="the run (the defaults are those without --preset)")


def _evaluate(parser: _Parser) -> None:
    from fastnull.robustness import CORRUPTIONS
    from fastnull.robustness.settings import EvaluationSettings

    parser.description = (
        f"{parser.description} Corruptions are any of\n{_listed(CORRUPTIONS)},\nor all, for ImageNet-C's 15."
    )
    _model_and_data(parser)
    option = parser.add_argument
    option("--out", metavar="FILE", help="file for the results (.json)")
    option("--overwrite", action="store_true", help="replace the file")
    option("--resume", action="store_true", help="complete the file")
    option("--source", metavar="FILE", help="transfer: attack this model (of finetune), try the attacks on --model")
    option("--noise", metavar="FILE", help="noise of `synthesize`, for the suite noise")
    own = ("device", "out", "resume", "progress")
    add_options(parser, EvaluationSettings, skip=own, title="the measurements")


def _report(parser: _Parser) -> None:
    option = parser.add_argument
    option("sources", nargs="+", metavar="RESULTS", help="files of results, or folders that hold some")
    option("--out", default="report", metavar="FOLDER", help="folder for the report")
    option("--overwrite", action="store_true", help="replace a report that is there")


def _bench(parser: _Parser) -> None:
    from fastnull.bench.run import add_bench_options

    add_bench_options(parser)


def _selftest(parser: _Parser) -> None:
    option = parser.add_argument
    option("model", nargs="?", default="vit_base_patch16_224", metavar="MODEL", help="timm model")
    option("--batch", type=int, metavar="N", help="images in the batch (default: 64, on a CPU 2)")
    option("--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of a synthesis")
    option("--device", metavar="DEVICE", help="torch device (default: cuda if there is one, else cpu)")
    option("--tiles", action="store_true", help="try the Triton kernels with other tiles too, which takes minutes")
    option("--json", metavar="FILE", help="file for the results")


def _model_and_data(parser: _Parser, *, required: bool = True) -> None:
    """Options of a command that opens a model and images."""
    option = parser.add_argument_group("the model").add_argument
    option("--model", required=required, metavar="NAME|FILE", help="timm model, or a file that finetune wrote")
    option("--checkpoint", metavar="FILE", help="weights for a model given by name (.safetensors, .pth)")
    option("--pretrained", action="store_true", help="timm's pretrained weights")
    option("--num-classes", type=int, metavar="N", help="classes of the head (default: the model's own)")
    option("--img-size", type=int, metavar="PIXELS", help="height and width of the images (default: the model's own)")
    option("--device", metavar="DEVICE", help="torch device (default: cuda if there is one, else cpu)")
    option = parser.add_argument_group("the data").add_argument
    what = "digits, photos, a folder with train/ and val/, or torch/... or hfds/..."
    option("--data", default="digits", help=what)
    option("--data-dir", metavar="FOLDER", help="folder where timm keeps the data set")
    option("--download", action="store_true", help="let timm download the data set")


COMMANDS: dict[str, Callable[[_Parser], None]] = {
    "demo": _demo, "compare": _compare, "inspect": _inspect, "analyze": _analyze, "tune": _tune,
    "synthesize": _synthesize, "finetune": _finetune, "evaluate": _evaluate, "report": _report, "bench": _bench,
    "selftest": _selftest,
}  # fmt: skip
"""The function that adds the options of each command; what it does is the function of that name in `commands`."""
