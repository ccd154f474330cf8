"""CIFAR-10-C: its constants, corruption before resizing, and the published files in miniature."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastnull.data import evaluation_data
from fastnull.robustness import CORRUPTIONS, corrupt, evaluate, format_table
from fastnull.robustness.corruptions.constants import CIFAR10_C, IMAGENET_C
from fastnull.robustness.suites import CIFAR10, CIFAR10_CORRUPTIONS
from tests.pictures import write_cifar10_c
from tests.robustness.small_model import Returning

image = pytest.importorskip("PIL.Image")


class Reader(nn.Module):
    """Reads the class off the red of the middle pixel of a 64-pixel image."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.num_classes, self.seen = classes, torch.zeros(0)
        self.pretrained_cfg = {"input_size": (3, 64, 64), "crop_pct": 1.0, "interpolation": "nearest"}
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (3, 64, 64)
        self.seen = images
        red = images[:, 0, 32, 32].mul(255 / 20).round().long() % self.num_classes
        return nn.functional.one_hot(red, self.num_classes).float() + 0 * self.weight


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_cifar10_c(tmp_path)


def test_published_files(root: Path) -> None:
    settings: dict[str, Any] = {"suites": ("cifar10-c",), "root": root, "severities": (3, 4), "progress": False}
    record = evaluate(Reader(), **settings)
    tables = record["results"]["cifar10-c"]
    assert tuple(tables) == CIFAR10_CORRUPTIONS
    assert all(table == {"3": 100.0, "4": 0.0} for table in tables.values())
    assert record["summary"]["cifar10_c_mean"] == 50
    assert record["images"]["cifar10-c/fog/3"]["n"] == 20
    assert "| cifar10-c fog (mean of severities 3, 4) | 50.0 |" in format_table(record)
    assert evaluate(Reader(), limit=10, **settings)["images"]["cifar10-c/fog/4"]["n"] == 10
    named = Returning(Reader(), lambda logits: logits.roll(1, 1))
    named.classes = [CIFAR10[-1], *CIFAR10[:-1]]  # type: ignore[assignment]
    named.pretrained_cfg = Reader().pretrained_cfg
    assert evaluate(named, **settings)["results"]["cifar10-c"] == tables


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


SAVED: Callable[[Any], Callable[[Path], None]] = lambda array: lambda path: np.save(path, array)  # noqa: E731


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("labels", Path.unlink, r"there is no file .*labels\.npy; ROOT/cifar10-c must hold CORRUPTION\.npy"),
        ("fog", Path.unlink, r"there is no file .*fog\.npy"),
        ("fog", cut, r"cannot read .*fog\.npy"),
        ("fog", lambda path: path.write_bytes(b""), r"cannot read .*fog\.npy"),
        ("fog", SAVED(np.array([{}])), r"cannot read .*fog\.npy"),  # a pickle
        ("fog", lambda path: np.savez(path.open("wb"), np.zeros(3)), "must hold one array"),
        ("fog", SAVED(np.zeros((100, 3, 32, 32), np.uint8)), r"must be bytes \[5 n, 32, 32, 3\].*\[100, 3, 32, 32\]"),
        ("fog", SAVED(np.zeros((99, 32, 32, 3), np.uint8)), r"must be bytes \[5 n, 32, 32, 3\]"),
        ("fog", SAVED(np.zeros((100, 32, 32, 3))), "must be bytes .*got float64"),
        ("fog", SAVED(np.zeros((0, 32, 32, 3), np.uint8)), "must be bytes"),
        ("labels", SAVED(np.zeros(20, np.uint8)), r"got uint8 \[100, 32, 32, 3\] and uint8 \[20\]"),
        ("labels", SAVED(np.full(100, 10)), "their classes 0 to 9"),
        ("labels", SAVED(np.zeros(100)), "their classes 0 to 9"),
    ],
)
def test_broken_files_are_one_clear_error(root: Path, name: str, change: Callable[[Path], None], message: str) -> None:
    change(root / "cifar10-c" / f"{name}.npy")
    with pytest.raises(ValueError, match=rf"^cifar10-c.*{message}"):
        evaluate(Reader(), suites=("cifar10-c",), root=root, severities=(1,), progress=False)


