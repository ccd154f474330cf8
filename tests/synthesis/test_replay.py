"""Replay, with a stand-in for CUDA graphs: what a capture leaves alone, what a replay reads and writes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastnull.augment import NullspaceAugment
from fastnull.encoder import FrozenEncoder
from fastnull.rng import generator
from fastnull.synthesis import SynthesisConfig, replay, solvers, synthesize, universal
from fastnull.synthesis.batches import Batches, embed_batch
from fastnull.synthesis.replay import Replay, Report, use_graph
from fastnull.vit import NormalizedModel
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
    assert events == ["capture"] + ["replay"] * 5
    assert torch.equal(total, expected)  # neither the warm-ups nor the capture moved it
    torch.testing.assert_close(results, eager, rtol=0, atol=0)  # earlier results outlive later replays


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


def drawn(model: NormalizedModel, sizes: Sequence[int], between: Callable[[NullspaceAugment], object]) -> list[Tensor]:
    """Noise for batches of these sizes, with something else after the first."""
    augment = NullspaceAugment(copy.deepcopy(model).train(), "boundary", site="patch", steps=2, backend="cpu")
    noises = []
    for size in sizes:
        tokens = augment.encoder.embed(torch.rand(size, 3, 16, 16, generator=generator(size)))
        noises.append(augment.draw(tokens))
        if len(noises) == 1:
            between(augment)
    return noises


def other_weights(augment: NullspaceAugment) -> None:
    with torch.no_grad():
        for parameter in augment.model.parameters():
            parameter.mul_(1.1)


def another_module(augment: NullspaceAugment) -> None:
    blocks = augment.encoder.vit.network.blocks
    blocks[0] = copy.deepcopy(blocks[1])


BETWEEN: dict[str, Callable[[NullspaceAugment], object]] = {
    "nothing": lambda augment: None,
    "a larger batch": lambda augment: augment.draw(torch.randn(64, 16, 32)),
    "evaluation": lambda augment: augment.encoder(torch.randn(300, 16, 32)),
    "another user of the encoder": lambda augment: augment.encoder.input_gradient(
        torch.randn(100, 16, 32), torch.randn(100, 10)
    ),
    "other weights": other_weights,
    "another module": another_module,
}


@pytest.mark.parametrize("between", BETWEEN)
def test_a_graph_outlives_what_happens_to_its_encoder(
    vit: NormalizedModel, between: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = drawn(vit, (10, 10, 4, 10), BETWEEN[between])
    monkeypatch.setattr(solvers, "use_graph", lambda *_: True)
    events = pretend_graphs(monkeypatch)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fastnull: inputs of another shape")
        replayed = drawn(vit, (10, 10, 4, 10), BETWEEN[between])
    torch.testing.assert_close(replayed, eager, rtol=0, atol=0)
    assert events.count("capture") <= 4


def test_batches_of_several_sizes_are_each_captured_in_the_memory_of_the_largest(
    vit: NormalizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = list(torch.rand(104, 3, 16, 16).split([10, 64, 10, 10, 10]))
    config = SynthesisConfig(mode="per_image", steps=2)
    eager = synthesize(FrozenEncoder(vit, backend="cpu"), batches, config)
    monkeypatch.setattr(solvers, "use_graph", lambda *_: True)
    events = pretend_graphs(monkeypatch)
    with pytest.warns(UserWarning, match="another shape") as warned:
        replayed = synthesize(FrozenEncoder(vit, backend="cpu"), batches, config)
    assert torch.equal(replayed.tokens, eager.tokens)
    assert events.count("capture") == 3, "10, 64, and 10 once more in the buffers of 64"
    assert len(warned) == 1


def test_noise_is_judged_on_many_images_between_the_steps_of_a_graph(
    vit: NormalizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, many = list(torch.rand(3, 4, 3, 16, 16)), torch.rand(300, 3, 16, 16)
    config = SynthesisConfig(count=2, steps=5, limit=1.0, stop="never", solver="adamw")
    start = torch.rand(2, 16, 32)

    def noise() -> Tensor:
        encoder = FrozenEncoder(vit, backend="cpu")
        pairs = [embed_batch(FrozenEncoder(vit, backend="cpu"), many)]  # so the first large batch is judged
        whole = universal.UniversalRun(encoder, Batches(encoder, loader, loader[:1], config), config, start.clone())

        whole.run(5, Mock(update=lambda: universal.judge(encoder, whole.noise, pairs)))
        return whole.noise

    eager = noise()
    monkeypatch.setattr(universal, "use_graph", lambda *_: True)
    pretend_graphs(monkeypatch)
    assert torch.equal(noise(), eager)


def test_two_users_of_one_encoder_capture_again_in_its_larger_buffers(
    vit: NormalizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = FrozenEncoder(vit, backend="cpu")
    events = pretend_graphs(monkeypatch)

    def gradient(tokens: Tensor) -> tuple[Tensor, ...]:
        return encoder.input_gradient(tokens, lambda logits: logits.sin())

    small, large = (Replay(gradient, graph=True, buffers=encoder.buffers) for _ in range(2))
    inputs = {small: torch.randn(10, 16, 32), large: torch.randn(64, 16, 32)}
    for user in (small, large, small, large, small):
        assert torch.equal(user(inputs[user])[1], gradient(inputs[user])[1])
    assert events.count("capture") == 3


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_a_capture_is_on_the_device_of_its_inputs_and_owns_its_workspaces(
    error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without CUDA: a model on the second card while the first one is the current device."""
    happened: list[Any] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

    @contextmanager
    def device(where: torch.device) -> Iterator[None]:
        happened.append(where)
        yield

    @contextmanager
    def graph(graph: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        happened.append(("capture", stream.device))
        yield

    def function(x: Tensor) -> tuple[Tensor]:
        if error is not None:
            raise error
        return (x + 1,)

    for name, fake in {"device": device, "graph": graph, "Stream": Stream, "CUDAGraph": Mock}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    cleared = lambda: happened.append("cleared")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", cleared, raising=False)
    monkeypatch.setattr(replay, "_capture_stream", replay._capture_stream.__wrapped__)
    second = torch.device("cuda", 1)
    with FakeTensorMode(), nullcontext() if error is None else pytest.raises(error):
        replay._capture(function, [torch.empty(2, device=second)])
    assert happened[:4] == [second, "cleared", ("capture", second), "cleared"]


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


def test_a_report_waits_for_the_stream_of_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    event, second = Mock(), torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "Event", Mock(return_value=event))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", device))
    with FakeTensorMode():
        value = torch.empty(2, device=second)
        report = Report(value)
        report.send(value)
    event.record.assert_called_once_with(("stream of", second))


def test_a_graph_needs_the_cuda_backend() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not use_graph(None, cpu, "cpu")
    assert not use_graph(False, gpu, "cuda")
    assert not use_graph(None, gpu, "reference")
    assert use_graph(None, gpu, "cuda")
    for device, backend in ((cpu, "cpu"), (gpu, "reference")):
        with pytest.raises(ValueError, match=f"graph=True needs .* got {device} and backend '{backend}'"):
            use_graph(True, device, backend)
