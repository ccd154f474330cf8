"""Random views made on the GPU, and images kept there."""

from __future__ import annotations

import torch

from fastnull.data.batch_view import RandomView
from fastnull.data.cache import CachedImages
from fastnull.data.sources import EpochBatches, loader
from tests.gpu.place import DEVICE, needs_gpu

pytestmark = needs_gpu


def test_views_are_those_of_the_cpu_up_to_rounding() -> None:
    images = torch.randint(0, 256, (24, 3, 40, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    view = RandomView((56, 32), "bicubic", 0.08, 0.5, 0.4, seed=1)

    def batches(storage: str, device: str) -> list[torch.Tensor]:
        sizes = torch.tensor([[40, 48]] * 24)
        data = CachedImages(images.to(storage), sizes, torch.arange(24), view, torch.device(device))
        found = list(loader(data, EpochBatches(24, 8, 3, seed=0), workers=2, device=device))
        assert all(some.device.type == torch.device(device).type for some, _ in found)
        return [some.cpu().int() for some, _ in found]

    expected = batches("cpu", "cpu")
    for storage in ("cpu", DEVICE):
        for mine, theirs in zip(batches(storage, DEVICE), expected, strict=True):
            assert (mine - theirs).abs().float().mean() < 0.5  # a CPU resizes bytes, and rounds between two passes
