"""The block that each parameter of a model belongs to, for layer-wise learning rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn


def blocks_of(model: nn.Module, least: int = 2) -> list[nn.Module]:
    """The blocks of a model in order: members of its innermost lists of at least `least` modules of one class.

    Raises:
        ValueError: there is no such list.
    """
    found: list[nn.Module] = []
    for module in model.modules():
        members = list(module.children()) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
        alike = len(members) >= least and len({type(member) for member in members}) == 1
        if alike and next(members[0].children(), None) is not None:
            found += members
    listed = set(found)
    blocks = [block for block in found if not any(part in listed for part in block.modules() if part is not block)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no list of modules of one class for its blocks")
    return blocks


def layer_ids(model: nn.Module) -> dict[str, int]:
    """Parameter name → depth, numbered as in timm: 0 before the first block, i + 1 in and after block i (a final norm
    belongs to the last one), and one more in the head.

    Parameters are taken in the order of registration. The head is what follows the last block in another child of the
    model and is more than a norm: `classifier` in transformers, `heads` in torchvision.

    Raises:
        ValueError: as `blocks_of`.
    """
    blocks = blocks_of(model)
    index_of = {id(parameter): index for index, block in enumerate(blocks) for parameter in block.parameters()}
    ids: dict[str, int] = {}
    depth, trunk = 0, ""
    for name, parameter in model.named_parameters():
        child = name.partition(".")[0]
        if id(parameter) in index_of:
            depth, trunk = index_of[id(parameter)] + 1, child
        part = getattr(model, child)
        more_than_norm = isinstance(part, nn.Module) and any(p.ndim > 1 for p in part.parameters())
        head = depth == len(blocks) and child != trunk and more_than_norm
        ids[name] = len(blocks) + 1 if head else depth
    return ids


class Layered:
    """A model's parameters and `layer_ids` in the interface of timm's parameter grouping."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._ids = layer_ids(model)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's."""
        return self._model.named_parameters()

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Name → depth; there is no coarser grouping."""
        return self._ids.__getitem__