def test_other_classes_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="cifar10-c has 10 classes"):
        evaluate(Reader(7), suites=("cifar10-c",), root=root, progress=False)


# --- in memory


@pytest.fixture(scope="module")
def small() -> Tensor:
    """Eight crops of a photograph, [8, 3, 32, 32]."""
    picture = torch.from_numpy(pytest.importorskip("skimage.data").astronaut().copy()).permute(2, 0, 1) / 255
    return torch.stack([picture[:, 40 * i : 40 * i + 64 : 2, 60 + 30 * i : 124 + 30 * i : 2] for i in range(8)])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_constants_for_32_pixels_are_milder(small: Tensor, name: str) -> None:
    if name == "spatter":
        pytest.importorskip("cv2")
    for severity in range(1, 6):
        mild, strong = (
            (corrupt(small, name, severity, constants=constants) - small).abs().mean()
            for constants in ("cifar10-c", "imagenet-c")
        )
        assert 0 < mild <= strong * 1.001 or IMAGENET_C[name][severity - 1] == CIFAR10_C[name][severity - 1]


def test_constants_for_32_pixels_are_the_published(small: Tensor) -> None:
    def changed(name: str, severity: int) -> Tensor:
        return corrupt(small, name, severity, constants="cifar10-c")

    mean = small.mean((2, 3), keepdim=True)
    torch.testing.assert_close(changed("contrast", 1), (0.75 * small + 0.25 * mean).clamp(0, 1))
    bytes_ = small.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    for pixels, jpeg, boxes in zip(bytes_, changed("jpeg_compression", 5), changed("pixelate", 5), strict=True):
        file = io.BytesIO()
        image.fromarray(pixels).save(file, "JPEG", quality=40)
        assert np.array_equal(np.array(image.open(file)), jpeg.mul(255).round().byte().permute(1, 2, 0).numpy())
        coarse = image.fromarray(pixels).resize((20, 20), image.Resampling.BOX).resize((32, 32), image.Resampling.BOX)
        np.testing.assert_allclose(np.array(coarse) / 255, boxes.permute(1, 2, 0).numpy(), atol=1.01 / 255)
    # Poisson numbers of rates up to 500, beyond float32's exp(-rate)
    flat = torch.full((40, 3, 32, 32), 0.6)
    noise = corrupt(flat, "shot_noise", 1, constants="cifar10-c") - 0.6
    assert noise.mean().item() == pytest.approx(0, abs=3e-4)
    assert noise.std().item() == pytest.approx((0.6 / 500) ** 0.5, rel=0.02)
    with pytest.raises(ValueError, match="constants must be one of"):
        corrupt(small, "fog", 1, constants="cifar")


def test_files_are_corrupted_before_they_are_resized(tmp_path: Path, small: Tensor) -> None:
    for part in ("train", "val"):
        for index, pixels in enumerate(small):
            path = tmp_path / part / f"class{index}" / "a.png"
            path.parent.mkdir(parents=True)
            image.fromarray(pixels.mul(255).round().byte().permute(1, 2, 0).numpy()).save(path)
    model = Reader(8)
    settings: dict[str, Any] = {"corruptions": ("gaussian_noise",), "severities": (5,), "progress": False}
    settings |= {"suites": ("corruptions",), "corruption_size": 32}
    record = evaluate(model, evaluation_data(str(tmp_path), model), **settings)
    noisy = corrupt(small, "gaussian_noise", 5, constants="cifar10-c").mul(255).floor() / 255
    expected = noisy.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(model.seen, expected, atol=1.01 / 255, rtol=0)
    assert record["protocol"]["corruption_size"] == 32
    with pytest.raises(ValueError, match=r"corruption_size needs image files, .*got tuple"):
        evaluate(model, (small, torch.arange(8)), **settings)
