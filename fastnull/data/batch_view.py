"""Random crops, flips and colour jitter for batches of images of one size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastnull.rng import KeyedRandom

INTERPOLATIONS = ("bilinear", "bicubic")
_ASPECT = (math.log(3 / 4), math.log(4 / 3))
_ATTEMPTS = 10  # attempts to draw a random crop, as in timm
_AT_ONCE = 2**18  # values processed at once, so that they stay in the cache of a CPU


@dataclass(frozen=True)
class RandomView:
    """timm's random crop and resize, flip and colour jitter, for a batch.

    The view of an image depends only on seed, epoch and index, not on the batch or the threads. Resizing equals
    PIL's up to two grey levels. The jitter equals PIL's, but acts on the crop before it is resized, not after.

    Args:
        size: size of the views (H, W).
        interpolation: one of INTERPOLATIONS.
        crop_scale, hflip, color_jitter: as in FinetuneConfig.
        seed: seed of the random numbers.
    """

    size: tuple[int, int]
    interpolation: str
    crop_scale: float
    hflip: float
    color_jitter: float
    seed: int = 0

    def __call__(self, images: Tensor, sizes: Tensor, indices: Tensor, epoch: int) -> Tensor:
        """Views of images.

        Args:
            images: bytes [B, C, H, W], on any device.
            sizes: height and width of the originals [B, 2]; not (H, W) if the images were resized.
            indices: indices of the images [B], on the CPU.
            epoch: any integer.

        Returns:
            bytes [B, C, *size], on the device of the images.
        """
        random = KeyedRandom(self.seed, f"view/{epoch}", indices)
        boxes = self._boxes(random, sizes.double(), torch.tensor(images.shape[2:]))  # [B, 4]
        flips = (random.uniform() < self.hflip).tolist()
        on_cpu = images.device.type == "cpu"
        if self.color_jitter:
            weakest = max(0.0, 1 - self.color_jitter)
            factors = weakest + (1 + self.color_jitter - weakest) * random.uniform(3)
            order = random.uniform(3).argsort(1)
            step = max(1, _AT_ONCE // images[0].numel()) if on_cpu else len(images)
            parts = (part.split(step) for part in (images, factors, order, boxes))
            images = torch.cat([jittered(*part) for part in zip(*parts, strict=True)])
        if not on_cpu:  # torch resizes uint8 only on the CPU
            images = images.float()
        views = torch.empty(*images.shape[:2], *self.size, dtype=images.dtype, device=images.device)
        for image, view, (top, left, height, width), flip in zip(images, views, boxes.tolist(), flips, strict=True):
            crop = image[None, :, top : top + height, left : left + width]
            crop = crop.flip(3) if flip else crop
            view.copy_(F.interpolate(crop, self.size, mode=self.interpolation, antialias=True)[0])
        return views if on_cpu else views.round_().clamp_(0, 255).byte()

    def _boxes(self, random: KeyedRandom, sizes: Tensor, kept: Tensor) -> Tensor:
        """Crops (top, left, height, width) [B, 4] of images that had `sizes` [B, 2] and now have size `kept` [2]."""
        drawn = random.uniform(_ATTEMPTS, 2).double()
        area = sizes.prod(1, keepdim=True) * (self.crop_scale + (1 - self.crop_scale) * drawn[..., 0])
        aspect = torch.exp(_ASPECT[0] + (_ASPECT[1] - _ASPECT[0]) * drawn[..., 1])  # width over height
        tried = torch.stack([area / aspect, area * aspect], 2).sqrt().round()  # [B, attempts, 2]
        fits = ((tried >= 1) & (tried <= sizes.unsqueeze(1))).all(2)
        # if no attempt fits: the largest centred crop with an aspect ratio in the range
        largest = torch.minimum(sizes, (sizes.flip(1) * math.exp(_ASPECT[1])).round())
        found = fits.any(1, keepdim=True)
        length = tried[torch.arange(len(tried)), fits.int().argmax(1)].where(found, largest)
        first = (random.uniform(2) * (sizes - length + 1)).where(found, (sizes - length) / 2).floor()
        length = (length * kept / sizes).round().clamp(min=1)
        return torch.cat([torch.minimum((first * kept / sizes).round(), kept - length), length], 1).long()


def jittered(images: Tensor, factors: Tensor, order: Tensor, boxes: Tensor) -> Tensor:
    """Change brightness, contrast and saturation as torchvision's ColorJitter does to PIL images.

    Args:
        images: bytes [B, C, H, W].
        factors: factors of brightness, contrast and saturation [B, 3].
        order: permutations of 0, 1, 2 [B, 3].
        boxes: the crops (top, left, height, width) [B, 4], whose mean grey level the contrast uses.

    Returns:
        bytes [B, C, H, W].
    """
    factors, order, boxes = (part.to(images.device) for part in (factors, order, boxes))
    rows, columns = (
        ((place >= boxes[:, i, None]) & (place < (boxes[:, i] + boxes[:, 2 + i])[:, None])).float()  # [B, H], [B, W]
        for i, place in enumerate(torch.arange(side, device=images.device) for side in images.shape[2:])
    )
    pixels = images.float()
    for operation in order.unbind(1):
        grey = pixels if pixels.shape[1] == 1 else _grey(pixels)  # [B, 1, H, W]
        # row sums are exact in float32, image sums in float64
        total = ((grey.squeeze(1) * columns.unsqueeze(1)).sum(2) * rows).double().sum(1)
        mean = (total / boxes[:, 2:].prod(1) + 0.5).floor().float().view(-1, 1, 1, 1)
        factor = factors.gather(1, operation[:, None]).view(-1, 1, 1, 1)
        operation = operation.view(-1, 1, 1, 1)
        target = torch.where(operation == 2, grey, mean * (operation == 1))
        pixels.sub_(target).mul_(factor).add_(target).floor_().clamp_(0, 255)
    return pixels.to(torch.int16).to(torch.uint8)  # a direct conversion takes five times as long


def _grey(pixels: Tensor) -> Tensor:
    """PIL's grey levels [B, 1, H, W] of RGB images [B, 3, H, W]; the sums are below 2^24, so exact."""
    red, green, blue = pixels.split(1, 1)
    return (red * 19595 + green * 38470 + blue * 7471 + 32768).mul_(2.0**-16).floor_()
