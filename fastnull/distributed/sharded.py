"""A model whose weights, gradients and moments are shared out over the processes: torch's FSDP2 (`fully_shard`).

A unit is what is gathered at once: every block while it computes, and around them, as the root, all the rest (patch
embedding, positions, norm, head) while the model does. Between passes a process holds its share alone: a parameter is
then a DTensor.
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
    """Share out the parameters of a model, in place, over all processes; they must hold the same ones.

    The root is resharded after its forward too, though its backward gathers it again: so no parameter is whole between
    passes, whether the last one had a backward or not.

    Raises:
        ValueError: as `blocks_of`: sharding gathers a model block by block.
    """
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    try:
        blocks = blocks_of(model)
    except ValueError as error:
        raise ValueError(f"shard gathers a model block by block, and {error}; train it without shard") from None
    mesh = init_device_mesh(next(model.parameters()).device.type, (distributed.get_world_size(),))
    for unit in (*blocks, model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def local(value: Tensor) -> Tensor:
    """What this process holds of a tensor: its share of a sharded one, else all."""
    return value.to_local() if is_sharded(value) else value  # type: ignore[attr-defined]


def is_sharded(value: Any) -> bool:
    """Whether a value is a tensor that is shared out."""
    return isinstance(value, Tensor) and hasattr(value, "to_local")


class Units:
    """The units of a sharded model, for who reads its weights outside the units' own forwards.

    Everything here is done by all processes together.

    Args:
        model: sharded.
        held: parameters of the model before that. Who holds one of them finds the current values in it where its unit
            is gathered, and nothing elsewhere.

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
        """The unit that a module belongs to is whole inside; afterwards it is as before."""
        unit = self._owner[module]
        members = self.members[unit]
        shared = any(is_sharded(value) for member in members for value in member.parameters(recurse=False))
        unit.unshard()
        with self._held.filled(members):
            yield
        if shared:
            unit.reshard()


class Held:
    """The parameters of a model before it is sharded, which puts others into its modules."""

    def __init__(self, model: nn.Module) -> None:
        # weak, or the whole model would stay in memory beside its shards
        self._parameters = {
            module: {name: weakref.ref(value) for name, value in module.named_parameters(recurse=False)}
            for module in model.modules()
        }

    @contextmanager
    def filled(self, modules: list[nn.Module]) -> Iterator[None]:
        """Those parameters that somebody holds have inside the values that the modules have now."""
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
    """The state_dict of a sharded model with whole tensors, on the CPU of the first process; empty in the others."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))  # type: ignore[return-value]
