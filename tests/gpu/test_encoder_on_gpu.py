"""The cuda backend of the encoder and what runs on it: against the model in float64, and against the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastnull.augment import NullspaceAugment
from fastnull.encoder import FrozenEncoder
from fastnull.ops import references
from fastnull.synthesis import SynthesisConfig, measure_influence, replay, synthesize
from fastnull.synthesis.replay import conditional_nodes
from fastnull.vit import SITES, NormalizedModel
from tests.encoder.test_frozen import FEATURES, cosines, exact, loud, relative
from tests.gpu.place import DEVICE, DTYPES, GPU, needs_gpu

pytestmark = needs_gpu
Factory = Callable[..., NormalizedModel]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 2e-2}


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("feature", FEATURES)
def test_the_backend_is_the_model(make_vit: Factory, feature: str, site: str) -> None:
    settings = {"depth": 3, **FEATURES[feature]}
    model = loud(make_vit(**settings))
    images, cotangent = torch.rand(3, 3, *settings.get("img_size", (16, 16))), torch.randn(3, 10)
    tokens, logits, gradient = (value.to(DEVICE) for value in exact(model, images, cotangent, site))
    model = model.to(DEVICE)
    for dtype in DTYPES:
        frozen = FrozenEncoder(model, dtype=dtype, backend=DEVICE, site=site)
        assert frozen.backend == DEVICE
        assert relative(frozen.embed(images.to(DEVICE)), tokens) < BOUND[dtype]
        got_logits, got_gradient = frozen.input_gradient(tokens.to(dtype), cotangent.to(DEVICE))
        assert relative(frozen(tokens.to(dtype)), logits) < BOUND[dtype]
        assert relative(got_logits, logits) < BOUND[dtype]
        assert relative(got_gradient, gradient) < BOUND[dtype]
        assert cosines(got_gradient, gradient).min() > (1 - 1e-9 if dtype == torch.float32 else 0.999)


@pytest.mark.parametrize("grid", [7, 8, 14, 16, 24])
def test_token_counts_of_real_models(make_vit: Factory, grid: int) -> None:
    model = loud(make_vit(img_size=4 * grid, embed_dim=128, num_heads=2))
    images, cotangent = torch.rand(2, 3, 4 * grid, 4 * grid), torch.randn(2, 10)
    tokens, logits, gradient = (value.to(DEVICE) for value in exact(model, images, cotangent, "patch"))
    for dtype in DTYPES:
        frozen = FrozenEncoder(model.to(DEVICE), dtype=dtype, backend=DEVICE)
        got = frozen.input_gradient(tokens.to(dtype), cotangent.to(DEVICE))
        assert relative(got[0], logits) < BOUND[dtype]
        assert cosines(got[1], gradient).min() > (1 - 1e-9 if dtype == torch.float32 else 0.999)


def test_auto_takes_the_backend_and_the_switch_replaces_its_kernels(make_vit: Factory) -> None:
    model, images = make_vit().to(DEVICE), torch.rand(4, 3, 16, 16, device=DEVICE)
    frozen = FrozenEncoder(model)
    assert frozen.backend == DEVICE
    logits = frozen(frozen.embed(images))
    torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-4)
    with references():
        torch.testing.assert_close(frozen(frozen.embed(images)), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not GPU, reason="CUDA graphs")
def test_a_step_is_captured_and_replayed(make_vit: Factory) -> None:
    """Nothing in a step waits for the device, so a graph holds it; new tokens go in through the captured memory."""
    model = make_vit().to(DEVICE)
    frozen = FrozenEncoder(model, dtype=torch.bfloat16)
    tokens = frozen.embed(torch.rand(4, 3, 16, 16, device=DEVICE))
    cotangent = torch.randn(4, 10, device=DEVICE)
    for _ in range(3):
        frozen.input_gradient(tokens, cotangent)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = frozen.input_gradient(tokens, cotangent)
    tokens.copy_(frozen.embed(torch.rand(4, 3, 16, 16, device=DEVICE)))
    expected = frozen.input_gradient(tokens, cotangent)
    graph.replay()
    for mine, eager in zip(captured, expected, strict=True):
        torch.testing.assert_close(mine, eager, rtol=2e-2, atol=1e-3)


@pytest.mark.skipif(not GPU, reason="CUDA graphs")
@pytest.mark.parametrize("conditional", [False, True])
def test_a_run_in_a_graph_is_the_eager_run(
    make_vit: Factory, conditional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with steps in vain at its end: masked ones, and ones that the device leaves out."""
    if conditional and not conditional_nodes(torch.device(DEVICE, torch.cuda.current_device())):
        pytest.skip(f"torch {torch.__version__} has no conditional nodes on this GPU")
    monkeypatch.setattr(replay, "conditional_nodes", lambda device: conditional)
    encoder = FrozenEncoder(make_vit(depth=3).to(DEVICE), dtype=torch.bfloat16)
    images = [torch.rand(16, 3, 16, 16, device=DEVICE) for _ in range(3)]
    config = SynthesisConfig(limit=0.5, lr=0.01, steps=12, stop="never", schedule="constant", graph=False)
    eps = 1.05 * min(record["influence"] for record in synthesize(encoder, images, config).history)
    config = replace(config, steps=40, stop="batch", eps=eps)
    eager, replayed = (synthesize(encoder, images, replace(config, graph=graph)) for graph in (False, True))
    assert replayed.tokens.equal(eager.tokens)
    assert replayed.steps.equal(eager.steps)
    assert len(replayed.history) > len(eager.history)


