"""NullspaceAugment: adds nullspace noise, which hardly changes the model's output, during finetuning.

It has two forms. `aug.loss(images, labels, criterion)` is the published one, CE(clean) + CE(noisy). With `fraction`,
the default of boundary noise in pixels, each image has one view, which is noisy for that fraction of the images. With
two views, modes that need no clean logits (universal, random) run both views in one pass with one patch embedding; the
others run the clean view first and use its logits for the synthesis. In mode `free` the noisy view of an image comes
one step later, see fastnull.synthesis.free. The hook form (`attach()`, `detach()`, `with
aug:`) adds noise in any training loop that calls the model. Noise is added only if the model that is called is in
training mode; the modes of its parts do not matter. It is computed with the current weights, and a training forward
without the requested noise is a RuntimeError.

    aug = NullspaceAugment(model)
    for images, labels in loader:
        loss, logits = aug.loss(images, labels, criterion)
        loss.backward()
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.checks import as_type, check_choice, check_labels, check_number, refuse_renamed, trusted_values
from fastnull.distributed.sharded import is_sharded
from fastnull.encoder.frozen import FrozenEncoder
from fastnull.noise import Noise, check_noise
from fastnull.rng import KeyedRandom, Place, carried, fraction_of, generator
from fastnull.synthesis.batches import check_batch
from fastnull.synthesis.config import ALL_MODES, SynthesisConfig, recommended_fraction
from fastnull.synthesis.free import FreeNoise, Visited
from fastnull.synthesis.objective import influence
from fastnull.synthesis.replay import Replay
from fastnull.synthesis.run import synthesize
from fastnull.synthesis.solvers import norms, replayed_noise, valid_noise
from fastnull.synthesis.starts import Start, draw_start, step_source
from fastnull.vit.base import inside_frozen, logits_of

MODES = ALL_MODES


@dataclass
class _View:
    """The view of one forward of the model, and whether noise was applied."""

    noisy: bool = True
    """False: no noise, even if the augmentation is attached."""
    both: bool = False
    """Clean and noisy images in one pass, [2 B, ...]; False: only noisy ones."""
    clean: Tensor | None = None
    """Logits of the images without noise [B, K]; None: synthesis computes them."""
    applied: bool = False
    """Whether noise was added."""


NOT_APPLIED = (
    "noise was requested in this training forward and none was added: the module at its site did not run with its "
    "hook. If the model, or the part with that module, was compiled and run before NullspaceAugment was created, "
    "create it first, or call torch._dynamo.reset()"
)


PASSED_BY = (
    "a part of the model was called in training while its NullspaceAugment is attached, and not the model itself, so "
    "there was no noise: call the model of the augmentation as model(images), or set `enabled` to False around a call "
    "that needs no noise"
)


class NullspaceAugment:
    """Adds synthesised noise to a ViT's training views.

    It is not a module and not part of the model: a copy of the model (EMA, deepcopy) has no noise.

    Args:
        model: the ViT as the training loop calls it (NormalizedModel, DDP, compiled or plain). Site `pixels` needs
            pixels in [0, 1]. Create the augmentation before a compiled model runs for the first time.
        mode: `boundary`: noise of each image with influence ε; `per_image`: below ε; `universal`: drawn from a bank
            that `refresh` learns; `free`: along the gradients of the training, for `loss` only; `random`: U(−limit,
            limit) per image, without synthesis (a control). None: the mode of `config`, or `boundary`.
        eps: target influence; limit: of the uniform start, in units of the site; steps: of the synthesis.
            None: the recommended value of mode and site, see fastnull.synthesis.config.RECOMMENDED.
        site: `patch`, `block0` or `pixels`. None: `pixels` for `boundary` and `free`, else `patch`.
        count: universal: number of noises in the bank; every image of a batch gets one of them.
        seed: the same (seed, step) gives the same noise.
        fraction: 0: `loss` uses a clean and a noisy view of every image, the hook form a noisy one. In (0, 1]: one view
            per image, noisy for that fraction of a batch at equal distances, or of the batches if they hold one image.
            None: the recommended one, 0.5 for boundary noise in pixels, else 0.
        backend, dtype: of the FrozenEncoder for the synthesis. dtype None is that of `config`, by default `auto`: a
            16-bit dtype where this machine multiplies it faster.
        config: all settings of the synthesis, instead of eps, limit, steps, site, count and seed.

    Attributes:
        step: number of draws so far; set it to the global step for exact resume, or see `at`.
        enabled: False switches the hook form off without detaching.
        stats: of the last draw: `influence` (mean over images before the last step; of the bank in universal mode;
            in free mode of the noise itself, with the clean view of the step before; NaN in random mode) and `norm`
            (mean), as tensors on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: str | None = None,
        *,
        eps: float | None = None,
        limit: float | None = None,
        steps: int | None = None,
        site: str | None = None,
        count: int | None = None,
        seed: int | None = None,
        fraction: float | None = None,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        config: SynthesisConfig | None = None,
        **unknown: Any,
    ) -> None:
        refuse_renamed("NullspaceAugment", unknown, {"share": "fraction"})
        if unknown:
            raise TypeError(f"NullspaceAugment has no argument {', '.join(unknown)}")
        settings = {"eps": eps, "limit": limit, "steps": steps, "site": site, "count": count, "seed": seed}
        asked: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
        if config is None:
            mode = check_choice("mode", "boundary" if mode is None else mode, ALL_MODES)
            config = SynthesisConfig.recommended(mode, **asked)
        elif asked:
            raise ValueError(
                f"give either config or {', '.join(asked)}, not both: set {', '.join(asked)} in the config"
            )
        self.mode = mode = check_choice("mode", config.mode if mode is None else mode, ALL_MODES)
        if mode not in (config.mode, "random"):
            raise ValueError(f"config.mode must be mode, {mode!r}; got {config.mode!r}")
        self.config = config
        self.fraction = recommended_fraction(mode, config.site) if fraction is None else fraction
        check_number("fraction", self.fraction, 0, 1)
        if mode == "free" and self.fraction:
            raise ValueError(f"fraction is for modes of one view: 'free' has two; got {self.fraction}")
        self.encoder = FrozenEncoder(model, dtype or config.encoder_dtype, backend, config.site)
        self.model = model
        self._solve = self._solver()
        self._free = FreeNoise(config) if mode == "free" else None
        self.step = 0
        self.enabled = True
        self.stats: dict[str, Tensor] = {}
        self._bank: Noise | None = None
        self._attached = False
        self._traced = _frames_traced() > _at_reset  # compiled code may lack this augmentation's hooks
        self._forwards = 0  # with noise, since it was attached
        self._looked = False  # whether the values of a batch were checked
        self._place: Place | None = None
        self._asked: _View | None = None  # of the running `loss`, `views` or `outputs`
        self._inside = False  # whether a forward of the model runs
        self._running: _View | None = None  # of the running forward, if it has noise
        self._handles: list[Any] = []
        weakref.finalize(self, _remove, self._handles)
        _check_tokens_stay(self.encoder, config.site)
        if self.encoder.vit.num_classes == 1 and mode != "random":
            warnings.warn(
                "fastnull: influence is measured on class probabilities, and a model with one output has none: the "
                "influence is 0, and the noise stays at its random start",
                stacklevel=2,
            )
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise ValueError(
                "DataParallel runs copies of the model on several devices, which share this augmentation's state: use "
                "one process per device (DistributedDataParallel)"
            )
        self._register()

    def at(self, step: int, place: Place | None = None) -> NullspaceAugment:
        """Set the training step of the next draws, and the position of their images in its batch; returns self.

        Args:
            step: of the training; the next draw uses the random numbers of this step.
            place: position in a larger batch (a fastnull.rng.Place) that is split over processes or into parts. The
                images get the noise that they would get in the whole batch. None: they are the whole batch.
        """
        self.step, self._place = step, place
        return self

    def loss(
        self, images: Tensor, labels: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """criterion(clean) + criterion(noisy); with `fraction` the criterion of the only view.

        In mode `free` the criterion of the images without noise and those of the call before with noise, in one batch.
        It needs `backward` after each call. The first call has no noise.

        Args:
            images: [B, C, H, W], the input of the model.
            labels: classes [B] or soft labels [B, K]. Integers and bools are converted to int64 [B], or to the logits'
                dtype [B, K].
            criterion: (logits [B, K], labels) → scalar.

        Returns:
            the loss with its graph, and the clean view's logits [B, K]; with `fraction` those of the only view.

        Raises:
            RuntimeError: in eval mode, before `refresh` in universal mode, or if no noise was added because the model
                was compiled and run before this augmentation was created.
            ValueError, TypeError: invalid images or labels, or a model whose forward interrupts the gradient that the
                noise needs (torch.no_grad() around a backbone). On a GPU only the values of the first batch are
                checked, to avoid synchronisation.
        """
        trusting = self._trusting(images)
        if self._free is not None:
            return self._free_loss(self._free, images, labels, criterion)
        if self.fraction:
            self._check(images)
            logits = self._forward(images, _View())
            with trusting:
                labels = _for_a_loss(labels, logits)
            return criterion(logits, labels), logits
        clean, noisy = self.views(images)
        with trusting:
            labels = _for_a_loss(labels, clean)
        return criterion(clean, labels) + criterion(noisy, labels), clean

    def _free_loss(
        self, free: FreeNoise, images: Tensor, labels: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        trusting = self._trusting(images)
        self._check(images)
        rows = torch.arange(len(images)) if self._place is None else self._place.rows
        free.begin(self.step, images.device, partial(_mean, self.model))
        self.step += 1
        images = images.detach().clone().requires_grad_()  # loops may load the next batch into the same memory
        due = self._due(rows, images.device)
        if due is not None and due[1].shape[1:] != images.shape[1:]:
            due = None  # a training that changes the size of its images has a step without a noisy view
        logits = logits_of(self.model(images if due is None else torch.cat([images, due[0].images + due[1]])))
        clean, noisy = logits[: len(images)], logits[len(images) :]
        with trusting:
            labels = _for_a_loss(labels, clean)
        found = logits.new_full((), torch.nan, dtype=torch.float32)
        self.stats = {"influence": found, "norm": found}
        every = labels
        if due is not None:
            found = influence(due[0].logits, noisy.detach()).mean().float()
            self.stats = {"influence": found, "norm": norms(due[1]).mean()}
            every = _both_labels(labels, due[0].labels, logits)
        free.keep(rows, images, labels.clone(), clean, found)
        return criterion(logits, every), clean

    def _due(self, rows: Tensor, device: torch.device) -> tuple[Visited, Tensor] | None:
        assert self._free is not None
        return self._free.due(rows, device)

    def views(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] of the clean and of the noisy view, with their graph. Raises as `loss`.

        With `fraction` only that fraction of the noisy view has noise.
        """
        self._not_free("views")
        self._check(images)
        if self.mode in ("universal", "random"):
            clean, noisy = self._forward(images, _View(both=True)).chunk(2)
            return clean, noisy
        clean, noisy = self._both_views(images, lambda: self.model(images))
        return logits_of(clean), logits_of(noisy)

    def outputs(self, images: Tensor, forward: Callable[[], Any]) -> list[Any]:
        """Results of a function that calls the model, for each view; for other losses than that of logits and labels.

        Args:
            images: [B, C, H, W], the input that the function gives to the model.
            forward: calls the model once; returns logits [B, K] or an output with `.logits`.

        Returns:
            the results for the clean and the noisy view; with `fraction` for the only view. Raises as `loss`.
        """
        self._not_free("outputs")
        self._check(images)
        if self.fraction:
            return [self._call(len(images), _View(), forward)]
        return list(self._both_views(images, forward))

    def _both_views(self, images: Tensor, forward: Callable[[], Any]) -> tuple[Any, Any]:
        before = _random_state(images.device)
        clean = self._call(len(images), _View(noisy=False), forward)
        noisy = _View()
        # with a fraction, synthesis has only some of the rows
        if not self.fraction and torch.equal(before, _random_state(images.device)):
            logits = logits_of(clean).detach()
            noisy.clean = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # else dropout was active: synthesis computes logits without it
        return clean, self._call(len(images), noisy, forward)

    def _not_free(self, name: str) -> None:
        if self._free is not None:
            raise RuntimeError(
                f"{name} is not for mode 'free', whose noise depends on the backward pass of the loss: use loss"
            )

    def _check(self, images: Tensor) -> None:
        if not self.encoder.vit.model.training:
            raise RuntimeError("noise is for training: call model.train() first")
        if not self._looked and _misses_exchange(self.model):
            warnings.warn(
                "fastnull: several processes train, and this augmentation's model exchanges no gradients: create the "
                "augmentation from the wrapped model (DistributedDataParallel, or the result of accelerator.prepare)",
                stacklevel=3,
            )
        with self._trusting(images):
            check_batch(self.encoder, images)
        self._looked = True

    def _trusting(self, images: Tensor) -> AbstractContextManager[None]:
        """Skip checks of values on a GPU after the first batch."""
        return trusted_values(self._looked and isinstance(images, Tensor) and images.device.type != "cpu")

    def _forward(self, images: Tensor, view: _View) -> Tensor:
        """The model's logits of a view, [B, K], or [2 B, K] of both."""
        given = torch.cat([images, images]) if view.both and self._doubled else images
        count = 2 * len(images) if view.both else len(images)
        return logits_of(self._call(count, view, lambda: self.model(given)))

    def _call(self, count: int, view: _View, forward: Callable[[], Any]) -> Any:
        """The result of `forward`, whose call of the model has this view and must give `count` logits."""
        self._asked = view
        try:
            output = forward()
        finally:
            self._asked = None
        if view.applied != view.noisy or len(logits_of(output)) != count:
            raise RuntimeError(NOT_APPLIED)
        return output

    def refresh(
        self,
        batches: Tensor | Iterable[Any],
        *,
        check: Any = None,
        progress: bool = False,
        mean: Callable[[Tensor], Tensor] | None = None,
    ) -> Noise | None:
        """Universal mode: learn a new bank from the model's current weights and return it; None in other modes.

        The start is new noise, or partly the last bank (SynthesisConfig.warm).

        Args:
            batches, check, progress, mean: see fastnull.synthesis.synthesize.
        """
        if self.mode != "universal":
            return None
        seed = int(torch.randint(2**31, (), generator=generator(self.config.seed, self.step)))
        config = replace(self.config, seed=seed)
        start = self._bank if config.warm else None
        self._bank = synthesize(self.encoder, batches, config, check=check, start=start, progress=progress, mean=mean)
        return self._bank

    @property
    def bank(self) -> Noise | None:
        """The noises of universal mode; None before `refresh`."""
        return self._bank

    def attach(self) -> NullspaceAugment:
        """Add noise in every training forward of the model until `detach`.

        Raises:
            RuntimeError: another augmentation is attached to the model, or the mode is `free`.
        """
        self._not_free("attach")
        hooks = self.encoder.vit.model._forward_pre_hooks.values()
        owners = [hook.owner for hook in hooks if isinstance(hook, _Hook)]
        if any(owner is not None and owner is not self and owner._attached for owner in owners):
            raise RuntimeError("another NullspaceAugment is attached to this model: detach() it first")
        if _is_compiled(self.model) or self._traced:
            what = "to a compiled model" if _is_compiled(self.model) else "after something was compiled and run"
            warnings.warn(
                f"attaching {what}: compiled code has no hooks, so torch._dynamo.reset() is called and the model "
                "compiles again. Create the augmentation and attach before the first call to avoid this",
                stacklevel=2,
            )
            _reset_dynamo()
            self._traced = False
        self._attached, self._forwards = True, 0
        return self

    def detach(self) -> None:
        """Stop adding noise. Warns if no training forward of the model had noise."""
        if self._attached and self.enabled and not self._forwards:
            warnings.warn(
                "fastnull: no training forward of the model ran while the augmentation was attached, so nothing was "
                "trained with noise: is it the model of the training loop, called as model(images)?",
                stacklevel=2,
            )
        self._attached = False

    def __enter__(self) -> NullspaceAugment:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """State for resuming: step, settings and bank, or the images of the last step, as tensors and plain values."""
        bank = None
        if self._bank is not None:
            bank = {name: getattr(self._bank, name) for name in ("tokens", "influence", "norm", "converged", "steps")}
        return {
            "mode": self.mode, "config": asdict(self.config), "step": self.step, "bank": bank,
            "dtype": str(self.encoder.dtype), "free": None if self._free is None else self._free.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of `state_dict`. Warns if its noise was made in another dtype.

        Raises:
            ValueError: the state is invalid, or of another mode or site; the augmentation is then unchanged.
        """
        missing = [key for key in ("mode", "config", "step", "bank", "dtype", "free") if key not in state]
        if missing:
            raise ValueError(f"state must be what state_dict() returned; it lacks {', '.join(missing)}")
        given = state["config"] if isinstance(state["config"], Mapping) else {}
        mine, theirs = (self.mode, self.config.site), (state["mode"], given.get("site"))
        if theirs != mine:
            raise ValueError(f"state is of mode and site {theirs}; this augmentation has {mine}")
        try:
            config = SynthesisConfig(**state["config"])
            step = as_type("step", state["step"], int)
            check_number("step", step, 0)
            if config.mode != self.config.mode:
                raise ValueError(f"config.mode is {config.mode!r}, not {self.config.mode!r}")
            bank = None
            if state["bank"] is not None:
                bank = Noise(**state["bank"], site=config.site)
                check_noise(state["bank"], "the state's bank")
            free = None
            if self._free is not None:
                free = FreeNoise(config)
                free.load_state_dict(state["free"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state must be what state_dict() returned: {error}") from None
        if state["dtype"] != str(self.encoder.dtype):
            warnings.warn(
                f"fastnull: the state is of noise made in {state['dtype']}, here it is made in {self.encoder.dtype}: "
                "what follows is not the same bit for bit, unless dtype is given",
                stacklevel=2,
            )
        self.config, self.step, self._bank, self._free = config, step, bank, free
        self._solve = self._solver()

    def draw(self, tokens: Tensor) -> Tensor:
        """Noise for a batch at the site [B, ...], for the current weights, without gradient; 0 for clean images.

        Increments `step` and sets `stats`, which are means over the noisy images (NaN without any).
        """
        with torch.autocast(tokens.device.type, enabled=False):
            return self._draw(tokens.detach())

    def _draw(self, tokens: Tensor) -> Tensor:
        step, device = self.step, tokens.device
        place = self._place or Place(torch.arange(len(tokens)), len(tokens))
        self.step += 1
        if not self.fraction:
            return self._drawn(tokens, step_source(self.config.seed, step, carried(place.rows, device)))
        positions, place = fraction_of(place, self.fraction, step)
        if len(positions) == 0:
            self.stats = dict.fromkeys(("influence", "norm"), tokens.new_tensor(torch.nan))
            return torch.zeros_like(tokens)
        positions = carried(positions, device)
        source = step_source(self.config.seed, step, carried(place.rows, device))
        return torch.zeros_like(tokens).index_copy(0, positions, self._drawn(tokens[positions], source))

    def _drawn(self, tokens: Tensor, source: KeyedRandom) -> Tensor:
        if self.mode == "universal":
            noise = self._from_bank(tokens, source)
        else:
            noise, influence = self._synthesized(tokens, draw_start(tokens, self.config, source))
            self.stats["influence"] = influence.mean()
        self.stats["norm"] = norms(noise).mean()
        return noise.to(tokens.dtype)

    def _from_bank(self, tokens: Tensor, source: KeyedRandom) -> Tensor:
        if self._bank is None:
            raise RuntimeError("universal mode has no noise yet: call refresh(batches) first")
        if self._bank.tokens.shape[1:] != tokens.shape[1:]:  # one token's noise would broadcast to all tokens
            raise ValueError(
                f"the bank's noises have shape {list(self._bank.tokens.shape[1:])}, these images at site "
                f"{self.config.site!r} {list(tokens.shape[1:])}: call refresh(batches) with images of this size"
            )
        if self._bank.tokens.device != tokens.device:  # it comes from a file
            self._bank = replace(self._bank, tokens=carried(self._bank.tokens, tokens.device))
        self.stats["influence"] = self._bank.influence.mean()
        noise = self._bank.tokens[source.integers(len(self._bank))]
        return valid_noise(tokens, noise) if self.config.site == "pixels" else noise

    def _synthesized(self, tokens: Tensor, start: Start) -> tuple[Tensor, Tensor]:
        if self.mode == "random":
            noise = valid_noise(tokens, start.noise) if self.config.site == "pixels" else start.noise
            return noise, torch.full((1,), float("nan"))
        self.encoder.sync()
        if self._solve_of != self.encoder.generation:  # a graph runs the old encoder
            self._solve = self._solver()
        inputs = tokens.to(self.encoder.dtype)
        clean = None if self._running is None else self._running.clean
        clean = self.encoder(inputs) if clean is None else clean
        noise, influence, _ = self._solve(inputs, clean, *start.tensors)
        return noise, influence

    def _solver(self) -> Replay:
        self._solve_of = self.encoder.generation
        return replayed_noise(self.encoder, self.config)

    def _register(self) -> None:
        """Register the hooks, which stay for the life of this object and do nothing without a view."""
        _remove(self._handles)
        vit = self.encoder.vit
        self._handles += [
            vit.model.register_forward_pre_hook(_Hook(self, "_begin"), with_kwargs=True),
            vit.model.register_forward_hook(_Hook(self, "_end"), always_call=True),
        ]
        if self.config.site != "pixels":
            self._handles.append(vit.site_module(self.config.site).register_forward_hook(_Hook(self, "_at_site")))
        else:  # for a compiled network on the outside, to avoid graph breaks
            part = vit.network if _is_compiled(self.model) else getattr(vit, "patch_module", vit.network)
            self._handles.append(part.register_forward_pre_hook(_Hook(self, "_at_part")))

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """At the start of a forward of the model: choose its view."""
        if inside_frozen():
            return None
        self._inside = True
        view = self._asked
        if view is None and self._attached and self.enabled:
            view = _View()
        if view is None or not view.noisy or not module.training:
            self._running = None
            return None
        self._running = view
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "the whole model runs again in the backward pass (activation checkpointing around it), where its noise "
                "would differ from that of the forward: checkpoint its blocks, not the model"
            )
        if self.encoder.follow():
            self._register()
        self._forwards += 1
        return self._with_noisy_images(args, kwargs) if self.config.site == "pixels" else None

    def _with_noisy_images(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The arguments of the model's call with noise on the images: the first argument, or `pixel_values`."""
        names = [name for name in ("pixel_values", *kwargs) if isinstance(kwargs.get(name), Tensor)]
        if not args and not names:
            raise TypeError("at site 'pixels' the images must be an argument of the model's call; it got none")
        images = args[0] if args else kwargs[names[0]]
        if self._asked is None:
            self._check(images)
        noisy = self._noisy(images)
        return ((noisy, *args[1:]), kwargs) if args else (args, {**kwargs, names[0]: noisy})

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """At the end of a forward of the model, also after an error: check that noise was added."""
        if inside_frozen():
            return
        view, self._running, self._inside = self._running, None, False
        if view is not None and not view.applied and output is not None:
            raise RuntimeError(NOT_APPLIED)

    @property
    def _doubled(self) -> bool:
        """Whether both views enter the model as images, because the number of token rows cannot change inside it."""
        return self.config.site != "pixels" and not self.encoder.vit.batch_may_grow

    def _at_site(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # synthesis also runs these modules
        if inside_frozen():
            return None
        if self._running is None:
            self._at_part()
            return None
        vit = self.encoder.vit
        tokens = vit.tokens_of(output)
        if self._running.both and self._doubled:
            tokens = tokens.chunk(2)[0]
        return vit.with_tokens(output, self._noisy(tokens))

    def _at_part(self, *_: Any) -> None:
        """Raise RuntimeError if a part of the model is called directly, where the model's hooks add no noise."""
        due = self._attached and self.enabled and self.encoder.vit.model.training
        if due and not self._inside and not inside_frozen() and torch._C._current_graph_task_id() == -1:
            raise RuntimeError(PASSED_BY)

    def _noisy(self, tokens: Tensor) -> Tensor:
        view = self._running
        assert view is not None
        noisy = tokens + self.draw(tokens)
        view.applied = True
        return torch.cat([tokens, noisy]) if view.both else noisy


def _for_a_loss(labels: Tensor, logits: Tensor) -> Tensor:
    """Checked labels in a dtype that torch's losses accept."""
    check_labels(labels, logits.shape[-1], len(logits))
    if labels.is_floating_point():
        return labels
    return labels.long() if labels.ndim == 1 else labels.to(logits.dtype)


def _both_labels(new: Tensor, before: Tensor, logits: Tensor) -> Tensor:
    """Labels of both halves of a batch: classes [2 B], or probabilities [2 B, K] if those of a half are."""
    if new.ndim != before.ndim:  # Mixup that begins or ends
        new, before = (
            nn.functional.one_hot(labels, logits.shape[-1]).to(logits.dtype) if labels.ndim == 1 else labels
            for labels in (new, before)
        )
    return torch.cat([new, before])


def _random_state(device: torch.device) -> Tensor:
    """State of torch's generator for the device, read without synchronisation."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


class _Hook:
    """Calls a method of the augmentation without keeping it alive; a copy does nothing."""

    def __init__(self, owner: NullspaceAugment | None, method: str) -> None:
        self._owner = weakref.ref(owner) if owner is not None else None
        self._method = method
        # synthesis computes gradients, which a compiled graph cannot contain
        self._call = torch.compiler.disable(self._run)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    @property
    def owner(self) -> NullspaceAugment | None:
        """The augmentation; None if it was deleted, and in a copy of the hook."""
        return None if self._owner is None else self._owner()

    def _run(self, *args: Any) -> Any:
        owner = self.owner
        return None if owner is None else getattr(owner, self._method)(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None, self._method)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Hook, (None, self._method))


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


def _is_compiled(model: nn.Module) -> bool:
    """Whether the model or a part of it is compiled: by torch.compile(module) or by module.compile()."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


_at_reset = 0


def _frames_traced() -> int:
    """Number of frames that torch.compile has traced in this process, such as functions that call the model."""
    dynamo = sys.modules.get("torch._dynamo")
    return 0 if dynamo is None else dynamo.utils.counters["frames"]["total"]


def _reset_dynamo() -> None:
    global _at_reset
    torch._dynamo.reset()
    _at_reset = _frames_traced()


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _mean(model: nn.Module, value: Tensor) -> Tensor:
    """Mean over the processes, if they train one model."""
    if not _several_processes() or _misses_exchange(model):
        return value
    torch.distributed.all_reduce(value)
    return value / torch.distributed.get_world_size()


def _misses_exchange(model: nn.Module) -> bool:
    """Whether there are several processes and this model does not exchange gradients."""
    if not _several_processes():
        return False
    wrapped = any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules())
    return torch.is_grad_enabled() and not wrapped and not any(map(is_sharded, model.parameters()))


def _check_tokens_stay(encoder: FrozenEncoder, site: str) -> None:
    """Raise ValueError if the model drops tokens before the site in training."""
    dropped = getattr(getattr(encoder.vit.network, "patch_drop", None), "prob", 0)
    if site == "block0" and dropped:
        raise ValueError(
            f"site 'block0' needs every token, and the model drops {dropped:.0%} of them in training "
            f"(patch_drop_rate={dropped:g}): use site 'patch' or 'pixels', or patch_drop_rate=0"
        )


def __getattr__(name: str) -> Any:
    if name == "PixelNullspace":  # needs torchvision
        from fastnull.nullspace.pixels import PixelNullspace

        return PixelNullspace
    raise AttributeError(f"module 'fastnull.augment' has no attribute {name!r}")
