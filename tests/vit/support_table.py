"""Writes docs/models.md: what fastnull can do with each kind of model, found out by doing it.

python tests/vit/support_table.py        rewrite the page
"""

from __future__ import annotations

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

HEAD = """# Models

What fastnull can do with each kind of model. `tests/vit/support_table.py` writes this page: it builds a small one of
each and tries; a test compares.

- **Sites**: where noise can be added, with the model's own logits bit for bit where it is zero.
- **Encoder**: `written out` has the fast forward and input gradient; `reference` runs the model under autograd, which
  works everywhere, is slower, and is said once.
- **Nullspace**: `PatchNullspace` (exact; there is one where the width is below the values of a patch).

"""

TAIL = """
## What is proven when an encoder is made

The written-out encoder reads weights and never calls the model's modules, so it must be sure that this is the same
thing. `FrozenEncoder` (and `NullspaceAugment`, `synthesize`, which make one) takes it only if

1. every module is what its class says: its class comes from torch, timm, transformers, torchvision or open_clip, no
   method of it was replaced on the instance (accelerate's autocast wrapper is known), it has no parametrised weights
   and no hooks (those of FSDP, of output recording and of wandb are known), and linears, norms and the patch embedding
   are torch's own;
2. logits and input gradient of two random images are the model's own under autograd: within 3e-4 and 3e-3 of their size
   in float32, within 0.1 and 0.3 in bfloat16. This costs one forward and backward of two images.

Else the encoder runs on `reference`, and one warning names the first part that differs: adapters of PEFT and loralib,
quantised layers and pruning run there. A forced backend raises `UnsupportedModelError`.

`encoder.sync()` takes over all weights, and noise is synced at every draw: fused optimisers, writes through `.data` and
`load_state_dict(assign=True)` leave no trace that could be relied on. It also compares the identities of modules, hooks
and parameters; where one changed (a new head, an injected adapter, a hook) the model is split and proven anew.

A training forward that should have had noise and had none raises `RuntimeError`, whatever modes, freezing, compilation
or checkpointing are inside the model. Whether noise is on is decided by the mode of the model that is called.

## Names

In transformers the classifiers (`...ForImageClassification`) are meant; names before and after the renaming of
release 5.9 are both known. Wrap them, `NormalizedModel(model, mean, std)`, with the mean and std of their image
processor: then they take pixels in [0, 1] and return plain logits, as `finetune` and `evaluate` want it. A backbone
without a classifier of its own, such as `DINOv3ViTModel`, goes into `fastnull.vit.PooledClassifier(backbone, classes)`.
Of an open_clip model pass `model.visual`.

Commands take timm's names. `fastnull inspect` takes the others too, `torchvision:vit_b_16`, `open_clip:ViT-B-32` and
`transformers:FOLDER` (with its config.json); in Python it is `fastnull.nullspace.inspection.inspect_model(model)`.

Another model: name its modules.

```python
import torch
from torch import nn
import fastnull
from fastnull import SynthesisConfig, synthesize
from fastnull.vit import HookedViT


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = fastnull.create_model("vit_digits").network

    def forward(self, images):
        return self.backbone(images)


vit = HookedViT(Mine(), patch="backbone.patch_embed", block0="backbone.norm_pre", image_size=(16, 16))
noise = synthesize(vit, torch.rand(8, 3, 16, 16), SynthesisConfig(mode="universal", limit=1.0, steps=3))
```

Without tokens (`site="pixels"`) any model that maps images to logits works as it is.
"""


def missing(kind: Kind) -> str:
    """Why a kind cannot be built here, or an empty string."""
    try:
        __import__(kind.library)
    except ImportError:
        return f"{kind.library} is not installed"
    except RuntimeError:  # a torchvision of another torch: fastnull.compat helps it when the model is built
        pass
    return ""


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
    """The whole page."""
    titles = ["library", "model", "sites", "encoder", "nullspace"]
    lines = ["| " + " | ".join(cells) + " |" for cells in [titles, ["---"] * len(titles), *rows]]
    return HEAD + "\n".join(lines) + "\n" + TAIL


if __name__ == "__main__":
    absent = sorted({reason for kind in KINDS if (reason := missing(kind))})
    if absent:
        sys.exit(f"the table needs every library: {', '.join(absent)}")
    PAGE.write_text(page([row(kind) for kind in KINDS]), encoding="utf-8")
