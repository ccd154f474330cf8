"""A model whose weights, gradients and moments are sharded over the processes: torch's FSDP2 (`fully_shard`).

A unit is gathered as a whole: each block while it computes, and the root unit (patch embedding, positions, norm, head)
while the model does. Between passes a process holds only its shard, and parameters are DTensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastnull.vit.layers import blocks_of

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def shard(model: nn.Module) -> None:
    """Shard the parameters of a model in place; all processes must hold the same values.

    The root is resharded after its forward too, although its backward gathers it again, so parameters are always
    sharded between passes.

    Raises:
        ValueError: as `blocks_of`, because units are blocks.
    """
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    try:
        blocks = blocks_of(model)
    except ValueError as error:
        raise ValueError(f"shard needs a list of blocks, and {error}; train it without shard") from None
    mesh = init_device_mesh(next(model.parameters()).device.type, (distributed.get_world_size(),))
    for unit in (*blocks, model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def local(value: Tensor) -> Tensor:
    """The shard of this process of a sharded tensor; other tensors unchanged."""
    return value.to_local() if is_sharded(value) else value  # type: ignore[attr-defined]


def is_sharded(value: Any) -> bool:
    """Whether a value is a sharded tensor."""
    return isinstance(value, Tensor) and hasattr(value, "to_local")


class Units:
    """The units of a sharded model, for reading weights outside the units' forwards.

    All methods are collective.

    Args:
        model: sharded.
        held: the parameters before sharding, which hold the current values while their unit is gathered.

    Raises:
        ValueError: the model is not sharded.
    """

    def __init__(self, model: nn.Module, held: Held) -> None:
        self._owner: dict[nn.Module, FSDPModule] = {}
        self.members: dict[FSDPModule, list[nn.Module]] = {}
        self._find(model, None)
        self.parameters = list(model.parameters())
        self._held = held

    def _find(self, module: nn.Module, unit: FSDPModule | None) -> None:
        from torch.distributed.fsdp import FSDPModule

        unit = module if isinstance(module, FSDPModule) else unit
        if unit is None:
            raise ValueError(
                f"the {type(module).__name__} is not sharded: call fully_shard for its blocks and then for the model"
            )
        self._owner[module] = unit
        self.members.setdefault(unit, []).append(module)
        for child in module.children():
            self._find(child, unit)

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """Gather the unit of a module inside the block."""
        unit = self._owner[module]
        members = self.members[unit]
        was_sharded = any(is_sharded(value) for member in members for value in member.parameters(recurse=False))
        unit.unshard()
        with self._held.filled(members):
            yield
        if was_sharded:
            unit.reshard()


class Held:
    """The parameters of a model before sharding, which replaces them in the modules."""

    def __init__(self, model: nn.Module) -> None:
        # weak references, or the whole model would stay in memory
        self._parameters = {
            module: {name: weakref.ref(value) for name, value in module.named_parameters(recurse=False)}
            for module in model.modules()
        }

    @contextmanager
    def filled(self, modules: list[nn.Module]) -> Iterator[None]:
        """Parameters that are still referenced get the modules' current values inside the block."""
        found = []
        for module in modules:
            for name, before in self._parameters[module].items():
                value = before()
                if value is not None and value is not getattr(module, name):
                    value.data = getattr(module, name).data
                    found.append(value)
        try:
            yield
        finally:
            for value in found:
                value.data = value.data.new_empty(0)


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a sharded model with whole tensors, on the CPU of rank 0; empty in other processes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))  # type: ignore[return-value]
