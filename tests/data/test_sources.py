"""Data: the digits, folders of real pictures, transforms, and the order that resuming rests on."""

from __future__ import annotations

import copy
import random

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from fastnull.data import (
    EpochBatches,
    ImageFiles,
    ImageFolder,
    Samples,
    digits,
    evaluation_data,
    hold_out,
    loader,
    open_source,
    to_pixels,
)
from fastnull.data.classes import _warn_of_order
from fastnull.data.image_files import BadImageError
from fastnull.data.photos import Crops
from fastnull.data.view import View
from fastnull.finetune import FinetuneConfig
from fastnull.models import create_model
from tests.data.test_image_files import RAMP
from tests.pictures import write_pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def model():
    from fastnull.compat import import_timm
    from fastnull.vit import NormalizedModel

    vit = import_timm().models.vision_transformer.VisionTransformer
    network = vit(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    return NormalizedModel(network, (0.5,) * 3, (0.5,) * 3)


def test_digits_are_always_the_same_split():
    train, test = digits()
    images, labels = train.tensors
    assert images.shape == (1297, 3, 16, 16)
    assert test.tensors[0].shape == (500, 3, 16, 16)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert images.max() == 1
    assert torch.equal(images[:, 0], images[:, 2])
    assert set(labels.tolist()) == set(range(10))
    torch.manual_seed(7)
    assert torch.equal(digits()[0].tensors[0], images)
    # train and test share no image (some digits may be drawn alike, so by position in the source, not by pixels)
    assert len(train) + len(test) == 1797
    assert digits(8, 1)[0].tensors[0].shape == (1297, 1, 8, 8)
    with pytest.raises(ValueError, match="size must be"):
        digits(0)


def test_folder_classes_are_in_natural_order(tmp_path):
    for name in ("10", "9", "1"):
        (tmp_path / name / "deeper").mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / name / "deeper" / "a.PNG")  # grey, upper-case suffix, nested
    found = ImageFolder(tmp_path)
    assert found.classes == ["1", "9", "10"]
    assert [label for _, label in found.files] == [0, 1, 2]
    assert found[0][0].mode == "RGB"
    assert ImageFolder(tmp_path, ["10", "9", "1", "0"])[0][1] == 2  # the training folder's numbering holds


@pytest.mark.parametrize("names", [("cat", "Bird", "apple"), ("10", "9", "1")])
def test_a_checkpoint_without_names_is_evaluated_with_timms_labels(tmp_path, model, names):
    from timm.data import create_dataset

    for split in ("train", "val"):
        for number, name in enumerate(names):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (80 * number,) * 3).save(tmp_path / split / name / "a.png")
    _warn_of_order.cache_clear()
    with pytest.warns(UserWarning, match="the model has no class names"):
        found = evaluation_data(str(tmp_path), model)
    labels = {round(float(image.mean()) * 255): label for image, label in (found[index] for index in range(3))}
    theirs = create_dataset("", root=str(tmp_path / "val"))
    assert labels == {image.getpixel((0, 0))[0]: label for image, label in (theirs[index] for index in range(3))}


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        ImageFolder(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no folder"):
        ImageFolder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no image"):
        ImageFolder(tmp_path)
    with pytest.raises(ValueError, match="does not know: empty"):
        ImageFolder(tmp_path, ["cat"])


def test_sources(tmp_path, pictures):
    assert open_source("digits").num_classes == 10
    found = open_source(str(pictures))
    assert found.classes == ["cat", "flower", "temple"]
    assert len(found.train) == 24
    with pytest.raises(ValueError, match="there is no folder 'nowhere'"):
        open_source("nowhere")
    (tmp_path / "training").mkdir()
    with pytest.raises(ValueError, match="must hold a folder train; it holds training"):
        open_source(str(tmp_path))
    with pytest.raises(ValueError, match="is a stream"):
        open_source("tfds/cifar10")
    with pytest.raises(ValueError, match="cannot be opened"):
        open_source("torch/no_such_set", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot be opened.*not found"):
        open_source("torch/cifar10", data_dir=str(tmp_path))


def test_timm_dataset(tmp_path, model):
    """CIFAR-10's own file layout with four made-up pictures: timm and torchvision read it without a download."""
    import pickle

    import torchvision

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = numpy.random.default_rng(0).integers(0, 256, (4, 3072), dtype=numpy.uint8)
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 2, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(k) for k in range(10)]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets.cifar.CIFAR10, "_check_integrity", lambda self: True)
        patch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
        found = open_source("torch/cifar10", data_dir=str(tmp_path))
        tested = evaluation_data("torch/cifar10", model, data_dir=str(tmp_path), labelled=False)
        with pytest.raises(ValueError, match=r"torch/cifar10 has 10 classes .*, the model 3 without names"):
            evaluation_data("torch/cifar10", model, data_dir=str(tmp_path))
        backwards = create_model("vit_digits", num_classes=10)
        backwards.classes = [str(k) for k in range(10)][::-1]
        reversed_labels = evaluation_data("torch/cifar10", backwards, data_dir=str(tmp_path))
    assert found.num_classes == 10
    assert found.classes == [str(k) for k in range(10)]
    assert [reversed_labels[index][1] for index in range(4)] == [9, 8, 7, 0]
    assert len(found.train) == 20
    view = View.of(model)
    image, label = Samples(found.train, view.training(**FinetuneConfig().image_settings()), view.channels)[3]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.uint8
    assert label == 9
    assert len(tested) == 4
    assert tested[1][0].shape == (3, 32, 32)
    assert tested[1][0].max() <= 1


