"""Replay, with a stand-in for CUDA graphs: what a capture leaves alone, what a replay reads and writes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fastnull import replay
from fastnull.replay import Replay, use_graph


def pretend_graphs(monkeypatch: pytest.MonkeyPatch, state: Sequence[Tensor]) -> list[str]:
    """A graph that remembers the function and the very tensors, as a real one does; returns what happened."""
    events: list[str] = []

    def warm_up(function: replay.Function, inputs: Sequence[Tensor]) -> None:
        events.append("warm up")
        for _ in range(replay.WARM_UPS):
            function(*inputs)

    def capture(function: replay.Function, inputs: Sequence[Tensor]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        events.append("capture")
        before = [value.clone() for value in state]
        results = tuple(torch.full_like(result, torch.nan) for result in function(*inputs))
        for value, kept in zip(state, before, strict=True):  # a capture runs nothing
            value.copy_(kept)

        def run() -> None:
            events.append("replay")
            for result, new in zip(results, function(*inputs), strict=True):
                result.copy_(new)

        return run, results

    monkeypatch.setattr(replay, "_warm_up", warm_up)
    monkeypatch.setattr(replay, "_capture", capture)
    return events


def test_replays_are_the_eager_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    total = torch.zeros(3)

    def accumulate(x: Tensor) -> tuple[Tensor]:
        total.add_(x)
        return (total * 2,)

    inputs = [torch.randn(3) for _ in range(5)]
    eager = [Replay(accumulate, graph=False)(x)[0] for x in inputs]
    expected = total.clone()
    total.zero_()
    events = pretend_graphs(monkeypatch, [total])
    replayed = Replay(accumulate, graph=True, state=[total])
    results = [replayed(x)[0] for x in inputs]
    assert events == ["warm up", "capture"] + ["replay"] * 5
    assert torch.equal(total, expected)  # neither the warm-ups nor the capture moved it
    for result, wanted in zip(results, eager, strict=True):
        assert torch.equal(result, wanted)  # earlier results outlive later replays


def test_another_shape_is_captured_once_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    events = pretend_graphs(monkeypatch, [])
    double = Replay(lambda x: (2 * x,), graph=True)
    double(torch.ones(2))
    with pytest.warns(UserWarning, match=r"another shape \(\[3\]\)"):
        double(torch.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        double(torch.ones(4))
        assert torch.equal(double(torch.full((2,), 3.0))[0], torch.full((2,), 6.0))
    assert events.count("capture") == 3


def test_a_graph_needs_the_cuda_backend() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not use_graph(None, cpu, "cpu")
    assert not use_graph(False, gpu, "cuda")
    assert not use_graph(None, gpu, "reference")
    assert use_graph(None, gpu, "cuda")
    for device, backend in ((cpu, "cpu"), (gpu, "reference")):
        with pytest.raises(ValueError, match=f"graph=True needs .* got {device} and backend '{backend}'"):
            use_graph(True, device, backend)
