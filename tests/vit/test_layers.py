"""Depths of parameters: equal to timm's for its own models, and analogous for others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastnull.compat import import_timm
from fastnull.distributed import Processes
from fastnull.finetune.config import FinetuneConfig
from fastnull.finetune.plan import make_plan
from fastnull.finetune.training import Training
from fastnull.models import create_model
from fastnull.vit import NormalizedModel
from fastnull.vit.layers import blocks_of, layer_ids
from tests.vit.zoo import KINDS, Kind

OTHERS = [kind for kind in KINDS if kind.library in ("transformers", "torchvision")]
TIMM = [kind for kind in KINDS if kind.library == "timm" and kind.name in ("ViT", "DINOv2, registers", "CLIP", "Swin")]


def name_of(kind: Kind) -> str:
    return f"{kind.library}: {kind.name}"


def test_blocks_are_found() -> None:
    names = ("vit_digits", "swin_tiny_patch4_window7_224", "convnext_atto", "resnet18")
    found = [blocks_of(create_model(name, num_classes=2)) for name in names]
    assert [type(blocks[0]).__name__ for blocks in found] == [
        "Block", "SwinTransformerBlock", "ConvNeXtBlock", "BasicBlock",
    ]  # fmt: skip
    assert [len(blocks) for blocks in found] == [4, 12, 12, 8]
    with pytest.raises(ValueError, match="Linear has no list of modules of one class"):
        blocks_of(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", TIMM[:-1], ids=name_of)
def test_depths_of_timms_vits_are_timms(kind: Kind) -> None:
    import_timm()
    from timm.models import group_parameters

    model = kind.model()
    theirs = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert layer_ids(model) == theirs
    assert max(theirs.values()) == 3  # two blocks


@pytest.mark.parametrize("kind", OTHERS, ids=name_of)
def test_depths_go_from_the_patches_to_the_classes(kind: Kind) -> None:
    model = kind.model()
    ids = layer_ids(model)
    assert list(ids) == [name for name, _ in model.named_parameters()]
    deepest = len(blocks_of(model)) + 1
    of = {depth: [name for name in ids if ids[name] == depth] for depth in range(deepest + 1)}
    assert all(of.values())
    assert any("patch_embed" in name or name.startswith("conv_proj") for name in of[0])
    assert all("classifier" in name or name.startswith("heads") for name in of[deepest])
    # block i and nothing before it
    for depth, block in enumerate(blocks_of(model), 1):
        theirs = {id(parameter) for parameter in block.parameters()}
        assert {ids[name] for name, parameter in model.named_parameters() if id(parameter) in theirs} == {depth}
    norms = [name for name in of[deepest - 1] if name.split(".")[-2] in ("layernorm", "post_layernorm", "ln", "norm")]
    assert norms or kind.name in ("BEiT",)  # the final norm goes with the last block; BEiT's is in its pooler


@pytest.mark.parametrize("kind", [OTHERS[0], OTHERS[-1]], ids=name_of)
def test_layer_decay_of_a_model_that_timm_does_not_know(kind: Kind) -> None:
    """Parameters have the learning rates of a timm model's parameters at the same depth."""
    rates: list[dict[tuple[int, bool], float]] = []
    for size, one in ((32, TIMM[0]), (16, kind)):
        model = one.model()
        config = FinetuneConfig(augment="none", layer_decay=0.5, lr=0.1, weight_decay=0.05, batch_size=4, epochs=3)
        wrapped = NormalizedModel(model, [0.5] * 3, [0.5] * 3).train()
        training = Training(config, wrapped, make_plan(config, 8), 5, torch.device("cpu"), Processes())
        for _ in range(2):
            training.train_step(torch.rand(4, 3, size, size), torch.arange(4))
        depth = {id(parameter): layer_ids(model)[name] for name, parameter in model.named_parameters()}
        rates.append({})
        for group in training.optimizer.param_groups:
            (at,) = {depth[id(parameter)] for parameter in group["params"]}
            rates[-1][at, group["weight_decay"] > 0] = group["lr"]
    assert rates[0] == rates[1]
    assert len(rates[0]) == 8  # four depths, with weight decay and without
    assert len(set(rates[0].values())) == 4
