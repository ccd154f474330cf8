"""The frozen encoder: logits, and gradients of functions of the logits with respect to the tokens, never to weights.

A synthesis runs `FrozenEncoder` hundreds of times. Its backends compute the same:
    reference   the model's own modules under autograd with frozen parameters; for any model with an adapter
    cpu         forward and input gradient written out (fastnull.encoder.explicit) on library GEMMs and the C++ ops of
                csrc/cpu
    cuda        the same code on cuBLAS, the Triton kernels of kernels/ and the CUDA kernels of csrc/cuda
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fastnull import _C, choices
from fastnull.checks import check_choice
from fastnull.choices import Found
from fastnull.distributed.sharded import Held, Units, is_sharded
from fastnull.encoder.autograd import AutogradEncoder
from fastnull.encoder.explicit.encoder import ExplicitEncoder
from fastnull.encoder.explicit.products import automatic_dtype, products_dtype
from fastnull.encoder.proof import TOLERANCES, check_structure, check_values, problems_of
from fastnull.ops.attention import WIDEST_HEAD
from fastnull.ops.common import NATIVE_DTYPES, gpu_problem, in_autocast, switched_off, told, triton_problem
from fastnull.selftest import prove
from fastnull.vit.base import SplitViT, check_site
from fastnull.vit.exact import same, snapshot
from fastnull.vit.parts import UnsupportedModelError, ViTParts
from fastnull.vit.split import as_split

AUTO = "auto"
"""A dtype: see FrozenEncoder."""
BACKENDS = ("auto", "reference", "cpu", "cuda")

Cotangent: TypeAlias = "Tensor | Callable[..., Tensor | tuple[Tensor, ...]]"

_warned: set[str] = set()


class FrozenEncoder:
    """A ViT from the noise site to the logits, in eval mode, whose weights never get a gradient.

    Weights are those of the model at the last `sync` (the reference backend in the model's own dtype has no copy and
    always uses the current ones). The fast backends return float32 logits for every compute dtype, because an influence
    needs more than the eight bits of bfloat16.

    Args:
        model: a ViT (NormalizedModel, plain, compiled or DDP-wrapped), or an adapter.
        dtype: compute dtype; None is the model's own. The fast backends take float32 and bfloat16, `cuda` also float16
            (input gradients below 6e-8 become zero), and `cpu` any dtype, on the ops' references. "auto", the default
            for noise, is a 16-bit dtype where that is faster (see automatic_dtype in explicit/products.py) and a fast
            backend supports the model in it, otherwise the model's own. On the `reference` backend it is the model's
            own except inside autocast.
        backend: `auto` takes the fastest backend for model, device and dtype, and warns once if that is not the
            device's own; `reference`, `cpu` and `cuda` force one.
        site: `patch`, `block0` or `pixels`; see fastnull.vit.SITES.
        selftest: on a GPU, whether kernels are checked before the first encoder of these sizes runs on this machine:
            `auto`; `force` (again); or `off`, library calls alone, with which backend `auto` is `reference`. None:
            what FASTNULL_SELFTEST says, else `auto`. See fastnull.selftest.

    Attributes:
        backend: the backend in use, never `auto`.
        dtype, site: as resolved.
        products: dtype of matrix products: `dtype`, or float32 for bfloat16 on a CPU that multiplies float32 faster.
        generation: how often the structure of the model changed, see `sync`.

    Raises:
        ValueError: unknown backend or site; a model that no adapter knows; a model that is sharded already (see
            `sharding`); a dtype other than float64, float32, float16 and bfloat16; or a forced backend that cannot run
            the model: on another device or on several devices, or with a part that has no written-out form
            (UnsupportedModelError). For `cuda` also a GPU below sm_80, neither Triton nor a build of csrc/cuda,
            float64, and heads wider than 128, for which `auto` uses torch's attention.
    """

    def __init__(
        self,
        model: nn.Module | SplitViT,
        dtype: torch.dtype | str | None = None,
        backend: str = "auto",
        site: str = "patch",
        selftest: str | None = None,
    ) -> None:
        self._asked = check_choice("backend", backend, BACKENDS)
        self._selftest = choices.mode(selftest)
        self.site = check_site(site)
        self.vit = as_split(model, site)
        self._model = model
        self._units: Units | None = None
        if any(is_sharded(parameter) for parameter in self.vit.model.parameters()):
            raise ValueError(
                "the model is sharded already: make the encoder (or NullspaceAugment) first, and call fully_shard "
                "inside `with encoder.sharding():`"
            )
        weight = self.vit.projection.weight
        if dtype is not None and dtype != AUTO:
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"dtype must be a torch.dtype, {AUTO!r} or None; got {dtype!r}")
            if dtype not in TOLERANCES:
                allowed = ", ".join(map(str, TOLERANCES))
                raise ValueError(f"dtype must be one of {allowed}, {AUTO!r} or None; got {dtype}")
        own = weight.dtype if dtype is None or isinstance(dtype, str) else dtype
        preferred = automatic_dtype(weight) if dtype == AUTO else own
        self._dtypes = list(dict.fromkeys((preferred, own)))  # the first that the written-out encoder supports is used
        # nothing proves a 16-bit copy of the model: only a caller in autocast gets one without asking
        self._reference_dtype = preferred if in_autocast(weight.device) else own
        self._device = weight.device
        self.generation = 0
        self._choose()

    def __reduce__(self) -> tuple[object, ...]:
        """Copies and pickles are made anew from the model: buffers may be in a layout that neither can read."""
        return type(self), (self._model, self.dtype, self._asked, self.site, self._selftest)

    def _choose(self) -> None:
        """Take the fast encoder if it is allowed and proven, otherwise the model's own modules."""
        for dtype in self._dtypes:
            with self._own_modes():
                last = dtype == self._dtypes[-1]
                explicit = _explicit(self.vit, dtype, self._asked, self.site, self._selftest, refuse=last)
            if explicit is not None:
                break
        self._encoder: ExplicitEncoder | AutogradEncoder
        self._encoder = explicit or AutogradEncoder(self.vit, self._reference_dtype)
        self.dtype = self._encoder.dtype
        self.backend = "reference" if explicit is None else self._device.type
        self.products = self._encoder.compute
        self._snapshot = snapshot(self.vit.model)

    @property
    def device(self) -> torch.device:
        """Device of the encoder's weights."""
        return self._device

    @contextmanager
    def sharding(self) -> Iterator[None]:
        """Wraps the calls of fully_shard, first of the model's blocks, then of the model.

        Afterwards the encoder of every process has its own full weights (the reference backend has a copy of the
        model), and `sync` gathers one unit of the model at a time: all processes must call it together.

        Raises:
            ValueError: the model was not sharded inside.
        """
        if isinstance(self._encoder, AutogradEncoder):
            self._encoder.copy()
        held = Held(self.vit.model)
        yield
        self._units = Units(self.vit.model, held)
        self._snapshot = snapshot(self.vit.model, parameters=False)

    @torch.no_grad()
    def sync(self) -> None:
        """Copy the model's current weights, in place; bit for bit those of a new encoder of the model.

        If modules were replaced, wrapped or hooked since the last call, the model is split and the encoder is proven
        again: `backend` may then be another one, and `generation` is one higher.

        Raises:
            RuntimeError: the model was moved to another device, or changed after it was sharded.
            UnsupportedModelError: a forced backend cannot run what the model became.
        """
        self._check_device()
        with self._own_modes():
            if not self.follow():
                self._encoder.sync(self._units)

    def sync_if_changed(self) -> None:
        """Same as `sync`; the name from version 0.1. No test for changed weights works with all optimisers."""
        self.sync()

    def follow(self) -> bool:
        """Whether the structure of the model changed since the last call; if so, the encoder has been rebuilt.

        Cheap if nothing changed: compares flags and the identities of modules, hooks, buffers and parameters.
        """
        if same(snapshot(self.vit.model, parameters=self._units is None), self._snapshot):
            return False
        if self._units is not None:
            raise RuntimeError(
                "modules or hooks of the model changed after it was sharded: change it before `encoder.sharding()`"
            )
        if not isinstance(self._model, SplitViT):
            self.vit = as_split(self._model, self.site)
        self._choose()
        self.generation += 1
        return True

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Images as the model takes them [B, C, H, W] → the tensor at the site: [B, N, D], [B, P + N, D] or images.

        In `dtype`, without gradient.

        Raises:
            TypeError: images of a dtype that is not floating.
            ValueError: images of another shape, or on another device.
            RuntimeError: the model was moved to another device.
        """
        self._check_images(images)
        with self._own_modes():
            return self._encoder.embed(images, self.site)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """The tensor at the site [B, ...] → logits [B, K], without gradient.

        Raises:
            ValueError, TypeError: tokens of another shape, dtype or device.
            RuntimeError: the model was moved to another device.
        """
        self._check_tokens(tokens)
        with self._own_modes():
            return self._encoder.logits(tokens, self.site)

    def input_gradient(
        self,
        tokens: Tensor,
        cotangent: Cotangent,
        *,
        by_image: bool = False,
        sum_every: int | None = None,
        has_aux: bool = False,
    ) -> tuple[Tensor, ...]:
        """Logits, and the gradient of Σ logits · cotangent with respect to the tokens.

        Args:
            tokens: at the site [B, ...].
            cotangent: [B, K], or a function of the logits that returns it, alone or first in a tuple. NaN in it gives
                NaN in the gradient.
            by_image: the function is called as cotangent(logits[images], images) with slices of the batch in order, and
                must treat each image separately. The fast backends then run the batch in parts and keep only one part
                for the backward: on a CPU the memory of 8 images (more for small models). A tensor always allows that.
            sum_every: return the gradient summed over every so many images in a row (in float32 or float64), for noise
                that these images share: [B / sum_every, ...]. The gradients of all images are then never in memory.
            has_aux: the function returns (cotangent, tensor, ...), and these tensors are returned too.

        Returns:
            Logits [B, K] and the gradient in `dtype`, shaped as the tokens, or the sums. With `has_aux` also the other
            tensors of the function, concatenated along their first dimension if it was called several times.

        Raises:
            ValueError, TypeError, RuntimeError: as the call; ValueError for a cotangent of another shape or a
                `sum_every` that does not divide B, or if the model's forward interrupts the gradient (torch.no_grad());
                TypeError if `has_aux` is set and the function does not return a tuple of tensors.
        """
        self._check_tokens(tokens)
        if sum_every is not None and (sum_every < 1 or len(tokens) % sum_every):
            raise ValueError(f"sum_every must divide the batch of {len(tokens)} images; got {sum_every}")

        def weights(logits: Tensor, images: slice) -> tuple[Tensor, ...]:
            if isinstance(cotangent, Tensor):
                if has_aux:
                    raise TypeError("has_aux needs a function as the cotangent; got a tensor")
                _check_cotangent(cotangent, (len(tokens), logits.shape[1]))
                return (cotangent[images].detach().to(logits.dtype),)
            returned = cotangent(logits, images) if by_image else cotangent(logits)
            given, *aux = returned if isinstance(returned, tuple) else (returned,)
            _check_cotangent(given, tuple(logits.shape))
            if has_aux and not (aux and all(isinstance(value, Tensor) for value in aux)):
                kinds = ", ".join(type(value).__name__ for value in (given, *aux))
                raise TypeError(f"with has_aux the function must return (cotangent, tensor, ...); got ({kinds})")
            return given.detach().to(logits.dtype), *(aux if has_aux else ())

        parts = by_image or isinstance(cotangent, Tensor)
        tokens = tokens.detach()
        with self._own_modes():
            tokens = tokens.clone() if tokens.is_inference() else tokens  # which autograd refuses
            return self._encoder.input_gradient(tokens, self.site, weights, parts, sum_every)

    def check_kernels(self, images: int | None = None, tiles: bool = False) -> dict[str, Found]:
        """Check and time every implementation of the ops at this encoder's sizes, whatever earlier processes found.

        Args:
            images: in a batch; None: 64 on a GPU, 2 on a CPU.
            tiles: try the Triton kernels with other tiles than their tables' too, which takes some minutes.

        Returns:
            Problem → implementation → outcome.

        Raises:
            ValueError: on the reference backend, which runs no ops, or where FASTNULL_SELFTEST=off.
        """
        if isinstance(self._encoder, AutogradEncoder):
            raise ValueError(f"backend 'reference' runs the model's own modules on {self._device}: no op to check")
        if choices.mode() == "off":
            raise ValueError(f"{choices.SWITCH}=off keeps kernels from being checked: unset it")
        with self._own_modes():
            return prove(problems_of(self._encoder), self._device, asked="force", images=images, tiles=tiles)

    def about(self) -> dict[str, str]:
        """What a record says of it: dtype, dtype of the products, backend."""
        return {"dtype": str(self.dtype), "products": str(self.products), "backend": self.backend}

    def memory(self) -> dict[str, int]:
        """Bytes that the encoder holds: `weights`, `kept` for the backward, and `scratch`; 0 on `reference`, where
        autograd allocates memory in each call."""
        return self._encoder.memory()

    def buffers(self) -> tuple[object, ...]:
        """The objects whose memory a CUDA graph of the encoder's passes reads and writes.

        The graph must keep them alive, and must be captured again once this returns others: after a larger batch, which
        needs larger buffers, or a change of the model's structure.
        """
        return self._encoder, *self._encoder.buffers()

    @contextmanager
    def _own_modes(self) -> Iterator[None]:
        """Makes the encoder independent of the caller's autocast region and inference mode."""
        library = choices.library_calls() if self._selftest == "off" else nullcontext()
        # buffers allocated in inference mode could not be written outside it
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self._device.type, enabled=False), library:
            yield

    def _check_device(self) -> None:
        now = self.vit.projection.weight.device
        if now != self._device:
            raise RuntimeError(f"the model was moved from {self._device} to {now}: make a new FrozenEncoder of it")

    def _check_images(self, images: Tensor) -> None:
        self._check_device()
        if not images.is_floating_point():
            raise TypeError(
                f"images must be of a floating dtype, as the model takes them; got {images.dtype}: convert pixels with "
                "images.float() / 255"
            )
        if images.device != self._device:
            raise ValueError(f"images are on {images.device}, the encoder is on {self._device}")
        size = self.vit.image_size
        if images.ndim != 4 or images.shape[1] != self.vit.channels or (size and tuple(images.shape[2:]) != size):
            wanted = f"[B, {self.vit.channels}, {', '.join(map(str, size)) if size else 'H, W'}]"
            raise ValueError(f"images must have shape {wanted}; got {list(images.shape)}")

    def _check_tokens(self, tokens: Tensor) -> None:
        self._check_device()
        if self.site == "pixels":
            self._check_images(tokens)
            return
        if not tokens.is_floating_point():
            raise TypeError(f"tokens must be of a floating dtype; got {tokens.dtype}")
        if tokens.device != self._device:
            raise ValueError(f"tokens are on {tokens.device}, the encoder is on {self._device}")
        wanted = self._encoder.token_shape(self.site)
        if wanted is not None and tuple(tokens.shape[1:]) != wanted:
            shape = f"[B, {', '.join(map(str, wanted))}]"
            raise ValueError(f"tokens at site {self.site!r} must have shape {shape}; got {list(tokens.shape)}")


