"""Subsets that stand for the whole data set."""

import pytest
import torch

from fastnull.data.subset import even_subset

SORTED = torch.arange(10).repeat_interleave(40)


def counts(labels: torch.Tensor, chosen: torch.Tensor, classes: int) -> list[int]:
    return labels[chosen].bincount(minlength=classes).tolist()


@pytest.mark.parametrize("count", [1, 7, 10, 95, 200, 399])
@pytest.mark.parametrize("labels", [SORTED, SORTED.flip(0), SORTED[torch.randperm(400)]])
def test_every_class_gets_its_part_whatever_the_order(labels, count):
    chosen = even_subset(labels, count, seed=0)
    assert len(chosen.unique()) == count
    assert chosen.tolist() == sorted(chosen.tolist())
    each = counts(labels, chosen, 10)
    assert max(each) - min(each) <= 1


def test_small_classes_give_all_and_the_others_the_rest():
    labels = torch.tensor([0] * 2 + [1] * 50 + [2] * 50 + [3])
    assert counts(labels, even_subset(labels, 23, seed=1), 4) == [2, 10, 10, 1]


def test_the_seed_decides_and_the_numbering_of_the_classes_does_not():
    renumbered = torch.randperm(10)[SORTED] * 7 - 3
    chosen = even_subset(SORTED, 95, seed=3)
    torch.testing.assert_close(chosen, even_subset(renumbered.int(), 95, seed=3))
    torch.manual_seed(5)
    torch.testing.assert_close(chosen, even_subset(SORTED, 95, seed=3))
    assert chosen.tolist() != even_subset(SORTED, 95, seed=4).tolist()


def test_it_draws_within_a_class_and_not_its_first():
    firsts = torch.arange(10) * 40
    assert not torch.isin(even_subset(SORTED, 10, seed=0), firsts).all()
    # of 95 images the odd five come from classes that the seed chooses
    extra = {tuple(c > 9 for c in counts(SORTED, even_subset(SORTED, 95, seed), 10)) for seed in range(8)}
    assert len(extra) > 1


def test_a_smaller_subset_lies_within_a_larger_one():
    small, large = even_subset(SORTED, 30, seed=2), even_subset(SORTED, 100, seed=2)
    assert torch.isin(small, large).all()


def test_more_than_there_are_is_all_and_global_random_state_stays():
    before = torch.get_rng_state()
    assert even_subset(SORTED, 10**9, seed=0).tolist() == list(range(400))
    even_subset(SORTED, 5, seed=0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("labels", [torch.rand(4), torch.zeros(4, 3, dtype=torch.long), torch.tensor(3)])
def test_labels_of_another_kind_are_refused(labels):
    with pytest.raises(ValueError, match="labels must be integers"):
        even_subset(labels, 2, seed=0)


def test_a_count_below_one_is_refused():
    with pytest.raises(ValueError, match="count must be >= 1; got 0"):
        even_subset(SORTED, 0, seed=0)
