"""Image files in memory: the same batches everywhere, and when there is a cache."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from fastnull.data import EpochBatches, ImageFolder, Samples, View, loader
from fastnull.data import cache as caches
from fastnull.data.cache import CACHES, free_memory, keep, plan_cache
from fastnull.data.image_files import BadImageError
from fastnull.finetune import FinetuneConfig, finetune
from fastnull.finetune.dry_run import dry_run
from tests.finetune.runs import assert_same_run, small
from tests.pictures import write_pictures

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def samples(pictures, size=32, labels=None, **settings):
    """Training and held-out images, and the view of batches."""
    view = View((size, size), 3, "bicubic", 0.9, (0.5,) * 3, (0.5,) * 3)
    settings = FinetuneConfig(**settings).image_settings()
    train = Samples(ImageFolder(pictures / "train"), view.training(**settings), 3, classes=labels)
    held_out = Samples(ImageFolder(pictures / "val"), view.evaluation(), 3, classes=labels)
    return train, held_out, view.batched(0, **settings)


def test_batches_are_the_same_with_workers_and_from_any_start(pictures):
    train, held_out, view = samples(pictures, labels=[2, 0, 1])
    kept, tested = keep(plan_cache("auto", train, held_out, view, CPU), train, held_out, CPU, show=False)
    assert torch.equal(kept.targets, train.targets)

    def run(workers, start=0):
        order = EpochBatches(len(kept), 4, 5, seed=3)
        order.epoch, order.start = 1, start
        return list(loader(kept, order, workers=workers))

    whole = run(0)
    for some in (run(2), [*whole[:3], *run(0, 3)]):
        for (images, labels), (same, numbers) in zip(whole, some, strict=True):
            assert torch.equal(images, same)
            assert torch.equal(labels, numbers)
    chosen = Subset(Subset(tested, [5, 1, 9]), [2, 0])
    images, labels = next(iter(loader(chosen, 2)))
    for image, label, index in zip(images, labels, (9, 5), strict=True):
        assert torch.equal(image, held_out[index][0])
        assert label == held_out[index][1]


def test_images_of_several_sizes_are_kept_resized_only_if_asked_for(tmp_path):
    pictures = write_pictures(tmp_path)
    Image.effect_noise((90, 30), 50).save(pictures / "train" / "temple" / "7.png")
    config = small(
        "none", data=str(pictures), img_size=32, batch_size=4, epochs=1, cache="auto", out=str(tmp_path / "auto")
    )
    finetune(config)
    assert "several sizes" in json.loads((tmp_path / "auto" / "config.json").read_text())["cache"]
    finetune(replace(config, cache="ram", out=str(tmp_path / "ram")))
    about = json.loads((tmp_path / "ram" / "config.json").read_text())
    assert about["cache"] == "ram (0.1 MB, images of 37x37 pixels (resized))"
    assert about["data"]["cached"] == [37, 37]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    ("settings", "free", "problem"),
    [
        ({"auto_augment": "rand-m9"}, 1e9, "auto_augment"),
        ({"reprob": 0.1}, 1e9, "reprob"),
        ({}, 1e5, "1.75e-04|0.000175 GB of images for 0.0001 GB of free memory"),
        ({}, 2e5, None),  # 0.18 MB fit, but not in half of it
        ({}, 1e9, None),
    ],
)
def test_there_is_a_cache_if_it_fits(pictures, monkeypatch, cache, settings, free, problem):
    train, held_out, view = samples(pictures, **settings)
    monkeypatch.setattr(caches, "free_memory", lambda: int(free))
    if problem and cache in ("ram", "device"):
        with pytest.raises(ValueError, match=f"cache='{cache}'.*{problem}.*use .*none"):
            plan_cache(cache, train, held_out, view, CPU)
        return
    plan = plan_cache(cache, train, held_out, view, CPU)
    there = cache != "none" and problem is None and (cache != "auto" or free == 1e9)
    assert plan.place == ("ram" if there else "none")
    assert (plan.view is not None) == there


def test_large_images_are_kept_resized_only_if_asked_for(pictures):
    train, held_out, view = samples(pictures, size=16)
    assert "large" in plan_cache("auto", train, held_out, view, CPU).about
    plan = plan_cache("ram", train, held_out, view, CPU)
    assert (plan.size, plan.resized) == ((18, 18), True)
    kept, _ = keep(plan, train, held_out, CPU, show=False)
    assert kept.images.shape == (24, 3, 18, 18)
    assert kept.sizes.tolist() == [[48, 40]] * 24


def test_a_bad_file_is_named(tmp_path):
    pictures = write_pictures(tmp_path)
    (pictures / "train" / "cat" / "5.png").write_bytes(b"rubbish")
    train, held_out, view = samples(pictures)
    with pytest.raises(BadImageError, match=r"cat/5\.png"):
        keep(plan_cache("auto", train, held_out, view, CPU), train, held_out, CPU, show=False)


def test_a_cache_is_recorded_and_kept_on_resume(pictures, tmp_path):
    config = small("none", data=str(pictures), img_size=32, batch_size=4, epochs=2, out=str(tmp_path / "run"))
    assert "cache      ram (0.1 MB, images of 48x40 pixels)" in dry_run(config)
    finetune(config)
    finetune(replace(config, cache="device", resume=True))  # on a CPU the same
    with pytest.raises(ValueError, match=r"other settings: data .*'cached': \[48, 40\]"):
        finetune(replace(config, cache="none", resume=True))
    finetune(replace(config, cache="ram", workers=2, out=str(tmp_path / "other")))
    assert_same_run(tmp_path / "run", tmp_path / "other")


def test_free_memory_is_that_of_the_control_group(tmp_path, monkeypatch):
    assert 0 < free_memory() < 2**50
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    (tmp_path / "memory.stat").write_text("anon 7\ninactive_file 500000\n")
    monkeypatch.setattr(caches, "_CONTROL_GROUP", tmp_path)
    assert free_memory() == 1_500_000