@pytest.mark.skipif(not GPU, reason="CUDA graphs")
def test_graphs_of_several_batch_sizes_are_the_eager_run_and_leave_no_memory(make_vit: Factory) -> None:
    encoder = FrozenEncoder(make_vit(depth=3).to(DEVICE), dtype=torch.bfloat16)
    batches = list(torch.rand(104, 3, 16, 16, device=DEVICE).split([10, 64, 10, 10, 10]))
    config = SynthesisConfig(mode="per_image", steps=3, graph=True)
    eager = synthesize(encoder, batches, replace(config, graph=False))
    held = []
    for _ in range(4):
        with pytest.warns(UserWarning, match="another shape"):
            assert synthesize(encoder, batches, config).tokens.equal(eager.tokens)
        held.append(torch.cuda.memory_allocated())
    assert held[3] <= held[1], "a workspace of cuBLAS stays for every capture"


@pytest.mark.skipif(not GPU, reason="CUDA graphs")
def test_memory_is_fixed_after_the_first_steps(make_vit: Factory) -> None:
    encoder = FrozenEncoder(make_vit().to(DEVICE), dtype=torch.bfloat16)
    images = [torch.rand(8, 3, 16, 16, device=DEVICE)]
    peaks = []
    for steps in (100, 10_000):
        torch.cuda.reset_peak_memory_stats()
        synthesize(encoder, images, SynthesisConfig(steps=steps, stop="never", limit=1.0), check=images)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] - peaks[0] <= 10_000 * 32, "the records and rates of 10,000 steps, and nothing a step"


@pytest.mark.skipif(not GPU, reason="reads torch's CUDA allocator")
def test_a_step_asks_for_no_more_memory_than_the_last(make_vit: Factory) -> None:
    frozen = FrozenEncoder(make_vit(depth=4).to(DEVICE), dtype=torch.bfloat16)
    tokens, cotangent = frozen.embed(torch.rand(64, 3, 16, 16, device=DEVICE)), torch.randn(64, 10, device=DEVICE)
    for _ in range(2):
        frozen.input_gradient(tokens, cotangent)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    frozen.input_gradient(tokens, cotangent)
    assert torch.cuda.memory_allocated() == held
    # the last block's passes over the tokens, the site's gradient and its copy
    assert torch.cuda.max_memory_allocated() - held <= 10 * 64 * 17 * 32 * 2 + 2**20


@pytest.mark.parametrize("mode", ["universal", "per_image", "boundary"])
def test_synthesis_is_the_cpus(make_vit: Factory, mode: str) -> None:
    """The same start and steps in float32: the noise differs by what rounding grows to."""
    model = make_vit()
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    config = SynthesisConfig(mode=mode, limit=1.0, steps=5, eps=0.02, lr=0.05, stop="never", schedule="constant")
    found = []
    for device in ("cpu", DEVICE):
        placed = copy.deepcopy(model).to(device)
        noise = synthesize(placed, images.to(device), config)
        found.append(noise.tokens.float().cpu())
        assert noise.tokens.isfinite().all()
    error = ((found[0] - found[1]).norm() / found[0].norm()).item()
    assert error < 1e-3, error


def test_boundary_noise_in_pixels_lies_on_the_boundary(make_vit: Factory) -> None:
    model = make_vit().to(DEVICE).train()
    aug = NullspaceAugment(model, "boundary", site="pixels", eps=0.1)
    images, labels = torch.rand(8, 3, 16, 16, device=DEVICE), torch.arange(8, device=DEVICE)
    loss, logits = aug.loss(images, labels, torch.nn.CrossEntropyLoss())
    loss.backward()
    assert loss.isfinite()
    assert logits.device.type == DEVICE
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_bfloat16_synthesis_keeps_influence_and_norm(make_vit: Factory) -> None:
    """30 steps in bfloat16 end within 2 % of float32's influence and norm, both judged in float32."""
    model: Any = make_vit(depth=4).to(DEVICE)
    images = torch.rand(32, 3, 16, 16, device=DEVICE)
    config = SynthesisConfig(limit=0.5, steps=30, lr=0.01, eps=1e-9, stop="never", schedule="constant")
    judge = FrozenEncoder(model, dtype=torch.float32)
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        noise = synthesize(FrozenEncoder(model, dtype=dtype), images, config)
        ends.append((float(measure_influence(judge, noise, images).mean()), float(noise.tokens.float().norm())))
    assert ends[0][0] > 1e-5, "an influence of nothing but rounding"
    assert ends[1][0] == pytest.approx(ends[0][0], rel=0.02)
    assert ends[1][1] == pytest.approx(ends[0][1], rel=0.02)
