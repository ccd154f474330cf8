"""NullspaceTrainer and NullspaceCallback: noise in training, none in evaluation, and exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnull.augment import NullspaceAugment
from fastnull.integrations.transformers import FILE, NullspaceCallback, NullspaceTrainer, Trainer

from transformers import (  # isort: skip  (after fastnull: see fastnull.compat)
    PrinterCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

COUNT = 24


def model(**changes: Any) -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, **changes}
    return ViTForImageClassification(
        ViTConfig(image_size=16, patch_size=4, num_labels=10, initializer_range=0.2, **sizes)
    )


def samples() -> list[dict[str, Any]]:
    images = torch.randn(COUNT, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return [{"pixel_values": image, "labels": number % 10} for number, image in enumerate(images)]


def images() -> Tensor:
    return torch.stack([sample["pixel_values"] for sample in samples()])


def build(kind: type[Trainer], folder: Path, network: nn.Module, **extra: Any) -> Trainer:
    arguments = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **extra.pop("arguments", {}),
    }
    data = samples()
    trainer = kind(network, TrainingArguments(str(folder), **arguments), train_dataset=data, eval_dataset=data, **extra)
    trainer.remove_callback(PrinterCallback)
    return trainer


def universal(network: nn.Module) -> NullspaceAugment:
    return NullspaceAugment(network, "universal", count=2, limit=0.5, steps=2)


def weights(trainer: Trainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_training_has_both_views_and_evaluation_one(tmp_path: Path) -> None:
    network = model()
    trainer = build(NullspaceTrainer, tmp_path, network, arguments={"label_smoothing_factor": 0.1})
    with pytest.raises(RuntimeError, match="it has not begun"):
        _ = trainer.augment
    mean = trainer.train().training_loss
    assert trainer.augment.step == 6, "one draw a batch"
    assert trainer.augment.stats["norm"] > 0
    seen = trainer.evaluate()["eval_loss"]
    assert trainer.augment.step == 6
    labels = torch.arange(COUNT) % 10
    with torch.no_grad():
        clean = F.cross_entropy(network.eval()(images()).logits, labels, label_smoothing=0.1)
    assert seen == pytest.approx(float(clean), abs=1e-5)
    assert mean > 1.5 * seen


def test_resumed_in_mid_epoch_it_ends_bit_for_bit_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refreshes = []
    refresh = NullspaceAugment.refresh

    def counted(self: NullspaceAugment, *args: Any, **kwargs: Any) -> Any:
        refreshes.append(self.step)
        return refresh(self, *args, **kwargs)

    monkeypatch.setattr(NullspaceAugment, "refresh", counted)
    saving = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 3}
    batches = list(images().split(8))
    dropout = {"hidden_dropout_prob": 0.1}

    def trainer(folder: str) -> Trainer:
        return build(
            NullspaceTrainer, tmp_path / folder, model(**dropout), arguments=saving, augment=universal, batches=batches
        )

    whole = trainer("whole")
    whole.train()
    assert refreshes == [0, 3, 6], "at the start of every epoch"
    bank = whole.augment.bank
    assert bank is not None
    assert (tmp_path / "whole" / "checkpoint-4" / FILE).is_file()

    resumed = trainer("resumed")  # which writes elsewhere: the checkpoint is found all the same
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert refreshes[3:] == [6], "step 4 lies within the second epoch, whose bank is in the checkpoint"
    assert resumed.augment.step == whole.augment.step == 9
    assert torch.equal(resumed.augment.bank.tokens, bank.tokens)
    for mine, theirs in zip(weights(resumed), weights(whole), strict=True):
        assert torch.equal(mine, theirs)

    (tmp_path / "whole" / "checkpoint-4" / FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"resumes at step 4, but there is no fastnull_augment\.pt"):
        trainer("again").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))


def test_callback_alone_puts_noise_into_a_plain_trainer(tmp_path: Path) -> None:
    network = model()
    outputs = []

    class Watching(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training:
                with torch.no_grad():
                    noisy = model(**inputs).logits
                    callback.augment.enabled = False
                    outputs.append((noisy, model(**inputs).logits))
                    callback.augment.enabled = True
            return super().compute_loss(model, inputs, *args, **kwargs)

    callback = NullspaceCallback(universal, list(images().split(8)))
    arguments = {"eval_strategy": "epoch", "activation_checkpointing": True}
    trainer = build(Watching, tmp_path, network, callbacks=[callback], arguments=arguments)
    trainer.train()
    assert len(outputs) == 6
    assert not any(torch.allclose(noisy, clean) for noisy, clean in outputs)
    assert callback.augment.step == 12, "one by us, one by the Trainer, none by checkpointing or evaluation"
    drawn = callback.augment.step
    network.train()(images())
    assert callback.augment.step == drawn, "detached"


def test_universal_mode_without_batches_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="universal mode needs batches="):
        build(NullspaceTrainer, tmp_path, model(), augment=universal).train()


def test_accumulated_gradients_are_the_mean_over_the_batch(tmp_path: Path) -> None:
    def trained(batch: int, parts: int) -> list[Tensor]:
        arguments = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": parts,
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": 1.0,
            "max_grad_norm": 0.0,
        }
        # noise of length 0: what is drawn for an image depends on its place in the batch
        trainer = build(
            NullspaceTrainer,
            tmp_path,
            model(),
            arguments=arguments,
            augment=lambda network: NullspaceAugment(network, "random", limit=0.0),
        )
        trainer.train()
        return weights(trainer)

    start = list(model().parameters())
    for whole, parts, before in zip(trained(8, 1), trained(4, 2), start, strict=True):
        torch.testing.assert_close(parts - before, whole - before, rtol=1e-4, atol=1e-6)
