"""Every op at the sizes of real ViTs on the GPU, against float64; the small and odd sizes are in tests/kernels.

Buffers of the ops are filled with NaN before; a result may err twice as much as torch's own in its dtype.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastnull import ops, testing
from fastnull.ops.linear_gelu import decode_derivative, encode_derivative, gelu_ref
from fastnull.ops.patch_project import patch_project_ref
from tests.gpu.place import DEVICE, DTYPES, needs_gpu, randn
from tests.ops import checks

pytestmark = needs_gpu

# tokens and heads: B/32, a tile and one key, /16, /14, /16 at 384 pixels; heads of 32, and of 160: torch's attention
ATTENTION = [(50, 3, 64), (65, 2, 64), (197, 3, 64), (257, 2, 64), (577, 1, 64), (197, 2, 32), (50, 1, 160)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "width"), ATTENTION)
def test_attention(tokens: int, heads: int, width: int, dtype: torch.dtype) -> None:
    """From the tokens on; 3 images, odd on purpose."""
    qkv = randn(3, tokens, 3, heads, width, dtype=dtype)
    grad_o = randn(3, tokens, heads, width, dtype=dtype, seed=1)
    checks.attention(qkv, grad_o, 0.2)
    once, again = (ops.attention_dqkv(qkv, grad_o, 0.2) for _ in range(2))
    assert once.equal(again), "runs repeat bit for bit"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [384, 768, 1024, 1280])
def test_layer_norm(width: int, dtype: torch.dtype) -> None:
    x, dxhat, dres = (randn(3, 197, width, dtype=dtype, seed=seed) for seed in range(3))
    checks.layer_norm_gradient(x, dxhat, dres)
    checks.layer_norm(x, None, None, randn(width, seed=3))


@pytest.mark.parametrize("kind", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_gelu(dtype: torch.dtype, kind: str) -> None:
    x, w, bias = randn(591, 384, dtype=dtype), randn(1536, 384, dtype=dtype, seed=1) / 20, randn(1536, seed=2)
    dy, w2 = randn(591, 384, dtype=dtype, seed=3), randn(384, 1536, dtype=dtype, seed=4) / 20
    with testing.poisoned():
        h, derivative = ops.linear_gelu_derivative(x, w, bias, kind)
        dz = ops.linear_dgelu(dy, w2, derivative)
    exact, slope = gelu_ref(F.linear(x.double(), w.double(), bias.double()), None, kind)
    torchs = F.gelu(F.linear(x, w, bias.to(dtype)), approximate=kind)
    testing.assert_within_budget(h, exact, torchs, "h")
    kept = decode_derivative(derivative, torch.float64)
    # of a 16-bit z: its rounding, times the largest gelu'' (1.13), and half a code of 0.005
    rounding = torch.finfo(dtype).eps * F.linear(x, w, bias.to(dtype)).abs().max().item()
    assert (kept - slope).abs().max() <= 1.2 * rounding + (0.0026 if derivative.dtype == torch.uint8 else 1e-5)
    testing.assert_gradient_close(dz, dy.double() @ w2.double() * kept, dy @ w2 * kept.to(dtype), "dz")


@pytest.mark.parametrize("kind", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
def test_products_with_a_pass_in_their_epilogue(dtype: torch.dtype, kind: str) -> None:
    """linear + GELU and its input gradient, against the product and the pass."""
    x, w, bias = randn(591, 384, dtype=dtype), randn(1536, 384, dtype=dtype, seed=1) / 20, randn(1536, seed=2)
    dy, w2 = randn(591, 384, dtype=dtype, seed=3), randn(384, 1536, dtype=dtype, seed=4) / 20
    h, dz = (torch.full((591, 1536), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2))
    code = torch.zeros(591, 1536, dtype=torch.uint8, device=DEVICE)
    torch.ops.fastnull.linear_gelu_out(x, w, bias, kind == "tanh", h, code)
    exact, slope = gelu_ref(F.linear(x.double(), w.double(), bias.double()), None, kind)
    testing.assert_within_budget(h, exact, F.gelu(F.linear(x, w, bias.to(dtype)), approximate=kind), "h")
    kept = decode_derivative(code, torch.float64)
    rounding = torch.finfo(dtype).eps * exact.abs().max().item()  # a reference's z is rounded
    assert (kept - slope).abs().max() <= 0.0026 + 1.2 * rounding
    torch.ops.fastnull.linear_dgelu_out(dy, w2, code, dz)
    testing.assert_gradient_close(dz, dy.double() @ w2.double() * kept, dy @ w2 * kept.to(dtype), "dz")


@pytest.mark.parametrize("complement", [True, False])
@pytest.mark.parametrize("patch", [16, 32])
def test_patch_project(patch: int, complement: bool) -> None:
    """Leak of float32 noise through the embedding: at most 1e-6 of the noise's own size."""
    images, rows = torch.rand(3, 3, 224, 224, device=DEVICE), 3 * patch**2
    noise = randn(3, 3, 224, 224)
    whole = torch.linalg.qr(randn(rows, rows).double()).Q
    seen, unseen = whole[:, : rows // 4].contiguous(), whole[:, rows // 4 :].contiguous()
    basis = seen if complement else unseen
    with testing.poisoned():
        result = ops.patch_project(noise, basis.float(), patch, complement)
        added = ops.patch_project(noise, basis.float(), patch, complement, images)
    exact = patch_project_ref(noise.double(), basis, patch, complement)
    torchs = patch_project_ref(noise, basis.float(), patch, complement)
    testing.assert_within_budget(result, exact, torchs, "projection")
    torch.testing.assert_close(added, result + images, rtol=0, atol=1e-6)
    leak = F.unfold(result.double(), patch, stride=patch).transpose(1, 2) @ seen
    assert leak.abs().max() <= 1e-6 * F.unfold(noise, patch, stride=patch).norm(dim=1).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["l2", "l2_squared"])
