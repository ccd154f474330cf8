"""NullspaceTask: timm's task API around the two-view loss."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnull.augment import NullspaceAugment
from fastnull.distributed import Processes
from fastnull.integrations import run
from fastnull.integrations.timm import NullspaceTask
from fastnull.vit import NormalizedModel

LABELS = torch.arange(8)


def test_forward_is_the_loss_of_both_views(vit: NormalizedModel, images: Tensor) -> None:
    task = NullspaceTask(NullspaceAugment(vit, "boundary", site="patch"), F.cross_entropy).train()
    result = task(images, LABELS)
    expected, _ = NullspaceAugment(vit, "boundary", site="patch").loss(images, LABELS, F.cross_entropy)
    assert torch.equal(result["loss"], expected)
    torch.testing.assert_close(result["output"], vit(images))
    assert result["norm"] > 0
    assert result["influence"] > 0
    soft = F.one_hot(LABELS, 10).float()
    with_soft = NullspaceTask(NullspaceAugment(vit, site="patch"), F.cross_entropy)(images, soft)
    torch.testing.assert_close(with_soft["loss"], expected)  # the sums round differently


def test_evaluation_and_ema_see_no_noise(vit: NormalizedModel, images: Tensor) -> None:
    task = NullspaceTask(NullspaceAugment(vit, "boundary", site="patch"), F.cross_entropy)
    ema = task.setup_ema(decay=0.9)
    task.train()
    task(images, LABELS)["loss"].backward()
    task.update_ema()
    task.eval()
    result = task(images, LABELS)
    assert set(result) == {"loss", "output"}
    assert torch.equal(result["loss"], F.cross_entropy(vit(images), LABELS))
    ema.module.train()(images)
    assert task.augment.step == 1


def test_checkpoint_brings_back_step_and_bank(vit: NormalizedModel, images: Tensor, tmp_path: Path) -> None:
    from timm.task import resume_task_checkpoint

    def universal(model: NormalizedModel) -> NullspaceTask:
        return NullspaceTask(NullspaceAugment(model.train(), "universal", count=3, limit=1.0), F.cross_entropy)

    task = universal(vit)
    task.setup_ema()
    task.augment.refresh([images], check=images)
    task(images, LABELS)
    torch.save({**task.get_checkpoint_state(), "epoch": 0, "version": 2}, tmp_path / "last.pth")
    assert "task_state_ema" not in task.get_checkpoint_state(ema=True)
    again = universal(copy.deepcopy(vit))
    assert resume_task_checkpoint(again, str(tmp_path / "last.pth")) == 1
    assert torch.equal(again(images, LABELS)["loss"], task(images, LABELS)["loss"])
    assert again.augment.step == 2


def test_compiled_task_sees_noise_and_compiles_once(vit: NormalizedModel, images: Tensor) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    eager = NullspaceTask(NullspaceAugment(vit.train(), "boundary", site="patch"), F.cross_entropy)(images, LABELS)[
        "loss"
    ]
    task = NullspaceTask(NullspaceAugment(vit, "boundary", site="patch"), F.cross_entropy)
    torch._dynamo.reset()
    task.compile(backend=backend)
    torch.testing.assert_close(task(images, LABELS)["loss"], eager)
    first = len(graphs)
    assert first > 0
    losses = {float(task(images, LABELS)["loss"].detach()) for _ in range(5)}
    assert len(losses) == 5, "new noise in every step"
    assert len(graphs) == first, "and no new graph for it"


def test_blocks_compiled_one_by_one_see_noise(vit: NormalizedModel, images: Tensor) -> None:
    eager, _ = NullspaceAugment(vit.train(), "boundary", site="patch").loss(images, LABELS, F.cross_entropy)
    torch._dynamo.reset()
    for block in vit.network.blocks:
        block.compile(backend="eager")
    aug = NullspaceAugment(vit, "boundary", site="patch")
    torch.testing.assert_close(aug.loss(images, LABELS, F.cross_entropy)[0], eager)


def test_processes_take_their_rows_of_the_noise(
    vit: NormalizedModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noise_of(rows: Tensor) -> Tensor:
        task = NullspaceTask(NullspaceAugment(vit.train(), "random"), lambda logits, _: logits.sum())
        noisy: list[Tensor] = []
        handle = vit.network.norm_pre.register_forward_hook(lambda _m, _a, out: noisy.append(out.detach()))
        task(rows, LABELS[: len(rows)])
        handle.remove()
        clean, seen = noisy[0].chunk(2)
        return seen - clean

    whole = noise_of(images)
    for rank in range(2):
        processes = Processes()
        processes.rank, processes.world = rank, 2
        monkeypatch.setattr(run, "Processes", lambda processes=processes: processes)
        mine = slice(4 * rank, 4 * rank + 4)
        torch.testing.assert_close(noise_of(images[mine]), whole[mine], rtol=0, atol=1e-5)
