"""PixelNullspace: noise that changes no token, valid images, and workers that share the bank."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from fastnull.nullspace import PatchNullspace
from fastnull.nullspace.pixels import PixelNullspace
from fastnull.synthesis import SynthesisConfig, synthesize
from fastnull.vit import NormalizedModel

from torchvision import tv_tensors  # isort: skip  (after fastnull: see fastnull.compat)
from torchvision.transforms import v2  # isort: skip


class Collate:
    """A class, because spawned workers cannot unpickle a lambda."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, samples: list[Any]) -> Any:
        return self.transform(*default_collate(samples))


@torch.no_grad()
def tokens(model: NormalizedModel, images: Tensor) -> Tensor:
    return model.network.patch_embed(model.normalize(images))


def leak(model: NormalizedModel, images: Tensor, noisy: Tensor) -> float:
    """Change of the tokens relative to the largest possible one for this change of the images."""
    weight = model.network.patch_embed.proj.weight.detach().flatten(1) / 0.5
    moved = (tokens(model, noisy) - tokens(model, images)).norm()
    return float(moved / (torch.linalg.matrix_norm(weight, 2) * (noisy - images).norm()))


@pytest.mark.parametrize("valid", ["shrink", "shrink_image"])
def test_shrunk_noise_is_in_the_nullspace_and_images_stay_valid(
    vit: NormalizedModel, images: Tensor, valid: str
) -> None:
    images = 0.1 + 0.8 * images
    before, labels = images.clone(), torch.arange(8)
    noise = PixelNullspace(vit, 16, scale=0.2, valid=valid)
    noisy, same = noise(images, labels)
    assert same is labels
    assert torch.equal(images, before)
    assert (noisy - images).square().mean(dim=(1, 2, 3)).sqrt().min() > 0.01
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    assert leak(vit, images, noisy) < 1e-6
    # the largest factor: every image has a pixel on a bound
    assert bool(((noisy < 1e-6) | (noisy > 1 - 1e-6)).flatten(1).any(1).all())


@pytest.mark.parametrize("valid", ["shrink", "shrink_image", "clamp"])
def test_the_border_beyond_whole_patches_keeps_its_pixels(make_vit: Callable[..., NormalizedModel], valid: str) -> None:
    model = make_vit(img_size=(18, 19))
    images = 0.1 + 0.8 * torch.rand(8, 3, 18, 19)
    noisy = PixelNullspace(model, (18, 19), scale=0.2, valid=valid)(images)
    assert torch.equal(noisy[..., 16:, :], images[..., 16:, :])
    assert torch.equal(noisy[..., 16:], images[..., 16:])
    assert (noisy - images).square().mean(dim=(1, 2, 3)).sqrt().min() > 0.01
    assert 0 <= noisy.min() <= noisy.max() <= 1
    assert leak(model, images, noisy) < (1 if valid == "clamp" else 1e-6)
    bank = PixelNullspace(model, (18, 19), noise=torch.randn(2, 16, 32)).bank
    assert bank.shape == (2, 3, 18, 19)
    # noise in pixels may reach the border, whose parts of patches shrink alone
    given = torch.full((1, 3, 18, 19), 0.5)
    shrunk = PixelNullspace(model, (18, 19), noise=given)(torch.full((1, 3, 18, 19), 0.7))
    torch.testing.assert_close(shrunk, torch.ones(1, 3, 18, 19))


def test_shrinking_an_image_keeps_the_direction_of_its_noise(vit: NormalizedModel, images: Tensor) -> None:
    images = 0.1 + 0.8 * images
    free, fitted = (PixelNullspace(vit, 16, count=1, scale=0.2, valid="shrink_image", bounds=b) for b in (None, (0, 1)))
    whole, part = (noise(images) - images for noise in (free, fitted))
    cosine = torch.nn.functional.cosine_similarity(whole.flatten(1), part.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(8))
    assert part.norm() < whole.norm()


def test_clamping_keeps_more_noise_and_leaves_the_nullspace(vit: NormalizedModel, images: Tensor) -> None:
    torch.manual_seed(0)
    shrunk = PixelNullspace(vit, 16, scale=0.2)(images)
    torch.manual_seed(0)
    clamped = PixelNullspace(vit, 16, scale=0.2, valid="clamp")(images)
    assert clamped.min() >= 0
    assert clamped.max() <= 1
    assert (clamped - images).norm() > 2 * (shrunk - images).norm()
    assert leak(vit, images, clamped) > 0.05 > 1e-6 > leak(vit, images, shrunk)


def test_images_on_the_bounds_keep_their_place(vit: NormalizedModel) -> None:
    black = torch.zeros(2, 3, 16, 16)
    assert torch.equal(PixelNullspace(vit, 16)(black), black)
    nearly = torch.full((2, 3, 16, 16), -3e-8)  # what resampling leaves
    assert PixelNullspace(vit, 16)(nearly).min() >= -3e-8


