"""A picture that turns into another one while the model sees no change.

    python examples/hidden_change.py --out hidden_change.png
    python examples/hidden_change.py --checkpoint vit_small_patch32_224.safetensors

Every patch of the picture moves as far towards the target as valid pixels and the exact nullspace of the patch
embedding allow (PatchNullspace.maximize). Without a checkpoint the model has random weights: the nullspace is as large,
only its classes mean nothing. Nothing is downloaded; the pictures are scikit-image's.
"""

from __future__ import annotations

import argparse
import time

import matplotlib as mpl
import numpy as np
import torch
from skimage import data
from skimage.transform import resize
from torch import Tensor

import fastnull
from fastnull import PatchNullspace

mpl.use("Agg")
from matplotlib import pyplot


def picture(array: np.ndarray, side: int) -> Tensor:
    """The square in the middle of a picture, as pixels [1, 3, side, side] in [0, 1]."""
    height, width, _ = array.shape
    cut = min(height, width)
    top, left = (height - cut) // 2, (width - cut) // 2
    square = resize(array[top : top + cut, left : left + cut], (side, side), anti_aliasing=True)
    return torch.from_numpy(square).permute(2, 0, 1)[None].float().clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch32_224", help="timm name; its width must be below 3·patch²")
    parser.add_argument("--checkpoint", help="local file with its weights")
    parser.add_argument("--out", default="hidden_change.png")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = fastnull.create_model(args.model, checkpoint=args.checkpoint).eval()
    side = model.network.patch_embed.img_size[0]
    image, target = picture(data.astronaut(), side), picture(data.chelsea(), side)

    space = PatchNullspace.from_model(model)
    print(space)
    pictures = {"picture": image}
    for title, aim in (("towards another one", target), ("as far as it goes", None)):
        start = time.perf_counter()
        pictures[title] = space.maximize(image, aim)
        print(f"{title}: {time.perf_counter() - start:.1f} s")

    with torch.no_grad():
        logits = torch.cat([model(x) for x in pictures.values()])  # [3, classes]
    figure, axes = pyplot.subplots(1, len(pictures), figsize=(3 * len(pictures), 3.4))
    for axis, (title, shown), row in zip(axes, pictures.items(), logits, strict=True):
        moved = float((shown - image).square().mean().sqrt())
        differs = float((row - logits[0]).abs().max())
        print(f"{title}: class {int(row.argmax())}, pixels changed by {moved:.3f} rms, logits by {differs:.1e} at most")
        axis.imshow(shown[0].permute(1, 2, 0).numpy())
        axis.set_title(f"{title}\nclass {int(row.argmax())}", fontsize=9)
        axis.axis("off")
    figure.savefig(args.out, dpi=120, bbox_inches="tight")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
