"""One step of universal synthesis: clean tokens and logits cached, forward at tokens + noise, objective, input gradient
summed over the batch, AdamW on the noise. The block products alone, in the same run, say what a step could at best be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from benchmarks.attention import fastest
from benchmarks.baselines import block_products, compile_problem, fastnull_step, frozen_step, in_dtype, published_step
from benchmarks.common import AGAIN, Case, Variant, dtypes, name_of, ratio
from benchmarks.models import make_images, make_model, make_start
from benchmarks.work import ViTShape, Work, noise_step
from fastnull.bench import BenchSettings, Row
from fastnull.encoder import FrozenEncoder
from fastnull.vit import split

CHUNK = 32
"""Images that the float64 reference takes at once: ViT-L at a batch of 256 would not fit a GPU."""
GRAPH = "fastnull, graph"
PRODUCTS = "products of all blocks"


def cases(settings: BenchSettings) -> Iterator[Case]:
    """A step for every model."""
    problem = compile_problem() if settings.compile else "torch.compile was left out"
    for name in settings.models:
        yield _case(name, make_model(name, settings), settings, problem)


def _case(name: str, model: nn.Module, settings: BenchSettings, problem: str) -> Case:
    images, start = make_images(model, settings.batch, settings), make_start(model, settings)
    shape = ViTShape.of(split(model))
    B = settings.batch
    variants = []
    products: dict[str, str] = {}  # dtype of the encoder → of its products
    cuda = torch.device(settings.device).type == "cuda"
    for dtype in dtypes(settings):
        attention = fastest(_packed(shape, B, dtype, settings.device)) if cuda else ""
        note = f"attention {attention}" if attention else ""
        encoder = FrozenEncoder(model, dtype=dtype)
        products[name_of(dtype)] = name_of(encoder.products)
        published = published_step(model, images, start, dtype)
        frozen = frozen_step(model, images, start, dtype, attention=attention)
        ours = fastnull_step(encoder, images, start)
        variants += [
            Variant("published", dtype, lambda i, step=published: step()),
            Variant("frozen", dtype, lambda i, step=frozen: step(), library=True, note=note),
            _compiled(model, images, start, dtype, settings, problem, attention),
            Variant(
                "fastnull",
                dtype,
                lambda i, step=ours: step(),
                twice=dtype == dtypes(settings)[-1],
                note=f"backend {encoder.backend}, products {products[name_of(dtype)]}",
            ),
        ]
        if cuda:
            graph = fastnull_step(encoder, images, start)
            variants.append(Variant(GRAPH, dtype, lambda i, step=graph: step(), graph=True, twice=True))
        work = Work(2 * shape.L * 24 * B * shape.N * shape.D**2)
        variants.append(Variant(PRODUCTS, dtype, block_products(model, B, dtype), work=work))
    if torch.float32 not in dtypes(settings):  # what was published is float32, whatever the others are
        step = published_step(model, images, start, torch.float32)
        variants.append(Variant("published", torch.float32, lambda i: step()))
    return Case(
        "encoder", name, "universal step", f"batch {B}, {shape.N} tokens, width {shape.D}", variants,
        ("published", torch.float32), reference=lambda: _reference(model, images, start),
        work=lambda dtype: noise_step(shape, B, dtype.itemsize), summary=lambda rows: _summary(name, rows, products),
    )  # fmt: skip


def _compiled(
    model: nn.Module,
    images: Tensor,
    start: Tensor,
    dtype: torch.dtype,
    settings: BenchSettings,
    problem: str,
    attention: str,
) -> Variant:
    """The compile happens in the judging call, before anything is timed."""
    if problem:
        return Variant("compiled", dtype, skip=problem)
    step = frozen_step(model, images, start, dtype, compiled=settings.compile_mode, attention=attention)
    note = f"mode {settings.compile_mode}" + (f", attention {attention}" if attention else "")
    return Variant("compiled", dtype, lambda i: step(), note=note)


def _packed(shape: ViTShape, B: int, dtype: torch.dtype, device: str) -> Tensor:
    """A random packed qkv of the model's shape, [B, N, 3, H, d]."""
    source = torch.Generator(device).manual_seed(0)
    size = (B, shape.N, 3, shape.H, shape.D // shape.H)
    return torch.randn(size, generator=source, device=device).to(dtype)


def _reference(model: nn.Module, images: Tensor, start: Tensor) -> Tensor:
    """The gradient in float64, of the clean tokens' own float64 values, summed over parts of the batch."""
    vit = in_dtype(model, torch.float64, trainable=False)
    noise = start.double().requires_grad_(True)
    gradient = torch.zeros_like(noise)
    for part in images.double().split(CHUNK):
        with torch.no_grad():
            tokens = vit.embed(part, "patch")
            clean = vit.logits(tokens, "patch")
        loss = (vit.logits(tokens + noise, "patch") - clean).norm(dim=1).sum() / len(images)
        gradient += torch.autograd.grad(loss, noise)[0]
    return gradient


def _summary(name: str, rows: Sequence[Row], products: Mapping[str, str]) -> list[str]:
    lines = []
    for kind in products:
        mine = (GRAPH if ratio(rows, (GRAPH, kind), (GRAPH, kind)) else "fastnull", kind)
        against = ratio(rows, ("published", "float32"), mine)
        if against is not None:
            lines.append(f"{name} {kind}: {against:.2f} x the speed of the published loop (float32)")
        best = [r for r in (ratio(rows, (b, kind), mine) for b in ("frozen", "compiled")) if r is not None]
        if best:
            lines.append(f"{name} {kind}: {min(best):.2f} x the speed of the better frozen baseline in {kind}")
        fraction = ratio(rows, (PRODUCTS, products[kind]), mine)
        if fraction is not None:
            lines.append(
                f"{name} {kind}: {PRODUCTS} alone, in {products[kind]}, take {100 * fraction:.0f} % of the step's time"
            )
        twin = ratio(rows, (mine[0] + AGAIN, kind), mine)
        if twin is not None:
            lines.append(f"{name} {kind}: the same step timed twice differs by {100 * abs(twin - 1):.1f} %")
    return lines
