"""Whether every module of a model computes what its class says, so that reading its weights can replace calling it.

The fast encoder reads weights and never calls the modules. It would miss a user's hook, parametrisation, LoRA layer,
subclass or replaced method. `first_difference` names the first of these, and `snapshot` detects later changes.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

LIBRARIES = ("torch", "timm", "transformers", "torchvision", "open_clip", "fastnull")
"""Packages whose classes the adapters know. Any other class may compute anything."""

WATCHERS = ("torch.distributed.", "torch.nn.parallel.", "torch._dynamo.", "transformers.utils.", "wandb.", "fastnull.")
"""Modules whose hooks change no result in eval mode: sharding, output recording, logging and ours."""

WRAPPERS = ("torch.", "accelerate.")
"""Modules whose wrappers of `forward` only change the precision (autocast, casts of the output)."""

_HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}


def first_difference(modules: Iterable[tuple[str, nn.Module]], known_classes: bool = True) -> str | None:
    """Describe the first module that differs from its class, or return None.

    Args:
        modules: (name, module) pairs, as from `named_modules`.
        known_classes: whether a class outside LIBRARIES counts as a difference.
    """
    for name, module in modules:
        where = name or f"the {type(module).__name__}"
        kind = type(module)
        if nn.utils.parametrize.is_parametrized(module):
            return f"{where} with parametrized weights"
        if known_classes and _origin(kind).partition(".")[0] not in LIBRARIES:
            return f"{where} of type {kind.__name__} from {_origin(kind)}"
        for method in own_methods(module):
            return f"{where} with a {method} assigned to the instance"
        for hook, what in foreign_hooks(module):
            return f"{where} with a {what} ({getattr(hook, '__qualname__', type(hook).__name__)})"
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        for hook in getattr(torch_module, name, {}).values():
            if not _written_in(hook, WATCHERS):
                return f"a global forward hook ({getattr(hook, '__qualname__', type(hook).__name__)})"
    return None


def foreign_hooks(module: nn.Module) -> list[tuple[Any, str]]:
    """Hooks that may change what a module computes: (hook, kind)."""
    return [
        (hook, what)
        for name, what in _HOOKS.items()
        for hook in (getattr(module, name, None) or {}).values()
        if not _written_in(hook, WATCHERS)
    ]


def own_methods(module: nn.Module) -> list[str]:
    """Names of methods that were replaced on this instance, without a `forward` that accelerate wrapped in autocast."""
    if "_orig_mod" in module._modules:  # torch.compile's wrapper, which calls the module inside
        return []
    own = [
        name for name, value in vars(module).items() if isinstance(value, _FUNCTIONS) and hasattr(type(module), name)
    ]
    return [name for name in own if _is_replaced(module, name)]


def _is_replaced(module: nn.Module, name: str) -> bool:
    method = getattr(type(module), name)
    function = vars(module)[name]
    inner = getattr(function, "__func__", function)
    while inner is not method:
        wrapped = getattr(inner, "__wrapped__", None)
        if wrapped is None or not _written_in(inner, WRAPPERS):
            return inspect.isfunction(method)
        inner = getattr(wrapped, "__func__", wrapped)
    return False


def class_forward(module: nn.Module) -> Callable[..., Any]:
    """The module's forward in its own precision, without accelerate's autocast wrapper."""
    if "forward" in own_methods(module):
        return module.forward
    return functools.partial(type(module).forward, module)


_OF_TRAINING = ("training", "p", "drop_prob")
"""Attributes that training changes and that have no effect in eval mode."""
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_COMPARED = frozenset((bool, int, float, str, tuple, type(None), *_FUNCTIONS))
"""Types of the attributes that determine what a module computes."""


def snapshot(model: nn.Module, parameters: bool = True) -> list[Any]:
    """The structure of a model: modules, classes and their forwards, assigned functions, flags, hooks, buffers and
    parameters, without the values of the last two. Compare snapshots with `same`.

    Args:
        model: any.
        parameters: False leaves the parameters out (a sharded model replaces them in every pass).
    """
    found: list[Any] = []
    for module in model.modules():
        own = module.__dict__
        found += (module, type(module), type(module).forward)
        found += [value for name, value in own.items() if type(value) in _COMPARED and name not in _OF_TRAINING]
        found += own["_buffers"].values()
        if any(own[name] for name in _HOOKS):
            found += [hook for hook, _ in foreign_hooks(module)]
        if parameters:
            found += own["_parameters"].values()
    return found


def same(one: list[Any], other: list[Any]) -> bool:
    """Whether two snapshots hold the same objects and equal flags."""
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(
        a is b or (isinstance(a, (int, float, str)) and type(a) is type(b) and a == b) for a, b in pairs
    )


def is_plain_linear(module: object) -> bool:
    """Whether a module is nn.Linear itself (or torch's alias of it), no other subclass."""
    return type(module) in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def is_plain_convolution(module: nn.Module) -> bool:
    """Whether a module is nn.Conv2d itself, without padding, dilation or groups."""
    if type(module) is not nn.Conv2d:
        return False
    padded = module.padding != "valid" and (module.padding == "same" or any(module.padding))
    return not padded and tuple(module.dilation) == (1, 1) and module.groups == 1


def is_plain_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm from LIBRARIES over the last dimension."""
    known = _origin(type(module)).partition(".")[0] in LIBRARIES
    return known and isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1


def _origin(kind: type) -> str:
    return kind.__module__ or ""


def _written_in(function: Any, modules: tuple[str, ...]) -> bool:
    """Whether a hook or wrapper is defined in one of these modules. functools.wraps overwrites its `__module__`."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    if inspect.isfunction(function):
        return function.__globals__.get("__name__", "").startswith(modules)
    return _origin(type(function)).startswith(modules)