def _explicit(
    vit: SplitViT,
    dtype: torch.dtype,
    backend: str,
    site: str = "patch",
    selftest: str = "auto",
    *,
    refuse: bool = True,
) -> ExplicitEncoder | None:
    """The written-out encoder if backend, model, device and dtype allow it and it is proven, otherwise None.

    With `refuse` the reason for None is given: as an error if the backend was forced, else as a warning.
    """
    device = vit.projection.weight.device
    if backend == "reference" or (backend == "auto" and device.type not in NATIVE_DTYPES):
        return None
    if backend == "auto":
        if switched_off() or (not _cpu_is_fast(dtype) if device.type == "cpu" else selftest == "off"):
            return None
    elif device.type != backend:
        raise ValueError(f"backend {backend!r} needs a model on a device of type {backend!r}; it is on {device}")
    try:
        parts = _checked_parts(vit, dtype, device, backend)
        made = ExplicitEncoder(vit, parts, dtype, products_dtype(dtype, device))
        if device.type == "cuda" and not switched_off():
            prove(problems_of(made), device, asked=selftest)
        check_values(vit, made, site)
        return made
    except UnsupportedModelError as reason:
        if not refuse:
            return None
        if backend != "auto":
            problem = f"backend {backend!r} does not support {reason}; use 'auto' or 'reference'"
            raise UnsupportedModelError(problem) from None
        _warn_once(f"the model runs on the reference backend: {reason} is not supported")
        return None


