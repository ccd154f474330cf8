"""The images of a measurement: how many there are, in which order they come, and which a limit chooses."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from fastnull.data.subset import even_subset, labels_of
from fastnull.robustness import evaluate
from fastnull.robustness.batches import EvaluationData
from tests.robustness.small_model import CLASSES, make_model

COUNT = 40
IMAGES = torch.rand(COUNT, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(COUNT) % 4  # sorted below, as folders are
SORTED = LABELS.sort().values
CPU = torch.device("cpu")


class Pairs(Dataset):
    """Images whose labels cannot be had without loading them."""

    def __init__(self, images: Tensor = IMAGES, labels: Tensor = SORTED) -> None:
        self.images, self.classes = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.classes[index])


class Stream(IterableDataset):
    """A stream, maybe shuffled; its length may be wrong."""

    def __init__(self, shuffle: bool = False) -> None:
        self.shuffle = shuffle

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(COUNT) if self.shuffle else torch.arange(COUNT)
        yield from ((IMAGES[i], SORTED[i]) for i in order)

    def __len__(self) -> int:
        return 7


class Numbers(Sampler[Any]):
    """Whatever a function returns in a pass."""

    def __init__(self, numbers: Callable[[], Any]) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[Any]:
        return iter(self.numbers())

    def __len__(self) -> int:
        return COUNT


DATA = TensorDataset(IMAGES, SORTED)


def stacked(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    """A user's collate function."""
    return tuple(torch.stack(part) for part in zip(*items, strict=True))


def seen(data: EvaluationData) -> tuple[Tensor, Tensor, Tensor]:
    batches = list(data.batches())
    return tuple(torch.cat([getattr(b, part) for b in batches]) for part in ("images", "labels", "indices"))  # type: ignore[return-value]


# --- how many


@pytest.mark.parametrize(
    ("loader", "numbers"),
    [
        (lambda: DataLoader(DATA, 4, sampler=range(8)), list(range(8))),
        (lambda: DataLoader(DATA, 16, drop_last=True), list(range(32))),
        (lambda: DataLoader(DATA, 4, sampler=[5, 3, 3, 20, 1]), [5, 3, 3, 20, 1]),
        (lambda: DataLoader(DATA, 3, sampler=[5, 3, 9, 20, 1], drop_last=True), [5, 3, 9]),
        (lambda: DataLoader(DATA, batch_sampler=[[7, 2], [1]]), [7, 2, 1]),
        (lambda: DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 16, True)), list(range(32))),
        (lambda: DataLoader(Subset(DATA, [9, 8, 30]), 2), [9, 8, 30]),
        (lambda: DataLoader(DATA, 4, sampler=Numbers(lambda: range(0, COUNT, 5))), list(range(0, COUNT, 5))),
        (lambda: DataLoader(DATA, 4, sampler=DistributedSampler(DATA, 4, 1, shuffle=False)), list(range(1, COUNT, 4))),
    ],
)
def test_a_loader_has_the_images_of_its_sampler(loader: Callable[[], DataLoader], numbers: list[int]) -> None:
    data = EvaluationData(loader(), 8, None, CPU)
    assert data.total == len(numbers)
    images, labels, indices = seen(data)
    assert torch.equal(images, IMAGES[numbers])
    assert torch.equal(labels, SORTED[numbers])
    assert indices.tolist() == list(range(len(numbers)))
    record = evaluate(make_model(), loader(), suites=("clean",), progress=False)
    assert record["protocol"]["n"] == len(numbers)


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(Stream(), 4),
        lambda: DataLoader(Stream(), 4, drop_last=True),
        lambda: DataLoader(Stream(), 4, num_workers=1),
        lambda: DataLoader([(IMAGES[i : i + 10], SORTED[i : i + 10]) for i in range(0, COUNT, 10)], batch_size=None),
        lambda: DataLoader(DATA, 10, collate_fn=stacked),
    ],
)
def test_what_cannot_be_known_before_is_counted(loader: Callable[[], DataLoader]) -> None:
    assert EvaluationData(loader(), 8, None, CPU).total is None
    record = evaluate(make_model(), loader(), suites=("clean",), progress=False)
    assert record["protocol"]["n"] == record["images"]["all"]["n"] == COUNT


