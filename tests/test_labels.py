"""Label schemes: what the classes are written as."""

from __future__ import annotations

import pytest

from jrs.errors import UsageError
from jrs.runtime.labels import label_scheme


@pytest.mark.parametrize(
    ("values", "wanted", "expected"),
    [
        ((0, 1, 2, 4), "bundle", ("brats2018", (0, 1, 2, 4))),
        ((0, 1, 2, 3), "bundle", ("brats2023", (0, 1, 2, 3))),
        ((0, 10, 20, 30), "bundle", ("bundle", (0, 10, 20, 30))),
        ((0, 1), "bundle", ("bundle", (0, 1))),
        ((0, 1, 2, 4), "brats2023", ("brats2023", (0, 1, 2, 3))),
        ((0, 1, 2, 3), "brats2018", ("brats2018", (0, 1, 2, 4))),
    ],
)
def test_schemes(values: tuple[int, ...], wanted: str, expected: tuple[str, tuple[int, ...]]) -> None:
    assert label_scheme(values, wanted) == expected


def test_an_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"brats2021.*brats2018, brats2023, bundle"):
        label_scheme((0, 1, 2, 4), "brats2021")


def test_a_bundle_of_other_classes_has_no_brats_scheme() -> None:
    with pytest.raises(UsageError, match="4 classes and the bundle 2"):
        label_scheme((0, 1), "brats2018")
