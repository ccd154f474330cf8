"""The processes of one run: `torchrun --nproc_per_node N -m fastnull finetune ...` starts one per device.

All take the same steps on their own rows of every batch. Only rank 0 writes files and shows progress. In a run without
a process group all functions here return at once.
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
"""Parts of gloo's and NCCL's error messages when the other process has ended."""


class PeerError(RuntimeError):
    """Another process of the run has ended, or cannot be reached."""


def join() -> None:
    """Join torchrun's process group; does nothing without torchrun or if already joined.

    CPU tensors use gloo, GPU tensors NCCL. The process's GPU becomes the current one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("cpu:gloo,cuda:nccl")
    else:
        distributed.init_process_group("gloo")


def leave() -> None:
    """Leave the group, if any."""
    if distributed.is_available() and distributed.is_initialized():
        # gloo's threads must finish the last exchange before the interpreter ends
        distributed.barrier()
        distributed.destroy_process_group()


class Processes:
    """The existing process group, or this process alone.

    Attributes:
        rank, world: index of this process, and number of processes.
    """

    def __init__(self) -> None:
        joined = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if joined else 0
        self.world = distributed.get_world_size() if joined else 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and messages."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.world == 1

    def device(self, asked: str | None) -> torch.device:
        """The device of this process: `asked`; None: a GPU if available, one per process."""
        device = check_device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None and not self.alone:
            return torch.device("cuda", torch.cuda.current_device())
        return device

    def rows(self, batch: int, *, pairs: bool = False) -> list[int]:
        """The rows of a batch for this process: a slice, or with `pairs` one slice from each end.

        Mixup pairs row i with row batch - 1 - i; with `pairs` both are in one process, in an order that keeps pairs.
        """
        count = batch // self.world
        if not pairs:
            return list(range(self.rank * count, (self.rank + 1) * count))
        half = count // 2
        begin = self.rank * half
        return [*range(begin, begin + half), *range(batch - begin - half, batch - begin)]

    def places(self, batch: int, parts: int, *, pairs: bool = False) -> list[Place | None]:
        """The positions of the parts of this process's rows in the batch; None: the whole batch."""
        if self.alone and parts == 1:
            return [None]
        rows = torch.tensor(self.rows(batch, pairs=pairs))
        return [Place(part, batch) for part in rows.chunk(parts)]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are means over all processes (DDP)."""
        if self.alone:
            return model
        device = next(model.parameters()).device
        with explained(self):
            return nn.parallel.DistributedDataParallel(
                model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
            )

    def broadcast(self, model: nn.Module) -> None:
        """Copy the parameters and buffers of rank 0 to all processes, as `wrap` does too."""
        with explained(self), torch.no_grad():
            for value in (*model.parameters(), *model.buffers()):
                distributed.broadcast(value, src=0)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes, bitwise the same on all."""
        return value if self.alone else self._reduced(value, distributed.ReduceOp.SUM) / self.world

    def total(self, value: Tensor) -> Tensor:
        """Sum over the processes."""
        return value if self.alone else self._reduced(value, distributed.ReduceOp.SUM)

    def least(self, value: Tensor) -> Tensor:
        """Minimum over the processes."""
        return value if self.alone else self._reduced(value, distributed.ReduceOp.MIN)

    def greatest(self, value: int) -> int:
        """Maximum over the processes of a number on the host, without device synchronisation."""
        return value if self.alone else int(self._reduced(torch.tensor(value), distributed.ReduceOp.MAX))

    def from_first(self, work: Callable[[], Value]) -> Value:
        """Run `work` in rank 0 only and return its result in all processes.

        Raises:
            PeerError: in the others, if `work` raised an error, with its message.
        """
        if self.alone:
            return work()
        sent: list[object] = [None, None]
        error: Exception | None = None
        if self.first:
            try:
                sent[0] = work()
            except Exception as caught:
                error, sent[1] = caught, str(caught)
        with explained(self):
            distributed.broadcast_object_list(sent, src=0, device=torch.device("cpu"))
        if error is not None:
            raise error
        if sent[1] is not None:
            raise PeerError(f"process 0 of {self.world} ended: {sent[1]}")
        return cast("Value", sent[0])

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
    """Backward passes inside do not exchange gradients; the next one outside exchanges the sum."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):
        return _kept_whole(model)
    return nullcontext()


@contextmanager
def _kept_whole(model: Any) -> Iterator[None]:
    """The gradients of a sharded model stay unsharded until the next backward pass outside."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


@contextmanager
def explained(processes: Processes) -> Iterator[None]:
    """Raise a PeerError for errors of an exchange whose other process has ended."""
    try:
        yield
    except RuntimeError as error:
        if processes.alone or isinstance(error, PeerError) or not any(sign in str(error) for sign in _LOST):
            raise
        raise PeerError(
            f"process {processes.rank} of {processes.world}: another process of the run has ended or does not answer; "
            "see its own message. Start all processes again with --resume to resume from the last state"
        ) from error
