"""The result of a synthesis, and its file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastnull.checks import as_type, check_finite
from fastnull.vit.base import check_site

FORMAT = "fastnull-noise-1"
_FLOATING = ("of a floating dtype", lambda dtype: dtype.is_floating_point and dtype.itemsize > 1)
_KINDS: dict[str, tuple[str, Callable[[torch.dtype], bool]]] = {
    "tokens": _FLOATING,
    "influence": _FLOATING,
    "norm": _FLOATING,
    "converged": ("bool", lambda dtype: dtype == torch.bool),
    "steps": ("int64", lambda dtype: dtype == torch.int64),
}
_TENSORS = tuple(_KINDS)


@dataclass(frozen=True)
class Noise:
    """M noises with their measurements.

    Attributes:
        tokens: [M, ...], shaped like the site's tensor without its batch: [M, N, D] at the token sites.
        influence: [M], mean over the check images (or for the noise's own image) of the sum over classes of (p − p̃)².
        norm: [M], the L2 norm.
        converged: [M], bool: influence below ε (boundary: within a factor of two of ε).
        steps: [M], updates made.
        site: one of fastnull.vit.SITES.
        metadata: configuration, check set and provenance, as JSON values.
        history: a record per step (step, loss, influence, norm), not saved.
    """

    tokens: Tensor
    influence: Tensor
    norm: Tensor
    converged: Tensor
    steps: Tensor
    site: str
    metadata: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.tokens)

    def permuted(self, seed: int = 0) -> Noise:
        """A control of equal norm: the elements of each noise are shuffled, and the influence is NaN until measured.

        Source: the published code's permuted control.
        """
        source = torch.Generator().manual_seed(seed)
        flat = self.tokens.flatten(1)
        rows = [row[torch.randperm(row.numel(), generator=source).to(row.device)] for row in flat]
        tokens = torch.stack(rows).view_as(self.tokens) if rows else self.tokens.clone()
        unknown = torch.full_like(self.influence, float("nan"))
        return replace(self, tokens=tokens, influence=unknown, converged=torch.zeros_like(self.converged))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file. Raises ValueError if the noise is not finite."""
        from fastnull.tensor_files import write_tensors

        check_finite("noise", self.tokens)
        metadata = {"format": FORMAT, "site": self.site, "metadata": json.dumps(self.metadata)}
        write_tensors(path, {name: getattr(self, name) for name in _TENSORS}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Noise:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: truncated, not safetensors (such as a pickle), from another program, or invalid values.
        """
        from safetensors import SafetensorError, safe_open

        if not os.path.isfile(path):
            raise FileNotFoundError(f"no noise file at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise ValueError(f"{path} is not a noise file of fastnull (format {header.get('format')!r})")
                missing = [name for name in _TENSORS if name not in file.keys()]  # noqa: SIM118 (not a dict)
                if missing:
                    raise ValueError(f"{path} lacks {', '.join(missing)}")
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
                header = {name: header.get(name, "") for name in ("site", "metadata")}
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a safetensors file (a pickle?): {error}") from error
        check_noise(tensors, str(path))
        try:
            metadata = as_type("metadata", json.loads(header["metadata"]), dict[str, Any])
            return cls(**tensors, site=check_site(header["site"]), metadata=metadata)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} has an invalid header: {error}") from error


def check_noise(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError unless the five tensors of a Noise, by name, have valid dtypes, shapes and values.

    `source` is where they come from, for the message.
    """
    for name, (kind, fits) in _KINDS.items():
        tensor = tensors[name]
        if not fits(tensor.dtype):
            raise ValueError(f"{source}: {name} must be {kind}; it is {tensor.dtype}")
        if tensor.ndim < 3 if name == "tokens" else tensor.ndim != 1:
            shape = "[M, N, D] or [M, C, H, W]" if name == "tokens" else "[M]"
            raise ValueError(f"{source}: {name} must have shape {shape}; it is {list(tensor.shape)}")
    check_finite(f"noise in {source}", tensors["tokens"])
    counts = {name: len(tensors[name]) for name in _KINDS}
    if len(set(counts.values())) != 1:
        raise ValueError(f"{source} holds different numbers of noises: {counts}")