def test_view_of_models(model):
    view = View.of(model)
    assert (view.size, view.channels) == ((32, 32), 3)
    assert View.of(torch.nn.Conv2d(3, 1, 1)).size == (224, 224)


@pytest.mark.parametrize("channels", [1, 3])
def test_erasing_changes_only_a_box(pictures, channels):
    """Outside of it a byte must be unchanged by the normalisation and its inverse."""
    view = View.of(create_model("deit_tiny_patch16_224", channels=channels, img_size=32, depth=1))
    assert channels == 3 or view.mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    plain = {"crop_scale": 1.0, "hflip": 0.0, "color_jitter": 0.0}
    files = ImageFolder(pictures / "train")
    before, after = (
        Samples(files, view.training(**FinetuneConfig(**plain, reprob=reprob).image_settings()), channels)[0][0]
        for reprob in (0.0, 1.0)
    )
    changed = (before != after).any(0)  # [H, W]
    assert 0 < changed.sum() < 0.5 * changed.numel()
    rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
    box = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert box.float().mean() > 0.9


def test_evaluation_data_is_pixels(pictures, model):
    tested = evaluation_data(str(pictures), model)
    assert len(tested) == 12
    image, label = tested[0]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1
    assert label == 0
    assert len(evaluation_data("digits", create_model("vit_digits"))) == 500


def test_order_covers_the_data_and_changes_each_epoch():
    order = EpochBatches(11, 3, 3, seed=0)
    first = [index for batch in order for index, _ in batch]
    assert len(set(first)) == 9
    order.epoch = 1
    second = [index for batch in order for index, _ in batch]
    assert first != second
    # what an epoch leaves out comes up in others
    seen = set(first) | set(second)
    for epoch in range(2, 8):
        order.epoch = epoch
        seen |= {index for batch in order for index, _ in batch}
    assert seen == set(range(11))