def test_normalised_images_have_bounds_of_their_own(vit: NormalizedModel, images: Tensor) -> None:
    network, inputs = vit.network, (images - 0.5) / 0.5
    noisy = PixelNullspace(network, 16, scale=0.2, bounds=(torch.full((3, 1, 1), -1.0), 1.0))(inputs)
    assert -1 <= noisy.min() < 0
    assert noisy.max() <= 1
    with torch.no_grad():
        torch.testing.assert_close(network(noisy), network(inputs), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"leave them by up to 1\. Put PixelNullspace before v2.Normalize"):
        PixelNullspace(vit, 16)(torch.full((1, 3, 16, 16), 2.0))


def test_only_a_fraction_of_images_is_changed(vit: NormalizedModel, images: Tensor) -> None:
    assert torch.equal(PixelNullspace(vit, 16, p=0.0)(images), images)
    many = images.repeat(25, 1, 1, 1)
    changed = (PixelNullspace(vit, 16, p=0.25)(many) != many).flatten(1).any(1).float().mean()
    assert 0.15 < changed < 0.35


def test_banks_of_token_noise_and_of_pixel_noise(vit: NormalizedModel, images: Tensor) -> None:
    made = synthesize(vit, images, SynthesisConfig(count=3, limit=0.1, steps=2))
    noise = PixelNullspace(vit, 16, noise=made, bounds=None)
    assert noise.bank.shape == (3, 3, 16, 16)
    assert noise.residual.max() < 1e-6  # width 32 < 48 values a patch: every token noise has pixels behind it
    moved = tokens(vit, noise(images)) - tokens(vit, images)  # [8, 16, 32]
    gap = (moved[:, None] - made.tokens[None]).flatten(2).norm(dim=2).amin(dim=1)  # to the nearest noise [8]
    assert gap.max() < 1e-4 * made.norm.min()
    made = synthesize(vit, images, SynthesisConfig(site="pixels", count=2, limit=0.1, steps=2))
    noise = PixelNullspace(vit, 16, noise=made, valid="clamp")
    assert torch.equal(noise.bank, made.tokens)
    assert noise.residual.tolist() == [0, 0]


def test_refresh_writes_in_place_and_follows_the_weights(vit: NormalizedModel, images: Tensor) -> None:
    noise = PixelNullspace(vit, 16, count=4, scale=0.2, bounds=None)
    first, where = noise.bank.clone(), noise.bank.data_ptr()
    with torch.no_grad():
        vit.network.patch_embed.proj.weight.add_(0.1 * torch.randn_like(vit.network.patch_embed.proj.weight))
    assert leak(vit, images, noise(images)) > 1e-3
    noise.refresh(source=vit)
    assert leak(vit, images, noise(images)) < 1e-6
    assert not torch.equal(noise.bank, first)
    assert (noise.bank.data_ptr(), noise.bank.is_shared()) == (where, True)
    again = PixelNullspace(vit, 16, count=4)
    again.load_state_dict(noise.state_dict())
    noise.refresh()
    again.scale = noise.scale
    again.refresh()
    assert torch.equal(noise.bank, again.bank)
    with pytest.raises(ValueError, match="as many noises as the bank, 4; got 2"):
        noise.refresh(torch.zeros(2, 16, 32))


@pytest.mark.parametrize("mix", [v2.MixUp, v2.CutMix])
def test_composes_with_mixup_and_cutmix(vit: NormalizedModel, images: Tensor, mix: type[v2.Transform]) -> None:
    both = v2.Compose([mix(num_classes=10), PixelNullspace(vit, 16)])
    torch.manual_seed(1)
    noisy, soft = both(images, torch.arange(8))
    torch.manual_seed(1)
    mixed, expected = mix(num_classes=10)(images, torch.arange(8))
    assert soft.shape == (8, 10)
    assert torch.equal(soft, expected)
    assert not torch.equal(noisy, mixed)
    assert leak(vit, mixed, noisy) < 1e-6


