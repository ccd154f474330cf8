"""The runs of a comparison on a user's own model and data: what each begins with, measures, and refuses beforehand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastnull
import fastnull.experiments.tasks
from fastnull.cli import main
from fastnull.data import embedded
from fastnull.experiments.compare import _prepare, run_compare
from fastnull.experiments.dry_run import dry_run
from fastnull.experiments.settings import CompareSettings
from fastnull.experiments.tasks import Inputs, plan_tasks, scale_of_norm, work
from fastnull.models import load_model
from fastnull.robustness.suites import CIFAR10, CIFAR10_CORRUPTIONS
from fastnull.synthesis import SynthesisConfig, synthesize
from fastnull.synthesis.solvers import norms, valid_noise
from fastnull.synthesis.starts import draw_start, step_source
from fastnull.tensor_files import write_tensors
from tests.pictures import write_cifar10_c

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")


def write_pictures(root: Path, split: str, classes: dict[str, tuple[int, int, int]], count: int) -> None:
    """PNGs of one colour with noise, of several sizes, in root/split/CLASS."""
    random = torch.Generator().manual_seed(len(split))
    for name, colour in classes.items():
        (root / split / name).mkdir(parents=True)
        for number in range(count):
            side = 16 + number % 5
            pixels = torch.tensor(colour) + torch.randint(-60, 60, (side, side + 3, 3), generator=random)
            Image.fromarray(pixels.clamp(0, 255).byte().numpy()).save(root / split / name / f"{number}.png")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images: two classes, 24 training and 6 test images in each."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 24), ("val", 6)):
        write_pictures(root, split, {"blue": (60, 60, 160), "red": (160, 60, 60)}, count)
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a vit_digits with ten classes, as another program writes them."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "ten.safetensors"
    write_tensors(path, fastnull.create_model("vit_digits").network.state_dict(), {})
    return path


def test_a_new_head_is_trained_before_weights_are_averaged_with_the_start(checkpoint: Path, tmp_path: Path) -> None:
    images, labels = torch.rand(16, 3, 16, 16), torch.arange(16) % 2
    settings = CompareSettings(
        model="mine", data="mine", methods=("average",), seeds=1,
        recipes={"average": {"augment": "none", "start_fraction": 0.5}},
        start_epochs=1, budget=3, batch_size=8, suites=("clean",),
    )  # fmt: skip
    inputs = Inputs(
        lambda: fastnull.create_model("vit_digits", num_classes=2, checkpoint=checkpoint),
        (images, labels),
        (images, labels),
    )
    for task in plan_tasks(tmp_path, settings, inputs)[0]:
        work(task)
    assert (tmp_path / "seed-0" / "average" / "results.json").exists()
    with pytest.raises(
        ValueError, match="average: start_fraction mixes in the weights at the start, but their head is"
    ):
        plan_tasks(tmp_path, replace(settings, start_epochs=0), inputs)


@pytest.fixture
def tiny(pictures: Path, checkpoint: Path) -> CompareSettings:
    return CompareSettings(
        model="vit_digits", checkpoint=str(checkpoint), data=str(pictures), methods=("none", "boundary-pixels"),
        seeds=1, start_epochs=1, budget=13, batch_size=8, suites=("clean", "fgsm", "corruptions"), eps=(4,),
        corruptions=("contrast",), severities=(1,), images=8,
    )  # fmt: skip


def test_command_on_a_folder_and_a_checkpoint(
    pictures: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    out, shared = tmp_path / "out", tmp_path / "shared.yaml"
    shared.write_text("crop_scale: 0.5\ncolor_jitter: 0\n")
    words = [
        "compare", "--model", "vit_digits", "--checkpoint", str(checkpoint), "--data", str(pictures), "--methods",
        "none", "boundary-pixels", "--seeds", "2", "--start-epochs", "1", "--budget", "13", "--batch-size", "8",
        "--config", str(shared), "--suite", "clean", "fgsm", "apgd", "corruptions", "--eps", "4", "--pgd-steps", "2",
        "--corruptions", "contrast", "--severities", "1", "--images", "8", "--costly-images", "4", "--jobs", "1",
    ]  # fmt: skip
    assert main([*words, "--out", str(out)]) == 0
    assert not [told for told in recwarn if "head" in str(told.message)], "the report says that the head is new"
    text = capsys.readouterr().out
    record = json.loads((out / "comparison.json").read_text())
    about = record["about"]
    assert (about["model"], about["classes"], about["train"], about["test"]) == ("vit_digits", ["blue", "red"], 48, 12)
    assert (about["new_head"], about["start_epochs"], about["pixels"]) == (True, 1, [16, 16])
    report = (out / "report" / "report.md").read_text()
    for told in (text, report):
        assert f"weights from `{checkpoint.name}`, with a new head" in told
        assert f"Data: `{pictures.name}`, 48 training and 12 test images in 2 classes (blue, red)" in told
        accuracy = sum(about["start_accuracy"].values()) / 2
        assert f"Start: 1 epoch of training on clean images; accuracy {accuracy:.1f}" in told
        assert "Not covered: " in told
        assert "attacks and corruptions on more than 8 of 12 images" in told
    assert "12 (clean), 8 (fgsm, corruptions), 4 (apgd)" in report
    starts = [load_model(out / f"seed-{seed}" / "start" / "last.safetensors") for seed in (0, 1)]
    assert starts[0].classes == ["blue", "red"]
    assert not torch.equal(starts[0].network.head.weight, starts[1].network.head.weight)
    for method in ("none", "boundary-pixels"):
        run = out / "seed-1" / method
        config = json.loads((run / "config.json").read_text())["config"]
        assert config["checkpoint"] == str(out / "seed-1" / "start" / "last.safetensors")
        assert (config["crop_scale"], config["color_jitter"]) == (0.5, 0)
        protocol = json.loads((run / "results.json").read_text())["protocol"]
        assert protocol["suite_images"] == {"clean": 12, "fgsm": 8, "apgd": 4, "corruptions": 8}
        assert protocol["backend"].startswith("FrozenEncoder"), "that of the attacks"
        assert not list(run.glob("state-*")), "states of a finished run take three times the space of its weights"
        assert not list(run.glob("part-*"))


def test_a_head_that_fits_needs_no_start(tiny: CompareSettings, tmp_path: Path) -> None:
    write = tmp_path / "two.safetensors"
    write_tensors(write, fastnull.create_model("vit_digits", num_classes=2).network.state_dict(), {})
    settings = replace(tiny, checkpoint=str(write), start_epochs=None, methods=("none",), seeds=2)
    record = run_compare(tmp_path / "out", settings, progress=False)
    assert list(record["about"]["start_accuracy"]) == [0]  # the same weights for every seed
    assert not (tmp_path / "out" / "seed-1" / "start").exists()
    about = json.loads((tmp_path / "out" / "seed-1" / "none" / "config.json").read_text())
    assert about["config"]["checkpoint"] == str(write)
    assert "the weights as they are" in (tmp_path / "out" / "comparison.md").read_text()


def test_progress_counts_steps_and_not_decoded_images(
    tiny: CompareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastnull.experiments.tasks, "_measure", lambda *_: {"summary": {}})
    start = plan_tasks(tmp_path, replace(tiny, common={"cache": "ram"}), Inputs())[0][0]
    assert start.plan is not None
    passes: list[float] = []
    work(start, passes.append)
    assert sum(passes) == pytest.approx(start.plan.total_cost)


def make_model() -> nn.Module:
    """A factory that draws its weights."""
    return fastnull.create_model("vit_digits", num_classes=2)


SAME = make_model()


def some_images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(count) % 2
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(count)), labels


@pytest.mark.parametrize("epochs", [None, 1])
def test_any_model_and_data_in_python(epochs: int | None, tiny: CompareSettings, tmp_path: Path) -> None:
    settings = replace(tiny, model="mine", checkpoint=None, data="noise", start_epochs=epochs, methods=("none",))
    record = run_compare(
        tmp_path / "out",
        settings,
        model=make_model,
        train_data=some_images(24),
        test_data=some_images(10),
        progress=False,
    )
    assert (record["about"]["model"], record["about"]["train"], record["about"]["test"]) == ("mine", 24, 10)
    inputs = Inputs(make_model, some_images(24), some_images(10))
    task = plan_tasks(tmp_path / "out", settings, inputs)[0][-1]
    first, again = (task.model().network.head.weight for _ in range(2))  # type: ignore[union-attr]
    other = Inputs(make_model).make(1).network.head.weight  # type: ignore[union-attr]
    assert torch.equal(first, again)
    assert not torch.equal(first, other), "each seed draws its own"
    started = (tmp_path / "out" / "seed-0" / "start" / "last.safetensors").exists()
    assert started == (epochs is not None)
    assert torch.equal(first, Inputs(make_model).make(0).network.head.weight) != started  # type: ignore[union-attr]


def test_all_suites(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    model = fastnull.create_model("vit_digits").eval()
    synthesize(model, [torch.rand(4, 3, 16, 16)], SynthesisConfig(mode="universal", steps=1)).save(
        tmp_path / "noise.safetensors"
    )
    suites = ("clean", "fgsm", "pgd", "mi_fgsm", "apgd", "apgd_t", "cw", "patch", "noise", "corruptions")
    settings = CompareSettings(
        suites=suites, noise=str(tmp_path / "noise.safetensors"), pgd_steps=1, eps=(4,), images=2, methods=("none",),
        seeds=1, start_epochs=1, budget=3, corruptions=("contrast",), severities=(1,),
    )  # fmt: skip
    record = run_compare(tmp_path / "out", settings, progress=False)
    named = {name.removeprefix("suite/") for name in record["methods"]["none"]["mean"] if name.startswith("suite/")}
    assert named == set(suites) - {"clean", "corruptions"}
    report = (tmp_path / "out" / "report" / "report.md").read_text()
    for row in ("MI-FGSM 4/255", "APGD-T 4/255", "cw", "patch", "with noise, permuted"):
        assert f"| {row} |" in report


def test_evaluation_as_in_evaluate(tiny: CompareSettings, tmp_path: Path) -> None:
    """Corruption at the images' own size, PGD with the usual protocol, and the published files of CIFAR-10-C."""
    for split in ("train", "val"):
        colours = {name: (25 * number, 99, 99) for number, name in enumerate(CIFAR10)}
        write_pictures(tmp_path / "pictures", split, colours, 2)
    write_cifar10_c(tmp_path)
    settings = replace(
        tiny, data=str(tmp_path / "pictures"), methods=("none",), suites=("clean", "pgd", "corruptions", "cifar10-c"),
        pgd_steps=1, restarts=2, final_iterate=True, corruption_size=32, root=str(tmp_path), images=10,
    )  # fmt: skip
    assert "corruptions    " in dry_run(settings, progress=False)
    run_compare(tmp_path / "out", settings, progress=False)
    record = json.loads((tmp_path / "out" / "seed-0" / "none" / "results.json").read_text())
    protocol = record["protocol"]
    assert (protocol["restarts"], protocol["corruption_size"]) == (2, 32)
    assert list(protocol["folders"]) == ["cifar10-c"]
    assert tuple(record["results"]["cifar10-c"]) == CIFAR10_CORRUPTIONS
    report = (tmp_path / "out" / "report" / "report.md").read_text()
    for text in ("Attacked: all images, to the last step.", "at 32x32 pixels", "| cifar10-c fog, severity 1 |"):
        assert text in report


