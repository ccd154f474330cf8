"""Every command with bad paths, devices, files and numbers: one clear line, exit code 2, nothing changed."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from safetensors.torch import load_file, save_file

from fastnull.cli import main
from fastnull.finetune.checkpoint import read_state, write_state
from fastnull.models import load_model
from fastnull.synthesis import MODES
from tests.commands import refused as error_of
from tests.damage import damaged, header_of

Refused = Callable[..., str]
Commands = dict[str, list[str]]

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished finetuning run with results and a noise file."""
    folder = tmp_path_factory.mktemp("bad") / "run"
    words = ["--augment", "none", "--epochs", "1", "--train-fraction", "0.1", "--no-progress"]
    assert main(["finetune", "--out", str(folder), *words]) == 0
    model = str(folder / "last.safetensors")
    words = ["--limit", "8", "--suite", "clean", "--out", str(folder / "results.json")]
    assert main(["evaluate", "--model", model, *words]) == 0
    words = ["--images", "8", "--steps", "1", "--out", str(folder / "noise.safetensors")]
    assert main(["synthesize", "--model", model, *words]) == 0
    return folder


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A test that blocks fails."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """A function: words of a command → its error line."""
    return functools.partial(error_of, capsys)


@pytest.fixture
def commands(run: Path) -> Commands:
    """Each command that writes, without its --out."""
    model = ["--model", str(run / "last.safetensors")]
    return {
        "synthesize": ["synthesize", *model, "--images", "8", "--steps", "1", "--overwrite"],
        "evaluate": ["evaluate", *model, "--limit", "8", "--suite", "clean", "--overwrite"],
        "finetune": ["finetune", "--epochs", "1", "--overwrite"],
        "tune": ["tune", *model, "--images", "4"],
        "analyze": ["analyze", "exact", *model, "--data", "digits", "--overwrite"],
        "report": ["report", str(run / "results.json"), "--overwrite"],
        "compare": ["compare", "--seeds", "1", "--overwrite"],
        "demo": ["demo", "--quick", "--overwrite"],
        "bench": ["bench", "--quick", "--only", "gemm"],
    }


WRITERS = ("synthesize", "evaluate", "finetune", "tune", "analyze", "report", "compare", "demo", "bench")
FOLDERS = {
    # one file that each command writes in its folder
    "finetune": "metrics.jsonl", "tune": "tune.png", "analyze": "exact.json", "report": "report.html",
    "compare": "comparison.md", "demo": "workers.log", "bench": "rows.csv",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["pipe", "device", "link", "empty", "below a file"])
@pytest.mark.parametrize("name", WRITERS)
def test_where_nothing_can_be_written(
    name: str, kind: str, tmp_path: Path, refused: Refused, commands: Commands
) -> None:
    out = tmp_path / "out"
    if kind == "pipe":
        os.mkfifo(out)
    elif kind == "device":
        out = Path(os.devnull)
    elif kind == "link":
        out.symlink_to("nowhere")
    elif kind == "below a file":
        (tmp_path / "file").write_text("kept")
        out = tmp_path / "file" / "out"
    before = os.lstat(out) if os.path.lexists(out) else None
    line = refused(*commands[name], "--out", "" if kind == "empty" else out)
    assert "--out" in line or "cannot be written" in line
    assert before is None or os.lstat(out)[:3] == before[:3]  # mode, inode, device
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("kind", ["pipe", "link"])
@pytest.mark.parametrize("name", FOLDERS)
def test_what_lies_in_the_folder(name: str, kind: str, tmp_path: Path, refused: Refused, commands: Commands) -> None:
    inside = tmp_path / FOLDERS[name]
    if kind == "pipe":
        os.mkfifo(inside)
    else:
        (tmp_path / "real").write_text("kept")
        inside.symlink_to("real")
    line = refused(*commands[name], "--out", tmp_path)
    assert f"{inside} cannot be written" in line
    assert inside.is_fifo() or (inside.is_symlink() and inside.read_text() == "kept")


@pytest.mark.parametrize("spelling", ["same", "relative", "hard link", "link"])
@pytest.mark.parametrize(
    ("name", "option"),
    [("evaluate", "model"), ("synthesize", "model"), ("synthesize", "start"), ("evaluate", "noise"),
     ("evaluate", "source"), ("synthesize", "checkpoint")],
)  # fmt: skip
def test_a_command_keeps_its_inputs(
    name: str, option: str, spelling: str, run: Path, tmp_path: Path, refused: Refused, commands: Commands
) -> None:
    source = tmp_path / "input.safetensors"
    content = (run / ("noise" if option in ("noise", "start") else "last")).with_suffix(".safetensors").read_bytes()
    source.write_bytes(content)
    out = source
    if spelling == "relative":
        out = tmp_path / "." / "x" / ".." / source.name
        (tmp_path / "x").mkdir()
    elif spelling != "same":
        out = tmp_path / "other.safetensors"
        os.link(source, out) if spelling == "hard link" else out.symlink_to(source)
    words = [*commands[name], f"--{option}", str(source)]
    if option in ("model", "checkpoint"):
        words[2] = {"model": str(source), "checkpoint": "vit_digits"}[option]
    line = refused(*words, "--out", out)
    assert f"--{option} reads" in line or "symbolic link" in line
    assert source.read_bytes() == content


def test_a_run_keeps_its_inputs(run: Path, refused: Refused) -> None:
    before = (run / "last.safetensors").read_bytes()
    words = ["finetune", "--checkpoint", run / "last.safetensors", "--out", run, "--overwrite"]
    assert "--checkpoint reads" in refused(*words)
    assert (run / "last.safetensors").read_bytes() == before
    assert "--recipes reads" in refused(
        "compare", "--recipes", _written(run / "comparison.json", "{}"), "--out", run, "--overwrite"
    )


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("inside", [False, True])
def test_a_run_keeps_its_images(inside: bool, tmp_path: Path, refused: Refused) -> None:
    data = tmp_path / "images"
    (data / "train" / "cat").mkdir(parents=True)
    words = ["finetune", "--data", data, "--epochs", "1", "--overwrite", "--out", tmp_path if inside else data]
    assert "--data reads" in refused(*words)


READERS: dict[str, list[str]] = {
    "evaluate --model": ["evaluate", "--model", "PIPE"],
    "evaluate --checkpoint": ["evaluate", "--model", "vit_digits", "--checkpoint", "PIPE"],
    "evaluate --source": ["evaluate", "--model", "vit_digits", "--source", "PIPE"],
    "evaluate --noise": ["evaluate", "--model", "vit_digits", "--suite", "noise", "--noise", "PIPE"],
    "evaluate --data": ["evaluate", "--model", "vit_digits", "--data", "PIPE"],
    "synthesize --start": ["synthesize", "--model", "vit_digits", "--start", "PIPE", "--out", "x"],
    "finetune --config": ["finetune", "--config", "PIPE", "--out", "x"],
    "finetune --checkpoint": ["finetune", "--checkpoint", "PIPE", "--out", "x"],
    "compare --recipes": ["compare", "--recipes", "PIPE", "--out", "x"],
    "analyze --others": ["analyze", "transfer", "--model", "vit_digits", "--others", "PIPE", "--out", "x"],
    "inspect --checkpoint": ["inspect", "vit_digits", "--checkpoint", "PIPE"],
    "report": ["report", "PIPE"],
    "bench --compare": ["bench", "--compare", "PIPE", "PIPE"],
    "bench --plot": ["bench", "--plot", "PIPE", "x.png"],
}


@pytest.mark.parametrize("words", READERS.values(), ids=READERS)
def test_pipes_are_not_waited_for(words: list[str], tmp_path: Path, refused: Refused) -> None:
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    assert "is a named pipe" in refused(*(str(pipe) if word == "PIPE" else word for word in words))


def test_pipes_among_results_and_in_a_configuration(tmp_path: Path, refused: Refused) -> None:
    os.mkfifo(tmp_path / "results.json")
    assert "results.json is a named pipe" in refused("report", tmp_path, "--out", tmp_path / "report")
    config = _written(tmp_path / "run.yaml", f"checkpoint: {tmp_path / 'results.json'}\nout: {tmp_path / 'run'}\n")
    assert "is a named pipe" in refused("finetune", "--config", config)
    assert "out must not be empty" in refused("finetune", "--config", _written(config, "out: ''\n"))


DEVICES = [
    ("rubbish", "device must be cpu, cuda"),
    ("cuda:63", "does not exist: torch sees"),
    ("cuda:256", "device must be cpu, cuda"),
    ("meta", "cannot be used here"),
    ("cuda:x", "device must be cpu, cuda"),
]


@pytest.mark.parametrize(("device", "message"), DEVICES)
@pytest.mark.parametrize("name", ["synthesize", "evaluate", "finetune", "tune", "analyze", "bench"])
def test_devices(name: str, device: str, message: str, tmp_path: Path, refused: Refused, commands: Commands) -> None:
    words = [*commands[name], "--device", device, "--out", tmp_path / "out"]
    assert message in refused(*words)
    assert not (tmp_path / "out").exists()


NUMBERS: list[tuple[str, list[str], str]] = [
    ("finetune", ["--device", "cuda:63", "--dry-run"], "does not exist"),
    *(("synthesize", ["--limit", "1e300", "--mode", mode], "limit must be") for mode in MODES),
    *(("synthesize", ["--limit", "3e38", "--mode", mode], "not finite") for mode in MODES),
    ("synthesize", ["--count", "20000000"], "count must be"),
    ("synthesize", ["--count", "99999999999999999999"], "count must be"),
    ("synthesize", ["--keep", "maybe"], "neither true"),
    ("synthesize", ["--graph", ""], "neither true"),
    ("tune", ["--steps", "0"], "steps must be >= 1"),
    ("tune", ["--steps", "-1"], "steps must be >= 1"),
    ("tune", ["--limits", "0"], "limits must be > 0"),
    ("tune", ["--limits", "nan"], "limits must be > 0"),
    ("finetune", ["--preset", "vit_s"], "needs data_dir (--data-dir)"),
    ("finetune", ["--data", "torch/cifar10"], "needs data_dir (--data-dir)"),
    ("evaluate", ["--data", "torch/cifar10"], "needs data_dir (--data-dir)"),
    ("tune", ["--data", "torch/cifar10"], "needs data_dir (--data-dir)"),
    ("finetune", ["--img-size", "x"], "invalid int value"),
    ("compare", ["--eps", "inf"], "eps must be"),
]


@pytest.mark.parametrize(("name", "words", "message"), NUMBERS)
def test_numbers_and_names(
    name: str, words: list[str], message: str, tmp_path: Path, refused: Refused, commands: Commands
) -> None:
    assert message in refused(*commands[name], *words, "--out", tmp_path / "out", bar="--limit" in words)
    assert not list(tmp_path.iterdir())


def test_a_large_bank_that_fits_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused, commands: Commands
) -> None:
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.__getitem__)
    line = refused(*commands["synthesize"], "--count", "5000", "--out", tmp_path / "out")
    assert "5000 noises of shape [16, 32] need about 0.0614 GB; cpu has 0.0041 GB" in line


def test_damaged_model_files(run: Path, tmp_path: Path) -> None:
    source, path = run / "last.safetensors", tmp_path / "model.safetensors"
    weights, header = load_file(source), header_of(source)
    read = {key: json.loads(value) for key, value in header.items() if key != "format"}
    del read["provenance"], read["metadata"]  # whatever they hold
    errors = []
    for what, wrong in damaged(read):
        dumped = {key: json.dumps(value) for key, value in wrong.items()}
        save_file(weights, path, {"format": header["format"], **dumped})
        try:
            load_model(path)
        except ValueError as error:
            errors.append((what, str(error)))
    assert len(errors) > 50
    assert [entry for entry in errors if str(path) not in entry[1]] == []
    for key in header:
        save_file(weights, path, {**header, key: "{"})
        if key != "format":
            with pytest.raises(ValueError, match="damaged"):
                load_model(path)


def test_damaged_states(run: Path, tmp_path: Path, refused: Refused) -> None:
    words = ["finetune", "--augment", "none", "--epochs", "1", "--train-fraction", "0.1", "--no-progress"]
    for file in ("config.json", "metrics.jsonl"):
        (tmp_path / file).write_bytes((run / file).read_bytes())
    (good,) = run.glob("state-*.pt")
    state = read_state(good)
    parts = [{key: value for key, value in state.items() if key != gone} for gone in state if gone != "lines"]
    for wrong in [*parts, {}, []]:  # states of earlier versions count no lines
        write_state(tmp_path / good.name, wrong)  # type: ignore[arg-type]
        assert "state" in refused(*words, "--out", tmp_path, "--resume", bar=True)
    write_state(tmp_path / good.name, state)
    assert main([*words, "--out", str(tmp_path), "--resume"]) == 0


def test_damaged_results_are_not_resumed(run: Path, tmp_path: Path, refused: Refused, commands: Commands) -> None:
    out = tmp_path / "results.json"
    words = [word for word in commands["evaluate"] if word != "--overwrite"]
    good = json.loads((run / "results.json").read_text())
    for part in ("protocol", "results", "summary", "images", "partial"):
        for wrong in (None, 3, "x", [], True, {"clean": "x"}, {"all": 3}):
            if part in ("results", "summary") and wrong == {"all": 3}:  # a number more does no harm
                continue
            out.write_text(json.dumps({**good, part: wrong}))
            line = refused(*words, "--out", out, "--resume", bar=True)
            assert str(out) in line
            assert "is not a result of evaluate()" in line or "another protocol" in line


def test_other_errors_are_one_line_too(monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    for error, said in (
        (KeyError("key"), "KeyError: 'key'"),
        (AssertionError(), "AssertionError: "),
        (MemoryError(), "MemoryError: "),
        (RecursionError("deep"), "RecursionError: deep"),
        (RuntimeError("two\nlines"), "error: two lines"),
    ):
        monkeypatch.setattr("fastnull.cli.commands.report", Mock(side_effect=error))
        assert refused("report", "x").endswith(f"{said} (--debug shows where)")
        assert main(["report", "x"]) == 2
        with pytest.raises(type(error)):
            main(["report", "x", "--debug"])
