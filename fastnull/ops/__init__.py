"""The ops, one per file: formula, plain-torch reference, registration and public function.

CPU tensors of float32 or bfloat16 use the C++ kernels if they are built, CUDA tensors of float32, bfloat16 or float16
the Triton kernels if Triton is installed, and all others the reference. Importing this package loads no native code.
`references` switches kernels off, all or by the names in OPS.
"""

from __future__ import annotations

from fastnull.ops.attention import attention, attention_dqkv
from fastnull.ops.common import OPS, references
from fastnull.ops.layer_norm import layer_norm, layer_norm_dx, layer_norm_stats
from fastnull.ops.linear_gelu import (
    derivative_dtype,
    dgelu_,
    gelu_,
    linear_dgelu,
    linear_gelu,
    linear_gelu_derivative,
)
from fastnull.ops.noise_objective import NoiseObjective, noise_objective
from fastnull.ops.noise_step import (
    AdamWState,
    adamw_step,
    boundary_gate,
    descent_gate,
    normalized_step,
    sign_step,
)
from fastnull.ops.patch_project import patch_project

__all__ = [
    "OPS",
    "AdamWState",
    "NoiseObjective",
    "adamw_step",
    "attention",
    "attention_dqkv",
    "boundary_gate",
    "derivative_dtype",
    "descent_gate",
    "dgelu_",
    "gelu_",
    "layer_norm",
    "layer_norm_dx",
    "layer_norm_stats",
    "linear_dgelu",
    "linear_gelu",
    "linear_gelu_derivative",
    "noise_objective",
    "normalized_step",
    "patch_project",
    "references",
    "sign_step",
]
