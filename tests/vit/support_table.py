"""Writes docs/models.md: what fastnull supports for each kind of model, found by trying it.

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

HEAD = """# Your model

What fastnull supports for each kind of model. `tests/vit/support_table.py` generates this page: it builds a small model
of each kind and tries it, and a test compares the result with this page.

- **Sites**: where noise can be added. With zero noise the logits are bit for bit those of the model.
- **Encoder**: `written out` is the fast forward and input gradient. `reference` runs the model under autograd: it works
  for every model, is slower, and warns once.
- **Nullspace**: whether `PatchNullspace` works. A nullspace exists where the width is smaller than the number of values
  in a patch.

"""

TAIL = """
## How to pass a model

- **timm**: by name on the command line. In Python pass the model, or use `fastnull.create_model(name)`.
- **transformers**: pass the classifiers (`...ForImageClassification`). Their names before and after the renaming of
  release 5.9 are both supported. Wrap them in `NormalizedModel(model, mean, std)` with the mean and standard deviation
  of their image processor. They then take pixels in [0, 1] and return plain logits, as `finetune` and `evaluate` need.
  A backbone without a classifier, such as `DINOv3ViTModel`, goes into `fastnull.vit.PooledClassifier(backbone,
  classes)`.
- **open_clip**: pass `model.visual`.

The command line takes timm's names. `fastnull inspect` also takes `torchvision:vit_b_16`, `open_clip:ViT-B-32` and
`transformers:FOLDER` (a folder with a config.json). In Python this is
`fastnull.nullspace.inspection.inspect_model(model)`.

For any other model, name its modules:

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

At `site="pixels"` every model that maps images to logits works as it is.

## Checks when an encoder is created

The written-out encoder reads weights and never calls the modules of the model, so it must be sure to compute the same
function. `FrozenEncoder` (which `NullspaceAugment` and `synthesize` create) uses it only if both checks pass:

1. Every module does what its class says. Its class comes from torch, timm, transformers, torchvision or open_clip. No
   method was replaced on the instance (accelerate's autocast wrapper is allowed). There are no parametrised weights and
   no hooks (those of FSDP, of output recording and of wandb are allowed). Linears, norms and the patch embedding are
   torch's own.
2. Logits and input gradient of two random images agree with those of the model under autograd: within 3e-4 and 3e-3 of
   their size in float32, within 0.1 and 0.3 in bfloat16. This costs one forward and backward of two images.

Otherwise the encoder runs on `reference`, and one warning names the first part that differs. Adapters of PEFT and
loralib, quantised layers and pruning run there. If you force a backend, `UnsupportedModelError` is raised instead.

`encoder.sync()` copies all weights, and noise is synced at every draw: fused optimisers, writes through `.data` and
`load_state_dict(assign=True)` leave no reliable trace of a change. `sync()` also compares the identities of modules,
hooks, buffers, parameters and the `forward` of classes, and the flags of modules (a pooling, an epsilon, a padding). If
one changed (a new head, an injected adapter, a hook), the model is checked again.

A training forward that should have had noise and had none raises `RuntimeError`. This holds for all modes, freezing,
compilation and checkpointing inside the model. While an augmentation is attached, it also holds for a training call
that bypasses the model it was made of, such as `model.network(images)` or `model.forward(images)`. The mode of the
model that is called decides whether noise is on.
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
