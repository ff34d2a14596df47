"""Which images make a pair."""

from __future__ import annotations

import pytest

from jrs.train.batch import pair_indices

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
