"""Image files for tests: crops of the pictures of scikit-image and scikit-learn, and CIFAR-10-C in miniature."""

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


def write_cifar10_c(root: Path) -> Path:
    """Write root/cifar10-c/ as published, with two images of each class for each severity, and return the root.

    The images are grey, by class; those of severity 4 look like the next class.
    """
    import numpy as np

    from fastnull.robustness.suites import CIFAR10_CORRUPTIONS

    folder = root / "cifar10-c"
    folder.mkdir()
    labels = np.tile(np.arange(10), 10)  # [5 severities x 20]
    shown = np.where(np.arange(100) // 20 == 3, labels + 1, labels)
    pixels = np.zeros((100, 32, 32, 3), np.uint8) + (20 * shown[:, None, None, None]).astype(np.uint8)
    for name in CIFAR10_CORRUPTIONS:
        np.save(folder / f"{name}.npy", pixels)
    np.save(folder / "labels.npy", labels.astype(np.uint8))
    return root
