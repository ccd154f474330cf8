"""Writes the table of docs/models.md: what fastnull supports for each kind of model, found by trying it.

python tests/vit/support_table.py        rewrite the table
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from fastnull import PatchNullspace
from fastnull.encoder import FrozenEncoder
from fastnull.vit import SITES
from fastnull.vit.base import logits_of
from fastnull.vit.parts import UnsupportedModelError
from fastnull.vit.split import as_split
from tests.vit.zoo import KINDS, Kind

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def images_for(model: nn.Module) -> torch.Tensor:
    """Two images [2, C, H, W] of the size that the model wants."""
    vit = as_split(model, "pixels")
    return torch.rand(2, vit.channels, *(vit.image_size or (32, 32)), generator=torch.Generator().manual_seed(0))


def sites(model: nn.Module) -> list[str]:
    """The sites whose tensor gives the model's logits, bit for bit."""
    images, found = images_for(model), []
    with torch.no_grad():
        expected = logits_of(model(images))
        for site in SITES:
            try:
                vit = as_split(model, site)
                logits = vit.logits(vit.embed(images, site), site)
            except ValueError:
                continue
            assert torch.equal(logits, expected), f"{type(model).__name__}: site {site}"
            found.append(site)
    return found


def row(kind: Kind) -> list[str]:
    """A line of the table."""
    model = kind.model()
    found = sites(model)
    try:
        as_split(model, "pixels").parts()
        encoder = "written out"
    except UnsupportedModelError as reason:
        encoder = f"reference ({reason})"
    try:
        PatchNullspace.from_model(model)
        nullspace = "yes"
    except ValueError:
        nullspace = "no"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert FrozenEncoder(model, site=found[0]).site == found[0]
    return [kind.library, kind.name, ", ".join(found), encoder, nullspace]


def page(rows: list[list[str]]) -> str:
    """docs/models.md with these rows in its table."""
    titles = ["library", "model", "sites", "encoder", "nullspace"]
    lines = ["| " + " | ".join(cells) + " |\n" for cells in [titles, ["---"] * len(titles), *rows]]
    return re.sub(
        r"(^\|.*\n)+", lambda _: "".join(lines), PAGE.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE
    )


if __name__ == "__main__":
    absent = sorted({reason for kind in KINDS if (reason := kind.missing())})
    if absent:
        sys.exit(f"the table needs every library: {', '.join(absent)}")
    PAGE.write_text(page([row(kind) for kind in KINDS]), encoding="utf-8")
