"""NullspaceCallback in Lightning, under both names of the library."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fastnull.augment import NullspaceAugment
from fastnull.vit import NormalizedModel
from tests.integrations.models import QUIET


def module_of(library: Any, vit: NormalizedModel) -> Any:
    class Module(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.vit = vit.train()
            self.training_logits: list[tuple[Tensor, Tensor]] = []
            self.validation_steps: list[int] = []
            self.callback: Any = None

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            images, labels = batch
            logits = self.vit(images)
            augment = self.callback.augment
            augment.enabled = False
            self.training_logits.append((logits.detach(), self.vit(images).detach()))
            augment.enabled = True
            return F.cross_entropy(logits, labels)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            before = self.callback.augment.step
            self.vit(batch[0])
            self.validation_steps.append(self.callback.augment.step - before)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.vit.parameters(), lr=0.1)

    return Module()


def trainer_of(library: Any, callback: Any, epochs: int, **settings: Any) -> Any:
    settings = {"enable_checkpointing": False, "max_epochs": epochs, **QUIET, **settings}
    return library.Trainer(callbacks=[callback], **settings)


def universal(module: Any) -> NullspaceAugment:
    return NullspaceAugment(module.vit, "universal", count=2, limit=1.0, steps=2)


@pytest.fixture
def loader(images: Tensor) -> Any:
    return DataLoader(TensorDataset(images, torch.arange(8)), batch_size=2)


@pytest.mark.filterwarnings("ignore")
def test_training_forwards_see_noise_and_validation_none(
    lightning: Any, vit: NormalizedModel, images: Tensor, loader: Any
) -> None:
    library, make = lightning
    module = module_of(library, vit)
    callback = module.callback = make(lambda module: NullspaceAugment(module.vit, "random"))
    trainer_of(library, callback, 2).fit(module, loader, loader)
    assert len(module.training_logits) == 8
    assert not any(torch.allclose(noisy, clean) for noisy, clean in module.training_logits)
    assert set(module.validation_steps) == {0}
    assert callback.augment.step == 8
    vit.train()(images)
    assert callback.augment.step == 8, "detached"


@pytest.mark.filterwarnings("ignore")
def test_resumed_run_ends_bit_for_bit_the_same(
    lightning: Any, make_vit: Any, images: Tensor, loader: Any, tmp_path: Path
) -> None:
    library, make = lightning

    def fit(epochs: int, path: Path | None = None) -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        module = module_of(library, make_vit())
        callback = module.callback = make(universal, [images])
        trainer = trainer_of(library, callback, epochs)
        trainer.fit(module, loader, ckpt_path=path)
        return trainer, module, callback

    _, whole, noise = fit(2)
    trainer, module, half = fit(1)
    assert not torch.equal(half.augment.bank.tokens, noise.augment.bank.tokens), "learnt anew in the second epoch"
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, again = fit(2, tmp_path / "half.ckpt")
    assert len(resumed.training_logits) == 4
    assert again.augment.step == noise.augment.step == 8
    assert torch.equal(again.augment.bank.tokens, noise.augment.bank.tokens)
    for mine, theirs in zip(resumed.vit.parameters(), whole.vit.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    # a state from within an epoch: its bank is used, and not learned again
    state = half.state_dict()
    late = make(universal, [images])
    late.load_state_dict(state)
    late.on_fit_start(None, module)
    late.run.start_epoch(0)
    assert torch.equal(late.augment.bank.tokens, state["augment"]["bank"]["tokens"])
    late.run.start_epoch(1)
    assert not torch.equal(late.augment.bank.tokens, state["augment"]["bank"]["tokens"])


@pytest.mark.filterwarnings("ignore:Found .* module")
def test_model_in_eval_mode_is_warned_of(lightning: Any, vit: NormalizedModel, loader: Any) -> None:
    library, make = lightning
    module = module_of(library, vit)
    callback = module.callback = make(lambda module: NullspaceAugment(module.vit.eval(), "random"))
    with pytest.warns(UserWarning, match=r"the model is in eval mode when training starts .* call its train\(\)"):
        trainer_of(library, callback, 1, limit_train_batches=1).fit(module, loader)


def test_processes_have_noise_of_their_own(lightning: Any, vit: NormalizedModel) -> None:
    _, make = lightning
    callback = make(lambda module: NullspaceAugment(module.vit, "random"))
    callback.on_fit_start(None, SimpleNamespace(vit=vit))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=0))
    keys = []
    for loop.epoch_loop.total_batch_idx in range(3):
        for rank in range(2):
            trainer = SimpleNamespace(fit_loop=loop, world_size=2, global_rank=rank)
            callback.on_train_batch_start(trainer, None, None, 0)
            keys.append(callback.augment.step)
    assert keys == [0, 1, 2, 3, 4, 5]
