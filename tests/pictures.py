"""Real pictures for tests of image files: crops of those that come with scikit-image and scikit-learn."""

from __future__ import annotations

from pathlib import Path


def write_pictures(root: Path) -> Path:
    """Write root/{train,val}/{cat,flower,temple}/*.png, 8 and 4 files a class, and return the root.

    48x40 pixels: neither square nor a model's size, so that resizing and cropping are used.
    """
    from PIL import Image
    from skimage.data import chelsea
    from sklearn.datasets import load_sample_images

    temple, flower = load_sample_images().images
    for label, picture in {"cat": chelsea(), "flower": flower, "temple": temple}.items():
        for split, offset, count in (("train", 0, 8), ("val", 200, 4)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                left = offset + 20 * number
                Image.fromarray(picture[100:148, left : left + 40]).save(folder / f"{number}.png")
    return root
