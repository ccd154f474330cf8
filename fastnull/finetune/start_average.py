"""Weights between the start and the end of a finetuning run.

Finetuned weights lie in one basin with those that they started from, so weights on the line between them make a model
as well. It keeps more of what the start can do and has part of what the training taught.

Source: Wortsman et al. 2022 ("Robust fine-tuning of zero-shot models", WiSE-FT), there for natural shifts.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from fastnull.distributed.processes import Processes
from fastnull.distributed.sharded import local, shard


class StartAverage:
    """A model whose weights are (1 - fraction) · trained + fraction · start.

    Args:
        model: with the weights of the start; it is copied.
        fraction: of the start, in (0, 1).
        processes: of the run.
        sharded: shard the copy, as the model will be.
    """

    def __init__(self, model: nn.Module, fraction: float, processes: Processes, *, sharded: bool) -> None:
        self._fraction = fraction
        self._module = copy.deepcopy(model)
        if sharded:
            shard(self._module)
        self._start = [local(parameter).clone() for parameter in self._module.parameters()]
        parts = torch.stack([self._sums(start) for start in self._start]).sum(0)
        self._sum, self._squares = (processes.total(parts) if sharded else parts).tolist()

    @staticmethod
    def _sums(value: Tensor) -> Tensor:
        wide = value.double()
        return torch.stack([wide.sum(), wide.square().sum()])

    @torch.no_grad()
    def of(self, trained: nn.Module) -> nn.Module:
        """The model with the average of the start and the weights that `trained` has now; always the same object."""
        for mine, its, start in zip(self._module.parameters(), trained.parameters(), self._start, strict=True):
            local(mine).copy_(local(its))
            if mine.is_floating_point():  # quantised layers hold integers
                local(mine).lerp_(start, self._fraction)
        buffers = dict(self._module.named_buffers())
        for name, its in trained.named_buffers():
            owner, _, own = name.rpartition(".")
            if name in buffers and buffers[name].shape == its.shape:
                local(buffers[name]).copy_(local(its))
            else:  # made in a forward pass
                self._module.get_submodule(owner).register_buffer(own, its.clone())
        return self._module

    def state_dict(self) -> tuple[float, float]:
        """What tells the start from others: sums of its weights and of their squares."""
        return self._sum, self._squares

    def check(self, state: tuple[float, float] | None) -> None:
        """Raise ValueError if a state is of a run with another start."""
        if state is None:
            raise ValueError("the run had no start_fraction")
        scale = 1e-6 * self._squares
        if not all(
            math.isclose(a, b, rel_tol=1e-6, abs_tol=scale) for a, b in zip(state, self.state_dict(), strict=True)
        ):
            raise ValueError(
                "start_fraction needs the weights that the run began with, and the model has others: pass the same "
                "model or checkpoint"
            )
