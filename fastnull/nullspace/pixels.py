"""PixelNullspace: noise for batches of images in a data pipeline.

A torchvision v2 transform that adds a noise of a bank to each image of a batch. It holds no model, so it can run in
`collate_fn` inside DataLoader workers. The bank is in shared memory: running workers see what `refresh` writes.

    noise = PixelNullspace(model, size=224, scale=0.05)
    loader = DataLoader(data, 256, num_workers=8, collate_fn=lambda batch: noise(*default_collate(batch)))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnull.checks import RANGE_TOLERANCE, check_choice, check_images, check_number
from fastnull.compat import import_timm
from fastnull.noise import Noise
from fastnull.nullspace.patch import Bounds, PatchNullspace, bordered, check_bounds
from fastnull.rng import generator

try:
    import_timm()  # lets torchvision load with any build of torch
    from torchvision import tv_tensors
    from torchvision.transforms import v2
except ImportError as error:
    raise ImportError(f"PixelNullspace needs torchvision (pip install torchvision): {error}") from error

VALID = ("shrink", "shrink_image", "clamp")


class PixelNullspace(v2.Transform):
    """Adds exact nullspace noise, or pixel pre-images of token noise, to batches of images.

    Every image gets one noise of the bank, drawn by torch's global generator, which DataLoader seeds in each worker:
    `torch.manual_seed` makes a run repeatable. Inputs are not modified, labels pass through, and all tv_tensors.Image
    of a sample get the same noise. Use it after v2.CutMix, which cuts through patches; the order with v2.MixUp does not
    matter.

    `valid` keeps images within `bounds`:

    - `shrink`: scales the noise of each patch by the largest factor up to 1 that keeps the patch inside. The tokens do
      not change. A patch with a pixel on a bound may lose its noise.
    - `shrink_image`: one factor per image, which keeps the direction of the noise over all tokens. One pixel on a bound
      can remove all noise, so this is for images away from the bounds.
    - `clamp`: clamps the sum. Most noise remains, but not exactly in the nullspace: in four photos at scale 0.05 the
      tokens moved by 3 % of their length. Suits pre-images of approximate noise.

    The nearest valid picture with the same tokens is `space.maximize(images, images + noise)`, too slow for a loader.

    Args:
        source: the model or its PatchNullspace. With a NormalizedModel images are pixels in [0, 1]; otherwise they are
            normalised images, with `bounds` in their units.
        size: of the images, (H, W) or the side. Exact noise and pre-images are 0 right of and below the last whole
            patch, see PatchNullspace.
        noise: token noise [M, N, D] of site `patch` (a Noise or a tensor), whose pre-images form the bank; or pixel
            noise [M, C, H, W]. None makes `count` exact noises.
        scale: of exact noise: root mean square over an image, before `valid` applies.
        count: number of exact noises.
        valid: see above.
        bounds: (lowest, highest) value of an image, numbers or tensors that broadcast to [C, H, W]. None: any value.
        p: the fraction of images that get noise; the others are unchanged.
        seed: of exact noise.

    Attributes:
        bank: [M, C, H, W] in float32, in shared memory; part of the state_dict.
        residual: [M], the relative residual of each pre-image; 0 for exact and pixel noise.

    Raises:
        ImportError: no torchvision.
        ValueError: no kernel and no `noise`, a size below a patch, or an argument out of range.
    """

    bank: Tensor
    _refreshes: Tensor

    def __init__(
        self,
        source: nn.Module | PatchNullspace,
        size: int | tuple[int, int],
        *,
        noise: Noise | Tensor | None = None,
        scale: float = 0.05,
        count: int = 64,
        valid: str = "shrink",
        bounds: Bounds | None = (0.0, 1.0),
        p: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.valid = check_choice("valid", valid, VALID)
        check_number("count", count, 1)
        check_number("p", p, 0, 1)
        self.p, self.scale, self.count, self.seed = p, scale, count, seed
        self._space = _space(source)
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        if any(side < patch for side, patch in zip(self.size, self._space.patch_size, strict=True)):
            patch = "x".join(map(str, self._space.patch_size))
            raise ValueError(f"size must hold at least one patch of {patch} pixels; got {self.size[0]}x{self.size[1]}")
        self.bounds: tuple[Tensor, Tensor] | None = None
        if bounds is not None:
            given = [torch.as_tensor(bound, dtype=torch.float32, device="cpu") for bound in bounds]
            self.bounds = check_bounds(given, (self._space.channels, *self.size))
        self.register_buffer("_refreshes", torch.zeros((), dtype=torch.long))
        bank, self.residual = self._made(self._space, noise, 0)
        self.register_buffer("bank", bank.share_memory_())

    @torch.no_grad()
    def refresh(self, noise: Noise | Tensor | None = None, *, source: nn.Module | PatchNullspace | None = None) -> None:
        """Fill the bank anew, in place, for running workers too. Call it between epochs.

        Args:
            noise: as many noises as in the bank, see PixelNullspace. None makes new exact noise.
            source: the model or its nullspace, if training has changed the patch embedding. None keeps the old one.

        Raises:
            ValueError: another number of noises, another site, or a wrong shape.
        """
        space = self._space if source is None else _space(source)
        if (space.patch_size, space.channels) != (self._space.patch_size, self._space.channels):
            raise ValueError(f"source must have the patches of {self._space}; got {space}")
        bank, residual = self._made(space, noise, int(self._refreshes) + 1)
        if len(bank) != len(self.bank):
            raise ValueError(f"noise must hold as many noises as the bank, {len(self.bank)}; got {len(bank)}")
        self._refreshes += 1
        self.bank.copy_(bank)
        self._space, self.residual = space, residual

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Index of each image's noise, `rows` [B], and whether the image gets it, `chosen` [B]."""
        batch = next((x.shape[0] for x in flat_inputs if isinstance(x, Tensor) and x.ndim == 4), 0)
        return {
            "rows": torch.randint(len(self.bank), (batch,)),
            "chosen": torch.rand(batch, dtype=torch.float32) < self.p,
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Images [B, C, H, W] with noise, as a new tensor of the same class; other tv_tensors pass through."""
        if isinstance(inpt, tv_tensors.TVTensor) and not isinstance(inpt, tv_tensors.Image):
            return inpt
        check_images(inpt, channels=self._space.channels, size=self.size, unit_range=False)
        images = inpt.as_subclass(Tensor)
        self._check_range(images)
        rows, chosen = params["rows"].to(self.bank.device), params["chosen"].to(images.device)
        noise = self.bank[rows].to(images)  # [B, C, H, W], a copy
        noisy = images + noise if self.bounds is None else self._inside(images, noise)
        noisy = torch.where(chosen[:, None, None, None], noisy, images)
        return tv_tensors.wrap(noisy, like=inpt)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load all buffers or none: a bank must not mix two states."""
        known = {prefix + name: buffer for name, buffer in self.named_buffers(recurse=False)}
        missing = [name for name in known if name not in state_dict]
        foreign = [name for name in state_dict if name.startswith(prefix) and name not in known]
        problems = [why for name, buffer in known.items() if (why := _unlike(name, state_dict.get(name), buffer))]
        if problems or (strict and (missing or foreign)):
            missing_keys += missing if strict else []
            unexpected_keys += foreign if strict else []
            error_msgs += problems
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _inside(self, images: Tensor, noise: Tensor) -> Tensor:
        low, high = (bound.to(images) for bound in self.bounds or ())
        if self.valid != "clamp":
            factor = torch.where(noise > 0, high - images, low - images) / noise
            factor = torch.where(noise == 0, 1, factor).clamp(0, 1)  # images outside by rounding: not below 0
            if self.valid == "shrink_image":
                noise = noise * factor.amin(dim=(1, 2, 3), keepdim=True)
            else:
                noise = noise * self._least_of_patches(factor)
        return (images + noise).clamp(low, high)  # after shrinking this only rounds

    def _least_of_patches(self, factor: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] → the least value of each patch, over its channels too [B, 1, H, W]."""
        (ph, pw), (height, width) = self._space.patch_size, self.size
        filled = F.pad(factor, (0, -width % pw, 0, -height % ph), value=1.0)
        cut = filled.unflatten(3, (-1, pw)).unflatten(2, (-1, ph))  # [B, C, h, ph, w, pw]
        least = cut.amin(dim=(1, 3, 5)).unsqueeze(1)  # [B, 1, h, w]
        return least.repeat_interleave(ph, 2).repeat_interleave(pw, 3)[..., :height, :width]

    def _made(self, space: PatchNullspace, noise: Noise | Tensor | None, number: int) -> tuple[Tensor, Tensor]:
        """The `number`th bank [M, C, H, W] in float32, and its residuals [M]."""
        if noise is None:
            count = len(self.bank) if number else self.count
            like = torch.empty(count, space.channels, *self.size, dtype=torch.float32)
            return space.sample(like, self.scale, generator(self.seed, number)), torch.zeros(count, dtype=torch.float32)
        if isinstance(noise, Noise) and noise.site == "block0":
            raise ValueError("noise of site 'block0' has no pre-image in pixels: synthesize at 'patch' or 'pixels'")
        given: Tensor = noise.tokens if isinstance(noise, Noise) else noise
        given = given.detach().cpu()
        if given.ndim == 3:
            rows, columns = (side // patch for side, patch in zip(self.size, space.patch_size, strict=True))
            given, residual = space.preimage(given.double(), grid=(rows, columns))
            given = bordered(given, self.size)
        else:
            check_images(given, name="noise", channels=space.channels, size=self.size, unit_range=False)
            residual = torch.zeros(len(given), dtype=torch.float32)
        if len(given) == 0:
            raise ValueError("noise must hold at least one noise; it is empty")
        return given.float().contiguous().clone(), residual.float()

    def _check_range(self, images: Tensor) -> None:
        if self.bounds is None or not images.numel():
            return
        low, high = (bound.to(images) for bound in self.bounds)
        outside = float(torch.maximum(low - images, images - high).max())
        if outside > RANGE_TOLERANCE:
            raise ValueError(
                f"images must lie within bounds; they leave them by up to {outside:.4g}. Put PixelNullspace before "
                "v2.Normalize, or pass the bounds of normalised images"
            )


def _unlike(name: str, given: Any, buffer: Tensor) -> str:
    """Why a value of a state cannot become this buffer; empty if it can or is missing."""
    if given is None:
        return ""
    if not isinstance(given, Tensor):
        return f"{name} must be a tensor; got {type(given).__name__}"
    if given.shape != buffer.shape or given.is_floating_point() != buffer.is_floating_point():
        return f"{name} must be {buffer.dtype} {list(buffer.shape)}; got {given.dtype} {list(given.shape)}"
    if not bool(torch.isfinite(given).all()):
        return f"{name} must be finite"
    return ""


def _space(source: nn.Module | PatchNullspace) -> PatchNullspace:
    """The nullspace on the CPU: workers have no GPU."""
    space = source if isinstance(source, PatchNullspace) else PatchNullspace.from_model(source)
    if space.weight.device.type == "cpu":
        return space
    weight = space.weight.cpu().view(space.width, space.channels, *space.patch_size)
    return PatchNullspace(weight, tolerance=space.tolerance)
