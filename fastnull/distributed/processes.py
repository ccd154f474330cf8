"""The processes of one run: `torchrun --nproc_per_node N -m fastnull finetune ...` starts them, one a device.

All take the same steps on their own rows of every batch, and agree on whatever the next step depends on. The first one
alone writes files and shows progress. A run without a process group is alone, and everything here costs it nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn

from fastnull.checks import check_device
from fastnull.rng import Place

Value = TypeVar("Value")

_LOST = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Timed out",
    "timed out",
    "Socket closed",
    "unhandled system",
)
"""What gloo's and NCCL's errors say where the other end is gone."""


class PeerError(RuntimeError):
    """Another process of the run has ended, or cannot be reached."""


def join() -> None:
    """Join the group that torchrun's environment describes; nothing to do without torchrun, or in a group already.

    Tensors on the CPU are exchanged by gloo, those on a GPU by NCCL. The process's GPU becomes the current one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("cpu:gloo,cuda:nccl")
    else:
        distributed.init_process_group("gloo")


def leave() -> None:
    """Leave the group, where there is one."""
    if distributed.is_available() and distributed.is_initialized():
        # together: gloo's threads must be done with the last exchange before the interpreter ends
        distributed.barrier()
        distributed.destroy_process_group()


class Processes:
    """The process group that exists, or this process alone.

    Attributes:
        rank, world: number of this process, from 0, and of all.
    """

    def __init__(self) -> None:
        joined = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if joined else 0
        self.world = distributed.get_world_size() if joined else 1

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.world == 1

    def device(self, asked: str | None) -> torch.device:
        """The device of this process: `asked`, or None for a GPU where there is one; GPUs are shared out by rank."""
        device = check_device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None and not self.alone:
            return torch.device("cuda", torch.cuda.current_device())
        return device

    def rows(self, batch: int, *, pairs: bool = False) -> list[int]:
        """The rows of a batch that are this process's: a slice, or with `pairs` one from either end.

        Mixup pairs row i with row batch - 1 - i: with `pairs` both are here, in an order in which they still pair.
        """
        count = batch // self.world
        if not pairs:
            return list(range(self.rank * count, (self.rank + 1) * count))
        half = count // 2
        begin = self.rank * half
        return [*range(begin, begin + half), *range(batch - begin - half, batch - begin)]

    def places(self, batch: int, parts: int, *, pairs: bool = False) -> list[Place | None]:
        """Where the parts of this process's rows lie in the batch; None stands for the whole batch."""
        if self.alone and parts == 1:
            return [None]
        rows = torch.tensor(self.rows(batch, pairs=pairs))
        return [Place(part, batch) for part in rows.chunk(parts)]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as the training loop calls it: its gradients are means over all processes."""
        if self.alone:
            return model
        device = next(model.parameters()).device
        with explained(self):
            return nn.parallel.DistributedDataParallel(
                model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
            )

    def spread(self, model: nn.Module) -> None:
        """Give the model the first process's parameters and buffers, as `wrap` does too."""
        with explained(self), torch.no_grad():
            for value in (*model.parameters(), *model.buffers()):
                distributed.broadcast(value, src=0)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes, bit for bit the same on all."""
        return value if self.alone else self._reduced(value, distributed.ReduceOp.SUM) / self.world

    def total(self, value: Tensor) -> Tensor:
        """Sum over the processes."""
        return value if self.alone else self._reduced(value, distributed.ReduceOp.SUM)

    def least(self, value: Tensor) -> Tensor:
        """Least over the processes."""
        return value if self.alone else self._reduced(value, distributed.ReduceOp.MIN)

    def greatest(self, value: int) -> int:
        """Greatest over the processes, of a number on the host: no device is waited for."""
        return value if self.alone else int(self._reduced(torch.tensor(value), distributed.ReduceOp.MAX))

    def from_first(self, work: Callable[[], Value]) -> Value:
        """What `work` returns in the first process, which alone does it. Its error ends the others too.

        Raises:
            PeerError: in the others, with the message of the first one's error.
        """
        if self.alone:
            return work()
        told: list[object] = [None, None]
        error: Exception | None = None
        if self.first:
            try:
                told[0] = work()
            except Exception as caught:
                error, told[1] = caught, str(caught)
        with explained(self):
            distributed.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        if error is not None:
            raise error
        if told[1] is not None:
            raise PeerError(f"process 0 of {self.world} ended: {told[1]}")
        return cast("Value", told[0])

    def gathered(self, value: Value) -> list[Value]:
        """The values of all processes, in order."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.world
        with explained(self):
            distributed.all_gather_object(found, value)
        return found

    def _reduced(self, value: Tensor, how: distributed.ReduceOp.RedOpType) -> Tensor:
        value = value.detach().clone()
        with explained(self):
            distributed.all_reduce(value, how)
        return value


def without_exchange(model: nn.Module) -> AbstractContextManager[None]:
    """Backward passes inside keep their gradients to themselves: the next one outside exchanges the sum."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):
        return _kept_whole(model)
    return nullcontext()


@contextmanager
def _kept_whole(model: Any) -> Iterator[None]:
    """The gradients of a sharded model stay where they arise, whole, until the next backward pass outside."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


@contextmanager
def explained(processes: Processes) -> Iterator[None]:
    """Turns the error of an exchange whose other end is gone into a PeerError."""
    try:
        yield
    except RuntimeError as error:
        if processes.alone or isinstance(error, PeerError) or not any(sign in str(error) for sign in _LOST):
            raise
        raise PeerError(
            f"process {processes.rank} of {processes.world}: another process of the run has ended or does not answer; "
            "its own message says why. Start all of them again with --resume to go on from the last state"
        ) from error