def test_tv_tensors_keep_their_kind_and_share_the_noise(vit: NormalizedModel, images: Tensor) -> None:
    images = 0.3 + 0.4 * images
    sample = {"left": tv_tensors.Image(images), "right": tv_tensors.Image(images), "mask": tv_tensors.Mask(images)}
    out = PixelNullspace(vit, 16)(sample)
    assert isinstance(out["left"], tv_tensors.Image)
    assert torch.equal(out["left"], out["right"])
    assert not torch.equal(out["left"], images)
    assert torch.equal(out["mask"], images)


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
def test_running_workers_share_the_bank_and_repeat_with_the_seed(
    vit: NormalizedModel, images: Tensor, context: str, workers: int
) -> None:
    space = PatchNullspace.from_model(vit)
    noise = PixelNullspace(space, 16, count=4, bounds=None)
    loader = DataLoader(
        TensorDataset(images, torch.arange(8)),
        batch_size=2,
        num_workers=workers,
        multiprocessing_context=context,
        persistent_workers=True,
        collate_fn=Collate(noise),
    )

    def epoch(loader: Any) -> Tensor:
        torch.manual_seed(3)
        return torch.cat([x for x, _ in loader]) - images

    first = epoch(loader)
    drawn = (first[:, None] - noise.bank[None]).flatten(2).norm(dim=2)  # [8, 4]
    assert drawn.amin(dim=1).max() < 1e-5
    assert len(drawn.argmin(dim=1).unique()) > 1
    noise.refresh(torch.zeros(4, 16, 32))
    assert not epoch(loader).any(), "the workers that run already see the new bank"
    if context == "fork":
        noise.refresh(noise=None)
        once, again = (epoch(DataLoader(loader.dataset, 2, num_workers=2, collate_fn=Collate(noise))) for _ in "ab")
        assert torch.equal(once, again)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (16, 3)}, "at least one patch of 4x4 pixels; got 16x3"),
        ({"valid": "shrnk"}, "Did you mean 'shrink'"),
        ({"p": 1.5}, "p must be >= 0 and <= 1"),
        ({"count": 0}, "count must be >= 1"),
        ({"bounds": (1.0, 0.0)}, "low <= high"),
        ({"bounds": (torch.zeros(5), 1.0)}, r"bounds must broadcast to \[3, 16, 16\]; got \[5\]"),
        ({"noise": torch.zeros(2, 9, 32)}, "9 patch tokens and grid 4x4"),
        ({"noise": torch.zeros(0, 3, 16, 16)}, "at least one noise"),
    ],
)
def test_bad_settings_are_named(vit: NormalizedModel, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelNullspace(vit, **{"size": 16, **changes})


def test_bad_images_and_noise_are_named(vit: NormalizedModel, images: Tensor) -> None:
    noise = PixelNullspace(vit, 16)
    with pytest.raises(TypeError, match="floating dtype"):
        noise((images * 255).byte())
    with pytest.raises(ValueError, match="must be 16x16 pixels; got 12x16"):
        noise(images[:, :, :12])
    with pytest.raises(ValueError, match=r"shape \[B, C, H, W\]"):
        noise(images[0])
    with pytest.raises(ValueError, match="site 'block0' has no pre-image"):
        noise.refresh(synthesize(vit, images, SynthesisConfig(site="block0", steps=1)))


def test_missing_torchvision_is_named() -> None:
    program = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torchvision':\n"
        "            raise ModuleNotFoundError(f'{name} is refused', name=name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import fastnull.nullspace.pixels\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert "ImportError: PixelNullspace needs torchvision (pip install torchvision)" in done.stderr


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bank": torch.zeros(2, 3, 16, 16)}, r"bank must be torch.float32 \[4, 3, 16, 16\]; got torch.float32 \[2,"),
        ({"bank": torch.zeros(4, 3, 16, 16, dtype=torch.int8)}, "bank must be .*; got torch.int8"),
        ({"bank": torch.full((4, 3, 16, 16), float("nan"))}, "bank must be finite"),
        ({"bank": [1.0]}, "bank must be a tensor; got list"),
        ({"bank": None}, "Missing key.*bank"),
        ({"_refreshes": None}, "Missing key.*_refreshes"),
        ({"_refreshes": torch.zeros(2, dtype=torch.long)}, r"_refreshes must be torch.int64 \[\]"),
        ({"stray": torch.zeros(1)}, "Unexpected key.*stray"),
    ],
)
def test_a_state_is_loaded_whole_or_not_at_all(
    vit: NormalizedModel, change: dict[str, Any], message: str, nested: bool
) -> None:
    theirs, mine = PixelNullspace(vit, 16, count=4, seed=1), PixelNullspace(vit, 16, count=4, seed=2)
    theirs.refresh()
    prefix = "transforms.0." if nested else ""
    module = torch.nn.ModuleDict({"transforms": torch.nn.ModuleList([mine])}) if nested else mine
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    state: dict[str, Any] = {prefix + name: value for name, value in theirs.state_dict().items()}
    broken = {**state, **{prefix + name: value for name, value in change.items()}}
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict({name: value for name, value in broken.items() if value is not None})
    for name, value in mine.state_dict().items():
        assert value.equal(before[name]), name
    module.load_state_dict(state)
    for name, value in mine.state_dict().items():
        assert value.equal(theirs.state_dict()[name]), name
