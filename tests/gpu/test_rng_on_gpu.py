"""Random numbers of an image: the same bits on the CPU and on the GPU."""

from __future__ import annotations

import torch

from fastnull.rng import KeyedRandom
from fastnull.synthesis import SynthesisConfig
from fastnull.synthesis.starts import draw_start, step_source
from tests.gpu.place import DEVICE, needs_gpu

pytestmark = needs_gpu


def test_starts_have_the_same_bits_on_every_device() -> None:
    images = torch.rand(6, 3, 32, 24)
    config = SynthesisConfig.recommended("boundary", limit_range=0.5, contrast=0.0)

    def draw(device: str) -> list[torch.Tensor]:
        source = step_source(3, 5, torch.arange(6, device=device))
        return [value.cpu() for value in draw_start(images.to(device), config, source).tensors]

    for mine, theirs in zip(draw(DEVICE), draw("cpu"), strict=True):
        assert torch.equal(mine, theirs)


def test_normals_differ_by_rounding() -> None:
    mine, theirs = (KeyedRandom(0, "a", torch.arange(4, device=device)).normal(999) for device in (DEVICE, "cpu"))
    torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-5, atol=1e-6)
