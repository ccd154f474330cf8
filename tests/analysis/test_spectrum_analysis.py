"""The randomised spectrum against the SVD of a dense Jacobian, and of matrices whose spectrum is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastnull.analysis.spectrum import LOGITS, along, jacobian_spectra, randomized_svd, spectrum_rows
from fastnull.encoder import FrozenEncoder
from fastnull.vit import NormalizedModel, split
from tests.vit.zoo import find


def dense(model: NormalizedModel, images: Tensor, depth: int | str) -> Tensor:
    """The stacked Jacobian [B·m, n] / √B by plain autograd, without the code under test."""
    vit = split(model)
    with torch.no_grad():
        clean = vit.patch(images)
    blocks = model.network.blocks[: depth if isinstance(depth, int) else None]

    def run(noise: Tensor) -> Tensor:
        tokens = vit.prepare(clean + noise)
        for block in blocks:
            tokens = block(tokens)
        return tokens if isinstance(depth, int) else vit.head(model.network.norm(tokens))

    jacobian = torch.autograd.functional.jacobian(run, torch.zeros_like(clean[0]))
    return jacobian.reshape(-1, clean[0].numel()) / math.sqrt(len(images))


def test_known_spectrum() -> None:
    source = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(60, 40, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0]
    values = 0.8 ** torch.arange(40, dtype=torch.float64)
    matrix = left * values @ right.T
    found, directions = randomized_svd(lambda v: v @ matrix.T, lambda u: u @ matrix, 40, 10, source, like=matrix)
    torch.testing.assert_close(found, values[:10], rtol=1e-3, atol=0)
    torch.testing.assert_close(directions @ directions.T, torch.eye(10, dtype=torch.float64))
    torch.testing.assert_close((directions @ matrix.T).norm(dim=1), found)


@pytest.mark.parametrize("depth", [1, 2, LOGITS])
def test_against_the_dense_jacobian(vit: NormalizedModel, images: Tensor, depth: int | str) -> None:
    model, pictures = vit.double(), images[:3].double()
    matrix = dense(model, pictures, depth)
    exact = torch.linalg.svdvals(matrix)
    size = matrix.shape[1]

    (whole,) = jacobian_spectra(model, pictures, size, depths=[depth])
    assert whole.rest < 1e-8
    kept = min(len(exact), len(whole.values))
    torch.testing.assert_close(whole.values[:kept], exact[:kept], rtol=1e-8, atol=1e-10)

    (part,) = jacobian_spectra(model, pictures, 20, depths=[depth], iterations=4)
    torch.testing.assert_close(part.values[:10], exact[:10], rtol=0.02, atol=0)
    energy = float(part.values.square().sum()) + (size - 20) * part.rest**2
    assert energy == pytest.approx(float(exact.square().sum()), rel=0.2)
    with torch.no_grad():
        output = model(pictures) if depth == LOGITS else None
    if output is not None:
        assert part.output == pytest.approx(float(output.square().sum(1).mean().sqrt()))
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_small_noise_moves_the_logits_as_predicted(vit: NormalizedModel, images: Tensor) -> None:
    (found,) = jacobian_spectra(vit, images, 8, depths=[LOGITS])
    encoder = FrozenEncoder(vit)
    tokens = encoder.embed(images)
    small = 1e-2 * found.directions[0].view(tokens.shape[1:])
    moved = (encoder(tokens + small) - encoder(tokens)).square().sum(1).mean().sqrt()
    assert float(moved) == pytest.approx(1e-2 * float(found.values[0]), rel=0.05)
    rows = along(encoder, found, images, [0.01, 1.0])
    kinds = {row["kind"]: row for row in rows if row["norm"] == pytest.approx(0.01)}
    assert kinds["strongest"]["influence"] > kinds["random"]["influence"]
    assert kinds["strongest"]["predicted"] == pytest.approx(0.01 * float(found.values[0]))
    assert kinds["random"]["predicted"] is None
    table = spectrum_rows([found])
    assert [row["index"] for row in table] == [*range(1, 9), None]
    assert table[0]["relative"] == pytest.approx(table[0]["value"] / found.output)


def test_a_model_of_another_library(images: Tensor) -> None:
    model = find("transformers", "ViT")
    model = type(model)(model.config).eval()  # with its initial weights
    spectra = jacobian_spectra(model, images[:2], 4)
    assert [found.depth for found in spectra] == [1, 2, LOGITS]
    # the residual branch has small weights: nearly the identity
    assert float(spectra[0].values[0]) == pytest.approx(1, rel=0.5)


def test_bad_requests(vit: NormalizedModel, images: Tensor) -> None:
    with pytest.raises(ValueError, match="rank must be >= 1"):
        jacobian_spectra(vit, images, 0)
    with pytest.raises(ValueError, match="block numbers 1 to 2 or 'logits'; got 3"):
        jacobian_spectra(vit, images, depths=[3])
    with pytest.raises(ValueError, match="site must be one of"):
        jacobian_spectra(vit, images, site="head")