def test_images_that_a_collate_function_leaves_out_are_not_counted() -> None:
    def collate(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        kept = [item for item in items if int(item[1]) != 2]
        images, labels = zip(*kept, strict=True)
        return torch.stack(images), torch.stack(labels)

    data = TensorDataset(IMAGES, LABELS)
    record = evaluate(make_model(), DataLoader(data, 8, collate_fn=collate), suites=("clean",), progress=False)
    assert record["protocol"]["n"] == 30


# --- a fixed order


SHUFFLING: dict[str, Callable[[], DataLoader]] = {
    "shuffle": lambda: DataLoader(DATA, 4, shuffle=True),
    "shuffle with a seed": lambda: DataLoader(DATA, 4, shuffle=True, generator=torch.Generator().manual_seed(0)),
    "random sampler": lambda: DataLoader(DATA, 4, sampler=RandomSampler(DATA, num_samples=8)),
    "subset": lambda: DataLoader(DATA, 4, sampler=SubsetRandomSampler(range(8))),
    "weighted": lambda: DataLoader(DATA, 4, sampler=WeightedRandomSampler([1.0] * COUNT, 8)),
    "batch sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 4, False)),
    "distributed": lambda: DataLoader(DATA, 4, sampler=DistributedSampler(DATA, 2, 0, shuffle=True)),
    "Python": lambda: DataLoader(DATA, 4, sampler=Numbers(lambda: random.sample(range(COUNT), COUNT))),
    "NumPy": lambda: DataLoader(DATA, 4, sampler=Numbers(lambda: np.random.permutation(COUNT).tolist())),
    "torch": lambda: DataLoader(DATA, 4, sampler=Numbers(lambda: torch.randperm(COUNT).tolist())),
    "batches": lambda: DataLoader(DATA, batch_sampler=Numbers(lambda: torch.randperm(COUNT).view(-1, 4).tolist())),
    "one pass": lambda: DataLoader(DATA, 4, sampler=iter(range(COUNT))),  # type: ignore[arg-type]
    "two images": lambda: DataLoader(Subset(DATA, [0, 1]), 1, shuffle=True),
}


@pytest.mark.parametrize("name", SHUFFLING)
def test_shuffling_samplers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="data must come in a fixed order; this DataLoader shuffles"):
        evaluate(make_model(), SHUFFLING[name](), suites=("clean",), progress=False)


def test_streams_and_transforms_that_shuffle_are_refused() -> None:
    class Flipping(Pairs):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            image, label = super().__getitem__(index)
            return image * torch.rand(()), label

    for loader in (DataLoader(Stream(shuffle=True), 4), DataLoader(Flipping(), 4)):
        with pytest.raises(ValueError, match="the same images in the same order every time"):
            evaluate(make_model(), loader, suites=("clean",), progress=False)


def test_looking_at_the_order_draws_nothing() -> None:
    def draw() -> list[int]:
        random.random(), np.random.rand(), torch.rand(())
        return list(range(COUNT))

    model = make_model()
    states = random.getstate(), torch.get_rng_state(), (np.random.get_state()[1].copy(), np.random.get_state()[2])
    evaluate(model, DataLoader(DATA, 4, sampler=Numbers(draw)), suites=("clean",), progress=False)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.random.get_state()[2] == states[2][1]
    assert np.array_equal(np.random.get_state()[1], states[2][0])


def test_a_stream_needs_a_loader_and_pairs_are_tensors() -> None:
    with pytest.raises(TypeError, match="data must be a pair of tensors"):
        EvaluationData(Stream(), 8, None, CPU)
    with pytest.raises(TypeError, match=r"pairs of tensors .*the labels are"):
        EvaluationData(DataLoader(DATA, 2, collate_fn=lambda items: (IMAGES[:2], [0, 1])), 8, None, CPU)
    with pytest.raises(ValueError, match="a label for each of 2 images"):
        EvaluationData(DataLoader(DATA, 2, collate_fn=lambda items: (IMAGES[:2], SORTED[:1])), 8, None, CPU)


# --- a limit


def folder(place: Path) -> Any:
    from PIL import Image

    from fastnull.data.image_files import ImageFiles, ImageFolder

    for index, label in enumerate(SORTED.tolist()):
        path = place / f"class{label}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((IMAGES[index].permute(1, 2, 0) * 255).byte().numpy()).save(path)
    return ImageFiles(ImageFolder(place), lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1), 3)


