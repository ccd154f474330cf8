"""Replay, with a stand-in for CUDA graphs: what a capture leaves alone, what a replay reads and writes."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastnull.synthesis import replay
from fastnull.synthesis.replay import Replay, Report, use_graph
from tests.synthesis.recorded_graphs import pretend_graphs


def test_replays_are_the_eager_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    total = torch.zeros(3)

    def accumulate(x: Tensor) -> tuple[Tensor]:
        total.add_(x)
        return (total * 2,)

    inputs = [torch.randn(3) for _ in range(5)]
    eager = [Replay(accumulate, graph=False)(x)[0] for x in inputs]
    expected = total.clone()
    total.zero_()
    events = pretend_graphs(monkeypatch)
    replayed = Replay(accumulate, graph=True, state=[total])
    results = [replayed(x)[0] for x in inputs]
    assert events == ["warm up", "capture"] + ["replay"] * 5
    assert torch.equal(total, expected)  # neither the warm-ups nor the capture moved it
    for result, wanted in zip(results, eager, strict=True):
        assert torch.equal(result, wanted)  # earlier results outlive later replays


def test_another_shape_is_captured_once_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    events = pretend_graphs(monkeypatch)
    double = Replay(lambda x: (2 * x,), graph=True)
    double(torch.ones(2))
    with pytest.warns(UserWarning, match=r"another shape \(\[3\]\)"):
        double(torch.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        double(torch.ones(4))
        assert torch.equal(double(torch.full((2,), 3.0))[0], torch.full((2,), 6.0))
    assert events.count("capture") == 3


@pytest.mark.parametrize("conditional", [False, True])
def test_steps_in_vain_are_left_out_where_there_are_conditional_nodes(
    conditional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    total, runs = torch.zeros(2), torch.tensor(True)
    gate: Callable[[], Tensor] = lambda: runs  # noqa: E731

    def accumulate(x: Tensor) -> tuple[Tensor]:
        total.add_(x * runs)  # a masked step
        return (total * 2,)

    events = pretend_graphs(monkeypatch, conditional=conditional)
    replayed = Replay(accumulate, graph=True, state=[total], when=gate)
    results = []
    for runs_now in (True, False, False, True):
        runs.fill_(runs_now)
        results.append(replayed(torch.ones(2))[0])
    assert total.tolist() == [2, 2]
    assert results[0].tolist() == [2, 2]
    assert results[3].tolist() == [4, 4]
    assert all(bool(result.isnan().all()) == conditional for result in results[1:3])
    assert events.count("left out") == (2 if conditional else 0)


def test_without_the_nodes_or_a_device_there_is_nothing_to_try() -> None:
    assert not replay.conditional_nodes(torch.device("cpu"))


def test_a_report_is_what_was_sent_at_the_look_before() -> None:
    value = torch.tensor([1.0, 2.0])
    report = Report(value)
    assert report.read() is None
    report.send(value)
    value.fill_(7)  # work launched since does not show
    assert report.read() == [1, 2]
    report.send(value)
    assert report.read() == [7, 7]


def test_a_graph_needs_the_cuda_backend() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not use_graph(None, cpu, "cpu")
    assert not use_graph(False, gpu, "cuda")
    assert not use_graph(None, gpu, "reference")
    assert use_graph(None, gpu, "cuda")
    for device, backend in ((cpu, "cpu"), (gpu, "reference")):
        with pytest.raises(ValueError, match=f"graph=True needs .* got {device} and backend '{backend}'"):
            use_graph(True, device, backend)
