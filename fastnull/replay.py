"""A function of tensors that is captured once in a CUDA graph and replayed; called as it is where there is no graph.

A synthesis step is hundreds of short kernels: launched one by one from Python they leave a GPU waiting. The function
must work on tensors alone, read nothing back from the device, and keep its state in tensors that it changes in place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
WARM_UPS = 2
"""Calls before the capture: they compile kernels, choose algorithms and grow the encoder's buffers."""


def use_graph(asked: bool | None, device: torch.device, backend: str) -> bool:
    """Whether synthesis runs in a graph: where it is asked for, or (None) on the cuda backend.

    Raises:
        ValueError: a graph was asked for on another device or backend.
    """
    if asked and (device.type != "cuda" or backend != "cuda"):
        raise ValueError(
            f"graph=True needs a model on a CUDA device and the cuda backend; got {device} and backend {backend!r}"
        )
    return device.type == "cuda" and backend == "cuda" if asked is None else asked


class Replay:
    """Calls `function(*inputs)`; with `graph`, by replaying a CUDA graph of it.

    The first call for inputs of given shapes captures (said once where there are several shapes); every later one
    copies its inputs into the graph's own and replays, which gives bit for bit what the function gives.

    Args:
        function: of tensors, to a tuple of tensors.
        graph: capture and replay; needs CUDA.
        state: tensors that the function changes in place; a capture leaves them as they were.
    """

    def __init__(self, function: Function, graph: bool, state: Sequence[Tensor] = ()) -> None:
        self._function, self._graph, self._state = function, graph, state
        self._captured: dict[tuple[tuple[torch.Size, torch.dtype], ...], _Captured] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The function's results for these inputs."""
        if not self._graph:
            return self._function(*inputs)
        key = tuple((value.shape, value.dtype) for value in inputs)
        if key not in self._captured:
            if len(self._captured) == 1:
                shapes = ", ".join(str(list(value.shape)) for value in inputs)
                warnings.warn(f"fastnull: inputs of another shape ({shapes}): captured in one more graph", stacklevel=2)
            self._captured[key] = _Captured(self._function, inputs, self._state)
        return self._captured[key](*inputs)


class _Captured:
    """One graph, with the inputs it reads and the results it writes."""

    def __init__(self, function: Function, inputs: Sequence[Tensor], state: Sequence[Tensor]) -> None:
        self._inputs = [value.clone() for value in inputs]
        before = [value.clone() for value in state]
        _warm_up(function, self._inputs)
        for value, kept in zip(state, before, strict=True):
            value.copy_(kept)
        self._replay, self._results = _capture(function, self._inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._replay()
        return tuple(result.clone() for result in self._results)  # the next replay overwrites them


def _warm_up(function: Function, inputs: Sequence[Tensor]) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)


def _capture(function: Function, inputs: Sequence[Tensor]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """What replays the function, which has not run yet, and the results that a replay fills."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: a loader's thread may pin memory meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = function(*inputs)
    return graph.replay, results
