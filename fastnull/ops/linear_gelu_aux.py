"""`linear_gelu` and `linear_dgelu` with GELU in the epilogue of the library's product; tanh form alone, z is kept.

    z = x W^T + b;  h = gelu(z)                                              (forward, W of the first linear)
    dz = (dy W) * gelu'(z)                                                   (backward, W of the second linear)

On a GPU, where csrc/cuda is asked for: cublasLt's epilogues GELU_AUX_BIAS and DGELU, which save the pass over h and the
one over dz. They keep z, 2 bytes an element in place of the one-byte derivative of ops/linear_gelu, and know no erf
form. Everywhere else, product and pass of torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnull.ops.common import define, use_native

DTYPES = (torch.bfloat16, torch.float16)


def linear_gelu_aux_ref(x: Tensor, weight: Tensor, bias: Tensor, h: Tensor, z: Tensor) -> None:
    """`linear_gelu_aux` in plain torch."""
    torch.addmm(bias, x, weight.t(), out=z)
    h.copy_(F.gelu(z, approximate="tanh"))


def linear_dgelu_aux_ref(dy: Tensor, weight: Tensor, z: Tensor, dz: Tensor) -> None:
    """`linear_dgelu_aux` in plain torch."""
    dz.copy_(torch.ops.aten.gelu_backward(dy @ weight, z, approximate="tanh"))


define(
    "linear_gelu_aux_out(Tensor x, Tensor weight, Tensor bias, Tensor(a!) h, Tensor(b!) z) -> ()", linear_gelu_aux_ref
)
define("linear_dgelu_aux_out(Tensor dy, Tensor weight, Tensor z, Tensor(a!) dz) -> ()", linear_dgelu_aux_ref)


def keeps_z(approximate: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether an MLP with this GELU is to run on the two functions below: on a GPU for which csrc/cuda is chosen.

    Raises:
        RuntimeError: FASTNULL_CUDA_OPS asks for kernels that were not built.
    """
    if approximate != "tanh" or device.type != "cuda" or dtype not in DTYPES:
        return False
    if not use_native("linear_gelu", torch.empty(0, dtype=dtype, device=device)):
        return False
    from fastnull.kernels import choice

    return choice.served_by_cuda("linear_gelu", device)


def linear_gelu_aux(x: Tensor, weight: Tensor, bias: Tensor, *, h: Tensor, z: Tensor) -> Tensor:
    """h = gelu(z), z = x W^T + b; no autograd.

    Args:
        x: [M, K], as all of these dense and of one dtype.
        weight: [D, K].
        bias: [D].
        h: [M, D], written.
        z: [M, D], written.

    Returns:
        h.
    """
    if use_native("linear_gelu", x):
        torch.ops.fastnull.linear_gelu_aux_out(x, weight, bias, h, z)
    else:
        linear_gelu_aux_ref(x, weight, bias, h, z)
    return h


def linear_dgelu_aux(dy: Tensor, weight: Tensor, z: Tensor, *, out: Tensor) -> Tensor:
    """dz = (dy W) * gelu'(z); no autograd.

    Args:
        dy: [M, K], as all of these dense and of one dtype.
        weight: [K, D] of the linear after the GELU.
        z: [M, D], as `linear_gelu_aux` wrote it.
        out: [M, D], written.

    Returns:
        out.
    """
    if use_native("linear_gelu", dy):
        torch.ops.fastnull.linear_dgelu_aux_out(dy, weight, z, out)
    else:
        linear_dgelu_aux_ref(dy, weight, z, out)
    return out
