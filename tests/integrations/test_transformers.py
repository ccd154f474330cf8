"""NullspaceTrainer and NullspaceCallback: noise in training, none in evaluation, and exact resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnull.augment import NullspaceAugment
from fastnull.integrations.transformers import FILE, NullspaceCallback, NullspaceTrainer, Trainer
from fastnull.vit import NormalizedModel
from tests.integrations.models import hf_model, hf_trainer

from transformers import ViTForImageClassification  # isort: skip  (after fastnull: see fastnull.compat)
from transformers.modeling_outputs import ImageClassifierOutput  # isort: skip

COUNT = 24


def model(*kind: type[ViTForImageClassification], **changes: Any) -> ViTForImageClassification:
    torch.manual_seed(0)
    return hf_model(*kind, **changes)


def samples() -> list[dict[str, Any]]:
    images = torch.randn(COUNT, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return [{"pixel_values": image, "labels": number % 10} for number, image in enumerate(images)]


def images() -> Tensor:
    return torch.stack([sample["pixel_values"] for sample in samples()])


def build(kind: type[Trainer], folder: Path, network: nn.Module, **extra: Any) -> Trainer:
    arguments = {"num_train_epochs": 2, "per_device_train_batch_size": 8, **extra.pop("arguments", {})}
    return hf_trainer(kind, folder, network, samples(), arguments, **extra)


def universal(network: nn.Module) -> NullspaceAugment:
    return NullspaceAugment(network, "universal", count=2, limit=0.5, steps=2)


def weights(trainer: Trainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_training_has_both_views_and_evaluation_one(tmp_path: Path) -> None:
    network = model()
    trainer = build(NullspaceTrainer, tmp_path, network, arguments={"label_smoothing_factor": 0.1})
    with pytest.raises(RuntimeError, match="has not happened yet"):
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


def silent(network: nn.Module) -> NullspaceAugment:
    """Noise of length 0: both views are the clean one."""
    return NullspaceAugment(network, "random", limit=0.0)


def focal(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    losses = F.cross_entropy(outputs["logits"], labels, reduction="none")
    return ((1 - (-losses).exp()) ** 2 * losses).sum() / (num_items_in_batch or len(labels))


class Weighted(ViTForImageClassification):
    """A user's model that computes another loss in its forward."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        logits = super().forward(pixel_values).logits
        weights = torch.arange(1.0, 11.0)
        return ImageClassifierOutput(None if labels is None else F.cross_entropy(logits, labels, weights), logits)


CLASSES = torch.arange(COUNT) % 10
NUMBERS = torch.linspace(-1, 1, COUNT)
SEVERAL = (torch.arange(COUNT)[:, None] % torch.arange(2, 12) == 0).float()

LOSSES: dict[str, tuple[Any, Tensor, dict[str, Any], dict[str, Any]]] = {
    # model, labels, training arguments, arguments of the Trainer
    "one label": (model, CLASSES, {}, {}),
    "one label, said": (lambda: model(problem_type="single_label_classification"), CLASSES, {}, {}),
    "several labels": (lambda: model(problem_type="multi_label_classification"), SEVERAL, {}, {}),
    "several labels, seen": (model, SEVERAL, {}, {}),
    "a number": (lambda: model(num_labels=1), NUMBERS, {}, {}),
    "several numbers": (lambda: model(num_labels=2, problem_type="regression"), NUMBERS[:, None].repeat(1, 2), {}, {}),
    "label smoothing": (model, CLASSES, {"label_smoothing_factor": 0.1}, {}),
    "compute_loss_func": (model, CLASSES, {}, {"compute_loss_func": focal}),
    "the model's own": (lambda: model(Weighted), CLASSES, {}, {}),
}


def labelled(labels: Tensor) -> list[dict[str, Any]]:
    return [{**sample, "labels": label} for sample, label in zip(samples(), labels, strict=True)]


def with_labels(
    kind: type[Trainer], folder: Path, case: str, arguments: dict[str, Any], **extra: Any
) -> tuple[Trainer, list[dict[str, Any]]]:
    make, labels, more, functions = LOSSES[case]
    trainer = build(kind, folder, make(), arguments={**arguments, **more}, **functions, **extra)
    trainer.train_dataset = trainer.eval_dataset = labelled(labels)
    return trainer, trainer.train_dataset


@pytest.mark.parametrize("case", LOSSES)
def test_loss_of_a_view_is_the_trainers(case: str, tmp_path: Path) -> None:
    """So with noise of length 0 a step is twice as long as Trainer's, in whatever way it accumulates gradients."""

    def trained(kind: type[Trainer], rate: float, **extra: Any) -> tuple[Trainer, list[Tensor]]:
        # three parts of 8, 8 and 4 images, which a mean over parts weighs wrongly
        arguments = {
            "gradient_accumulation_steps": 3,
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": rate,
            "max_grad_norm": 0.0,
        }
        trainer, data = with_labels(kind, tmp_path, case, arguments, **extra)
        trainer.train_dataset = data[:20]
        trainer.train()
        return trainer, weights(trainer)

    plain, expected = trained(Trainer, 0.2)
    ours, seen = trained(NullspaceTrainer, 0.1, augment=silent)
    assert ours.augment.step == 3
    start = list(LOSSES[case][0]().parameters())
    assert any(not torch.equal(a, b) for a, b in zip(expected, start, strict=True))
    for mine, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("case", ["several labels", "a number"])
