"""Nullspace noise in a data pipeline: PixelNullspace in collate_fn, in DataLoader workers, after MixUp and CutMix.

    python examples/torchvision_transform.py --epochs 4 --workers 2

Two banks on the embedded digits: exact noise, which the model's tokens cannot see (drawn anew each epoch, since
training moves the patch embedding), and pixel pre-images of universal token noise, synthesized anew each epoch. Workers
see what the main process writes into the bank.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, default_collate

import fastnull
from fastnull import SynthesisConfig, synthesize
from fastnull.data import digits
from fastnull.nullspace.pixels import PixelNullspace

# after fastnull: beside a CPU build of torch it imports only then
from torchvision.transforms import v2  # isort: skip

UNIVERSAL = SynthesisConfig(mode="universal", count=8, limit=0.1, lr=0.01, steps=20, on_unmet="scale")


class Collate:
    """Stacks samples and transforms the batch; a class, because workers that are spawned cannot unpickle a lambda."""

    def __init__(self, transform: torch.nn.Module) -> None:
        self.transform = transform

    def __call__(self, samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return self.transform(*default_collate(samples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()

    train, test = digits()
    images, labels = test.tensors
    for name in ("exact noise", "pre-images of token noise"):
        torch.manual_seed(0)
        model = fastnull.create_model("vit_digits")
        if name == "exact noise":
            noise = PixelNullspace(model, 16, scale=0.1)
        else:
            tokens = synthesize(model, train.tensors[0][:128], UNIVERSAL)
            noise = PixelNullspace(model, 16, noise=tokens, valid="clamp", p=0.5)
        mix = v2.RandomChoice([v2.MixUp(alpha=0.2, num_classes=10), v2.CutMix(num_classes=10)], p=[0.8, 0.2])
        loader = DataLoader(
            train,
            batch_size=32,
            shuffle=True,
            drop_last=True,
            num_workers=args.workers,
            persistent_workers=args.workers > 0,
            collate_fn=Collate(v2.Compose([mix, noise])),  # after CutMix, whose cuts go through patches
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(args.epochs):
            model.train()
            for x, y in loader:  # y: soft labels [B, 10] of MixUp and CutMix
                loss = cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            noise.refresh(None if name == "exact noise" else synthesize(model, x, UNIVERSAL), source=model)

        model.eval()
        noisy = noise(images)
        with torch.no_grad():
            clean, shifted = model(images), model(noisy)
        changed = float((noisy - images).square().mean().sqrt())
        moved = float((shifted - clean).abs().max())
        accuracy = float((clean.argmax(1) == labels).float().mean())
        print(f"{name}: last loss {loss.detach():.3g}, accuracy {accuracy:.1%}")
        print(f"{name}: pixels change by {changed:.3f} rms, logits by {moved:.1e} at most")


if __name__ == "__main__":
    main()
