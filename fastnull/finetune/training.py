"""Training steps, and the state of a run between steps."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnull import choices
from fastnull.checks import check_choice, trusted_values
from fastnull.compat import import_timm
from fastnull.data.image_files import to_pixels
from fastnull.data.sources import seed_everything
from fastnull.distributed.processes import Processes, explained, without_exchange
from fastnull.distributed.sharded import local, shard
from fastnull.distributed.sharded_state import load_state_of, load_whole_state, state_of
from fastnull.finetune.config import ATTACKS, FinetuneConfig
from fastnull.finetune.controls import AdversarialTraining, CleanOnly, Stopwatch, TimedAugment, Trades
from fastnull.finetune.plan import REFRESH_COST, Plan
from fastnull.finetune.start_average import StartAverage
from fastnull.record import device_name
from fastnull.rng import Place, generator
from fastnull.vit import NormalizedModel, unwrap
from fastnull.vit.layers import Layered

STEP_KEY = 1
"""(seed, STEP_KEY, step) is the key of a step's random numbers."""
_NEVER = 2**62
_ENTRIES = {"step", "start", "scaler", "augment", "loss_sum", "history", "best", "spent", "seconds"}
"""Entries of a training state besides the weights."""


class DivergenceError(RuntimeError):
    """The loss or a weight became NaN or Inf."""


