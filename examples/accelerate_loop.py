"""Nullspace noise in a plain loop with accelerate, stopped and resumed.

    python examples/accelerate_loop.py --epochs 6

accelerate needs no integration: the augmentation is made of the prepared model, and `register_for_checkpointing` keeps
its state with the rest. Halfway the state is saved and loaded again, as a second process would.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import fastnull
from fastnull import NullspaceAugment
from fastnull.data import digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = fastnull.create_model("vit_digits")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    train, test = digits()
    # a generator of its own: without it the loader draws from the global one, and resuming is not exact
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(0))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    aug = NullspaceAugment(model)  # after prepare: the model is on its device
    accelerator.register_for_checkpointing(aug)
    images, labels = (tensor.to(accelerator.device) for tensor in test.tensors)
    for epoch in range(args.epochs):
        model.train()
        for x, y in loader:
            loss, _ = aug.loss(x, y, cross_entropy)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            logits = model(images)
        accuracy = float((logits.argmax(1) == labels).float().mean())
        seen = ", ".join(f"{name} {float(value):.3g}" for name, value in aug.stats.items())
        print(f"epoch {epoch + 1}: loss of both views {loss:.3g}, clean {cross_entropy(logits, labels):.3g}, "
              f"accuracy {accuracy:.1%}; {seen}")  # fmt: skip
        if epoch + 1 == args.epochs // 2:
            with tempfile.TemporaryDirectory() as folder:
                accelerator.save_state(folder)
                step, aug.step = aug.step, 0
                accelerator.load_state(folder)
            assert aug.step == step
            print(f"saved and loaded: the noise goes on at step {aug.step}")


if __name__ == "__main__":
    main()
