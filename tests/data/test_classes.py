"""Labels mean the model's classes: names of models, of data, and how they are matched."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from fastnull.compat import import_timm
from fastnull.data import Samples
from fastnull.data.classes import (
    _warn_of_order,
    class_order,
    classes_of,
    match_classes,
    names_of,
    printable,
    shortened,
    warn_of_assumed_order,
    wordnet_ids,
)
from fastnull.data.image_files import ImageFiles, ImageFolder
from fastnull.data.subset import labels_of
from fastnull.models import create_model
from fastnull.robustness import evaluate


@pytest.mark.parametrize(
    ("model", "folder", "labels"),
    [
        (["cat", "dog", "frog"], ["cat", "dog", "frog"], [0, 1, 2]),
        (["frog", "cat", "dog"], ["cat", "dog", "frog"], [1, 2, 0]),  # another order
        (["cat", "dog", "frog"], ["dog", "frog"], [1, 2]),  # a part
        (["1", "2", "10"], ["10", "1", "2"], [2, 0, 1]),
        (["caf\u00e9", "bar"], ["bar", "cafe\u0301"], [1, 0]),  # one accent, written in two ways
        (2, ["dog", "frog"], [0, 1]),  # no names, but as many
        (1000, ["n01440764", "n01443537", "n15075141"], [0, 1, 999]),
        (None, ["dog", "frog"], [0, 1]),
    ],
)
def test_matches(model: Any, folder: list[str], labels: list[int]) -> None:
    assert match_classes(model, folder) == labels


@pytest.mark.parametrize(
    ("model", "folder", "message"),
    [
        (
            ["cat", "dog"],
            ["bird", "dog"],
            "does not know: bird. Its 2 classes are bird, dog; the model's 2 are cat, dog",
        ),
        (["cat", "dog"], ["Cat", "dog"], "does not know: Cat"),
        (["crane", "dog", "crane"], ["crane"], "the model has more than once: crane"),
        (10, ["dog", "frog"], r"has 2 classes \(dog, frog\), the model 10 without names"),
        (2, ["a", "b", "c"], "has 3 classes"),
        (1000, ["n01440764", "n00000000"], "the model 1000 without names"),
        ([str(k) for k in range(1000)], ["x"], r"the model's 1000 are 0, 1, 2, 3, 4, 5, \.\.\. \(994 more\)"),
    ],
)
def test_mismatches_show_both_lists(model: Any, folder: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match_classes(model, folder)


def test_class_folders_are_in_timms_order() -> None:
    import_timm()
    from timm.utils.misc import natural_key

    for names in (["cat", "Bird", "apple"], ["10", "2", "1"], ["Z_1", "za", "ZB", "a10", "A9"], ["n2", "n10", "N3"]):
        assert sorted(names, key=class_order) == sorted(names, key=natural_key)
    numbers = [str(number) for number in range(1000)]  # ImageNetV2
    assert sorted(sorted(numbers), key=class_order) == numbers
    # timm's order of equal keys is that of the file system
    assert sorted(["cat", "01", "Cat", "1"], key=class_order) == ["01", "1", "Cat", "cat"]


def test_an_assumed_order_that_is_not_torchvisions_warns_once() -> None:
    _warn_of_order.cache_clear()
    message = "timm's order of the folders, apple, Bird, cat. In torchvision's order class 0 is Bird, not apple"
    with pytest.warns(UserWarning, match=message):
        warn_of_assumed_order(3, ["apple", "Bird", "cat"])
    with pytest.warns(UserWarning, match="class 1 is 10, not 2"):
        warn_of_assumed_order(None, ["1", "2", "10"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_assumed_order(3, ["apple", "Bird", "cat"])  # said already
        warn_of_assumed_order(["cat", "apple", "Bird"], ["apple", "Bird", "cat"])  # matched by name
        warn_of_assumed_order(1000, list(wordnet_ids()[:3]))
        warn_of_assumed_order(2, ["cat", "dog"])  # one order for all
        warn_of_assumed_order(3, ["dog", "cat", "10"])  # no order of folders: the data set has its own


def test_one_string_is_no_list_of_names() -> None:
    with pytest.raises(TypeError, match="a list of names"):
        match_classes("cat", ["c", "a", "t"])


def test_names_in_messages_are_one_line() -> None:
    assert printable("a\nb\udcffc é") == r"a\nb\udcffc é"
    assert shortened(["a"] * 9) == "a, a, a, a, a, a, ... (3 more)"


def test_classes_of_models() -> None:
    model = create_model("vit_digits", num_classes=3)
    assert classes_of(model) == 3
    model.classes = ["cat", "dog", "frog"]
    assert classes_of(model) == classes_of(torch.nn.DataParallel(model)) == ["cat", "dog", "frog"]
    model.network.reset_classifier(2)
    assert classes_of(model) == 2  # the names were those of the head before
    network = create_model("vit_digits", num_classes=2).network
    network.pretrained_cfg = {**network.pretrained_cfg, "label_names": ["cat", "dog"]}
    assert classes_of(network) == ["cat", "dog"]
    assert classes_of(torch.nn.Flatten()) is None


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ({0: "cat", 1: "dog"}, ["cat", "dog"]),
        ({1: "dog", 0: "cat"}, ["cat", "dog"]),
        ({0: "LABEL_0", 1: "LABEL_1"}, 2),
    ],
)
def test_classes_of_hugging_face_models(labels: dict[int, str], found: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        id2label=labels,
    )  # fmt: skip
    assert classes_of(transformers.ViTForImageClassification(config)) == found


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        (["a", "b"], ["a", "b"], None),
        (None, ["a", "b"], None),
        (["a", "b"], ["b", "a"], "in their order; its 2 are b, a, the model's 2 are a, b"),
        (["a", "b"], ["a", "b", "c"], "in their order"),
        (["a", "b"], 3, "source must have the model's 2 classes; it has 3"),
    ],
)
def test_a_source_of_attacks_has_the_models_classes(one: Any, two: Any, message: str | None) -> None:
    """Otherwise an attack on a label would be against another class."""
    model, source = (
        create_model("vit_digits", num_classes=len(k) if isinstance(k, list) else k or 2) for k in (one, two)
    )
    model.classes, source.classes = (names if isinstance(names, list) else None for names in (one, two))
    data = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        evaluate(model, data, suites=("fgsm",), eps=(0.1,), source=source, progress=False)


def test_names_of_data() -> None:
    plain = TensorDataset(torch.zeros(3), torch.arange(3))
    assert names_of(plain) is names_of(None) is None
    plain.classes = ["a", "b", "c"]
    assert names_of(Subset(plain, [0])) == ["a", "b", "c"]
    assert names_of(SimpleNamespace(class_to_idx={"b": 1, "a": 0})) == ["a", "b"]
    assert names_of(SimpleNamespace(class_to_idx={"b": 2, "a": 0})) is None  # labels with a gap
    assert names_of(SimpleNamespace(reader=SimpleNamespace(class_to_idx={"b": 0, "a": 1}))) == ["b", "a"]
    synonyms = SimpleNamespace(classes=[("tench", "Tinca tinca")], class_to_idx={"tench": 0}, wnids=["n01440764"])
    assert names_of(synonyms) == ["n01440764"]
    features = {"label": SimpleNamespace(names=["x", "y"])}
    hugging_face = SimpleNamespace(reader=SimpleNamespace(dataset=SimpleNamespace(features=features)))
    assert names_of(hugging_face) == ["x", "y"]
    itself: Any = SimpleNamespace()
    itself.dataset = itself
    assert names_of(itself) is None


def test_wordnet_ids_are_imagenets() -> None:
    assert len(wordnet_ids()) == len(set(wordnet_ids())) == 1000
    assert wordnet_ids()[:2] == ("n01440764", "n01443537")


def test_labels_of_data(tmp_path: Path) -> None:
    plain = TensorDataset(torch.zeros(4, 1), torch.tensor([3, 1, 2, 1]))
    assert labels_of(plain).tolist() == [3, 1, 2, 1]
    assert labels_of(Subset(plain, [2, 0])).tolist() == [2, 3]
    assert labels_of(Samples(Subset(plain, range(3)), classes=[5, 6, 7, 8])).tolist() == [8, 6, 7]
    assert labels_of(TensorDataset(torch.zeros(4, 1), torch.zeros(4, 3))) is None  # soft
    assert labels_of(TensorDataset(torch.zeros(4, 1))) is None
    assert labels_of([("image", 0)]) is None
    for name in ("cat/a.png", "dog/b.png", "dog/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")  # nothing is read
    folder = ImageFolder(tmp_path, ["dog", "cat"])
    assert labels_of(folder).tolist() == labels_of(ImageFiles(folder, None, 3)).tolist() == [1, 0, 0]
    readers = (
        SimpleNamespace(samples=[("a", 1), ("b", 0)]),
        SimpleNamespace(dataset=_Columns(label=[1, 0]), label_key="label"),
    )
    for reader in readers:
        assert labels_of(_Read(reader)).tolist() == [1, 0]


class _Columns(dict):
    """A Hugging Face data set."""

    features = ("label",)


class _Read(list):
    """A data set of timm, of two images."""

    def __init__(self, reader: Any) -> None:
        super().__init__([None, None])
        self.reader = reader


def test_a_replaced_head_counts_not_the_configuration() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(num_labels=2, id2label={0: "cat", 1: "dog"})
            self.classifier = nn.Linear(4, 2)

    model = Classifier()
    assert classes_of(model) == ["cat", "dog"]
    model.classifier = nn.Linear(4, 10)
    assert classes_of(model) == 10
