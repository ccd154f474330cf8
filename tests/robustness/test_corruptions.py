"""Corruptions: against scipy, scikit-image, Pillow or plain loops written from the original's formulas; properties."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastnull.rng import KeyedRandom
from fastnull.robustness import CORRUPTIONS, DEMO_CORRUPTIONS, corrupt
from fastnull.robustness.corruptions import SEVERITIES, frost_source
from fastnull.robustness.corruptions.base import border, zoom
from fastnull.robustness.corruptions.blur import _copies
from fastnull.robustness.corruptions.frost import made_pictures
from fastnull.robustness.corruptions.noise import poisson
from fastnull.robustness.corruptions.weather import plasma

ndimage = pytest.importorskip("scipy.ndimage")
pytest.importorskip("cv2")  # spatter
stats = pytest.importorskip("scipy.stats")

RANDOM = {
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur", "snow", "fog",
    "elastic_transform", "frost", "spatter",
}  # fmt: skip

# distances need not grow: saturate takes colour away and then adds it; elastic mixes two kinds of move; glass blur's
# (sigma, reach, rounds) and snow's settings rise and fall by design; fog's decay changes its texture; every severity of
# frost draws its own picture, and spatter goes from water to mud
NOT_MONOTONE = {"saturate", "elastic_transform", "glass_blur", "snow", "fog", "frost", "spatter"}


def image_of(tensor: Tensor) -> np.ndarray:
    """[C, H, W] → [H, W, C] float64."""
    return tensor.permute(1, 2, 0).double().numpy()


def random_of(name: str, severity: int, count: int, seed: int = 0) -> KeyedRandom:
    return KeyedRandom(seed, f"{name}/{severity}", torch.arange(count))


def assert_same(result: Tensor, expected: np.ndarray, atol: float = 2e-6) -> None:
    np.testing.assert_allclose(image_of(result), expected.clip(0, 1), atol=atol, rtol=0)


# --- properties of all


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("size", [(16, 16), (40, 24)])  # 16: the smallest; 40 x 24: not square, not a power of two
def test_in_range_deterministic_and_batch_independent(name: str, size: tuple[int, int]) -> None:
    images = torch.rand(5, 3, *size, generator=torch.Generator().manual_seed(0))
    kept = images.clone()
    before = torch.get_rng_state()
    for severity in SEVERITIES:
        whole = corrupt(images, name, severity)
        assert whole.shape == images.shape
        assert whole.dtype == images.dtype
        assert torch.isfinite(whole).all()
        assert whole.min() >= 0
        assert whole.max() <= 1
        assert torch.equal(whole, corrupt(images, name, severity))
        part = corrupt(images[[3, 1]], name, severity, indices=[3, 1])
        torch.testing.assert_close(part, whole[[3, 1]], atol=1e-6, rtol=0)  # matmul may sum in another order
        assert not torch.equal(whole, images)
    assert torch.equal(images, kept)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_seed_index_and_severity_change_the_random_ones(name: str) -> None:
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).expand(8, -1, -1, -1)
    base = corrupt(images, name, 2)
    others = [base[1:], corrupt(images, name, 2, seed=1)[:7], corrupt(images, name, 2, indices=range(8, 16))[:7]]
    for other in others:
        assert not torch.equal(other, base[:7])


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - RANDOM))
def test_the_others_do_not_depend_on_the_seed(name: str, photos: Tensor) -> None:
    assert torch.equal(corrupt(photos, name, 3), corrupt(photos, name, 3, seed=5))


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - NOT_MONOTONE))
def test_severity_moves_away_from_the_clean_image(name: str, photos: Tensor) -> None:
    distances = [(corrupt(photos, name, severity) - photos).square().mean().sqrt() for severity in SEVERITIES]
    assert distances == sorted(distances)
    assert distances[4] > 1.1 * distances[0]


@pytest.mark.parametrize("name", sorted(NOT_MONOTONE))
def test_the_rest_changes_visibly(name: str, photos: Tensor) -> None:
    for severity in SEVERITIES:
        assert (corrupt(photos, name, severity) - photos).abs().mean() > 0.005  # spatter's drops are few


def test_dtypes_layouts_and_empty_batches(photos: Tensor) -> None:
    for name in CORRUPTIONS:
        expected = corrupt(photos, name, 3)
        strided = photos.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        torch.testing.assert_close(corrupt(strided, name, 3), expected, atol=1e-6, rtol=0)
        assert corrupt(photos.half(), name, 3).dtype == torch.float16
        assert corrupt(photos[:0], name, 3).shape == (0, *photos.shape[1:])


def test_results_do_not_depend_on_how_many_run_at_once(photos: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {name: corrupt(photos, name, 4) for name in CORRUPTIONS}
    monkeypatch.setattr("fastnull.robustness.corruptions.CACHED_VALUES", 1)
    for name, whole in expected.items():
        torch.testing.assert_close(corrupt(photos, name, 4), whole, atol=1e-6, rtol=0)


def test_pixels_just_outside_count_as_black_and_white(photos: Tensor) -> None:
    # resampling leaves -3e-8 and 1.0000001; a negative rate has no Poisson distribution
    near = photos.clone()
    near[:, :, ::2], near[:, :, 1::2] = -3e-8, 1 + 2e-7
    for name in CORRUPTIONS:
        assert torch.equal(corrupt(near, name, 2), corrupt(near.clamp(0, 1), name, 2))


def test_autocast_of_the_caller_has_no_effect(photos: Tensor) -> None:
    expected = corrupt(photos, "gaussian_blur", 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(corrupt(photos, "gaussian_blur", 3), expected)


def test_gray_images_where_they_make_sense(photos: Tensor) -> None:
    gray = photos[:, :1]
    for name in CORRUPTIONS:
        if name in ("saturate", "snow", "spatter"):
            with pytest.raises(ValueError, match="needs 3 channels"):
                corrupt(gray, name, 1)
        else:
            assert corrupt(gray, name, 1).shape == gray.shape


def test_bad_input(photos: Tensor) -> None:
    with pytest.raises(ValueError, match="Did you mean 'gaussian_blur'"):
        corrupt(photos, "gausian_blur", 1)
    for severity in (0, 6, 2.5, True, "3"):
        with pytest.raises(ValueError, match="severity must be one of"):
            corrupt(photos, "contrast", severity)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        corrupt(photos * 255, "contrast", 1)
    with pytest.raises(ValueError, match="16x16 pixels or larger; got 8x64"):
        corrupt(photos[:, :, :8], "contrast", 1)
    with pytest.raises(ValueError, match=r"one entry per image \(6\)"):
        corrupt(photos, "contrast", 1, indices=[0])


def test_demo_corruptions_are_registered() -> None:
    assert len(DEMO_CORRUPTIONS) == 6
    assert set(DEMO_CORRUPTIONS) <= set(CORRUPTIONS)


# --- noise


@pytest.mark.parametrize("severity", SEVERITIES)
def test_moments_of_the_noises(severity: int) -> None:
    # .5 and small c: nothing is clipped at 5 standard deviations up to c = .08; above, compare with a clipped normal
    gray = torch.full((64, 3, 64, 64), 0.5)
    for name, scale in (
        ("gaussian_noise", (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]),
        ("speckle_noise", 0.5 * (0.15, 0.2, 0.35, 0.45, 0.6)[severity - 1]),
    ):
        change = corrupt(gray, name, severity).double() - 0.5
        cut = 0.5 / scale
        # variance of a normal clipped at ± cut
        inside = stats.norm.cdf(cut) - stats.norm.cdf(-cut)
        variance = scale**2 * (inside - 2 * cut * stats.norm.pdf(cut) + cut**2 * (1 - inside))
        assert abs(change.mean()) < 5 * scale / math.sqrt(change.numel())
        assert change.var().item() == pytest.approx(variance, rel=0.01)


def test_shot_noise_has_the_variance_of_counts() -> None:
    gray = torch.full((64, 3, 64, 64), 0.25)
    for severity, c in ((1, 60), (2, 25)):  # further on too much is clipped at 1
        noisy = corrupt(gray, "shot_noise", severity).double()
        assert noisy.mean().item() == pytest.approx(0.25, abs=1e-3)
        assert noisy.var().item() == pytest.approx(0.25 / c, rel=0.02)
        counts = noisy * c
        torch.testing.assert_close(counts, counts.round(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("largest", [3, 60])
def test_poisson_is_the_inverse_of_the_distribution_function(largest: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rate = torch.rand(200_000, generator=generator) * largest
    rate[:10] = 0
    uniform = (torch.randint(0, 1 << 23, rate.shape, generator=generator) + 0.5) * 2.0**-23
    uniform[10:20] = 1 - 2.0**-24  # the largest one there is: must not count to the end
    expected = stats.poisson.ppf(uniform.double().numpy(), rate.double().numpy()).clip(0)
    counts = poisson(rate, uniform, largest).numpy()
    assert (counts != expected).mean() < 1e-4  # float32 sums against float64 ones, at the edges of the steps
    assert np.abs(counts - expected).max() <= 4
    assert (counts[:10] == 0).all()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_counts(severity: int) -> None:
    c = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    noisy = corrupt(torch.full((64, 3, 64, 64), 0.5), "impulse_noise", severity)
    changed = noisy != 0.5
    assert changed.double().mean().item() == pytest.approx(c, rel=0.03)
    assert (noisy[changed] == 1).double().mean().item() == pytest.approx(0.5, abs=0.01)
    assert ((noisy == 0) | (noisy == 0.5) | (noisy == 1)).all()
    assert not torch.equal(changed[:, 0], changed[:, 1]), "channels are hit one by one"


# --- blurs


@pytest.mark.parametrize(("size", "factor"), [(48, 4.5), (17, 4.0), (48, 1.03)])  # trimmed by 1, by 1, not at all
def test_zoom_is_scipys_with_its_rim_trimmed(size: int, factor: float) -> None:
    picture = np.random.default_rng(0).random((size, size))
    crop = math.ceil(size / factor)
    first = (size - crop) // 2
    large = ndimage.zoom(picture[first : first + crop, first : first + crop], factor, order=1)
    trim = (len(large) - size) // 2
    expected = large[trim : trim + size, trim : trim + size]
    np.testing.assert_allclose(zoom(torch.from_numpy(picture).float(), factor).numpy(), expected, atol=1e-6)


def reference_motion(picture: np.ndarray, radius: int, sigma: float, degrees: float) -> np.ndarray:
    """Pixel by pixel, as ImageMagick describes it."""
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(2 * radius + 1)]
    height, width = picture.shape[:2]
    result = np.zeros_like(picture)
    for i, weight in enumerate(weights):
        right = math.ceil(i * math.cos(math.radians(degrees)) - 0.5)
        down = math.ceil(i * math.sin(math.radians(degrees)) - 0.5)
        for y in range(height):
            for x in range(width):
                source = picture[min(max(y + down, 0), height - 1), min(max(x + right, 0), width - 1)]
                result[y, x] += weight / sum(weights) * source
    return result


@pytest.mark.parametrize("severity", [1, 5])  # the others differ in the same two numbers
def test_motion_blur_is_a_smear(photos: Tensor, severity: int) -> None:
    images = photos[:2, :, :20, :24]
    radius, sigma = {1: (10, 3), 5: (20, 15)}[severity]
    angles = random_of("motion_blur", severity, 2).uniform() * 90 - 45
    result = corrupt(images, "motion_blur", severity)
    for k in range(2):
        assert_same(result[k], reference_motion(image_of(images[k]), radius, sigma, float(angles[k])))


@pytest.mark.parametrize(("reach", "size"), [(1, (16, 20)), (4, (17, 16))])
def test_glass_copies_equal_the_loop_over_pixels(reach: int, size: tuple[int, int]) -> None:
    height, width = size
    result = _copies(KeyedRandom(0, "glass", torch.arange(3)), height, width, reach)
    offsets = (KeyedRandom(0, "glass", torch.arange(3)).uniform(2, height, width) * 2 * reach).long() - reach
    for image in range(3):
        content = np.arange(height * width).reshape(height, width)
        for row in range(height - reach, reach, -1):
            for column in range(width - reach, reach, -1):
                down, right = offsets[image, :, row, column].tolist()
                content[row, column] = content[row + down, column + right]
        assert result[image].tolist() == content.flatten().tolist()


# --- weather


def reference_plasma(size: int, decay: float, random: KeyedRandom) -> np.ndarray:
    """Diamond-square on strided slices of one array, for one image."""
    field = np.zeros((size, size))
    step, wibble = size, 100.0

    def wibbled(total: np.ndarray) -> np.ndarray:
        return total / 4 + wibble * (2 * random.uniform(*total.shape)[0].double().numpy() - 1) * wibble

    while step >= 2:
        half = step // 2
        corner = field[::step, ::step]
        around = corner + np.roll(corner, -1, 0)
        field[half::step, half::step] = wibbled(around + np.roll(around, -1, 1))
        middle = field[half::step, half::step]
        field[::step, half::step] = wibbled(middle + np.roll(middle, 1, 0) + corner + np.roll(corner, -1, 1))
        field[half::step, ::step] = wibbled(middle + np.roll(middle, 1, 1) + corner + np.roll(corner, -1, 0))
        step, wibble = half, wibble / decay
    field -= field.min()
    return field / field.max()


def test_fog_is_diamond_square_haze(photos: Tensor) -> None:
    index = torch.tensor([4])
    haze = reference_plasma(256, 1.7, KeyedRandom(0, "fog/3", index))
    np.testing.assert_allclose(plasma(256, 1.7, KeyedRandom(0, "fog/3", index))[0].numpy(), haze, atol=1e-6)
    picture = image_of(photos[0])
    largest = picture.max()
    expected = (picture + 2.5 * haze[:48, :64, None]) * largest / (largest + 2.5)
    assert_same(corrupt(photos[:1], "fog", 3, indices=index)[0], expected, atol=1e-5)


def test_fog_covers_images_above_256_pixels() -> None:
    foggy = corrupt(torch.full((1, 3, 260, 300), 0.5), "fog", 1)
    assert torch.isfinite(foggy).all()
    assert foggy[..., 256:].std() > 0.01


def test_snow_by_its_parts(photos: Tensor) -> None:
    images = photos[:1, :, :48, :48]
    random = random_of("snow", 2, 1)
    flakes = 0.2 + 0.3 * random.normal(1, 48, 48)[0, 0].double().numpy()
    crop = math.ceil(48 / 2)
    flakes = ndimage.zoom(flakes[12 : 12 + crop, 12 : 12 + crop], 2, order=1)
    flakes = np.where(flakes < 0.5, 0, flakes).clip(0, 1)
    flakes = reference_motion(flakes[..., None], 12, 4, float(random.uniform() * 90 - 135))
    picture = image_of(images[0])
    gray = picture @ np.array([0.299, 0.587, 0.114])
    white = 0.7 * picture + 0.3 * np.maximum(picture, gray[..., None] * 1.5 + 0.5)
    assert_same(corrupt(images, "snow", 2)[0], white + flakes + np.rot90(flakes, 2), atol=1e-5)


def test_made_frost_is_always_the_same_and_varied() -> None:
    pictures = made_pictures()
    assert len(pictures) == 5
    made_pictures.cache_clear()
    for picture, again in zip(pictures, made_pictures(), strict=True):
        assert torch.equal(picture, again)
        assert picture.shape == (3, 448, 448)
        assert picture.mean((1, 2)).std() > 0.01  # tinted
        # detail at the scale of a pixel, of some pixels and of half the picture
        assert (picture[:, :, 1:] - picture[:, :, :-1]).abs().mean() > 0.01
        assert torch.nn.functional.avg_pool2d(picture, 32).std() > 0.01


def test_frost_is_a_part_of_a_picture_over_the_image(photos: Tensor, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    # one larger than the images, one that is too small: 30 rows must become 48
    own = [rng.integers(0, 256, (100, 90, 3), dtype=np.uint8), rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)]
    for number, picture in enumerate(own):
        image.fromarray(picture).save(tmp_path / f"{number}.png")
    (tmp_path / "note.txt").write_text("no picture")
    black = torch.zeros(16, *photos.shape[1:])
    layers = corrupt(black, "frost", 2, frost_folder=tmp_path) / 0.6
    large = torch.from_numpy(own[0]).permute(2, 0, 1).float() / 255
    windows = large.unfold(1, 48, 1).unfold(2, 64, 1)  # [3, 53, 27, 48, 64]
    found = [bool((windows - layer[:, None, None]).abs().amax((0, 3, 4)).min() < 1e-5) for layer in layers]
    assert 3 < sum(found) < 13  # the others are of the enlarged picture
    frosted = corrupt(photos, "frost", 2, frost_folder=tmp_path)
    torch.testing.assert_close(frosted, (0.8 * photos + 0.6 * layers[:6]).clamp(0, 1), atol=1e-5, rtol=0)
    assert not torch.equal(frosted, corrupt(photos, "frost", 2))
    assert "2 pictures of the user (" in frost_source(tmp_path)
    assert frost_source(None) != frost_source(tmp_path)


def test_frost_folder_errors(photos: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frost: there is no folder"):
        corrupt(photos, "frost", 1, frost_folder=tmp_path / "none")
    with pytest.raises(ValueError, match="holds no picture"):
        corrupt(photos, "frost", 1, frost_folder=tmp_path)
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(ValueError, match=r"cannot read the image file .*a\.png"):
        corrupt(photos, "frost", 1, frost_folder=tmp_path)


def test_frost_covers_images_above_its_pictures() -> None:
    frosted = corrupt(torch.zeros(1, 3, 460, 500), "frost", 3)
    assert (frosted > 0).float().mean() > 0.99


# --- the independent package


@pytest.fixture(scope="module")
def oracle() -> Any:
    """imagecorruptions-imaug: the original's numpy code, kept alive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("imagecorruptions.corruptions", reason="needs imagecorruptions-imaug")