BAD = [
    ({"checkpoint": "WIDE"}, r"wide\.safetensors does not fit .*of another shape: .*\[1, 17, 48\] in the file"),
    ({"data": "ONE"}, "training data must have at least two classes; it has only blue"),
    ({"data": "OTHER"}, "classes that the model does not know: green"),
    ({"data": "no/such/folder"}, "there is no folder 'no/such/folder'"),
    ({"model": None}, "model is needed with data"),
    ({"budget": 0.1}, r"none: budget 0.1 .* less than the cost of one step"),
    ({"start_epochs": 0}, "start_epochs must be >= 1 where the head is new"),
    ({"split": "held-out", "batch_size": 16}, "the held-out split has 10 images, fewer than a batch of 16"),
    ({"suites": ("imagenet-c",), "root": "ROOT"}, "imagenet-c: there is no folder .*gaussian_noise/1"),
    ({"suites": ("cifar10-c",), "root": "ROOT"}, r"cifar10-c: cannot read .*shot_noise\.npy"),
    ({"data": "digits", "checkpoint": None, "corruption_size": 32}, "corruption_size needs image files"),
    ({"frost_folder": "no/such", "corruptions": ("frost",)}, "no/such"),
    ({"common": {"cache": "ram"}}, "start: cache='ram': .* GB of images for 2e-05 GB of free memory"),
    ({"layer_decay": 0.5, "common": {"opt": "nosuch"}}, "start: opt must be one of"),
    ({"recipes": {"x": {"augment": "none", "accumulate": 7}}, "methods": ("x",)}, "x: batch_size must be"),
    ({"suites": ("clean", "apgd_t")}, "apgd_t/4/255: .* needs 4 classes or more; the model has 2"),
    ({"device": "gpu"}, "device must be cpu, cuda"),
    ({"noise": "no.safetensors", "suites": ("noise",)}, r"no\.safetensors"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_input_is_reported_before_anything_is_written(
    changes: dict[str, Any], message: str, tiny: CompareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastnull.data.cache, "free_memory", lambda: 20_000)
    places = {"WIDE": tmp_path / "wide.safetensors", "ONE": tmp_path / "one", "OTHER": tmp_path / "other"}
    places["ROOT"] = tmp_path
    if changes.get("checkpoint"):
        write_tensors(places["WIDE"], fastnull.create_model("vit_digits", embed_dim=48).network.state_dict(), {})
    blue, red, green = {"blue": (0, 0, 99)}, {"red": (99, 0, 0)}, {"green": (0, 99, 0)}
    for name, train, val in (("one", blue, blue), ("other", blue | red, blue | green)):
        write_pictures(tmp_path / name, "train", train, 8)
        write_pictures(tmp_path / name, "val", val, 8)
    (tmp_path / "imagenet-c").mkdir()
    (tmp_path / "cifar10-c").mkdir()
    (tmp_path / "cifar10-c" / "shot_noise.npy").write_bytes(b"rubbish")
    changes = {name: str(places.get(value, value)) if type(value) is str else value for name, value in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_compare(tmp_path / "out", replace(tiny, **changes), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_data": some_images(24)}, "train_data needs test_data beside it"),
        ({"train_data": some_images(24), "test_data": (torch.rand(4, 1, 16, 16), torch.arange(4) % 2)}, "3 channels"),
        ({"model": lambda: SAME}, "model must make a new model each time"),
        ({"model": lambda: make_model(), "jobs": 2}, "jobs must be 1 here: .*lambda"),
        ({"model": SAME}, "model must be a function that returns a new model for each run; got a NormalizedModel"),
    ],
)
def test_bad_input_in_python(given: dict[str, Any], message: str, tiny: CompareSettings, tmp_path: Path) -> None:
    settings = replace(tiny, num_classes=2, checkpoint=None if "model" in given else tiny.checkpoint)
    with pytest.raises((TypeError, ValueError), match=message):
        run_compare(tmp_path / "out", settings, progress=False, **given)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="checkpoint and pretrained are for a model by name"):
        run_compare(tmp_path / "out", tiny, model=make_model)


def test_a_corruption_that_the_images_do_not_allow(
    tiny: CompareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError("too small")

    monkeypatch.setattr("fastnull.robustness.measurements.corrupt", fails)
    with pytest.raises(ValueError, match="corruptions/contrast/1: too small"):
        run_compare(tmp_path / "out", tiny, progress=False)
    assert not (tmp_path / "out").exists()


def test_another_checkpoint_of_the_same_name_is_noticed(tiny: CompareSettings, tmp_path: Path) -> None:
    copied = tmp_path / "start.safetensors"
    shutil.copy(str(tiny.checkpoint), copied)
    settings = replace(tiny, checkpoint=str(copied))
    first, again = (plan_tasks(tmp_path, settings, Inputs())[1] for _ in range(2))
    assert first == again
    write_tensors(copied, fastnull.create_model("vit_digits").network.state_dict(), {})
    now = plan_tasks(tmp_path, settings, Inputs())[1]
    assert [name for name in now if now[name] != first[name]] == ["checkpoint"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_another_picture_in_place_of_one_is_noticed(
    split: str, tiny: CompareSettings, pictures: Path, tmp_path: Path
) -> None:
    """Methods that are added to a comparison must be measured on the images of the others."""
    copied = tmp_path / "pictures"
    shutil.copytree(pictures, copied)
    settings, out = replace(tiny, data=str(copied)), tmp_path / "out"
    tasks, about, _ = plan_tasks(out, settings, Inputs())
    _prepare(out, settings, about, "comparison", False, False, tasks)
    finished = out / "seed-0" / "none" / "results.json"
    finished.parent.mkdir(parents=True)
    finished.write_text("{}")
    (copied / split / "red" / "1.png").unlink()
    shutil.copy(pictures / split / "red" / "2.png", copied / split / "red" / "7777.png")
    tasks, about, _ = plan_tasks(out, settings, Inputs())
    name = "test_digest" if split == "val" else "train_digest"
    with pytest.raises(ValueError, match=rf"cannot resume the comparison in .* with other settings: {name} \(was"):
        _prepare(out, settings, about, "comparison", False, True, tasks)
    # a comparison of a version that did not record it
    record = json.loads((out / "comparison.json").read_text())
    for each in ("train_digest", "test_digest"):
        del record["begun"][each]
    (out / "comparison.json").write_text(json.dumps(record))
    _prepare(out, settings, about, "comparison", False, True, tasks)


def test_held_out_split_is_not_the_test_set(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    settings = CompareSettings(
        split="held-out", seeds=1, methods=("none",), start_epochs=1, budget=4, suites=("clean",)
    )
    tasks, about, ready = plan_tasks(tmp_path, settings, Inputs())
    assert about["test"] == round(0.2 * 1297)
    assert len(ready.train) == about["train"] == 1297 - about["test"]
    for task in tasks:
        work(task)
    for name in ("start", "none"):
        assert json.loads((tmp_path / "seed-0" / name / "config.json").read_text())["data"]["train"] == about["train"]
    protocol = json.loads((tmp_path / "seed-0" / "none" / "results.json").read_text())["protocol"]
    assert protocol["n"] == about["test"]
    # its images are training images, those that no training saw
    assert ready.validation is not None
    train, _ = embedded("digits", ready.model)
    held = ready.validation.base.indices  # type: ignore[attr-defined]
    assert torch.equal(ready.validation[0][0], train[held[0]][0])
    assert not set(held) & set(ready.train.base.indices)  # type: ignore[attr-defined]


def test_held_out_split_of_a_folder(tiny: CompareSettings, tmp_path: Path) -> None:
    settings = replace(tiny, split="held-out", methods=("none",), images=None)
    run_compare(tmp_path / "out", settings, progress=False)
    protocol = json.loads((tmp_path / "out" / "seed-0" / "none" / "results.json").read_text())["protocol"]
    assert protocol["n"] == round(0.2 * 48)


def test_dry_run_times_every_method_and_suite(
    pictures: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "compare", "--model", "vit_digits", "--checkpoint", str(checkpoint), "--data", str(pictures), "--methods",
        "none", "universal", "--seeds", "3", "--batch-size", "8", "--budget", "300", "--suite", "clean", "pgd",
        "--eps", "4", "--dry-run",
    ]  # fmt: skip
    assert main(words) == 0
    text = capsys.readouterr().out
    for name in ("start", "none", "universal", "clean", "pgd"):
        assert sum(line.startswith(f"{name} ") for line in text.splitlines()) == 1
    assert "whole       " in text
    assert ": 3 x " in text
    assert list(tmp_path.iterdir()) == []


def test_dry_run_leaves_the_model_as_it_is(tiny: CompareSettings) -> None:
    made: list[nn.Module] = []
    settings = replace(tiny, checkpoint=None, start_epochs=None)

    def make() -> nn.Module:
        made.append(make_model())
        return made[-1]

    model = Inputs(make).make(settings.first_seed)
    assert model is not None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dry_run(settings, model=make, train_data=some_images(24), test_data=some_images(10), progress=False)
    assert len(made) > 1
    for name, value in made[1].state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("site", "smooth", "contrast"),
    [("patch", 0.0, 0.0), ("pixels", 0.0, 0.0), ("pixels", 0.3, 0.0), ("pixels", 0.3, 0.4)],
)
def test_scale_of_norm(site: str, smooth: float, contrast: float) -> None:
    inputs = torch.rand(512, 3, 16, 16, generator=torch.Generator().manual_seed(0)).round()  # half of all noise is cut
    start = SynthesisConfig(
        mode="boundary", site=site, limit=0.1, limit_range=0.5, smooth_limit=smooth, contrast=contrast
    )
    scale = scale_of_norm(2.0, inputs, start)
    scaled = replace(start, limit=scale * 0.1, smooth_limit=scale * smooth)
    noise = draw_start(inputs, scaled, step_source(5, 0, torch.arange(512))).noise
    noise = valid_noise(inputs, noise) if site == "pixels" else noise
    assert float(norms(noise).mean()) == pytest.approx(2.0, rel=0.05)
    if site == "pixels":
        with pytest.raises(ValueError, match="no such noise in pixels"):
            scale_of_norm(1e3, inputs, start)
