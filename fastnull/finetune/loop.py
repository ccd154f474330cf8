"""The finetuning loop: open the data, train, validate, save; stop and resume at any step.

Its parts: `prepare` (data and model), `training` (a step: views, loss, update, and the state of a run), `refresh`
(batches for universal noise), `held_out` (validation), `start_average` (weights between start and end), `saving` (logs,
weights and states), `stopping`.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn

from fastnull.data.sources import EpochBatches, loader, seed_everything
from fastnull.distributed.processes import Processes, explained
from fastnull.finetune.checkpoint import RunFolder
from fastnull.finetune.config import FinetuneConfig, recommended_lr
from fastnull.finetune.held_out import checked_labels, held_out_loaders, validate
from fastnull.finetune.plan import make_plan
from fastnull.finetune.prepare import Data, Prepared, head_is_trained, keep_images, prepare
from fastnull.finetune.refresh import RefreshBatches
from fastnull.finetune.saving import log, resume_or_begin, run_folder, save
from fastnull.finetune.stopping import StopRequest
from fastnull.finetune.training import DivergenceError, FinetuneResult, Training
from fastnull.progress import progress_bar
from fastnull.rng import preserved
from fastnull.vit import unwrap

__all__ = ["DivergenceError", "FinetuneConfig", "FinetuneResult", "finetune"]

_INIT_KEY = 0  # (seed, _INIT_KEY): random numbers of a new head


def finetune(
    config: FinetuneConfig,
    model: nn.Module | None = None,
    train_data: Data | None = None,
    val_data: Data | None = None,
) -> FinetuneResult:
    """Finetune a model.

    Ctrl-C (or SIGTERM) stops the run after the current step, saves its state and prints how to resume; a second one
    stops it at once. The global random generators are restored.

    If a torch.distributed group exists, all processes must call this function. Each takes its rows of every batch, and
    noise, losses and weights equal those of one process up to rounding (except drop path, which each draws for itself).
    Rank 0 writes the files. With config.shard the model is sharded in place (torch's FSDP2), and `out` must be one
    folder for all processes.

    Args:
        config: the run.
        model: takes pixels in [0, 1] and returns logits [B, K]; trained in place. None: the model of `config`. If
            given, the model settings of `config` are only recorded.
        train_data: a dataset of (image, label), images [C, H, W] as bytes or floats in [0, 1], or a pair (images,
            labels) of tensors or NumPy arrays; None: `config.data`. A label is a class number or K probabilities
            (one-hot or soft labels).
        val_data: as train_data, to choose the best epoch; None: config.val_fraction of the training data.

    Raises:
        ValueError, TypeError: invalid settings or data; a folder with a run in it; settings changed on resume.
        DivergenceError: the loss or a weight became NaN or Inf.
        KeyboardInterrupt: on Ctrl-C, after saving.
        PeerError: another process of the run has ended.
    """
    if config.lr is None:  # a given model is not the one of the configuration
        made = config.model if model is None else getattr(unwrap(model), "recipe", {}).get("name")
        config = replace(config, lr=recommended_lr(made))
    processes = Processes()
    device = processes.device(config.device)
    if config.shard and processes.alone:
        warnings.warn("shard: there is only one process, so nothing is sharded; use torchrun", stacklevel=2)
    folder = run_folder(config, processes)
    with ExitStack() as stack:
        stack.enter_context(preserved())
        if device.type == "cuda":
            stack.enter_context(torch.random.fork_rng(devices=[device]))
        seed_everything(config.seed, _INIT_KEY)
        ready = prepare(config, device, model, train_data, val_data)
        ready = keep_images(config, ready, device, processes)
        plan = make_plan(config, len(ready.train), processes.world)
        training = Training(config, ready.model, plan, ready.num_classes, device, processes)
        resume_or_begin(training, folder, ready, stack)
        stop = stack.enter_context(StopRequest(processes))
        with explained(processes):
            _train(training, ready, folder, stop)
    result = training.result(*(None, None) if folder is None else folder.weights())
    for trained in (ready.model, result.model):
        head_is_trained(trained)
    return result


def _train(training: Training, ready: Prepared, folder: RunFolder | None, stop: StopRequest) -> None:
    """The loop: epochs of steps, with validation after each epoch."""
    config, plan, processes = training.config, training.plan, training.processes
    rows = processes.rows(plan.batch_size, pairs=config.mixing)
    order = EpochBatches(len(ready.train), plan.batch_size, plan.steps_per_epoch, config.seed, rows)
    batches = loader(ready.train, order, workers=config.workers, device=training.device, persistent=True)
    held_out, check = held_out_loaders(training, ready.validation)
    show = config.progress and processes.first
    with progress_bar(plan.steps, show=show, initial=training.step, desc=config.augment) as bar:
        while training.step < plan.steps:
            order.epoch, order.start = divmod(training.step, plan.steps_per_epoch)
            if training.lacks_bank:
                refreshing = RefreshBatches(ready.train, training, stop)
                log(folder, training.refresh(refreshing, refreshing.check_images(check)))
            training.model.train()
            for images, labels in batches:
                # views, loss, and update of the weights
                training.train_step(images, checked_labels(images, labels, ready.num_classes))
                bar.update()
                ends_epoch = training.step % plan.steps_per_epoch == 0 or training.step == plan.steps
                if training.step % config.log_every == 0 or ends_epoch:
                    record = training.step_record()
                    bar.set_postfix(training.shown(record), refresh=False)
                    log(folder, record)
                if ends_epoch:
                    break
                stop.agree()
                if stop.requested or (config.checkpoint_every and training.step % config.checkpoint_every == 0):
                    save(training, folder)
                stop.leave_if_requested(training)
            accuracy = None if held_out is None else validate(training, held_out, ready.num_classes)
            log(folder, training.end_epoch(accuracy))
            save(training, folder, best=training.best_epoch == training.epoch)
            stop.agree()
            stop.leave_if_requested(training)