# glass, motion blur, snow, elastic, fog and frost differ there by design (see facts in docs/robustness.md), the noises
# in their random numbers; jpeg and pixelate round to 8 bits there
@pytest.mark.parametrize(
    ("name", "atol"),
    [
        ("gaussian_blur", 1e-5), ("defocus_blur", 1e-5), ("zoom_blur", 1e-5), ("brightness", 1e-5),
        ("contrast", 1e-5), ("saturate", 2e-5), ("pixelate", 1.01 / 255), ("jpeg_compression", 1e-6),
    ],
)  # fmt: skip
@pytest.mark.parametrize("severity", SEVERITIES)
def test_deterministic_ones_equal_imagecorruptions(
    photos: Tensor, oracle: Any, name: str, atol: float, severity: int
) -> None:
    image = pytest.importorskip("PIL.Image")
    whole = photos[2].mul(255).round().byte().permute(1, 2, 0).numpy()
    whole[0, :4] = np.array([[0], [255], [128], [77]])  # black, white, gray: no hue
    for pixels in (whole, whole[:16, :16]):  # 16: kernels reach over both borders
        expected = np.asarray(getattr(oracle, name)(image.fromarray(pixels), severity), dtype=np.float64) / 255
        bytes_ = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        assert_same(corrupt(bytes_, name, severity)[0], expected, atol=atol)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_spatter_equals_imagecorruptions(
    photos: Tensor, oracle: Any, severity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = photos[0].mul(255).round().byte().permute(1, 2, 0).numpy()
    drawn = random_of("spatter", severity, 1).normal(1, *photos.shape[2:])[0, 0].double().numpy()
    monkeypatch.setattr(oracle.np.random, "normal", lambda size, loc, scale: loc + scale * drawn)
    expected = oracle.spatter(image.fromarray(pixels), severity) / 255
    bytes_ = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    difference = np.abs(image_of(corrupt(bytes_, "spatter", severity)[0]) - expected.clip(0, 1))
    assert expected.max() > pixels.max() / 255 or severity > 3, "no drop was drawn"
    # float32 values that a threshold of 8 bits sends the other way are rare
    assert np.median(difference) < 1e-5
    assert (difference > 1e-3).mean() < 0.01


# --- digital


@pytest.mark.parametrize("severity", [1, 2, 5])  # the three regimes: affine, strong waves, fine waves
def test_elastic_transform_is_scipys_sampling(photos: Tensor, severity: int) -> None:
    filters = pytest.importorskip("skimage.filters")
    amplitude, sigma, jitter = {1: (488, 170.8, 24.4), 2: (488, 19.52, 48.8), 5: (29.28, 2.44, 4.88)}[severity]
    height, width = photos.shape[2:]
    random = random_of("elastic_transform", severity, 1)
    moved = (2 * random.uniform(3, 2)[0].double().numpy() - 1) * jitter
    waves = 2 * random.uniform(2, height, width)[0].double().numpy() - 1
    reach = min(height, width) // 3
    centre = np.array([height // 2, width // 2], dtype=np.float64)
    before = centre + np.array([[reach, reach], [reach, -reach], [-reach, -reach]])
    # the affine map with M (x, y, 1) = after; cv2 samples the source at its inverse
    matrix = np.linalg.solve(np.c_[before, np.ones(3)], before + moved).T
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    source = np.linalg.inv(matrix[:, :2]) @ (np.stack([columns, rows]).reshape(2, -1) - matrix[:, 2:])
    x, y = source.reshape(2, height, width)
    dx, dy = (filters.gaussian(wave, sigma, mode="reflect", truncate=3) * amplitude for wave in waves)
    for channel, plane in enumerate(photos[0].double().numpy()):
        warped = ndimage.map_coordinates(plane, [y, x], order=1, mode="mirror")
        expected = ndimage.map_coordinates(warped, [rows + dy, columns + dx], order=1, mode="reflect")
        result = corrupt(photos[:1], "elastic_transform", severity)[0, channel].numpy()
        # float32 positions of some hundred pixels; a few land on the other side of a pixel's edge
        np.testing.assert_allclose(result, expected.clip(0, 1), atol=2e-3)


@pytest.mark.parametrize(("rule", "mode"), [("nearest", "edge"), ("reflect", "symmetric"), ("reflect101", "reflect")])
def test_border_rules_are_numpys(rule: str, mode: str) -> None:
    positions = torch.arange(-40, 45)  # several times the size
    expected = np.pad(np.arange(5), 40, mode=mode)
    assert border(positions, 5, rule).tolist() == expected.tolist()
