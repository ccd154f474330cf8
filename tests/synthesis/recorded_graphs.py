"""A stand-in for CUDA graphs on the CPU: a capture records operations and the memory they use, a replay repeats them.

As in a real graph no Python runs in a replay, and memory is addressed as it was in the capture. What the capture
allocates belongs to the graph. Memory from outside is held weakly: a replay that would touch freed memory fails, where
a GPU would read and write whatever lies there now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastnull.synthesis import replay

aten = torch.ops.aten
WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.lift_fresh.default)
"""Operations that read a value of the device or send it one."""


class NothingWaits(TorchDispatchMode):
    """Fails where the host would read a value of the device, or send it one: neither can be in a graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in WAITS, func
        return func(*args, **(kwargs or {}))


class Place:
    """Where a tensor lies: in memory of the graph, or in memory that may be freed."""

    def __init__(self, tensor: Tensor, own: bool) -> None:
        self._layout = tensor.storage_offset(), tensor.shape, tensor.stride()
        self._dtype = tensor.dtype
        storage = tensor.untyped_storage()
        self._storage = storage if own else None
        self._weak = StorageWeakRef(storage)

    def tensor(self) -> Tensor:
        """The tensor that lies there now."""
        storage = self._storage or torch.UntypedStorage._new_with_weak_ptr(self._weak.cdata)
        assert storage is not None, "a replay touches memory that was freed after the capture"
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._layout)


class Recorder(TorchDispatchMode):
    """Records operations; what they change outside is undone at the end, since a capture runs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Callable[[], None]] = []
        self._own: dict[int, torch.UntypedStorage] = {}
        self._outside: dict[int, tuple[StorageWeakRef, torch.UntypedStorage]] = {}

    def place(self, value: Any) -> Any:
        """Where a tensor lies; other values as they are."""
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return value
        storage = value.untyped_storage()
        own = storage._cdata in self._own
        if not own and storage._cdata not in self._outside:
            self._outside[storage._cdata] = StorageWeakRef(storage), storage.clone()
        return Place(value, own)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in WAITS, func
        kwargs = kwargs or {}
        given = tree_map(self.place, (args, kwargs))
        results = func(*args, **kwargs)
        made = []
        for index, value in enumerate(tree_leaves(results)):
            if isinstance(value, Tensor) and value.layout == torch.strided:
                storage = value.untyped_storage()
                if storage._cdata not in self._own and storage._cdata not in self._outside:
                    self._own[storage._cdata] = storage
                    made.append((index, Place(value, own=True)))

        def operation() -> None:
            args, kwargs = tree_map(lambda value: value.tensor() if isinstance(value, Place) else value, given)
            new = tree_leaves(func(*args, **kwargs))
            for index, place in made:
                place.tensor().copy_(new[index])

        self.operations.append(operation)
        return results

    def finish(self) -> None:
        """Undo what the operations did, and poison what they allocated."""
        for weak, before in self._outside.values():
            storage = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)
            if storage is not None:
                storage.copy_(before)
        self._outside.clear()
        for storage in self._own.values():
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(255)  # NaN in every floating dtype


def pretend_graphs(monkeypatch: pytest.MonkeyPatch, *, conditional: bool = False) -> list[str]:
    """Let Replay capture in the stand-in; returns what happens. With `conditional` it has conditional nodes."""
    events: list[str] = []
    recorders: list[Recorder] = []

    def capture(function: replay.Function, inputs: Sequence[Tensor]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        events.append("capture")
        recorders.append(Recorder())
        with torch.no_grad(), recorders[-1]:
            results = function(*inputs)
        recorder = recorders.pop()
        recorder.finish()

        def run() -> None:
            events.append("replay")
            with torch.no_grad():
                for operation in recorder.operations:
                    operation()

        return run, results

    def run_if(runs: Tensor, body: Callable[[], object]) -> None:
        recorder = recorders[-1]
        condition = recorder.place(runs)
        outer, inner = recorder.operations, []
        recorder.operations = inner
        body()
        recorder.operations = outer

        def operation() -> None:
            if not condition.tensor():
                events.append("left out")
                return
            for operation in inner:
                operation()

        outer.append(operation)

    monkeypatch.setattr(replay, "_capture", capture)
    monkeypatch.setattr(replay, "_run_if", run_if)
    monkeypatch.setattr(replay, "conditional_nodes", lambda device: conditional)
    return events
