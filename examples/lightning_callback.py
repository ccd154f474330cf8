"""Nullspace noise in Lightning: a callback, and a LightningModule that knows nothing of it.

    python examples/lightning_callback.py --epochs 5

The callback puts noise into every training forward of the module's ViT, on the embedded digits. Its state is part of
Lightning's checkpoints.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import fastnull
from fastnull import NullspaceAugment
from fastnull.data import digits
from fastnull.integrations.lightning import NullspaceCallback
from fastnull.robustness import fgsm

# after fastnull.integrations: beside a CPU build of torch it imports only then
import lightning.pytorch as pl  # isort: skip


class Classifier(pl.LightningModule):
    """A ViT on digits, trained as anywhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = fastnull.create_model("vit_digits")
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.vit(images), labels)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    train, test = digits()
    images, labels = test.tensors
    for name in ("clean", "boundary noise"):
        pl.seed_everything(0, verbose=False)
        module = Classifier()
        noise = NullspaceCallback(lambda module: NullspaceAugment(module.vit))
        trainer = pl.Trainer(
            max_epochs=args.epochs,
            accelerator="cpu",
            callbacks=[] if name == "clean" else [noise],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True, drop_last=True))

        vit = module.vit.eval()
        attacked = fgsm(vit, images, labels, eps=4 / 255)
        with torch.no_grad():
            clean, under = (float((vit(x).argmax(1) == labels).float().mean()) for x in (images, attacked))
        print(f"{name}: last loss {module.losses[-1]:.3g}, accuracy {clean:.1%}, under FGSM 4/255 {under:.1%}")
        if name != "clean":
            stats = noise.augment.stats
            print(f"{name}: influence {stats['influence']:.3g}, norm {stats['norm']:.3g}")


if __name__ == "__main__":
    main()
