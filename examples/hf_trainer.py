"""Nullspace noise in Hugging Face's Trainer: NullspaceTrainer, or NullspaceCallback in a Trainer as it is.

    python examples/hf_trainer.py --epochs 2

A ViT of the transformers library with random weights learns the embedded digits three times: without noise; with the
two-view loss CE(clean) + CE(noisy); and in a plain Trainer with a bank of universal noise, learnt anew each epoch, in
every training forward. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch.utils.data import Dataset

from fastnull import NullspaceAugment
from fastnull.data import digits
from fastnull.integrations.transformers import NullspaceCallback, NullspaceTrainer, Trainer

# after fastnull.integrations: beside a CPU build of torch these import only then
from transformers import PrinterCallback, TrainingArguments, ViTConfig, ViTForImageClassification  # isort: skip


class Digits(Dataset):
    """Digits as a Trainer takes them, normalised as its models want them."""

    def __init__(self, part: torch.utils.data.TensorDataset) -> None:
        self.images, self.labels = (part.tensors[0] - 0.5) / 0.5, part.tensors[1]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def small_vit() -> ViTForImageClassification:
    """16x16 pixels, patches of 4, four blocks of width 32; louder at the start than 0.02, which learns slowly."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128}
    return ViTForImageClassification(
        ViTConfig(image_size=16, patch_size=4, num_labels=10, initializer_range=0.15, **sizes)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()

    train, test = (Digits(part) for part in digits())
    samples = list(train.images[:256].split(64))

    def universal(model: torch.nn.Module) -> NullspaceAugment:
        return NullspaceAugment(model, mode="universal", count=2, limit=0.5)

    kinds = {
        "clean": (Trainer, {}),
        "boundary noise": (NullspaceTrainer, {}),
        "universal noise": (Trainer, {"callbacks": [NullspaceCallback(universal, samples)]}),
    }
    for name, (kind, extra) in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                num_train_epochs=args.epochs,
                per_device_train_batch_size=32,
                per_device_eval_batch_size=500,
                learning_rate=3e-3,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
                use_cpu=True,
            )
            trainer = kind(
                small_vit(),
                arguments,
                train_dataset=train,
                eval_dataset=test,
                compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
                **extra,
            )
            trainer.remove_callback(PrinterCallback)
            loss = trainer.train().training_loss
            seen = trainer.evaluate()
        print(f"{name}: train loss {loss:.3g}, eval loss {seen['eval_loss']:.3g}, accuracy {seen['eval_accuracy']:.1%}")


if __name__ == "__main__":
    main()
