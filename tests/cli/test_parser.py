"""The command line: helps, exit codes, one-line errors, and each command on tiny inputs."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
import torch

from fastnull import __version__
from fastnull.cli import commands, main
from fastnull.cli.options import add_options, attribute_docs, from_options, number, read_fields
from fastnull.cli.parser import COMMANDS
from fastnull.data import EMBEDDED, embedded
from fastnull.finetune import FinetuneConfig
from fastnull.models import create_model
from fastnull.noise import Noise
from fastnull.synthesis import SynthesisConfig, SynthesisInterrupted, synthesize
from fastnull.tensor_files import write_tensors
from tests.commands import refused
from tests.finetune.runs import BLUE, RED, coloured


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished finetuning run."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("cli") / "run"
    words = ["--augment", "boundary", "--noise.steps", "1", "--epochs", "1", "--train-fraction", "0.1"]
    assert main(["finetune", "--out", str(folder), "--no-progress", *words]) == 0
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  fastnull {name}" in text
    assert "--debug" in text


def test_top_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["--version"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert f"fastnull {__version__}" in text
    assert torch.__version__ in text


def test_every_setting_is_an_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    for name, settings in (("finetune", FinetuneConfig), ("synthesize", SynthesisConfig)):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        for entry in fields(settings):
            if entry.name == "noise":
                assert "--noise.step-size NUMBER" in text
                assert "--noise.seed" not in text  # the run's
                continue
            assert f"--{entry.name.replace('_', '-')} " in text.replace(",", " ")
    # documented in the class docstring, not in metadata
    assert "fraction of the batches that a round uses (default: 1)" in text
    assert set(attribute_docs(SynthesisConfig)) == {entry.name for entry in fields(SynthesisConfig)}


def test_noise_of_a_file_and_of_options_come_together(tmp_path: Path) -> None:
    """What neither names is the recommended value of augmentation and site."""
    file = tmp_path / "run.yaml"
    file.write_text("augment: per_image\nnoise:\n  eps: 1/2\n  steps: 7\n")
    parser = argparse.ArgumentParser()
    add_options(parser, FinetuneConfig)
    given = parser.parse_args(["--noise.steps", "5", "--seed", "3"])
    config = from_options(FinetuneConfig, given, read_fields(FinetuneConfig, file))
    assert config.noise == SynthesisConfig.recommended("per_image", "patch", eps=0.5, steps=5, seed=3)
    published = from_options(FinetuneConfig.published("vit_s"), parser.parse_args(["--noise.eps", "0.5"]))
    assert published.noise == SynthesisConfig.published("finetune", eps=0.5)


def test_options_from_a_dataclass() -> None:
    @dataclass(frozen=True)
    class Settings:
        rate: float = 8 / 255
        steps: int | None = 3
        name: str | None = field(default=None, metadata={"help": "100 % of it"})
        fast: bool = True

    parser = argparse.ArgumentParser()
    add_options(parser, Settings)
    assert "(default: 8/255)" in parser.format_help()
    assert "100 % of it" in parser.format_help()
    given = parser.parse_args(["--rate", "1/2", "--steps", "none", "--no-fast"])
    assert from_options(Settings(name="kept"), given) == Settings(rate=0.5, steps=None, name="kept", fast=False)
    # what is not given must not hide a preset
    assert from_options(Settings(steps=7), parser.parse_args([])) == Settings(steps=7)


@pytest.mark.parametrize(
    ("text", "value"),
    [("False", False), ("no", False), ("off", False), ("0", False), ("TRUE", True), ("yes", True), ("none", None)],
)
def test_switches_with_three_states(text: str, value: bool | None) -> None:
    @dataclass(frozen=True)
    class Settings:
        keep: bool | None = None

    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, Settings)
    assert from_options(Settings(), parser.parse_args(["--keep", text])).keep is value
    for wrong in ("", "2", "falsch", "None of these"):
        with pytest.raises(argparse.ArgumentError, match="neither true"):
            parser.parse_args(["--keep", wrong])


def test_number() -> None:
    assert [number(text) for text in ("8/255", "0.5", "1e-3")] == [8 / 255, 0.5, 1e-3]
    for text in ("a/b", "1/0", "", "eight"):
        with pytest.raises(argparse.ArgumentTypeError, match="fraction such as 8/255"):
            number(text)


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "vit_digits"]) == 0
    assert "vit_digits" in capsys.readouterr().out
    assert main(["inspect", "vit_digits", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["values"], row["width"], row["nullity"]) == (48, 32, 16)
    assert "Did you mean 'vit_digits'" in refused(capsys, "inspect", "vit_digitz")


def test_finetune_evaluate_report(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((run / "config.json").read_text())["config"]
    assert (config["augment"], config["noise"]["steps"], config["train_fraction"]) == ("boundary", 1, 0.1)
    assert "--resume resumes it, --overwrite starts again" in refused(capsys, "finetune", "--out", run)
    results = tmp_path / "results.json"
    words = ["evaluate", "--model", str(run / "last.safetensors"), "--out", str(results), "--limit", "16",
             "--suite", "clean", "fgsm", "corruptions", "--eps", "8/255", "--severities", "3"]  # fmt: skip
    assert main(words) == 0
    assert "FGSM 8/255" in capsys.readouterr().out
    found = json.loads(results.read_text())
    assert list(found["results"]["fgsm"]) == ["8/255"]
    assert found["protocol"]["n"] == 16
    assert "--resume completes it, --overwrite replaces it" in refused(capsys, *words)
    assert main([*words, "--resume"]) == 0
    line = refused(capsys, *words[:-1], "4", "--resume")
    assert "set --overwrite to start again" in line
    assert "resume=False" not in line
    assert main([*words[:5], "--suite", "clean", "--limit", "1000000000000", "--overwrite"]) == 0
    protocol = json.loads(results.read_text())["protocol"]
    assert (protocol["n"], protocol["subset"]) == (500, "1000000000000, drawn evenly over the classes by the seed")
    capsys.readouterr()
    pytest.importorskip("matplotlib")
    assert main(["report", str(results), "--out", str(tmp_path / "report")]) == 0
    assert "report.html" in capsys.readouterr().out
    line = refused(capsys, "report", results, "--out", tmp_path / "report")
    assert "--overwrite replaces it" in line
    assert "overwrite=True" not in line


@pytest.mark.parametrize(("mode", "judged"), [("universal", "20 held-out images"), ("boundary", "its own images")])
def test_synthesize(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, judged: str) -> None:
    out = tmp_path / "noise.safetensors"
    words = ["synthesize", "--model", run / "last.safetensors", "--out", out, "--mode", mode, "--limit", "1",
             "--images", "20", "--batch-size", "8", "--steps", "2"]  # fmt: skip
    words = [str(word) for word in words]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert judged in text
    assert "permuted (same norm)" in text
    noise = Noise.load(out)
    assert len(noise) == (1 if mode == "universal" else 20)
    # the printed influence of noise an image is the one in the file: it was measured on the right images
    if mode == "boundary":
        (learned,) = [line for line in text.splitlines() if line.startswith("learned")]
        assert float(learned.split()[1]) == pytest.approx(float(noise.influence.mean()), rel=1e-3)
    assert "--overwrite replaces it" in refused(capsys, *words)


def test_synthesize_preset_and_unmet_eps(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "noise.safetensors"
    words = ["synthesize", "--model", run / "last.safetensors", "--out", out, "--images", "8", "--preset", "first",
             "--eps", "1e-12", "--on-unmet", "raise"]  # fmt: skip
    line = refused(capsys, *words, bar=True)
    beside = tmp_path / "noise.unmet.safetensors"
    assert str(beside) in line
    assert not out.exists()
    settings = Noise.load(beside).metadata["config"]
    assert (settings["weight_decay"], settings["eps"], settings["limit"]) == (0.01, 1e-12, 3.0)
    assert "preset must be one of" in refused(capsys, *words[:-6], "--preset", "second")


def test_finetune_starts_again_after_an_unreadable_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = coloured(tmp_path / "data", {"cat": RED, "dog": BLUE})
    broken = data / "train" / "dog" / "3.png"
    image = broken.read_bytes()
    broken.write_bytes(image[: len(image) // 2])
    words = ["finetune", "--model", "vit_digits", "--data", str(data), "--batch-size", "8", "--val-fraction", "0",
             "--epochs", "1", "--augment", "none", "--cache", "none", "--no-progress",
             "--out", str(tmp_path / "run")]  # fmt: skip
    assert "cannot read the image file" in refused(capsys, *words)
    assert (tmp_path / "run" / "config.json").exists()
    broken.write_bytes(image)
    assert main(words) == 0
    assert "holds a run already" in refused(capsys, *words)


def test_finetune_says_what_evaluate_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = coloured(tmp_path / "data", {"cat": RED, "dog": BLUE})
    words = ["finetune", "--model", "vit_digits", "--data", str(data), "--batch-size", "4", "--epochs", "1",
             "--augment", "none", "--no-progress", "--overwrite", "--out", str(tmp_path / "run")]  # fmt: skip
    assert main(words) == 0
    assert f"next: fastnull evaluate --model {tmp_path / 'run' / 'last.safetensors'}" in capsys.readouterr().out
    shutil.rmtree(data / "val")
    assert main(words) == 0
    text = capsys.readouterr().out
    assert f"next: test images in {data / 'val'}, for fastnull evaluate" in text
    assert "--model" not in text


def test_interrupted_synthesis_keeps_its_noise(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **settings: object) -> Noise:
        raise SynthesisInterrupted(synthesize(*args, **{**settings, "progress": False}))

    out = tmp_path / "noise.safetensors"
    words = ["synthesize", "--model", str(run / "last.safetensors"), "--out", str(out), "--images", "8", "--steps", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("fastnull.synthesis.run.synthesize", interrupted)
        assert main(words) == 130
    beside = tmp_path / "noise.partial.safetensors"
    assert f"--start {beside}" in capsys.readouterr().err
    assert not out.exists()
    assert main([*words, "--start", str(beside)]) == 0


def test_interrupted_demo_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")

    def stop(*args: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastnull.experiments.demo.run_demo", stop)
    assert main(["demo", "--quick", "--seeds", "2", "--out", str(tmp_path)]) == 130
    assert f"fastnull demo --quick --seeds 2 --out {tmp_path} --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required"),
        (["frob"], "invalid choice"),
        (["finetune"], "give --out"),
        (["finetune", "--out", "x", "--augment", "boundry"], "Did you mean 'boundary'"),
        (["finetune", "--out", "x", "--epochs", "ten"], "invalid int value"),
        (["finetune", "--out", "x", "--epochs", "0"], "epochs must be"),
        (["finetune", "--out", "x", "--preset", "vit_z"], "preset must be one of"),
        (["evaluate", "--model", "nothing.safetensors"], "there is no file nothing.safetensors"),
        (["evaluate", "--model", "vit_digits", "--eps", "8/0"], "fraction such as 8/255"),
        (["evaluate", "--model", "vit_digits", "--suite", "fgms"], "Did you mean 'fgsm'"),
        (["evaluate", "--model", "vit_digits", "--data", "/no/where"], "there is no folder"),
        (["synthesize", "--model", "vit_digits", "--out", "n", "--eps", "-1"], "eps must be"),
        (["synthesize", "--model", "vit_digits", "--out", "n", "--images", "0"], "images must be"),
        (["evaluate", "--model", "vit_digits", "--suite", "imagenet-r", "--root", "x"], "ROOT/imagenet-r/CLASS/"),
        (["evaluate", "--model", "vit_digits", "--eps", "2"], "eps must be"),
        (
            ["synthesize", "--model", "m", "--out", "n", "--mode", "free"],
            "per_image, boundary; free noise is not synth",
        ),
        (["compare", "--out", "x", "--seeds", "0"], "seeds must be"),
        (["compare", "--out", "x", "--methods", "trade"], "Did you mean 'trades'"),
        (["compare", "--out", "x", "--recipes", "/no/where.json"], "there is no file /no/where.json"),
        (["report", "nowhere"], "there are no results at nowhere"),
        (["inspect"], "MODEL"),
        (["finetune", "--eps", "0.1"], "--eps is called --noise.eps since version 0.2"),
        (["finetune", "--train-ratio", "0.1"], "--train-ratio is called --train-fraction since version 0.2"),
        (["synthesize", "--model", "m", "--out", "n", "--image-ratio", "1"], "is called --image-fraction since"),
        (["finetune", "--noise.epz", "1"], "unrecognized arguments: --noise.epz"),
    ],
)
def test_errors_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *words)


@pytest.mark.parametrize("command", [["evaluate"], ["tune"], ["synthesize", "--out", "n.safetensors"]])
@pytest.mark.parametrize(
    "option",
    [
        ["--num-classes", "10"],
        ["--num-classes", "0"],
        ["--img-size", "32"],
        ["--pretrained"],
        ["--checkpoint", "w.pth"],
    ],
)
def test_a_model_file_has_its_classes_and_weights(
    run: Path, command: list[str], option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, *command, "--model", run / "last.safetensors", *option)
    assert f"{option[0]} is for a model by name; " in line


@pytest.mark.parametrize("name", ["w.pth", "w.pth.tar", "w.safetensors"])
def test_a_checkpoint_of_another_program_needs_its_architecture(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    state = create_model("vit_digits").network.state_dict()
    if name.endswith(".safetensors"):
        write_tensors(file, state, {})
    else:
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, file)
    line = refused(capsys, "evaluate", "--model", file)
    assert "--model takes a name or a file of fastnull finetune" in line
    assert f"--model NAME --checkpoint {file}" in line
    assert main(["evaluate", "--model", "vit_digits", "--checkpoint", str(file), "--suite", "clean"]) == 0
    line = refused(capsys, "evaluate", "--model", run / "last.safetensors", "--source", file)
    assert "--source takes a file of fastnull finetune" in line


def test_a_model_at_another_size(tmp_path: Path) -> None:
    noise = tmp_path / "noise.safetensors"
    model = ["--model", "vit_tiny_patch16_224", "--num-classes", "10", "--img-size", "32"]
    assert main(["synthesize", *model, "--data", "digits", "--images", "4", "--steps", "1", "--out", str(noise)]) == 0
    assert Noise.load(noise).tokens.shape == (1, 4, 192)


def test_evaluate_completes_a_file_or_replaces_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--model", "vit_digits", "--resume", "--overwrite"]
    assert "give one of them" in refused(capsys, *words, "--out", tmp_path / "results.json")
    for option in ("--resume", "--overwrite"):
        assert f"{option} needs --out FILE" in refused(capsys, "evaluate", "--model", "vit_digits", option)
    assert not list(tmp_path.iterdir())
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.json")
        for option in ("--resume", "--overwrite"):
            assert "named pipe" in refused(capsys, *words[:3], option, "--out", tmp_path / "pipe.json")


@pytest.mark.parametrize("data", ["digits", "photos"])
@pytest.mark.parametrize("seed", [0, 1])
def test_images_of_a_part_are_even_over_the_classes(data: str, seed: int) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    model = create_model(f"vit_{data}").eval()
    classes = len(EMBEDDED[data].classes)
    args = argparse.Namespace(data=data, data_dir=None, download=False)
    for images, whole in zip(commands._two_sets(args, model, 3 * classes, seed), embedded(data, model), strict=True):
        known = {image.numpy().tobytes(): int(label) for image, label in whole}
        labels = [known[image.numpy().tobytes()] for image in images]
        assert sorted(labels) == sorted(list(range(classes)) * 3)
        assert labels != sorted(labels)  # or a batch would hold few classes
    assert not torch.equal(commands._two_sets(args, model, 3 * classes, seed + 1)[0], images)


@pytest.mark.slow
def test_ctrl_c_in_a_real_process(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "run"
    words = [sys.executable, "-m", "fastnull", "finetune", "--augment", "none", "--epochs", "9999", "--out", str(out)]
    with subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        deadline = time.monotonic() + 120
        while not list(out.glob("state-*.pt")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "--resume" in text
    assert "Traceback" not in text
    assert list(out.glob("state-*.pt"))
