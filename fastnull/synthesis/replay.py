"""Captures a function of tensors once in a CUDA graph and replays it; without a graph, calls the function.

A synthesis step is hundreds of short kernels, which leave a GPU idle if Python launches them one by one. The function
must work on tensors alone, read nothing back from the device, and keep its state in tensors that it changes in place.

The host reads values of the device through a `Report`, one look late, so that it never waits for what it has just
launched. Steps that are no longer needed by then are skipped on the device (`when`), if torch has conditional nodes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
Shapes = tuple[tuple[torch.Size, torch.dtype], ...]
WARM_UPS = 2
"""Calls before the capture. They compile kernels, choose algorithms and allocate the encoder's buffers."""


def use_graph(asked: bool | None, device: torch.device, backend: str) -> bool:
    """Whether synthesis runs in a graph: as asked, or for None on the cuda backend.

    Raises:
        ValueError: `asked` is True on another device or backend.
    """
    if asked and (device.type != "cuda" or backend != "cuda"):
        raise ValueError(
            f"graph=True needs a model on a CUDA device and the cuda backend; got {device} and backend {backend!r}"
        )
    return device.type == "cuda" and backend == "cuda" if asked is None else asked


class Replay:
    """Calls `function(*inputs)`; with `graph`, by replaying a CUDA graph of it.

    The first call for inputs of given shapes captures a graph, with one warning where there are several shapes. Every
    later call copies its inputs into those of the graph and replays it. The results are bit for bit those of the
    function.

    Args:
        function: takes tensors and returns a tuple of tensors.
        graph: capture and replay; needs CUDA.
        state: tensors that the function changes in place; a capture leaves them as they were.
        when: returns a bool scalar on the device, computed in each replay. If it is False, the function would change
            nothing, and a graph with conditional nodes skips it. Its floating results are then NaN.
        buffers: returns the objects whose memory the function uses and others may replace, such as an encoder's
            buffers. The graphs keep them alive. Once it returns other objects, graphs are captured again, so that the
            old memory is freed.
    """

    def __init__(
        self,
        function: Function,
        graph: bool,
        state: Sequence[Tensor] = (),
        when: Callable[[], Tensor] | None = None,
        buffers: Callable[[], tuple[object, ...]] = tuple,
    ) -> None:
        self._function, self._graph, self._state, self._when = function, graph, state, when
        self._buffers, self._held = buffers, buffers()
        self._captured: dict[Shapes, _Captured] = {}
        self._shapes: set[Shapes] = set()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The function's results for these inputs."""
        if not self._graph:
            return self._function(*inputs)
        key = tuple((value.shape, value.dtype) for value in inputs)
        self._drop_outdated()
        if key not in self._captured:
            if len(self._shapes) == 1 and key not in self._shapes:
                shapes = ", ".join(str(list(value.shape)) for value in inputs)
                warnings.warn(f"fastnull: inputs of another shape ({shapes}): captured in one more graph", stacklevel=2)
            self._shapes.add(key)
            captured = _Captured(self._function, inputs, self._state, self._when)
            self._drop_outdated()  # the capture may have needed larger buffers
            self._captured[key] = captured
        return self._captured[key](*inputs)

    def _drop_outdated(self) -> None:
        """Drop graphs whose buffers have been replaced, and hold the current ones."""
        held = self._buffers()
        if held != self._held:  # compares identities: the objects have no __eq__
            self._captured.clear()
            self._held = held


class _Captured:
    """One graph, with the inputs it reads and the results it writes."""

    def __init__(
        self,
        function: Function,
        inputs: Sequence[Tensor],
        state: Sequence[Tensor],
        when: Callable[[], Tensor] | None,
    ) -> None:
        self._inputs = [value.clone() for value in inputs]
        before = [value.clone() for value in state]
        for _ in range(WARM_UPS):
            results = function(*self._inputs)
        for value, kept in zip(state, before, strict=True):
            value.copy_(kept)
        if when is not None and conditional_nodes(inputs[0].device):
            function = _skippable(function, when, results)
        self._replay, self._results = _capture(function, self._inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._replay()
        return tuple(result.clone() for result in self._results)  # the next replay overwrites them


def _capture(function: Function, inputs: Sequence[Tensor]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """A function that replays the graph, and the results that it fills. The capture itself runs nothing."""
    device = inputs[0].device
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.device(device),
        _own_workspaces(),
        # thread_local: a loader's thread may pin memory meanwhile
        torch.cuda.graph(graph, stream=_capture_stream(device), capture_error_mode="thread_local"),
    ):
        results = function(*inputs)
    return graph.replay, results


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One per device: torch's default stream for captures belongs to the device of the first capture."""
    return torch.cuda.Stream(device)


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """Give the graph that is captured inside cuBLAS workspaces of its own (32 MiB on Hopper), freed with the graph.

    torch keeps a workspace for every stream on which cuBLAS ran. An older one could be freed while the graph still uses
    its address (torch.compile frees all of them for its own graphs), and a new one would outlive the graph.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def _skippable(function: Function, when: Callable[[], Tensor], results: tuple[Tensor, ...]) -> Function:
    """The function in a conditional node. It writes into `results`, which exist whether it runs or not."""

    def skippable(*inputs: Tensor) -> tuple[Tensor, ...]:
        for result in results:
            result.fill_(torch.nan)

        def body() -> None:
            for result, made in zip(results, function(*inputs), strict=True):
                result.copy_(made)

        _run_if(when(), body)
        return results

    return skippable


def _run_if(runs: Tensor, body: Callable[[], object]) -> None:
    """Inside a capture: make the body a conditional node, which a replay runs if the bool scalar `runs` is True."""
    graph = torch.cuda.CUDAGraph.get_currently_capturing_graph()  # type: ignore[no-untyped-call]
    graph.begin_capture_to_if_node(runs)
    try:
        body()
    finally:
        graph.end_capture_to_conditional_node()


@functools.cache
def conditional_nodes(device: torch.device) -> bool:
    """Whether a graph on this device can skip a part of itself (torch >= 2.13, CUDA >= 12.4); found by a trial."""
    if not hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node"):
        return False
    ones, total = (torch.full((16, 16), value, device=device) for value in (1.0, 0.0))
    runs = torch.tensor(False, device=device)

    def trial(a: Tensor) -> tuple[Tensor]:
        _run_if(runs, lambda: total.addmm_(a, a))
        return (total,)

    try:
        ones @ ones  # a capture must not be the first call of a library
        replay, _ = _capture(trial, [ones])
        replay()
        runs.fill_(True)
        replay()
        return bool((total == 16).all())
    except RuntimeError:
        return False


class Report:
    """Numbers from the device that the host reads one look late.

    `send` copies them into pinned memory, after the work launched so far. `read`, at the next look, waits for that copy
    alone, while the device goes on with the work launched since.

    Args:
        like: a tensor like those that will be sent.
    """

    def __init__(self, like: Tensor) -> None:
        self._device = like.device
        self._host = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
        self._event = torch.cuda.Event(blocking=True) if like.is_cuda else None
        self._sent = False

    def send(self, values: Tensor) -> None:
        """Copy these values for the next `read`. Values sent before must have been read."""
        self._host.copy_(values, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))
        self._sent = True

    def read(self) -> list[float] | None:
        """The values sent last; None before the first `send`."""
        if not self._sent:
            return None
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()  # type: ignore[no-any-return]