@dataclass
class FinetuneResult:
    """The result of a run.

    Attributes:
        model: with its last weights (the averaged ones with ema_decay or start_fraction), in eval mode. With `shard`
            every process holds a shard, and all must call the model together; the files hold whole weights.
        history: one record per epoch: epoch, step, loss (mean over the epoch), val_accuracy in %, and seconds so far.
        best_epoch, best_accuracy: on the held-out images, in %; None without them.
        best_path, last_path: weights (.safetensors) of the best epoch and the last step; None if not written.
        plan: steps and their cost.
        cost: in forward passes of one image: `planned`, `spent` (less if a universal noise stops early), `budget`
            (None without one).
        seconds: `total`, `synthesis` (noise or attack) and `synthesis_fraction` of the total.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    best_epoch: int | None
    best_accuracy: float | None
    best_path: Path | None
    last_path: Path | None
    plan: Plan
    cost: dict[str, float | None]
    seconds: dict[str, float]


class Training:
    """A run between two steps.

    Args:
        config, plan: of the run.
        model: on `device`; trained in place.
        num_classes: number of its logits.
        processes: of the run; all hold the same weights, optimiser, noise and records.

    Attributes:
        step: number of steps taken.
        history, best_epoch, best_accuracy: as in FinetuneResult.
        sharded: whether the model and its average are sharded.

    Raises:
        ValueError: shard or layer_decay for a model without blocks, an unknown optimiser, or a model that the
            augmentation cannot split.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        model: nn.Module,
        plan: Plan,
        num_classes: int,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self.config, self.model, self.plan, self.device, self.processes = config, model, plan, device, processes
        self._memory_format = torch.channels_last if config.channels_last else torch.preserve_format
        self.sharded = config.shard and not processes.alone
        if not self.sharded:  # FSDP2 shards contiguous weights
            model.to(memory_format=self._memory_format)
        # both views go through the wrapper, whose forward prepares the exchange of gradients
        if self.sharded:
            processes.broadcast(model)
            self._called = model
        else:
            self._called = processes.wrap(model)
        if config.compile:
            self._called = torch.compile(self._called)
        timm = import_timm()
        self.amp_dtype = getattr(torch, config.amp) if config.amp else None
        self.watch = Stopwatch(device)
        with self.autocast():  # whose dtype the synthesis takes over
            self.augment = _augment(config, self._called, self.watch)
        self.ema = timm.utils.ModelEmaV3(model, config.ema_decay, use_warmup=True) if config.ema_decay else None
        self._average = None
        if config.start_fraction:
            self._average = StartAverage(model, config.start_fraction, processes, sharded=self.sharded)
        if self.sharded:
            self._shard()
        self.optimizer = _optimizer(config, model)
        self.scheduler = _scheduler(config, plan, self.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
        self._num_classes = num_classes
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.best_epoch: int | None = None
        self.best_accuracy: float | None = None
        self._spent = 0.0
        self._seconds = 0.0
        self._synthesis_seconds = 0.0
        self._started = time.perf_counter()
        # on the device, to avoid synchronisation: sum of the epoch's losses, and the first step with a bad loss
        self._loss = torch.zeros((), device=device)
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._bad_step = torch.full((), _NEVER, dtype=torch.long, device=device)
        self._stats: dict[str, Tensor] = {}
        self._places = processes.places(plan.batch_size, config.accumulate, pairs=config.mixing)

    def _shard(self) -> None:
        """Shard the model and its average, after everything that copies the model or checks its classes."""
        encoder = getattr(self.augment, "encoder", None)
        with nullcontext() if encoder is None else encoder.sharding():
            shard(self.model)
        if self.ema is not None:
            shard(self.ema.module)

    @property
    def epoch(self) -> int:
        """Number of the current epoch, from 1; it changes with the first step of the next one."""
        return max(self.step - 1, 0) // self.plan.steps_per_epoch + 1

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and saved: the averaged one, if any, with the weights of the last step."""
        trained = self.model if self.ema is None else self.ema.module
        return trained if self._average is None else self._average.of(trained)

    @property
    def lacks_bank(self) -> bool:
        """Whether a universal bank must be learned before the next step: in every epoch, and if there is none."""
        if self.config.augment != "universal":
            return False
        return self.step % self.plan.steps_per_epoch == 0 or self.augment.state_dict()["bank"] is None

    def refresh(self, batches: Iterable[Tensor], check: list[Tensor]) -> dict[str, Any]:
        """Learn a universal bank from the current weights, with its influence measured on the `check` images.

        Returns its record for the first step that uses it, and warns if ε was not met.
        """
        self.augment.at(self.step)
        with self.watch:
            noise = self.augment.refresh(
                batches, check=check, mean=None if self.processes.alone else self.processes.mean
            )
        assert noise is not None
        self._spent += REFRESH_COST * len(noise) * len(noise.history) * self.plan.batch_size
        met, influence = int(noise.converged.sum()), float(noise.influence.mean())
        if met < len(noise) and self.processes.first:
            warnings.warn(
                f"the universal noise for step {self.step + 1} did not meet eps: influence {influence:.3g} after "
                f"{int(noise.steps.max())} updates. It is used nevertheless; more rounds, a larger image_fraction "
                "or a smaller limit would help",
                stacklevel=2,
            )
        return {
            "kind": "refresh",
            "step": self.step + 1,
            "noises": len(noise),
            "converged": met,
            "influence": influence,
            "norm": float(noise.norm.mean()),
            "updates": int(noise.steps.max()),
        }

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """One update from this process's rows of a checked batch on the host.

        images [B, C, H, W] are bytes or pixels, labels class indices [B] int64 or probabilities [B, K] float32.
        """
        seed_everything(self.config.seed, STEP_KEY, self.step)
        images, labels = to_pixels(images, self.device), labels.to(self.device, non_blocking=True)
        images = images.to(memory_format=self._memory_format)
        if self.config.mixing:
            images, labels = self._mixed(images, labels)
        if not self.processes.first:
            # mixing is the same in all processes, drop path is not
            torch.manual_seed(generator(self.config.seed, STEP_KEY, self.step, self.processes.rank).initial_seed())
        parts = len(self._places)
        self._loss = torch.zeros((), device=self.device)
        self._stats = {}
        for part in zip(self._places, images.chunk(parts), labels.chunk(parts), strict=True):
            last = part[0] is self._places[-1]
            with nullcontext() if last else without_exchange(self._called), explained(self.processes):
                self._backward(*part)
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        if self.scheduler is not None:
            self.scheduler.step_update(self.step)
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        self._loss_sum += self._loss
        bad_step = torch.where(torch.isfinite(self._loss), _NEVER, self.step)
        self._bad_step = torch.minimum(self._bad_step, bad_step)
        self._spent += self.plan.step_cost * self.plan.batch_size

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels after Mixup or CutMix; the labels as probabilities [B, K], smoothed."""
        count = len(images)
        # timm mixes only class indices: with the row numbers as classes, it returns the weights of the rows
        mixup = import_timm().data.Mixup(self.config.mixup, self.config.cutmix, label_smoothing=0.0, num_classes=count)
        images, parts = mixup(images, torch.arange(count, device=images.device))  # [B, B]
        if labels.ndim == 1:
            labels = F.one_hot(labels, self._num_classes).float()
        labels = torch.lerp(labels, torch.full_like(labels, 1 / self._num_classes), self.config.smoothing)
        own, other = (part.diagonal().to(labels.dtype).unsqueeze(1) for part in (parts, parts.flip(1)))  # [B, 1]
        return images, own * labels + other * labels.flip(0)

    def _backward(self, place: Place | None, images: Tensor, labels: Tensor) -> None:
        """Add the gradients, loss and statistics of one part of a batch, as means over the parts."""
        weight = 1 / len(self._places)
        self.augment.at(self.step, place)
        # labels and images were checked on the host
        with self.autocast(), trusted_values():
            loss, _ = self.augment.loss(images, labels, self._criterion)
        self.scaler.scale(loss * weight).backward()
        self._loss += weight * loss.detach()
        for name, value in self.augment.stats.items():
            self._stats[name] = self._stats.get(name, torch.zeros_like(value)) + weight * value

    def autocast(self) -> torch.autocast:
        """The configuration's autocast region."""
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def check_finite(self) -> None:
        """Raise DivergenceError if a loss (of any process) or a weight is NaN or Inf; synchronises."""
        step = int(self.processes.least(self._bad_step))
        what = f"the loss is NaN or Inf at step {step}"
        if step == _NEVER:
            broken = [
                name for name, value in self.model.named_parameters() if not bool(torch.isfinite(local(value)).all())
            ]
            if self.sharded:
                broken = sorted({name for names in self.processes.gathered(broken) for name in names})
            if not broken:
                return
            what = f"{len(broken)} weights ({broken[0]}, ...) hold NaN or Inf after step {self.step}"
        raise DivergenceError(
            f"{what} of {self.plan.steps}; later states are not saved. A lower lr than {self.config.highest_lr:g}, "
            "clip_grad, a warm-up, or amp=None may help"
        )

    def step_record(self) -> dict[str, Any]:
        """The record of the last step for metrics.jsonl, with means over all processes. Raises DivergenceError."""
        own = {"loss": self._loss, "bad": self._bad_step < _NEVER, **self._stats}
        means = self.processes.mean(torch.tensor([float(value) for value in own.values()], dtype=torch.float64))
        stats = dict(zip(own, means.tolist(), strict=True))
        if stats.pop("bad"):
            self.check_finite()
        return {
            "kind": "step",
            "step": self.step,
            "epoch": self.epoch,
            "loss": stats.pop("loss"),
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            # the influence of random noise is not measured (NaN)
            **{name: value for name, value in stats.items() if math.isfinite(value)},
        }

    def shown(self, record: dict[str, Any]) -> dict[str, str]:
        """The part of a step's record that the progress bar shows, with the last accuracy."""
        shown: dict[str, str] = {}
        for name in ("loss", "influence", "norm"):
            if name in record:
                shown[name] = f"{record[name]:.3g}"
        if self.history and "val_accuracy" in self.history[-1]:
            shown["val"] = f"{self.history[-1]['val_accuracy']:.1f} %"
        return shown

    def end_epoch(self, accuracy: float | None) -> dict[str, Any]:
        """End an epoch with the accuracy on the held-out images in %; return its record. Raises DivergenceError."""
        self.check_finite()
        taken = (self.step - 1) % self.plan.steps_per_epoch + 1
        if accuracy is not None and (self.best_accuracy is None or accuracy > self.best_accuracy):
            self.best_epoch, self.best_accuracy = self.epoch, accuracy
        record = {
            "kind": "epoch",
            "step": self.step,
            "epoch": self.epoch,
            "loss": float(self.processes.mean(self._loss_sum)) / taken,
            **({} if accuracy is None else {"val_accuracy": accuracy}),
            "cost": self._spent,
            "seconds": self.seconds(),
        }
        self.history.append(record)
        self._loss_sum.zero_()
        return record

    def seconds(self) -> dict[str, float]:
        """Total and synthesis time so far, including the parts before a resume."""
        total = self._seconds + time.perf_counter() - self._started
        synthesis = self._synthesis_seconds + self.watch.seconds()
        return {"total": total, "synthesis": synthesis, "synthesis_fraction": synthesis / total}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, except `shards`: tensors and plain values. Collective."""
        if self.sharded:
            weights: dict[str, Any] = {"sharded": self._weights()[1]}
        else:
            weights = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": None if self.ema is None else self.ema.module.state_dict(),
            }
        return {
            "step": self.step,
            **weights,
            "start": None if self._average is None else self._average.state_dict(),
            "scaler": self.scaler.state_dict(),
            "augment": self._augment_state(),
            "loss_sum": self.processes.mean(self._loss_sum),
            "history": self.history,
            "best": (self.best_epoch, self.best_accuracy),
            "spent": self._spent,
            "seconds": self.seconds(),
            **choices.in_records(),
        }

    def _augment_state(self) -> dict[str, Any]:
        """The state of the augmentation, in which free noise has the images of all processes."""
        state = self.augment.state_dict()
        if state.get("free") is not None:
            found = self.processes.gathered(state["free"]["visited"])
            state["free"]["visited"] = [visited for own in found for visited in own]
        return state

    def shards(self) -> dict[str, Tensor]:
        """The sharded tensors of the state by name."""
        return self._weights()[0]

    def _weights(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return state_of(self.model, None if self.ema is None else self.ema.module, self.optimizer)

    def load_state_dict(self, state: dict[str, Any], shards: Path | None = None) -> None:
        """Load a state of `state_dict`; sharded and unsharded runs can load each other's.

        The optimiser and the noise get the settings of the state, or with `force` those of this run.

        Args:
            state: of `state_dict`.
            shards: folder of `write_shards`, if the run was sharded.

        Raises:
            ValueError: the state is of another model, or lacks an entry.
        """
        weights = {"sharded"} if "sharded" in state else {"model", "optimizer", "ema"}
        missing = sorted((_ENTRIES | weights) - state.keys())
        if missing:
            raise ValueError(f"the training state is of another version of fastnull: it lacks {', '.join(missing)}")
        if self._average is not None:
            self._average.check(state["start"])
        average = None if self.ema is None else self.ema.module
        fresh = [{name: group[name] for name in group if name != "params"} for group in self.optimizer.param_groups]
        try:
            if "sharded" not in state and (average is None) != (state["ema"] is None):
                raise ValueError("only one of the run and the state has averaged weights")
            if "sharded" in state:
                assert shards is not None
                load_state_of(shards, state["sharded"], self.model, average, self.optimizer, self.processes)
            elif self.sharded:
                load_whole_state(state, self.model, average, self.optimizer)
            else:
                self.model.load_state_dict(state["model"])
                if average is not None:
                    average.load_state_dict(state["ema"])
                self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"the training state is of another model or optimiser: {error}") from error
        if state["scaler"]:  # empty without scaling
            self.scaler.load_state_dict(state["scaler"])
        self._load_augment(state["augment"])
        self._take_implementations(state.get("implementations", {}))
        self.step, self.history = state["step"], state["history"]
        self.best_epoch, self.best_accuracy = state["best"]
        self._loss_sum = state["loss_sum"].to(self.device)
        self._spent = state["spent"]
        self._seconds, self._synthesis_seconds = state["seconds"]["total"], state["seconds"]["synthesis"]
        if self.config.force:
            for group, settings in zip(self.optimizer.param_groups, fresh, strict=True):
                group.update(settings)
            self.scheduler.step_update(self.step)

    def _take_implementations(self, before: dict[str, str]) -> None:
        """Run the ops on a GPU as the run did so far; warn where that cannot be."""
        refused = choices.pin(before, device_name(self.device))
        if refused:
            more = f" (and {len(refused) - 3} more)" if len(refused) > 3 else ""
            warnings.warn(
                "the run goes on, but not bit for bit: other implementations of its ops serve here, because "
                f"{'; '.join(refused[:3])}{more}",
                UserWarning,
                stacklevel=3,
            )

    def _load_augment(self, state: dict[str, Any]) -> None:
        if self.config.force:
            mine = self.augment.state_dict()
            alike = [made.get("mode") and (made["mode"], made["config"]["site"]) for made in (mine, state)]
            kept = {name: state.get(name) for name in ("bank", "free")}
            state = {**mine, **kept} if alike[0] == alike[1] else mine
        self.augment.load_state_dict(state)

    def result(self, best_path: Path | None, last_path: Path | None) -> FinetuneResult:
        """The result of `finetune`."""
        return FinetuneResult(
            model=self.evaluated.eval(),
            history=self.history,
            best_epoch=self.best_epoch,
            best_accuracy=self.best_accuracy,
            best_path=best_path,
            last_path=last_path,
            plan=self.plan,
            cost={"planned": self.plan.total_cost, "spent": self._spent, "budget": self.plan.budget},
            seconds=self.seconds(),
        )

    def _criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy in float32, with class indices or probabilities (`_mixed` has smoothed them)."""
        smoothing = 0.0 if self.config.mixing else self.config.smoothing
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def _augment(config: FinetuneConfig, model: nn.Module, watch: Stopwatch) -> TimedAugment | CleanOnly:
    synthesis = config.synthesis()
    if synthesis is not None:
        augment = TimedAugment(
            model, config.augment, fraction=config.fraction, backend=config.backend, config=synthesis
        )
        augment.watch = watch
        return augment
    if config.augment in ATTACKS:
        attack: dict[str, Any] = {
            "eps": config.attack_eps,
            "steps": config.attack_steps,
            "step_size": config.attack_step_size,
            "seed": config.seed,
            "watch": watch,
        }
        if config.augment == "trades":
            return Trades(model, beta=config.trades_beta, **attack)
        return AdversarialTraining(model, fraction=config.fraction, **attack)
    return CleanOnly(model)


def _optimizer(config: FinetuneConfig, model: nn.Module) -> torch.optim.Optimizer:
    check_choice("opt", config.opt, import_timm().optim.list_optimizers())
    network = unwrap(model)
    network = network.network if isinstance(network, NormalizedModel) else network
    try:
        optimizer = _made_by_timm(config, network)
    except (AssertionError, ImportError) as error:  # optimisers that need other packages or a GPU
        raise ValueError(f"opt {config.opt!r} cannot be used here: {error}") from error
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(f"opt {config.opt!r} needs second derivatives of the loss, which finetuning does not compute")
    return optimizer


def _made_by_timm(config: FinetuneConfig, network: nn.Module) -> torch.optim.Optimizer:
    optim = import_timm().optim
    settings = {"weight_decay": config.weight_decay, "layer_decay": config.layer_decay}
    if config.layer_decay is not None and not hasattr(network, "group_matcher"):  # not a timm model
        try:
            groups = optim.param_groups_layer_decay(Layered(network), **settings)
        except ValueError as error:
            raise ValueError(f"layer_decay needs a list of blocks, and {error}") from None
        return optim.create_optimizer_v2(groups, opt=config.opt, lr=config.highest_lr)
    return optim.create_optimizer_v2(network, opt=config.opt, lr=config.highest_lr, **settings)


def _scheduler(config: FinetuneConfig, plan: Plan, optimizer: torch.optim.Optimizer) -> Any:
    """timm's scheduler with steps as epochs, because a budget may end within an epoch."""
    warmup = min(round(config.warmup_epochs * plan.steps_per_epoch), plan.steps - 1)
    scheduler, _ = import_timm().scheduler.create_scheduler_v2(
        optimizer,
        # a step schedule that never steps: only late versions of timm have "constant"
        sched="step" if config.sched == "constant" else config.sched,
        decay_rate=1.0,
        num_epochs=plan.steps,
        min_lr=config.min_lr,
        warmup_epochs=warmup,
        warmup_lr=config.highest_lr / (warmup + 1),
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return scheduler
