"""The adapters' interface, the wrapper that normalises pixels, and the frozen state that synthesis runs in."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.checks import check_choice
from fastnull.vit.exact import class_forward, foreign_hooks, own_methods
from fastnull.vit.parts import UnsupportedModelError, ViTParts

SITES = ("patch", "block0", "pixels")
"""Where noise is added: the output of the patch embedding (the published method), the input of the first block
(prefix tokens included), or the image itself in [0, 1] pixels."""


_inside_frozen: ContextVar[bool] = ContextVar("inside_frozen", default=False)


class NormalizedModel(nn.Module):
    """A model that takes pixels in [0, 1] and normalises them itself, with its own mean and standard deviation.

    Attacks, corruptions and noise can then use pixels in [0, 1]. Checkpoints hold the state_dict of `network`.

    Args:
        network: takes normalised images [B, C, H, W], returns logits [B, K].
        mean, std: one value per channel, in units of pixels in [0, 1].

    Attributes:
        classes: names of the classes in the order of the logits, or None.
        new_head: whether `create_model` loaded weights but made a new classifier.
    """

    mean: Tensor
    std: Tensor
    classes: list[str] | None = None
    new_head: bool = False

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        finite = all(map(math.isfinite, (*mean, *std)))
        if len(mean) != len(std) or not finite or min(std) <= 0:
            raise ValueError(f"mean and std must have a finite value per channel, std > 0; got mean {mean}, std {std}")
        self.network = network
        like = next(network.parameters())
        for name, value in (("mean", mean), ("std", std)):
            buffer = torch.tensor(list(value), dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)  # [1, C, 1, 1]

    @classmethod
    def from_timm(cls, network: nn.Module) -> NormalizedModel:
        """Wrap a timm model with the mean and std of its own configuration."""
        from fastnull.compat import import_timm

        config = import_timm().data.resolve_model_data_config(network)
        # timm's defaults have three channels, even for a model with one
        channels = getattr(network, "in_chans", len(config["mean"]))
        mean, std = config["mean"], config["std"]
        if len(mean) != channels:
            mean, std = [sum(mean) / len(mean)] * channels, [sum(std) / len(std)] * channels
        return cls(network, mean, std)

    def normalize(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1] → what `network` takes; [B, C, H, W].

        Raises:
            ValueError: wrong number of channels. A single channel would be broadcast silently.
        """
        channels = self.mean.shape[1]
        if channels > 1 and images.shape[1] != channels:
            raise ValueError(f"images must have {channels} channels, as mean and std have; got {list(images.shape)}")
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        output = self.network(self.normalize(images))
        return getattr(output, "logits", output)  # Hugging Face models return an object


class SplitViT(ABC):
    """A Vision Transformer as the chain patch → prepare → encode → head; together they are the model's own forward.

    Adapters define the attributes and the four steps. The model is neither copied nor changed.

    Attributes:
        model: the user's model without compile and DDP wrappers.
        network: the ViT itself, without any wrapper around it (NormalizedModel, PEFT's).
        normalized: the NormalizedModel around it, or None.
        patch_module: the module whose output is the `patch` site.
        block0_module: the module whose output is the `block0` site. Hooks on the first block itself would run twice
            under activation checkpointing.
        projection: the convolution of the patch embedding.
        num_classes, channels: of logits and images.
        image_size: required (H, W), or None if the model takes several sizes.
        num_prefix_tokens: class, register and distillation tokens before the image tokens.
        batch_may_grow: whether a hook at a token site may return more images than the forward was given.
    """

    patch_module: nn.Module
    block0_module: nn.Module
    projection: nn.Conv2d
    num_classes: int
    channels: int
    image_size: tuple[int, int] | None
    num_prefix_tokens: int
    batch_may_grow: bool = True

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)
        self.network, self.normalized = unwrapped(model)

    def parts(self) -> ViTParts:
        """The model's parts by name, for the written-out encoder.

        Raises:
            UnsupportedModelError: names the unsupported part.
        """
        raise UnsupportedModelError(type(self.network).__name__)

    def site_module(self, site: str) -> nn.Module:
        """The module whose output is the tensor at a token site."""
        return self.patch_module if site == "patch" else self.block0_module

    def tokens_of(self, output: Any) -> Tensor:
        """Output of a site's module → the tensor at the site."""
        return output

    def with_tokens(self, output: Any, tokens: Tensor) -> Any:
        """`output` of a site's module with its tokens replaced."""
        return tokens

    def normalize(self, images: Tensor) -> Tensor:
        """Pixels → the network's input; the identity if the model does not normalise."""
        return images if self.normalized is None else self.normalized.normalize(images)

    @abstractmethod
    def patch(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] → patch tokens [B, N, D]."""

    @abstractmethod
    def prepare(self, patches: Tensor) -> Tensor:
        """Patch tokens [B, N, D] → input of the first block [B, P + N, D]: prefix tokens, position embedding, norm."""

    @abstractmethod
    def encode(self, tokens: Tensor) -> Tensor:
        """Input of the first block [B, P + N, D] → normed output of the last block [B, P + N, D]."""

    @abstractmethod
    def head(self, features: Tensor) -> Tensor:
        """Encoder output [B, P + N, D] → logits [B, K]."""

    def whole(self, images: Tensor) -> Tensor:
        """The model's own forward with the user's hooks: images [B, C, H, W] → logits [B, K]."""
        if wrappers_are_plain(self.model):
            # not model(images): our own hooks are for the user's forwards
            return logits_of(class_forward(self.network)(self.normalize(images)))
        return logits_of(self.model._call_impl(images))  # not compiled

    def embed(self, images: Tensor, site: str) -> Tensor:
        """Images [B, C, H, W] → the tensor at `site`, where noise is added."""
        if site == "pixels":
            return images
        patches = self.patch(images)
        return patches if site == "patch" else self.prepare(patches)

    def logits(self, tokens: Tensor, site: str) -> Tensor:
        """The tensor at `site` → logits [B, K]."""
        if site == "pixels":
            tokens = self.patch(tokens)
        if site != "block0":
            tokens = self.prepare(tokens)
        return self.head(self.encode(tokens))


def unwrap(model: nn.Module) -> nn.Module:
    """The model under torch.compile's, DistributedDataParallel's and PEFT's wrappers."""
    while isinstance(model, nn.Module):  # the caller rejects anything else
        # not hasattr: PEFT's wrappers forward every attribute of the model inside
        inside = _under_peft(model)
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif inside is not None:
            model = inside
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            break
    return model


