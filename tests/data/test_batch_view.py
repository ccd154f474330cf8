"""Batches of random views against PIL, torchvision and timm, image by image."""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch
from PIL import Image

from fastnull.compat import import_timm
from fastnull.data.batch_view import INTERPOLATIONS, RandomView, jittered
from fastnull.rng import KeyedRandom


def photographs(count: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    """Crops of a photograph [count, channels, height, width] in bytes."""
    from skimage.data import chelsea

    picture = torch.from_numpy(chelsea()).permute(2, 0, 1)[:channels]
    return torch.stack([picture[:, 7 * i : 7 * i + height, 11 * i : 11 * i + width] for i in range(count)])


def to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())


def from_pil(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(numpy.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("hflip", [0.0, 1.0])
@pytest.mark.parametrize(("channels", "sizes"), [(3, None), (1, None), (3, (80, 20))], ids=["RGB", "grey", "resized"])
def test_crops_are_resized_as_by_pil(interpolation, hflip, channels, sizes):
    images, indices = photographs(8, 48, 40, channels), torch.arange(8)
    sizes = torch.tensor([sizes or (48, 40)] * 8)
    view = RandomView((32, 24), interpolation, 0.08, hflip, 0.0, seed=3)
    views = view(images, sizes, indices, epoch=5)
    boxes = view._boxes(KeyedRandom(3, "view/5", indices), sizes.double(), torch.tensor([48, 40]))
    for image, (top, left, height, width), found in zip(images, boxes.tolist(), views, strict=True):
        crop = to_pil(image).crop((left, top, left + width, top + height))
        expected = from_pil(crop.resize((24, 32), getattr(Image.Resampling, interpolation.upper())))
        expected = expected.flip(2) if hflip else expected
        difference = (found.int() - expected.int()).abs()
        assert difference.max() <= 2  # two passes round
        assert difference.float().mean() < 0.05


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_that_of_pil(channels):
    import_timm()  # which can import torchvision
    from torchvision.transforms import functional

    adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    orders = list(itertools.permutations(range(3)))
    images, factors = photographs(6, 48, 40, channels), torch.tensor([[0.6, 1.4, 1.3]] * 3 + [[1.35, 0.7, 0.65]] * 3)
    boxes = torch.tensor([[3, 5, 30, 20]] * 6)
    found = jittered(images, factors, torch.tensor(orders), boxes)
    for image, result, scales, order in zip(images, found, factors.tolist(), orders, strict=True):
        expected = to_pil(image[:, 3:33, 5:25])
        for operation in order:
            expected = adjust[operation](expected, scales[operation])
        assert torch.equal(result[:, 3:33, 5:25], from_pil(expected))


@pytest.mark.parametrize("size", [(40, 40), (30, 90), (120, 40)])
@pytest.mark.parametrize("scale", [0.08, 0.9])  # at 0.9 the long ones need the crop in the middle
def test_crops_are_distributed_as_timms(size, scale):
    indices = torch.arange(3000)
    sizes = torch.tensor([size] * 3000)
    found = RandomView((8, 8), "bicubic", scale, 0.5, 0.0)._boxes(
        KeyedRandom(0, "view/0", indices), sizes.double(), torch.tensor(size)
    )
    transform = import_timm().data.transforms.RandomResizedCropAndInterpolation
    image = Image.new("L", size[::-1])
    expected = torch.tensor([transform.get_params(image, (scale, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)])
    # means and standard deviations of top, left, height and width: within 4 standard errors and a bit of a pixel
    spread = expected.double().std(0)
    assert ((found.double().mean(0) - expected.double().mean(0)).abs() <= 4 * spread / 38 + 0.02).all()
    assert ((found.double().std(0) - spread).abs() <= 0.1 * spread + 0.1).all()
    assert (found[:, :2] >= 0).all()
    assert (found[:, :2] + found[:, 2:] <= torch.tensor(size)).all()


def test_views_depend_on_seed_epoch_and_index_alone():
    images, sizes, indices = photographs(9, 40, 40), torch.full((9, 2), 40), torch.arange(9) + 100
    view = RandomView((56, 56), "bicubic", 0.08, 0.5, 0.4, seed=1)
    views = view(images, sizes, indices, 2)
    assert views.dtype == torch.uint8
    some = torch.tensor([7, 2, 3])
    assert torch.equal(view(images[some], sizes[some], indices[some], 2), views[some])
    for other in (
        view(images, sizes, indices, 3),
        RandomView((56, 56), "bicubic", 0.08, 0.5, 0.4)(images, sizes, indices, 2),
    ):
        assert not any(map(torch.equal, views, other))
