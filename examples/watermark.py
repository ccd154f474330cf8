"""A watermark that a model does not see, found again by its key.

    python examples/watermark.py --out watermark.png
    python examples/watermark.py --checkpoint vit_small_patch32_224.safetensors --key 7

A pattern drawn from the key is put into the exact nullspace of the patch embedding (fastnull.nullspace.watermark), the
picture is rounded to 8 bits as a file would be, and the mark is looked for with the right key and with a wrong one.
Without a checkpoint the model has random weights: the nullspace is as large, only its classes mean nothing. Nothing is
downloaded; the picture is scikit-image's.
"""

from __future__ import annotations

import argparse

import matplotlib as mpl
import torch
from hidden_change import picture
from skimage import data

import fastnull
from fastnull import PatchNullspace
from fastnull.nullspace.watermark import detect, embed, read

mpl.use("Agg")
from matplotlib import pyplot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch32_224", help="timm name; its width must be below 3·patch²")
    parser.add_argument("--checkpoint", help="local file with its weights")
    parser.add_argument("--key", type=int, default=2026)
    parser.add_argument("--strength", type=float, default=4 / 255, help="rms of the mark, pixels in [0, 1]")
    parser.add_argument("--out", default="watermark.png")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = fastnull.create_model(args.model, checkpoint=args.checkpoint).eval()
    image = picture(data.astronaut(), model.network.patch_embed.img_size[0])
    space = PatchNullspace.from_model(model)
    marked = embed(space, image, args.key, args.strength)
    saved = (255 * marked).round() / 255

    with torch.no_grad():
        logits = model(torch.cat([image, marked, saved]))  # [3, classes]
    for title, row in (("marked", logits[1]), ("marked, 8 bits", logits[2])):
        print(f"{title}: class {int(row.argmax())}, logits moved by {float((row - logits[0]).abs().max()):.1e} at most")
    for title, shown, key in (
        ("marked, right key", saved, args.key),
        ("marked, wrong key", saved, args.key + 1),
        ("not marked, right key", image, args.key),
    ):
        found = detect(space, shown, key)
        score, rate = float(found.score), float(found.false_positive_rate)
        print(f"{title}: score {score:.3f}, false positive rate {rate:.1e}")

    mark = read(space, saved, image)[0]
    figure, axes = pyplot.subplots(1, 3, figsize=(9, 3.4))
    for axis, (title, pixels) in zip(
        axes,
        {"picture": image[0], "marked": saved[0], "read out, ×8": (0.5 + 8 * mark).clamp(0, 1)}.items(),
        strict=True,
    ):
        axis.imshow(pixels.permute(1, 2, 0).numpy())
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.savefig(args.out, dpi=120, bbox_inches="tight")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