def _under_peft(model: nn.Module) -> nn.Module | None:
    """The model inside a PeftModel or its tuner; None for other modules. Compared by name, without importing peft."""
    if not any(kind.__module__.partition(".")[0] == "peft" for kind in type(model).__mro__):
        return None
    return next((model._modules[name] for name in ("base_model", "model") if name in model._modules), None)


def under_adapters(layer: nn.Module) -> Any:
    """The layer inside an adapter (PEFT's `base_layer`, loralib's `conv`); other layers are returned as they are."""
    while True:
        libraries = {kind.__module__.partition(".")[0] for kind in type(layer).__mro__}
        if "peft" in libraries and "base_layer" in layer._modules:
            layer = layer.get_submodule("base_layer")
        elif "loralib" in libraries and "conv" in layer._modules:
            layer = layer.get_submodule("conv")
        else:
            return layer


def unwrapped(model: nn.Module) -> tuple[nn.Module, NormalizedModel | None]:
    """The network without wrappers, and the NormalizedModel among them or None."""
    normalized = None
    while True:
        model = unwrap(model)
        if isinstance(model, NormalizedModel):
            normalized, model = model, model.network
        elif type(model).__name__ == "TimmWrapperForImageClassification":  # a timm model inside transformers
            model = model.timm_model
        else:
            return model, normalized


def wrappers_are_plain(model: nn.Module) -> bool:
    """Whether a model only normalises and calls its network: no foreign hooks or replaced methods on either."""
    while True:
        model = unwrap(model)
        changed = isinstance(model, NormalizedModel) and type(model).forward is not NormalizedModel.forward
        if changed or foreign_hooks(model) or own_methods(model):
            return False
        inner = model.network if isinstance(model, NormalizedModel) else unwrapped(model)[0]
        if inner is model:
            return True
        model = inner


def logits_of(output: Any) -> Tensor:
    """The logits [B, K] of a model's output: the tensor itself, or its `.logits` as in Hugging Face.

    Raises:
        TypeError: any other output.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model must return logits [B, K] or an output with .logits; got {type(output).__name__}: a backbone "
            "needs a classifier on top (in transformers, a class named ...ForImageClassification, or "
            "fastnull.vit.PooledClassifier(backbone, num_classes))"
        )
    return logits


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without parameter gradients; modes and requires_grad flags are restored after it.

    `eval` is not called, because some modules change their weights there (loralib's merge).
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    inside = _inside_frozen.set(True)
    try:
        for module, _ in modes:
            module.training = False
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        _inside_frozen.reset(inside)
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def inside_frozen() -> bool:
    """Whether this runs inside `frozen`, where hooks add no training noise."""
    return _inside_frozen.get()


def check_site(site: str) -> str:
    """Return `site` if it is one of SITES; raise ValueError otherwise."""
    return check_choice("site", site, SITES)