def test_noise_objective(kind: str, dtype: torch.dtype) -> None:
    clean, noisy = randn(37, 1000, dtype=dtype), randn(74, 1000, dtype=dtype, seed=1)
    with testing.poisoned():
        mine = ops.noise_objective(clean, noisy, kind, groups=2)
    with ops.references():
        exact = ops.noise_objective(clean.double(), noisy.double(), kind, groups=2)
        torchs = ops.noise_objective(clean, noisy, kind, groups=2)
    for name in ("loss", "cotangent", "influence", "mean_loss", "mean_influence"):
        values = (getattr(result, name) for result in (mine, exact, torchs))
        testing.assert_within_budget(*values, name)


@pytest.mark.parametrize("step", [ops.adamw_step, ops.normalized_step, ops.sign_step])
def test_noise_steps(step: object) -> None:
    """Three noises: one descends, one stays bit for bit, one ascends."""
    start, gate = randn(3, 196, 384), torch.tensor([1.0, 0.0, -1.0], device=DEVICE)
    results = []
    for dtype in (torch.float32, torch.float64):
        noise = start.to(dtype, copy=True)
        state = (ops.AdamWState.zeros(noise),) if step is ops.adamw_step else ()
        for seed in range(3):
            step(noise, randn(3, 196, 384, seed=seed).to(dtype), *state, gate, lr=0.1)  # type: ignore[operator]
        results.append(noise)
    assert results[0][1].equal(start[1])
    assert not results[0][0].equal(start[0])
    torch.testing.assert_close(results[0].double(), results[1], rtol=0, atol=2e-6)


def test_opcheck() -> None:
    """Schema, fake and dispatch of every op on tensors of the device."""
    x, wide, stat = randn(1, 4, 64), randn(1, 4, 64), torch.empty(4, device=DEVICE)
    qkv, o = randn(1, 5, 3, 2, 16), randn(1, 5, 2, 16)
    code = encode_derivative(torch.zeros(4, 64, device=DEVICE))
    noise, gate = randn(2, 8), torch.ones(2, device=DEVICE)
    lr, steps = (
        torch.full((2,), 0.1, dtype=torch.float64, device=DEVICE),
        torch.ones(2, dtype=torch.int64, device=DEVICE),
    )
    images, basis = randn(1, 1, 4, 4), torch.linalg.qr(randn(4, 2)).Q.contiguous()
    loss = torch.empty(2, device=DEVICE)
    half = x[0].bfloat16()
    weight, hidden = randn(64, 64, dtype=torch.bfloat16), torch.empty_like(half)
    for name, arguments in {
        "layer_norm_out": (x, None, None, None, 1e-6, torch.empty_like(x), stat, stat.clone()),
        "layer_norm_dx_out": (x, wide, stat.fill_(0), stat.clone().fill_(1), None, torch.empty_like(x)),
        "gelu_out": (x, None, False, torch.empty_like(x), code),
        "dgelu_": (x.clone(), code),
        "attention_out": (qkv, 0.25, o.clone()),
        "attention_dqkv_out": (qkv, o, 0.25, torch.empty_like(qkv)),
        "patch_project_out": (images, basis, 2, True, None, torch.empty_like(images)),
        "noise_objective_out": (noise, noise.clone(), False, 1.0, loss, torch.empty_like(noise), loss.clone()),
        "adamw_step_": (noise, noise.clone(), noise.clone(), noise.abs(), steps, gate, lr, 0.9, 0.999, 1e-8, 0.0),
        "direct_step_": (noise, noise.clone(), gate, lr, True),
        "linear_gelu_out": (half, weight, None, False, hidden, code),
        "linear_dgelu_out": (half, weight, code, hidden),
    }.items():
        testing.opcheck(name, arguments)
