"""The photos: deterministic, with separate training and test images, and not separable by mean colour."""

from __future__ import annotations

import pytest
import torch

from fastnull.data import hold_out
from fastnull.data.photos import CROP, PHOTOS, PHOTOS_TEST, PHOTOS_TRAIN, TILE, load_picture, photos

pytest.importorskip("skimage")


def test_photos_are_always_the_same() -> None:
    train, test = photos()
    images, labels = train.tensors
    assert images.shape == (len(PHOTOS) * PHOTOS_TRAIN, 3, 32, 32)
    assert test.tensors[0].shape == (len(PHOTOS) * PHOTOS_TEST, 3, 32, 32)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < 0.05
    assert 0.95 < images.max() <= 1
    assert torch.bincount(labels).tolist() == [PHOTOS_TRAIN] * len(PHOTOS)
    assert torch.bincount(test.tensors[1]).tolist() == [PHOTOS_TEST] * len(PHOTOS)
    torch.manual_seed(7)
    assert torch.equal(photos()[0].tensors[0], images)


def test_training_and_test_share_no_pixel() -> None:
    """Find every crop again in its picture, and mark where it was."""
    train, test = photos(CROP)  # as they were cut
    for label, name in enumerate(PHOTOS):
        picture = load_picture(name)
        if picture.shape[1] * picture.shape[2] > 600_000:
            continue  # the search is slow on the two large ones
        covered = []
        for found in (train, test):
            images, labels = found.tensors
            mask = torch.zeros(picture.shape[1:], dtype=torch.bool)
            windows = picture[0].unfold(0, CROP, 1).unfold(1, CROP, 1)  # [H', W', CROP, CROP]
            for image in images[labels == label][::5].mul(255).round().byte():
                same = windows[:, :, 0, 0] == image[0, 0, 0]
                for k in (7, 19, 33, CROP - 1):  # most places are out after a few pixels
                    same &= (windows[:, :, k, k] == image[0, k, k]) & (windows[:, :, k, 0] == image[0, k, 0])
                places = [
                    (row, column)
                    for row, column in same.nonzero().tolist()
                    if torch.equal(picture[:, row : row + CROP, column : column + CROP], image)
                ]
                assert places, f"a crop of {name} is not from the picture"
                # within one tile
                assert any(row % TILE + CROP <= TILE and column % TILE + CROP <= TILE for row, column in places)
                for row, column in places:
                    mask[row : row + CROP, column : column + CROP] = True
            covered.append(mask)
        assert not (covered[0] & covered[1]).any(), name


def test_held_out_images_and_the_rest_have_no_tile_in_common() -> None:
    train = photos(CROP)[0]
    kept, held = hold_out(train, 0.2, seed=0)
    assert held is not None
    assert 0.2 * len(train) <= len(held) < 0.22 * len(train)
    assert not torch.isin(train.groups[kept.indices], train.groups[held.indices]).any()
    # groups are tiles: crops of one are alike in place, and no tile has crops of two pictures
    labels = train.tensors[1]
    assert all(len(labels[train.groups == group].unique()) == 1 for group in train.groups.unique())
    assert torch.bincount(labels[held.indices], minlength=len(PHOTOS)).min() > 0


def test_sizes_and_channels() -> None:
    assert photos((40, 64))[1].tensors[0].shape[1:] == (3, 40, 64)
    grey = photos(32, 1)[1].tensors[0]
    torch.testing.assert_close(grey, photos(32)[1].tensors[0].mean(1, keepdim=True))
    with pytest.raises(ValueError, match="size must be"):
        photos(8)
    with pytest.raises(ValueError, match="size must be"):
        photos(224)
    with pytest.raises(ValueError, match="channels must be 1 or 3"):
        photos(32, 4)


def test_colour_means_alone_do_not_solve_them() -> None:
    """A nearest class mean over the colour of a crop is far above chance and far from right: structure is needed."""
    train, test = photos()
    means = torch.stack([train.tensors[0][train.tensors[1] == k].mean((0, 2, 3)) for k in range(len(PHOTOS))])
    nearest = torch.cdist(test.tensors[0].mean((2, 3)), means).argmin(1)
    accuracy = (nearest == test.tensors[1]).float().mean()
    assert 0.15 < accuracy < 0.7
