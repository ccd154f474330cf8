"""Launches of a block and passes over memory, counted on the cuda backend's path without a GPU.

A step runs on tensors without memory. Every operation that a GPU would run is recorded; a launcher tells which kernels
it launches. A pass is the memory of one activation [B, N, D] read or written once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed: pip install fastnull[triton]")

from fastnull.encoder.explicit.encoder import ExplicitEncoder
from fastnull.kernels import LAUNCHERS
from fastnull.ops import common, dispatch
from fastnull.vit import split
from tests.kernels.ahead_of_time import launches_of

IMAGES, WIDTH, TOKENS = 4, 32, 17  # of make_vit: 16 patches and a class token
PASS = IMAGES * TOKENS * WIDTH * 2  # bytes of an activation in float16


class Step(TorchDispatchMode):
    """Names of the launches, and for each name the bytes that it reads and writes (weights and statistics aside)."""

    def __init__(self, fused: Collection[str]) -> None:
        super().__init__()
        self.apart = {"linear_gelu_out", "linear_dgelu_out"} - {f"{name}_out" for name in fused}
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastnull":
            name = func._schema.name.split("::")[1]
            if name in self.apart:
                with self:
                    dispatch._LIBRARY[name](*args)
                return None
            launches = launches_of(lambda: LAUNCHERS[name](*args))
            self._record([launch.name for launch in launches], func, args, kwargs)
            return None
        result = func(*args, **kwargs)
        if not func.is_view and func._schema.name != "aten::empty":
            self._record([func._schema.name.split("::")[1]], func, args, kwargs)
        return result

    def _record(self, names: list[str], func: Any, args: Any, kwargs: Any) -> None:
        moved = 0
        for index, argument in enumerate(func._schema.arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            if isinstance(value, Tensor) and value.numel() % (IMAGES * TOKENS * WIDTH) == 0:
                in_place = argument.alias_info is not None and func._schema.name.endswith("_")
                moved += value.numel() * value.itemsize * (2 if in_place else 1)
        self.launches.update(names)
        self.bytes[names[0]] += moved


def step_of(make_vit: Callable[..., Any], depth: int, fused: tuple[str, ...]) -> Step:
    vit = split(make_vit(depth=depth, global_pool="avg").to("meta"))
    encoder = ExplicitEncoder(vit, vit.parts(), torch.float16)
    tokens, cotangent = (torch.empty(IMAGES, *rest, device="meta") for rest in ((TOKENS - 1, WIDTH), (10,)))
    with Step(fused) as step:
        encoder.input_gradient(tokens, "patch", lambda logits, images: (cotangent[images],), by_image=True)
    return step


ATTENTION = {"attention_kernel": 1, "attention_dqkv_kernel": 1}
COMMON = {"layer_norm_kernel": 2, "addmm": 1, "addmm_": 2, "layer_norm_dx_kernel": 2, **ATTENTION}
# Passes that a product makes in any case: it reads its input and writes its output.
PLAIN = {"addmm_": 1 + 1 + 4 + 1, "linear_gelu_kernel": 1 + 4, "linear_dgelu_kernel": 1 + 4}
# Beside COMMON: the products around GELU; launches in all; passes beside attention and plain products.
# 34 = norms 2 x 2 and 2 x 4, the stream read by two products 2, GELU and its derivative 2 x 10. Fused, GELU leaves 2 of
# its 10: its derivative is 4 times as wide as an activation, one byte a value.
CASES = {
    (): ({"mm": 5, "gelu_kernel": 1, "dgelu_kernel": 1}, 16, 34),
    ("linear_gelu",): ({"mm": 4, "linear_gelu_kernel": 1, "dgelu_kernel": 1}, 15, 26),
    ("linear_gelu", "linear_dgelu"): ({"mm": 3, "linear_gelu_kernel": 1, "linear_dgelu_kernel": 1}, 14, 18),
}


@pytest.mark.parametrize("fused", CASES)
def test_launches_and_passes_of_a_block(
    make_vit: Callable[..., Any], fused: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(common.NATIVE_DTYPES, "meta", common.NATIVE_DTYPES["cuda"])
    monkeypatch.setattr(common, "_gpu_serves", lambda device: True)
    deep, shallow = step_of(make_vit, 3, fused), step_of(make_vit, 2, fused)
    launches, moved = deep.launches - shallow.launches, deep.bytes - shallow.bytes
    of_products, count, passes = CASES[fused]
    assert launches == {**COMMON, **of_products}
    assert launches.total() == count
    counted = moved.keys() - {"mm", "addmm", *ATTENTION}
    assert sum(moved[name] / PASS - PLAIN.get(name, 0) for name in counted) == passes
