"""Which images make a pair."""

from __future__ import annotations

import pytest
from small_training import label_maps, source

from jrs.train.batch import PairBatch, pair_indices, pair_names

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("images", [2, 3, 7])
@pytest.mark.parametrize("seed", [0, 11])
def test_pairs_of_a_round(images: int, seed: int) -> None:
    rounds = []
    for number in range(4):
        pairs = pair_indices(number, images, images, seed)
        assert sorted(moving for moving, _ in pairs) == list(range(images))
        assert sorted(fixed for _, fixed in pairs) == list(range(images))
        assert all(moving != fixed for moving, fixed in pairs)
        rounds.append(pairs)
    if images > 3:
        assert len({tuple(pairs) for pairs in rounds}) == 4


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batches_are_slices_of_one_sequence(size: int) -> None:
    whole = pair_indices(0, 30, 4, 3)
    parts = [pair for index in range(30 // size) for pair in pair_indices(index, size, 4, 3)]
    assert parts == whole
    assert pair_indices(0, 30, 4, 4) != whole


def test_pairs_are_named_by_the_images_they_are_made_of() -> None:
    pairs = source(label_maps(4))
    names = [name for index in range(4) for name in pairs.names(index, 3)]
    expected = [(f"map{moving}", f"map{fixed}") for moving, fixed in pair_indices(0, 12, 4, 5)]
    assert names == expected
    assert [pair_names(pairs, number) for number in range(12)] == expected


def test_a_source_without_names() -> None:
    class Nameless:
        def __len__(self) -> int:
            return 2

        def batch(self, index: int, size: int) -> PairBatch:
            raise NotImplementedError

    assert pair_names(Nameless(), 3) == ("", "")
