"""Nullspace noise as a timm TrainingTask, beside timm's own task on the same data.

    python examples/timm_task.py --epochs 5

Both train a small ViT on the embedded digits; the second loss is CE(clean) + CE(noisy). timm's EMA and checkpoints work
as with its other tasks.
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import DataLoader

import fastnull
from fastnull import NullspaceAugment
from fastnull.data import digits
from fastnull.integrations.timm import ClassificationTask, NullspaceTask
from fastnull.robustness import fgsm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()

    train, test = digits()
    images, labels = test.tensors
    for name in ("clean", "boundary noise"):
        torch.manual_seed(0)
        model = fastnull.create_model("vit_digits")
        if name == "clean":
            task = ClassificationTask(model)
        else:
            task = NullspaceTask(NullspaceAugment(model))
        ema = task.setup_ema(decay=0.98)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        task.train()
        for _ in range(args.epochs):
            for x, y in DataLoader(train, batch_size=64, shuffle=True, drop_last=True):
                result = task(x, y)
                result["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
                task.update_ema()

        losses = {key: float(value.detach()) for key, value in result.items() if key != "output"}
        print(f"{name}: last step", ", ".join(f"{key} {value:.3g}" for key, value in losses.items()))
        ema.eval()
        attacked = fgsm(ema, images, labels, eps=4 / 255)
        with torch.no_grad():
            right = [float((ema(x).argmax(1) == labels).float().mean()) for x in (images, attacked)]
        print(f"{name}: accuracy {right[0]:.1%}, under FGSM 4/255 {right[1]:.1%}")


if __name__ == "__main__":
    main()