def test_loading_leaves_the_global_generators_alone(pictures, model):
    data = Samples(ImageFolder(pictures / "train"), View.of(model).training(**FinetuneConfig().image_settings()), 3)
    before = (torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate())
    list(loader(data, 8))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (numpy.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_hold_out():
    data = TensorDataset(torch.arange(20))
    train, held = hold_out(data, 0.25, seed=0)
    assert sorted(train.indices + held.indices) == list(range(20))
    assert len(held) == 5
    assert hold_out(data, 0.25, seed=0)[1].indices == held.indices
    assert hold_out(data, 0.25, seed=1)[1].indices != held.indices
    assert hold_out(data, 0.0, seed=0)[1] is None
    with pytest.raises(ValueError, match="leaves one part empty"):
        hold_out(data, 0.01, seed=0)


def test_hold_out_keeps_groups_together():
    groups = torch.tensor([3, 0, 0, 7, 7, 7, 9, 9, 3, 0])
    data = Crops(torch.zeros(10, 3, 2, 2), torch.zeros(10), groups)
    seen = set()
    for seed in range(8):
        train, held = hold_out(data, 0.3, seed)
        assert sorted(train.indices + held.indices) == list(range(10))
        assert not set(groups[train.indices].tolist()) & set(groups[held.indices].tolist())
        assert 3 <= len(held) <= 5  # enough, and no group more than that takes
        seen.add(tuple(held.indices))
    assert len(seen) > 1
    with pytest.raises(ValueError, match="leaves one part empty"):
        hold_out(Crops(torch.zeros(4, 3, 2, 2), torch.zeros(4), torch.zeros(4)), 0.5, seed=0)


def test_to_pixels():
    assert torch.equal(to_pixels(torch.tensor([0, 51, 255], dtype=torch.uint8)), torch.tensor([0.0, 0.2, 1.0]))
    pixels = torch.rand(3)
    assert to_pixels(pixels) is pixels


def test_samples_that_are_no_tensors_are_refused(pictures):
    with pytest.raises(TypeError, match="must yield image tensors"):
        Samples(ImageFolder(pictures / "train"))[0]


def _write(root, **classes):
    """root/split/class/a.png for each split's classes."""
    for split, names in classes.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            Image.fromarray(RAMP * 257).save(root / split / name / "a.png")


def _labels(data):
    return sorted({int(data[index][1]) for index in range(len(data))})


@pytest.mark.parametrize(
    ("known", "train", "tested", "labels"),
    [
        (["cat", "dog", "frog"], None, ["dog", "frog"], [1, 2]),
        (["cat", "dog", "frog"], ["dog", "frog"], ["dog", "frog"], [1, 2]),
        (["frog", "dog", "cat"], ["cat", "dog", "frog"], ["cat", "frog"], [0, 2]),
        (None, ["cat", "dog", "frog"], ["dog", "frog"], [1, 2]),  # the training folder numbers them
    ],
)
def test_labels_of_a_folder_are_the_models(tmp_path, model, known, train, tested, labels):
    _write(tmp_path, train=train or (), val=tested)
    named = copy.copy(model)
    named.classes = known
    assert _labels(evaluation_data(str(tmp_path), named)) == labels


def test_labels_of_embedded_data_are_the_models():
    model = create_model("vit_digits")
    plain = evaluation_data("digits", model).tensors[1]
    model.classes = [str(digit) for digit in range(10)][::-1]
    assert torch.equal(evaluation_data("digits", model).tensors[1], 9 - plain)
    model.classes = [f"number {digit}" for digit in range(10)]
    with pytest.raises(ValueError, match="digits has classes that the model does not know: 0, 1"):
        evaluation_data("digits", model)
    with pytest.raises(ValueError, match=r"digits has 10 classes .*, the model 13 without names"):
        evaluation_data("digits", create_model("vit_photos"))


def test_samples_take_the_models_labels():
    base = TensorDataset(torch.zeros(3, 1, 2, 2), torch.arange(3))
    assert [Samples(base, classes=[5, 0, 2])[index][1] for index in range(3)] == [5, 0, 2]
    assert [int(Samples(base, classes=[0, 1, 2])[index][1]) for index in range(3)] == [0, 1, 2]
    soft = TensorDataset(torch.zeros(3, 1, 2, 2), torch.eye(3))
    with pytest.raises(ValueError, match="must be class numbers"):
        Samples(soft, classes=[1, 0, 2])[0]


@pytest.mark.parametrize("channels", [2, 4])
def test_image_files_have_one_or_three_channels(pictures, channels):
    files = ImageFolder(pictures / "train")
    for build in (lambda: Samples(files, None, channels), lambda: ImageFiles(files, numpy.asarray, channels)):
        with pytest.raises(ValueError, match=f"takes images of {channels} channels; image files give 1"):
            build()


POLICIES = [None, "rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "original", "3a"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_views_for_any_number_of_colours(pictures, channels, policy):
    view = View.of(create_model("vit_digits", channels=channels))
    assert len(view.mean) == len(view.std) == channels
    config = FinetuneConfig(auto_augment=policy, color_jitter=0.4, reprob=0.5)
    data = Samples(ImageFolder(pictures / "train"), view.training(**config.image_settings()), channels)
    for epoch in range(3):
        for index in range(0, len(data), 2):
            image = data[index, epoch][0]
            assert image.shape == (channels, 16, 16)
            assert image.dtype == torch.uint8


@pytest.mark.parametrize("policy", ["rubbish", "rand-rubbish", "rand-mfoo", "rand-m9-x", "augmix-", "3a-q"])
def test_unknown_policies_are_named(model, policy):
    with pytest.raises(ValueError, match=f"auto_augment must be a policy of timm.*got '{policy}'"):
        View.of(model).training(**FinetuneConfig(auto_augment=policy).image_settings())


class _Files(torch.utils.data.Dataset):
    """What timm's data sets yield: PIL images of any mode, or an error."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if isinstance(self.images[index], Exception):
            raise self.images[index]
        return self.images[index], index


@pytest.mark.parametrize("channels", [1, 3])
def test_deep_images_of_other_data_sets_are_scaled(channels):
    deep, bytes_ = Image.fromarray(RAMP * 257), RAMP.astype(numpy.uint8)
    floats = Image.fromarray((RAMP / 255).astype(numpy.float32))
    images = [deep, Image.fromarray((RAMP * 257).astype(">u2")), deep.convert("I"), floats, Image.fromarray(bytes_)]
    data = Samples(_Files(images), lambda image: torch.from_numpy(numpy.array(image)), channels)
    for index in range(len(images)):
        assert torch.equal(data[index][0].reshape(16, 16, -1)[..., 0], torch.from_numpy(bytes_))


@pytest.mark.parametrize(
    "fault", [RuntimeError("Failed to load"), OSError("truncated"), Image.DecompressionBombError("too large")]
)
def test_an_image_of_another_data_set_that_cannot_be_read_is_named(fault):
    with pytest.raises(BadImageError, match=f"cannot read image 1: {fault}"):
        Samples(_Files([Image.new("L", (4, 4)), fault]), None, 3)[1]


def test_torchvisions_folders(tmp_path):
    """Through timm's name for them: read as ours are, named by their folders."""
    _write(tmp_path, train="ab", val="b")
    found = open_source("torch/image_folder", data_dir=str(tmp_path))
    assert found.classes == ["a", "b"]
    assert len(numpy.unique(numpy.asarray(found.train[0][0]))) == 256
    model = create_model("vit_digits", num_classes=2)
    model.classes = ["a", "b"]
    assert [label for _, label in evaluation_data("torch/image_folder", model, data_dir=str(tmp_path))] == [1]
    (tmp_path / "val" / "b" / "a.png").write_bytes(b"")
    with pytest.raises(BadImageError, match=r"val/b/a\.png"):
        evaluation_data("torch/image_folder", model, data_dir=str(tmp_path))[0]