class Listed(Pairs):
    """As torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        self.targets = SORTED.tolist()


KINDS: dict[str, Callable[[Path], Any]] = {
    "tensors": lambda _: (IMAGES, SORTED),
    "tensors, int32": lambda _: (IMAGES, SORTED.int()),
    "tensor data set": lambda _: DATA,
    "targets": lambda _: Listed(),
    "unlisted": lambda _: Pairs(),
    "subset": lambda _: Subset(Listed(), range(COUNT)),
    "subset, unlisted": lambda _: Subset(Pairs(), range(COUNT)),
    "two": lambda _: ConcatDataset([Subset(DATA, range(16)), TensorDataset(IMAGES[16:], SORTED[16:])]),
    "folder": folder,
    "loader": lambda _: DataLoader(DATA, 7),
    "loader, unlisted": lambda _: DataLoader(Pairs(), 7),
    "loader, collated": lambda _: DataLoader(DATA, 7, collate_fn=stacked),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [4, 10, 39])
def test_a_limit_is_even_over_the_classes_whatever_the_data(kind: str, limit: int, tmp_path: Path) -> None:
    data = EvaluationData(KINDS[kind](tmp_path), 8, limit, CPU, seed=3)
    expected = even_subset(SORTED, limit, seed=3)
    images, labels, indices = seen(data)
    assert data.total == limit
    assert torch.equal(indices, expected)
    assert torch.equal(labels, SORTED[expected].to(labels.dtype))
    torch.testing.assert_close(images, IMAGES[expected], atol=1 / 255, rtol=0)
    counts = labels.long().bincount(minlength=4)
    assert counts.max() - counts.min() <= 1
    # from the middle, as in a resumed run
    rest = torch.cat([batch.indices for batch in data.batches(3)])
    assert torch.equal(rest, expected[3:])
    other = EvaluationData(KINDS[kind](tmp_path), 8, limit, CPU, seed=4)
    assert not torch.equal(seen(other)[2], expected)


@pytest.mark.parametrize("kind", ["tensors", "unlisted", "folder", "loader"])
def test_a_limit_beyond_the_data_is_all_of_it(kind: str, tmp_path: Path) -> None:
    data = EvaluationData(KINDS[kind](tmp_path), 8, 10**12, CPU)
    assert data.total == COUNT
    assert seen(data)[2].tolist() == list(range(COUNT))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_split_what_a_limit_chose(world: int) -> None:
    data = EvaluationData(Pairs(), 4, 22, CPU)
    parts = [batch.indices for rank in range(world) for batch in data.batches(0, rank, world)]
    assert torch.equal(torch.cat(parts).sort().values, even_subset(SORTED, 22, 0))


def test_a_stream_has_no_limit() -> None:
    with pytest.raises(ValueError, match=r"limit draws evenly over the classes, and a stream"):
        evaluate(make_model(), DataLoader(Stream(), 4), suites=("clean",), limit=8, progress=False)


def test_labels_are_read_off_lists_only_where_they_fit() -> None:
    class Odd(Pairs):
        targets: Any = None

    data = Odd()
    for targets in (SORTED[:-1].tolist(), SORTED.float(), torch.zeros(COUNT, 2).long(), "labels", object()):
        data.targets = targets
        assert labels_of(data) is None
    data.targets = SORTED.numpy()
    assert torch.equal(labels_of(data), SORTED)  # type: ignore[arg-type]
    assert labels_of(ConcatDataset([data, Pairs()])) is None


# --- in evaluate


def test_models_see_the_same_images_and_noise_is_that_of_the_image() -> None:
    labels = make_model()(IMAGES).argmax(1)
    # a data set sorted by class, of which the first half is the first classes alone
    order = labels.sort(stable=True).indices
    images, labels = IMAGES[order], labels[order]
    settings: dict[str, Any] = {"suites": ("clean", "corruptions"), "corruptions": ("gaussian_noise",),
                                "severities": (3,), "progress": False}  # fmt: skip
    digests = set()
    for seed in (0, 1):
        record = evaluate(make_model(seed), (images, labels), limit=14, **settings)
        assert record["protocol"]["subset"] == "14, drawn evenly over the classes by the seed"
        assert record["protocol"]["n"] == 14
        digests.add(record["protocol"]["data"])
    assert len(digests) == 1
    chosen = even_subset(labels, 14, 0)
    assert len(labels[chosen].unique()) == len(labels.unique())
    other = evaluate(make_model(), (images, labels), limit=14, seed=1, **settings)
    assert other["protocol"]["data"] not in digests
    assert CLASSES == 7
