"""In every library's training loop the noise is there, and of the model as it is then: with each library's own
optimiser, frozen parts, compiled parts, accumulated steps, checkpointed activations and mixed precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastnull.augment import NullspaceAugment
from fastnull.compat import import_timm
from fastnull.integrations.timm import NullspaceTask
from fastnull.integrations.transformers import NullspaceCallback, NullspaceTrainer, Trainer
from fastnull.vit import NormalizedModel
from tests.integrations.models import QUIET, hf_model, hf_trainer, lightning_of

SMALL = 1e-5
MOVED = 1e-4
LABELS = torch.arange(8)

Watch = Callable[..., tuple[list[float], list[Tensor]]]


class Watched:
    """Makes an augmentation, for a callback, and watches its draws."""

    def __init__(self, watch: Watch, images: Tensor, part: str | None = None, **settings: Any) -> None:
        self.watch, self.images, self.part, self.settings = watch, images, part, settings
        self.gaps: list[float] = []
        self.seen: list[Tensor] = []
        self.norms: list[float] = []

    def __call__(self, module: Any) -> NullspaceAugment:
        model = getattr(module, self.part) if self.part else module
        aug = NullspaceAugment(model, **{"mode": "boundary", "steps": 1, **self.settings})
        self.gaps, self.seen = self.watch(aug, self.images)
        draw = aug.draw

        def with_norm(tokens: Tensor) -> Tensor:
            noise = draw(tokens)
            self.norms.append(float(noise.abs().max()))
            return noise

        aug.draw = with_norm  # type: ignore[method-assign]
        return aug

    def check(self, draws: int, small: float = SMALL) -> None:
        """Noise in every draw, made with the weights of that time, which moved."""
        assert len(self.norms) == draws
        assert min(self.norms) > 0
        assert (self.seen[-1] - self.seen[0]).abs().max() > MOVED
        assert max(self.gaps) < small


def hf_train(kind: type[Trainer], network: nn.Module, folder: Path, images: Tensor, **more: Any) -> Trainer:
    extra = {key: more.pop(key) for key in ("augment", "callbacks") if key in more}
    arguments = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, **more}
    data = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, LABELS, strict=True)]
    trainer = hf_trainer(kind, folder, network, data, arguments, **extra)
    trainer.train()
    return trainer


WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "sgd": {"optim": "sgd", "learning_rate": 0.1},
    "adafactor": {"optim": "adafactor"},
    "accumulated": {"gradient_accumulation_steps": 2},
    "checkpointed": {"gradient_checkpointing": True},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 1},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "bf16": {"bf16": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["trainer", "callback"])
def test_transformers(form: str, way: str, images: Tensor, watch: Watch, tmp_path: Path) -> None:
    torch._dynamo.reset()
    made = Watched(watch, images)
    if form == "trainer":
        trainer = hf_train(NullspaceTrainer, hf_model(), tmp_path, images, augment=made, **WAYS[way])
    else:
        callback = NullspaceCallback(made)
        trainer = hf_train(Trainer, hf_model(), tmp_path, images, callbacks=[callback], **WAYS[way])
    if way == "default":
        assert trainer.optimizer.defaults["fused"], "the case that counters of versions do not see"
    # logits of a model under autocast have the eight bits of bfloat16
    made.check(4 * WAYS[way].get("gradient_accumulation_steps", 1), small=0.1 if way == "bf16" else SMALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["trainer", "callback"])
@pytest.mark.parametrize("images_are", ["pixels", "normalised"])
def test_transformers_at_site_pixels(form: str, images_are: str, images: Tensor, watch: Watch, tmp_path: Path) -> None:
    """Trainer calls its model with pixel_values=..."""
    made = Watched(watch, images, site="pixels", fraction=0.0)
    kind, extra = {
        "trainer": (NullspaceTrainer, {"augment": made}),
        "callback": (Trainer, {"callbacks": [NullspaceCallback(made)]}),
    }[form]
    if images_are == "normalised":
        with pytest.raises(ValueError, match=r"images must be pixels in \[0, 1\]; got the range"):
            hf_train(kind, hf_model(), tmp_path, (images - 0.5) / 0.5, **extra)
        return
    inputs: list[Tensor] = []
    network = hf_model()
    network.vit.embeddings.register_forward_pre_hook(
        lambda _module, args, kwargs: inputs.append(args[0] if args else kwargs["pixel_values"]), with_kwargs=True
    )
    hf_train(kind, network, tmp_path, images, **extra)
    made.check(4)
    noisy = [x for x in inputs if not any(torch.equal(row, image) for row in x for image in images)]
    assert len(noisy) >= 4
    assert all(float(x.min()) >= 0 and float(x.max()) <= 1 for x in noisy)


def fit(lightning: Any, vit: nn.Module, made: Watched, images: Tensor, prepare: Any = None, **settings: Any) -> Any:
    library, callback = lightning

    class Module(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.vit = vit

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.vit(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.vit(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            return torch.optim.AdamW(trained, lr=1e-2, fused=True)

    module = Module().train()
    if prepare is not None:
        prepare(module)
    settings = {"max_epochs": 2, "enable_checkpointing": False, **QUIET, **settings}
    trainer = library.Trainer(callbacks=[callback(made)], **settings)
    loader = DataLoader(TensorDataset(images, LABELS), batch_size=4)
    trainer.fit(module, loader, loader)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_lightning(
    lightning: Any, settings: dict[str, Any], vit: NormalizedModel, images: Tensor, watch: Watch
) -> None:
    made = Watched(watch, images, "vit")
    fit(lightning, vit, made, images, **settings)
    made.check(4)


def frozen_stem(vit: NormalizedModel) -> None:
    vit.network.patch_embed.requires_grad_(False).eval()


def frozen_backbone(vit: NormalizedModel) -> None:
    vit.network.requires_grad_(False).eval()
    vit.network.head.requires_grad_(True).train()


def frozen_block(vit: NormalizedModel) -> None:
    vit.network.blocks[0].requires_grad_(False).eval()
    vit.network.norm_pre.eval()


FROZEN = {function.__name__: function for function in (frozen_stem, frozen_backbone, frozen_block)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("site", ["patch", "block0", "pixels"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_lightning_keeps_frozen_parts_in_eval_mode(
    lightning: Any, frozen: str, site: str, vit: NormalizedModel, images: Tensor, watch: Watch
) -> None:
    made = Watched(watch, images, "vit", site=site, fraction=0.0)
    modes = []
    fit(lightning, vit, made, images, prepare=lambda module: FROZEN[frozen](module.vit), num_sanity_val_steps=0)
    modes = [module.training for module in (vit.network.patch_embed, vit.network.norm_pre)]
    assert not all(modes), "which is what makes this a test"
    made.check(4)


def compiled_inside(network: nn.Module) -> nn.Module:
    return torch.compile(network, backend="eager")


def compiled_in_place(network: nn.Module) -> nn.Module:
    network.compile(backend="eager")
    return network


def compiled_by_block(network: nn.Module) -> nn.Module:
    for block in network.blocks:
        block.compile(backend="eager")
    return network


COMPILED = {function.__name__: function for function in (compiled_inside, compiled_in_place, compiled_by_block)}


def compiles_too_early(run: Callable[[], None]) -> bool:
    """Whether a function raises the error about a model that was compiled and run before."""
    try:
        run()
    except RuntimeError as error:
        if "compile" not in str(error):
            raise
        return True
    return False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("already_run", [False, True])
@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_network_in_a_normalized_model(
    kind: str, already_run: bool, vit: NormalizedModel, images: Tensor
) -> None:
    """Noise in every step, or an error that says why not."""
    torch._dynamo.reset()
    model = NormalizedModel(COMPILED[kind](vit.network), [0.5] * 3, [0.5] * 3).train()
    if already_run:
        model(images)
    aug = NullspaceAugment(model, "boundary", site="patch")

    def steps() -> None:
        for _ in range(2):
            loss, clean = aug.loss(images, LABELS, F.cross_entropy)
            assert aug.stats["norm"] > 0
            assert loss.item() != pytest.approx(2 * F.cross_entropy(clean, LABELS).item(), abs=1e-4)

    assert compiles_too_early(steps) <= already_run
    torch._dynamo.reset()
    if already_run:
        model(images)
    aug = NullspaceAugment(model, "boundary", site="patch").attach()

    def forward() -> None:
        noisy = model(images)
        aug.enabled = False
        assert not torch.allclose(noisy, model(images), atol=1e-4)

    compiles_too_early(forward)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.parametrize("loop", ["lightning", "transformers", "timm"])
def test_compiled_network_in_a_trainer(
    loop: str, kind: str, vit: NormalizedModel, images: Tensor, watch: Watch, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    model = NormalizedModel(COMPILED[kind](vit.network), [0.5] * 3, [0.5] * 3).train()
    model(images)
    made = Watched(watch, images, "vit" if loop == "lightning" else None)
    if loop == "lightning":

        def train() -> None:
            fit(lightning_of("lightning.pytorch"), model, made, images)
    elif loop == "transformers":

        def train() -> None:
            more = {"remove_unused_columns": False, "label_names": ["labels"]}
            hf_train(NullspaceTrainer, model, tmp_path, images, augment=made, **more)
    else:

        def train() -> None:
            timm_steps(NullspaceTask(made(model), F.cross_entropy), images)

    if not compiles_too_early(train):
        made.check(4)


def timm_steps(task: NullspaceTask, images: Tensor, **settings: Any) -> None:
    optimizer = import_timm().optim.create_optimizer_v2(task.trainable_module, "adamw", lr=1e-2, **settings)
    task.train()
    for _ in range(4):
        task(images, LABELS)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if task.has_ema:
            task.update_ema()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_timm(settings: dict[str, Any], vit: NormalizedModel, images: Tensor, watch: Watch) -> None:
    made = Watched(watch, images)
    task = NullspaceTask(made(vit), F.cross_entropy)
    task.setup_ema(decay=0.9)
    timm_steps(task, images, **settings)
    made.check(4)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str, vit: NormalizedModel, images: Tensor, watch: Watch) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-2, fused=True)
    model, optimizer = accelerator.prepare(vit.train(), optimizer)
    made = Watched(watch, images)
    aug = made(model)
    for _ in range(4):
        accelerator.backward(aug.loss(images, LABELS, F.cross_entropy)[0])
        optimizer.step()
        optimizer.zero_grad()
    made.check(4, small=0.1 if precision == "bf16" else SMALL)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_data_parallel_on_one_device(vit: NormalizedModel, images: Tensor, watch: Watch) -> None:
    made = Watched(watch, images)
    model = nn.DataParallel(vit.train())
    aug = made(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        aug.loss(images, LABELS, F.cross_entropy)[0].backward()
        optimizer.step()
    made.check(3)
