"""The published test sets in miniature: classes, masks, folder order, damaged files, and wrong layouts."""

from __future__ import annotations

import pkgutil
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastnull.cli import main
from fastnull.data import evaluation_data
from fastnull.robustness import evaluate, format_published
from fastnull.robustness.suites import FOLDER_SUITES, open_suite, wordnet_ids
from fastnull.robustness.table import PUBLISHED, published_row

image = pytest.importorskip("PIL.Image")

OTHER = 999
"""A class that neither A nor R has."""


class Reader(nn.Module):
    """Predicts the class from the colour of an image; `shy` prefers a class that is not in A or R."""

    def __init__(self, shift: int = 0, shy: bool = False, classes: int = 1000) -> None:
        super().__init__()
        self.shift, self.shy, self.classes = shift, shy, classes
        self.pretrained_cfg = {"input_size": (3, 16, 16), "crop_pct": 0.9, "interpolation": "nearest"}
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        red, green, _ = images[:, :, 8, 8].mul(255 / 8).round().long().unbind(1)
        logits = nn.functional.one_hot((red + 32 * green + self.shift) % self.classes, self.classes).float()
        if self.shy:
            logits[:, OTHER] = 2
        return logits + 0 * self.weight


def write_image(path: Path, label: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[...] = (8 * (label % 32), 8 * (label // 32), 60)
    image.fromarray(pixels).save(path)


def timm_list(name: str) -> list[str]:
    return pkgutil.get_data("timm.data", f"_info/{name}").decode().split()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All eight sets with one image a class; those with ImageNet's folders are links to one folder."""
    root = tmp_path_factory.mktemp("sets")
    for label, name in enumerate(wordnet_ids()):
        write_image(root / "imagenet-val" / name / "a.png", label)
    for name in ("damagenet", "imagenet-sketch", "imagenet-stylized"):
        (root / name).symlink_to(root / "imagenet-val")
    (root / "imagenet-v2").mkdir()
    for label, name in enumerate(wordnet_ids()):
        (root / "imagenet-v2" / str(label)).symlink_to(root / "imagenet-val" / name)
    for letter in "ar":
        (root / f"imagenet-{letter}").mkdir()
        for name in timm_list(f"imagenet_{letter}_synsets.txt"):
            (root / f"imagenet-{letter}" / name).symlink_to(root / "imagenet-val" / name)
    from fastnull.robustness.metrics import ALEXNET_ERRORS

    for corruption in ALEXNET_ERRORS:
        for severity in "12345":
            (root / "imagenet-c" / corruption).mkdir(parents=True, exist_ok=True)
            (root / "imagenet-c" / corruption / severity).symlink_to(root / "imagenet-val")
    return root


IMAGENET = [name for name, layout in FOLDER_SUITES.items() if not layout.arrays]
WITHOUT_C = tuple(name for name in IMAGENET if name != "imagenet-c")


def test_labels_are_imagenets(root: Path) -> None:
    record = evaluate(Reader(), suites=WITHOUT_C, root=root, progress=False)
    assert record["results"] == dict.fromkeys(WITHOUT_C, 100.0)
    counts = {name: about["n"] for name, about in record["images"].items()}
    assert counts == {name: FOLDER_SUITES[name].classes for name in WITHOUT_C}
    # the oracle must be able to fail
    wrong = evaluate(Reader(shift=1), suites=("imagenet-v2", "imagenet-a"), root=root, progress=False)["results"]
    assert wrong["imagenet-v2"] == 0


@pytest.mark.parametrize("letter", ["a", "r"])
def test_masks_are_timms_200_classes(root: Path, letter: str) -> None:
    found = open_suite(f"imagenet-{letter}", root, Reader())
    assert found.mask is not None
    expected = [int(number) for number in timm_list(f"imagenet_{letter}_indices.txt")]
    assert found.mask.nonzero().flatten().tolist() == expected
    assert OTHER not in expected
    # a class outside the mask cannot be chosen there, and can elsewhere
    suites = (f"imagenet-{letter}", "damagenet")
    results = evaluate(Reader(shy=True), suites=suites, root=root, progress=False)["results"]
    assert results[f"imagenet-{letter}"] == 100
    assert results["damagenet"] == pytest.approx(0.1)


def test_imagenet_c_has_its_own_mean_and_mce(root: Path) -> None:
    record = evaluate(Reader(), suites=("imagenet-c",), root=root, severities=(1,), limit=5, progress=False)
    assert len(record["results"]["imagenet-c"]) == 15
    assert record["summary"]["imagenet_c_mean"] == 100
    assert record["summary"]["imagenet_c_mce"] is None  # one severity of five
    assert record["summary"]["mce"] is None
    assert record["images"]["imagenet-c/fog/1"]["n"] == 5
    assert "as published" in record["protocol"]["folders"]["imagenet-c"]


def test_published_images_are_not_cropped(root: Path, tmp_path: Path) -> None:
    """A frame of one pixel stays in imagenet-c and is cropped elsewhere."""
    framed = np.full((16, 16, 3), 90, np.uint8)
    framed[1:-1, 1:-1] = 0
    for name in ("imagenet-val", "imagenet-c/fog/1"):
        shutil.copytree(root / "imagenet-val", tmp_path / name)
        image.fromarray(framed).save(tmp_path / name / wordnet_ids()[0] / "a.png")
    kept = open_suite("imagenet-c/fog/1", tmp_path, Reader()).images[0][0]
    torch.testing.assert_close(kept, torch.from_numpy(framed).permute(2, 0, 1) / 255)
    assert open_suite("imagenet-val", tmp_path, Reader()).images[0][0].mean() < kept.mean()


def test_val_serves_clean_and_attacks(root: Path) -> None:
    record = evaluate(
        Reader(), suites=("clean", "corruptions"), root=root, corruptions=("gaussian_noise",), severities=(1,),
        limit=40, progress=False,
    )  # fmt: skip
    assert record["results"]["clean"] == 100
    assert record["protocol"]["n"] == 40
    assert record["protocol"]["transform"].startswith("imagenet-val, resized")


def test_damaged_files_are_named_or_skipped_and_counted(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "imagenet-val", tmp_path / "imagenet-sketch")
    names = wordnet_ids()
    (tmp_path / "imagenet-sketch" / names[3] / "a.png").write_bytes(b"no picture")
    whole = (root / "imagenet-val" / names[700] / "a.png").read_bytes()
    (tmp_path / "imagenet-sketch" / names[700] / "a.png").write_bytes(whole[: len(whole) // 2])
    settings: dict[str, Any] = {"suites": ("imagenet-sketch",), "root": tmp_path, "progress": False}
    with pytest.raises(ValueError, match=rf"cannot read the image file .*{names[3]}/a\.png.*--skip-bad"):
        evaluate(Reader(), **settings)
    record = evaluate(Reader(), skip_bad=True, **settings)
    assert record["results"]["imagenet-sketch"] == 100
    assert record["images"]["imagenet-sketch"] == {"n": 998, "skipped": [f"{names[3]}/a.png", f"{names[700]}/a.png"]}
    assert record["protocol"]["skip_bad"] is True


def test_damaged_files_of_any_folder_are_skipped_and_counted(tmp_path: Path) -> None:
    for label, name in enumerate(("ant", "bee", "cat")):
        for split in ("train", "val"):
            write_image(tmp_path / split / name / "a.png", label)
            write_image(tmp_path / split / name / "b.png", label)
    (tmp_path / "val" / "bee" / "b.png").write_bytes(b"")
    model = Reader(classes=3)
    with pytest.raises(ValueError, match=r"cannot read the image file .*bee/b\.png"):
        evaluate(model, evaluation_data(str(tmp_path), model), suites=("clean",), progress=False)
    data = evaluation_data(str(tmp_path), model, skip_bad=True)
    suites = {"suites": ("clean", "corruptions"), "corruptions": ("contrast",), "severities": (1,)}
    record = evaluate(model, data, **suites, batch_size=2, progress=False)
    assert record["results"]["clean"] == 100
    assert record["images"]["clean"] == {"n": 5, "skipped": ["bee/b.png"]}
    assert record["images"]["corruptions/contrast/1"] == {"n": 5, "skipped": ["bee/b.png"]}


def test_wrong_layouts_say_what_is_wrong(root: Path, tmp_path: Path) -> None:
    def problem(suite: str, where: Path = tmp_path) -> str:
        with pytest.raises(ValueError) as error:
            evaluate(Reader(), suites=(suite,), root=where, progress=False)
        return str(error.value)

    assert "there is no folder" in problem("imagenet-a")
    assert "ROOT/imagenet-a/CLASS/ with 200 class folders, named by WordNet ids" in problem("imagenet-a")
    (tmp_path / "imagenet-a").symlink_to(root / "imagenet-r")  # 200 classes, but others: only the count is checked
    (tmp_path / "imagenet-r").symlink_to(root / "imagenet-val")
    assert "holds 1000 class folders, not the 200 of imagenet-r" in problem("imagenet-r")
    (tmp_path / "imagenet-v2").symlink_to(root / "imagenet-val")
    text = problem("imagenet-v2")
    assert "among them n01440764" in text
    assert "named by class numbers 0 to 999" in text
    (tmp_path / "imagenet-c").symlink_to(root / "imagenet-val")
    assert "imagenet-c/gaussian_noise/1" in problem("imagenet-c")
    assert "ROOT/imagenet-c/CORRUPTION/SEVERITY/CLASS/" in problem("imagenet-c")
    with pytest.raises(ValueError, match="suite imagenet-a needs root"):
        evaluate(Reader(), suites=("imagenet-a",), progress=False)
    with pytest.raises(ValueError, match="need data, or a root"):
        evaluate(Reader(), suites=("clean",), progress=False)


def test_published_table() -> None:
    # the published averages are those of their rows
    for name, row in PUBLISHED.items():
        values = [100 - value if column == 6 else value for column, value in enumerate(row[:-1])]
        assert sum(values) / 11 == pytest.approx(row[-1], abs=0.011), name
    results = {"clean": 80.0, "patch": 10.0, "cw": 5.0, "fgsm": {"1/255": 30.0, "8/255": 1.0}, "damagenet": 40.0}
    results |= {f"imagenet-{name}": 20.0 for name in ("a", "v2", "r", "sketch", "stylized")}
    record = {"results": results, "summary": {"imagenet_c_mce": 50.0}}
    row = published_row(record)
    assert row[:-1] == [80, 10, 5, 30, 40, 20, 50, 20, 20, 20, 20]
    assert row[-1] == pytest.approx(sum([80, 10, 5, 30, 40, 20, 50, 20, 20, 20, 20]) / 11)
    del results["cw"]
    lines = format_published({"mine": record}).splitlines()
    cells = ["mine", "80.00", "10.00", "–", "30.00", "40.00", "20.00", "50.00", *["20.00"] * 4, "–"]
    assert lines[2] == f"| {' | '.join(cells)} |"
    assert len(lines) == 3 + len(PUBLISHED)


def test_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--model", "vit_tiny_patch16_224", "--device", "cpu"]
    words += ["--suite", "imagenet-a", "--root", str(root)]
    assert main([*words, "--limit", "2", "--out", str(tmp_path / "out.json")]) == 0
    text = capsys.readouterr().out
    assert "| imagenet-a | " in text
    assert "| ViT-B + nullspace, published | 81.42 |" in text


# --- labels are those of the model's classes


class Named(Reader):
    """A Reader with class names in another order; `extra` classes come before ImageNet's."""

    def __init__(self, names: list[str], order: list[int]) -> None:
        super().__init__(classes=len(names))
        self.classes, self.num_classes = names, len(names)  # type: ignore[assignment]
        self.register_buffer("place", torch.tensor(order))

    def forward(self, images: Tensor) -> Tensor:
        red, green, _ = images[:, :, 8, 8].mul(255 / 8).round().long().unbind(1)
        places = self.place[red + 32 * green]
        return nn.functional.one_hot(places, self.num_classes).float() + 0 * self.weight


def descriptions() -> list[str]:
    from fastnull.compat import import_timm

    info = import_timm().data.ImageNetInfo("imagenet-1k")
    return [info.index_to_description(index) for index in range(1000)]


SHUFFLED = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).tolist()
"""ImageNet's class i is the model's SHUFFLED[i]."""


def shuffled(names: list[str]) -> list[str]:
    return [names[SHUFFLED.index(place)] for place in range(1000)]


@pytest.mark.parametrize("extra", [0, 3])
def test_names_of_the_model_decide_and_not_the_order(root: Path, extra: int) -> None:
    names = [f"none of these {index}" for index in range(extra)] + shuffled(list(wordnet_ids()))
    model = Named(names, [extra + place for place in SHUFFLED])
    suites = ("imagenet-val", "imagenet-a", "imagenet-v2")
    record = evaluate(model, suites=suites, root=root, progress=False)
    assert record["results"] == dict.fromkeys(suites, 100.0)
    settings: dict[str, Any] = {"severities": (2,), "limit": 30, "progress": False}
    if extra:
        record = evaluate(model, suites=("imagenet-c",), root=root, **settings)
        assert all(table == {"2": 100.0} for table in record["results"]["imagenet-c"].values())
    clean = evaluate(model, suites=("clean",), root=root, limit=50, progress=False)["results"]
    assert clean["clean"] == 100
    mask = open_suite("imagenet-a", root, model).mask
    assert mask is not None
    indices = timm_list("imagenet_a_indices.txt")
    assert mask.nonzero().flatten().tolist() == sorted(extra + SHUFFLED[int(index)] for index in indices)


@pytest.mark.parametrize(
    "rename",
    [
        lambda names: names,
        lambda names: [name.split(",")[0] for name in names],
        lambda names: [name.split(",")[0].replace(" ", "_").upper() for name in names],
    ],
    ids=["whole", "first", "spelt otherwise"],
)
def test_what_imagenet_calls_its_classes_is_known(root: Path, rename: Any) -> None:
    # as Hugging Face's models have them; two are called crane, where the order decides
    model = Named(rename(descriptions()), list(range(1000)))
    results = evaluate(model, suites=("imagenet-val", "imagenet-v2", "imagenet-r"), root=root, progress=False)[
        "results"
    ]
    assert set(results.values()) == {100.0}


@pytest.mark.parametrize("suite", IMAGENET)
def test_names_that_are_not_imagenets_are_refused_with_both_lists(root: Path, suite: str) -> None:
    model = Named(["cat", "dog", "frog"], [0] * 1000)
    with pytest.raises(ValueError) as error:
        evaluate(model, suites=(suite,), root=root, progress=False)
    text = str(error.value)
    assert text.startswith(f"{suite} has classes that the model does not know: n0")
    assert "the model's 3 are cat, dog, frog" in text
    assert " classes are n0" in text


def test_names_that_lack_some_are_refused(root: Path) -> None:
    names = list(wordnet_ids())
    names[345] = "ox"  # ImageNet's name of that class, so it is known
    assert open_suite("imagenet-val", root, Named(names, list(range(1000))))
    names[345] = "no ox"
    with pytest.raises(ValueError, match="imagenet-val has classes that the model does not know: n02403003"):
        open_suite("imagenet-val", root, Named(names, list(range(1000))))
    # a set that does not have the class is fine
    assert "n02403003" not in timm_list("imagenet_r_synsets.txt")
    assert open_suite("imagenet-r", root, Named(names, list(range(1000))))


def test_numbered_folders_are_imagenets_numbers_and_not_the_models_names(root: Path) -> None:
    model = Named([str(index) for index in range(1000)], list(range(1000)))
    with pytest.raises(ValueError, match="imagenet-v2 has classes that the model does not know"):
        open_suite("imagenet-v2", root, model)


@pytest.mark.parametrize("suite", IMAGENET)
@pytest.mark.parametrize("classes", [10, 1001, 21841])
def test_a_model_without_names_must_have_imagenets_number_of_classes(root: Path, suite: str, classes: int) -> None:
    model = Reader(classes=classes)
    model.num_classes = classes  # type: ignore[assignment]
    with pytest.raises(ValueError, match=f"{suite}: the model must have ImageNet's 1000 classes; it has {classes}"):
        evaluate(model, suites=(suite,), root=root, progress=False)