def test_noisy_view_has_the_models_own_loss_too(case: str, tmp_path: Path) -> None:
    labels = LOSSES[case][1]
    ours, _ = with_labels(NullspaceTrainer, tmp_path, case, {"max_steps": 1})
    ours.train()
    network = ours.model.train()
    batch = {"pixel_values": images()[:8], "labels": labels[:8]}
    ours.augment.step = 5
    loss, outputs = ours.compute_loss(network, batch, return_outputs=True)
    assert set(batch) == {"pixel_values", "labels"}, "the caller's own"
    with ours.augment:
        ours.augment.step = 5
        noisy = network(**batch)
    assert not torch.allclose(noisy.logits, outputs.logits)
    torch.testing.assert_close(loss, outputs.loss + noisy.loss)
    own = F.binary_cross_entropy_with_logits if case == "several labels" else lambda z, y: F.mse_loss(z[:, 0], y)
    torch.testing.assert_close(noisy.loss, own(noisy.logits, labels[:8]))


def test_criterion_takes_the_place_of_the_models_loss(tmp_path: Path) -> None:
    def mixed(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=0.2)

    soft = torch.softmax(torch.randn(COUNT, 10), dim=1)
    trainer = build(NullspaceTrainer, tmp_path, model(), criterion=mixed, arguments={"max_steps": 1})
    trainer.train_dataset = trainer.eval_dataset = labelled(soft)
    trainer.train()
    with torch.no_grad():
        expected = mixed(trainer.model.eval()(images()).logits, soft)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(ValueError, match="give either criterion or compute_loss_func, not both"):
        build(NullspaceTrainer, tmp_path, model(), criterion=mixed, compute_loss_func=focal)


@pytest.mark.parametrize("several", [False, True])
def test_model_without_a_loss_of_its_own_has_one_that_fits(
    several: bool, tmp_path: Path, make_vit: Callable[..., NormalizedModel]
) -> None:
    kind = {"problem_type": "multi_label_classification"} if several else {}
    labels = SEVERAL if several else CLASSES
    own = F.binary_cross_entropy_with_logits if several else F.cross_entropy
    networks = [NormalizedModel(model(**kind), [0.5] * 3, [0.5] * 3)]
    if not several:
        networks.append(make_vit())  # nothing of transformers in it
    for network in networks:
        # it calls its images `images`
        arguments = {"max_steps": 1, "remove_unused_columns": False, "label_names": ["labels"]}
        trainer = build(NullspaceTrainer, tmp_path, network, arguments=arguments)
        data = [{**sample, "pixel_values": sample["pixel_values"].sigmoid()} for sample in labelled(labels)]
        trainer.train_dataset = trainer.eval_dataset = data
        trainer.train()
        assert trainer.augment.stats["norm"] > 0
        with torch.no_grad():
            expected = own(network.eval()(images().sigmoid()), labels)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_batches_without_images_say_so(tmp_path: Path) -> None:
    trainer = build(NullspaceTrainer, tmp_path, model(), arguments={"max_steps": 1})
    trainer.train()
    with pytest.raises(ValueError, match=r"batches must hold the images as pixel_values; got the keys \['x'\]"):
        trainer.compute_loss(trainer.model.train(), {"x": images()})


def test_run_that_begins_anew_after_an_error_has_one_noise(tmp_path: Path) -> None:
    """As auto_find_batch_size does when memory runs out."""
    callback = NullspaceCallback(silent)
    made: list[NullspaceAugment] = []
    make = callback.run._make

    def kept(network: Any) -> NullspaceAugment:
        made.append(make(network))
        return made[-1]

    callback.run._make = kept
    failures = iter([False, True])

    class Failing(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            if next(failures, False):
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            return super().training_step(*args, **kwargs)

    arguments = {"auto_find_batch_size": True, "num_train_epochs": 1}
    build(Failing, tmp_path, model(), callbacks=[callback], arguments=arguments).train()
    assert len(made) == 2
    assert made[0].step == 1, "no noise of the broken run"
    assert made[1].step > 1


def test_best_model_is_loaded_whole(tmp_path: Path) -> None:
    """transformers saves a ViT under other names than it looks for."""
    arguments = {
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "num_train_epochs": 3,
    }
    scores = iter([2.0, 1.0, 0.0])  # the first is best
    trainer = build(NullspaceTrainer, tmp_path, model(), arguments=arguments)
    trainer.compute_metrics = lambda _: {"score": next(scores)}
    trainer.train()
    best = ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-3")
    for mine, theirs in zip(trainer.model.parameters(), best.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_several_gpus_of_one_process_are_refused() -> None:
    callback = NullspaceCallback()
    with pytest.raises(RuntimeError, match=r"2 GPUs of one process \(DataParallel\)"):
        callback.on_train_begin(SimpleNamespace(n_gpu=2), SimpleNamespace(global_step=0), None, model=model())