def _cpu_is_fast(dtype: torch.dtype) -> bool:
    # without the C++ ops, their references are no faster than autograd
    return dtype in NATIVE_DTYPES["cpu"] and _C.cpu_available()


def _checked_parts(vit: SplitViT, dtype: torch.dtype, device: torch.device, backend: str) -> ViTParts:
    """The parts of a model that a fast backend can run.

    Raises:
        UnsupportedModelError: it cannot; the message is a noun phrase.
    """
    devices = {str(parameter.device) for parameter in vit.model.parameters()}
    if len(devices) > 1:
        raise UnsupportedModelError(f"a model on several devices ({', '.join(sorted(devices))})")
    if device.type == "cuda":
        # with native code switched off, the ops run on their references, which need neither this GPU nor Triton
        problem = "" if switched_off() else gpu_problem(device)
        if backend == "auto" and not switched_off():  # without Triton, LayerNorm and GELU are slower than autograd's
            problem = problem or triton_problem()
        if problem:
            told.add(device)  # this error or its warning says it
            raise UnsupportedModelError(f"{device} ({problem})")
        if dtype not in NATIVE_DTYPES["cuda"]:
            raise UnsupportedModelError(f"dtype {str(dtype)[6:]} (float32, bfloat16 or float16)")
    parts = vit.parts()
    check_structure(vit, parts)
    widest = max(block.proj.in_features // block.heads for block in parts.blocks)
    if device.type == "cuda" and widest > WIDEST_HEAD:
        if backend != "auto":
            raise UnsupportedModelError(f"heads of {widest} (at most {WIDEST_HEAD})")
        _warn_once(f"attention with heads of {widest} runs on torch's own operator: the kernels go to {WIDEST_HEAD}")
    return parts


def _check_cotangent(cotangent: Tensor, shape: tuple[int, ...]) -> None:
    if cotangent.shape != shape:
        raise ValueError(f"cotangent must have the logits' shape {list(shape)}; got {list(cotangent.shape)}")


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"fastnull: {message}", stacklevel=5)
