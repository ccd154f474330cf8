"""The Triton kernels of the ops.

Each op has one file with its table of tiles, kernels and launchers. A launcher has the arguments of its
`torch.ops.fastnull` op and writes into the given tensors. fastnull.ops imports this package at the first CUDA tensor;
fastnull/ops/dispatch.py chooses the implementation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from fastnull.kernels import (
    attention,
    gelu,
    layer_norm,
    linear_gelu,
    noise,
    patch_project,
)
from fastnull.kernels.tiles import Change
from fastnull.ops.noise_objective import means_after

LAUNCHERS: dict[str, Callable[..., None]] = {
    "layer_norm_out": layer_norm.layer_norm_out,
    "layer_norm_dx_out": layer_norm.layer_norm_dx_out,
    "gelu_out": gelu.gelu_out,
    "dgelu_": gelu.dgelu_,
    "linear_gelu_out": linear_gelu.linear_gelu_out,
    "linear_dgelu_out": linear_gelu.linear_dgelu_out,
    "attention_out": attention.attention_out,
    "attention_dqkv_out": attention.attention_dqkv_out,
    "patch_project_out": patch_project.patch_project_out,
    "noise_objective_out": noise.noise_objective_out,
    "noise_objective_means_out": functools.partial(means_after, noise.noise_objective_out),
    "adamw_step_": noise.adamw_step_,
    "direct_step_": noise.direct_step_,
}

CANDIDATES: dict[str, Sequence[Change]] = {
    "layer_norm_out": layer_norm.CANDIDATES,
    "layer_norm_dx_out": layer_norm.CANDIDATES,
    "gelu_out": gelu.CANDIDATES,
    "dgelu_": gelu.CANDIDATES,
    "linear_gelu_out": linear_gelu.CANDIDATES,
    "linear_dgelu_out": linear_gelu.CANDIDATES,
    "attention_out": attention.CANDIDATES,
    "attention_dqkv_out": attention.CANDIDATES,
    "patch_project_out": patch_project.CANDIDATES,
}
"""Op → changes to the tiles of its kernels to try."""
