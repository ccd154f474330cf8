"""Summary of a finetuning run before it starts: model, nullspace, memory, steps and cost."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fastnull.data.image_files import to_pixels
from fastnull.distributed.processes import Processes
from fastnull.encoder.frozen import FrozenEncoder
from fastnull.finetune.config import FinetuneConfig
from fastnull.finetune.plan import make_plan, views_of
from fastnull.finetune.prepare import Prepared, cache_of, prepare
from fastnull.nullspace.inspection import format_table, inspect_model
from fastnull.rng import preserved


def dry_run(config: FinetuneConfig) -> str:
    """A summary as text. Opens the data and creates the model on the CPU, but does not train or write files.

    If a torch.distributed group exists, the run is one of all its processes. Raises as `finetune` before its start.
    """
    processes = Processes()
    with preserved():
        prepared = prepare(config, torch.device("cpu"))
        return described(config, prepared, processes)


def described(config: FinetuneConfig, prepared: Prepared, processes: Processes) -> str:
    """The lines of `dry_run` for data and model that are open already."""
    model, train = prepared.model, prepared.train
    plan = make_plan(config, len(train), processes.world)
    views = views_of(config)
    images = plan.batch_size // (processes.world * config.accumulate)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    # weights, gradients, two moments
    copies = 4 + (config.ema_decay is not None) + 2 * (config.start_fraction > 0)
    shards = processes.world if config.shard else 1
    encoder = _encoder(model, config, sharded=shards > 1)
    image = to_pixels(train[0][0].unsqueeze(0), next(model.parameters()).device)
    # autocast also keeps copies of the weights, independent of the number of images: compare one and two
    once, twice = (_kept(model, image.expand(count, -1, -1, -1), config) for count in (1, 2))
    kept = once + (images * views - 1) * (twice - once)
    synthesis = plan.step_cost - 3 * views
    cache = cache_of(config, prepared, torch.device("cpu"), processes)
    held_in = "weights, gradients, two moments"
    if config.ema_decay is not None:
        held_in += " and an average"
    if config.start_fraction:
        held_in += ", the start and its average"
    if shards > 1:
        held_in += f" (a shard of {shards})"
    lines = [
        f"model      {config.model}: {parameters:,} parameters, {prepared.num_classes} classes",
        f"data       {config.data}: {len(train)} training images, "
        f"{0 if prepared.validation is None else len(prepared.validation)} held out",
        *([] if cache is None else [f"cache      {cache}"]),
        f"steps      {plan.steps} of {plan.batch_size} images in {plan.epochs} epochs"
        f" ({processes.world} processes x {config.accumulate} parts of {images})",
        f"cost       {plan.total_cost:,} forward passes of one image at most",
        f"synthesis  {synthesis} of {plan.step_cost} forward passes per image and step"
        + (f"; at most {plan.refresh_cost:,} per epoch for the universal noise" if plan.refresh_cost else ""),
        f"memory     {_size(copies * held // shards)} for {held_in}; "
        f"{_size(kept)} kept for the backward pass; {_size(encoder)} of weights in the synthesis's encoder "
        "(estimates, per process)",
        "",
    ]
    weights = config.checkpoint or ("pretrained" if config.pretrained else "random")
    table = format_table([{**inspect_model(model, config.model), "weights": weights}])
    return "\n".join([*lines, table.rstrip("\n"), ""])


def _encoder(model: nn.Module, config: FinetuneConfig, *, sharded: bool) -> int:
    """Bytes of the encoder's own weights; the reference backend copies the model only if necessary."""
    if config.augment not in ("boundary", "per_image", "universal"):
        return 0
    backend = "auto" if config.backend == "cuda" else config.backend  # this runs on the CPU
    synthesis = config.synthesis()
    assert synthesis is not None
    with _autocast(config, next(model.parameters()).device):
        encoder = FrozenEncoder(model, synthesis.encoder_dtype, backend, config.site)
    copied = sharded or encoder.dtype != next(model.parameters()).dtype
    if encoder.backend == "reference" and copied:
        return sum(parameter.numel() for parameter in model.parameters()) * encoder.dtype.itemsize
    return encoder.memory()["weights"]


def _kept(model: nn.Module, images: Tensor, config: FinetuneConfig) -> int:
    """Bytes that autograd keeps for images [B, C, H, W], without the model's weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return value

    def unpack(value: Tensor) -> Tensor:
        return value

    with saved_tensors_hooks(pack, unpack), _autocast(config, images.device):
        logits = model.train()(images)  # keeps the saved tensors alive, so that addresses are unique
    kept = sum(seen.values())
    del logits
    return kept


def _autocast(config: FinetuneConfig, device: torch.device) -> torch.autocast:
    dtype = getattr(torch, config.amp) if config.amp else None
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
