"""Splits by subject: drawn by a seed, stored, and refused where two parts show the same person."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jrs.errors import BadDataError, ConfigurationError, MissingInputError
from jrs.train.datasets import ImageFile, TrainingCase, find_cases
from jrs.train.splits import (
    Splits,
    check_splits,
    identities,
    make_splits,
    read_splits,
    repeated_images,
    settle_splits,
    write_splits,
)


def case(name: str, subject: str = "", path: Path = Path("x.nii.gz")) -> TrainingCase:
    return TrainingCase(name, {"t1": ImageFile(path)}, subject=subject)


def people(count: int, visits: int = 1) -> list[TrainingCase]:
    return [case(f"p{k:03d}_v{v}", f"p{k:03d}") for k in range(count) for v in range(visits)]


def names(cases: list[TrainingCase]) -> list[str]:
    return [c.name for c in cases]


@pytest.mark.parametrize("count", [4, 5, 16, 100])
def test_shares(count: int) -> None:
    splits = make_splits(identities(people(count), {}), 0, 0.15)
    assert sorted(splits.train + splits.validation) == names(people(count))
    assert len(splits.validation) == max(2, round(0.15 * count)) and not splits.test


def test_three_parts() -> None:
    splits = make_splits(identities(people(100), {}), 7, 0.15, 0.25)
    assert [len(part) for part in splits.parts().values()] == [60, 15, 25]
    assert len(set(splits.train + splits.validation + splits.test)) == 100


def test_the_seed_decides_and_the_order_of_the_cases_does_not() -> None:
    whose = identities(people(50), {})
    backwards = dict(reversed(whose.items()))
    assert make_splits(whose, 3, 0.2) == make_splits(backwards, 3, 0.2)
    assert make_splits(whose, 3, 0.2).validation != make_splits(whose, 4, 0.2).validation


@pytest.mark.parametrize("seed", range(5))
def test_a_subject_is_never_in_two_parts(seed: int) -> None:
    cases = people(20, visits=3)
    splits = make_splits(identities(cases, {}), seed, 0.2, 0.2)
    subject = {c.name: c.subject for c in cases}
    parts = [{subject[name] for name in part} for part in splits.parts().values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 20


@pytest.mark.parametrize("seed", range(5))
def test_what_shares_an_image_stays_together_directly_or_through_others(seed: int) -> None:
    cases = people(12)
    # p000 and p001 hold image A, p001 and p002 image B: one person under three names.
    hashes = {"p000_v0": ["A" * 64], "p001_v0": ["A" * 64, "B" * 64], "p002_v0": ["B" * 64]}
    splits = make_splits(identities(cases, hashes), seed, 0.3)
    same = {"p000_v0", "p001_v0", "p002_v0"}
    assert [len(same & set(part)) for part in splits.parts().values()].count(3) == 1


@pytest.mark.parametrize(("count", "visits"), [(3, 1), (1, 50)])
def test_too_few_to_hold_some_out(count: int, visits: int) -> None:
    with pytest.raises(ConfigurationError, match="too few"):
        make_splits(identities(people(count, visits), {}), 0, 0.15)


def test_shares_that_leave_nothing() -> None:
    with pytest.raises(ConfigurationError, match="shares"):
        make_splits(identities(people(10), {}), 0, 0.5, 0.5)


# Stored -----------------------------------------------------------------------------------------------------


def test_stored_and_read(tmp_path: Path) -> None:
    cases = people(10)
    splits = make_splits(identities(cases, {}), 5, 0.2, 0.1)
    write_splits(tmp_path / "splits.json", splits)
    assert read_splits(tmp_path / "splits.json", cases) == splits


def write(path: Path, **parts: Any) -> Path:
    path.write_text(json.dumps(parts))
    return path


def test_a_subject_stands_for_its_cases(tmp_path: Path) -> None:
    path = write(tmp_path / "s.json", train=["p001", "p000_v1"], validation=["p002_v0"])
    splits = read_splits(path, people(3, visits=2))
    assert splits.train == ("p001_v0", "p001_v1", "p000_v1") and splits.validation == ("p002_v0",)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ('{"train": ["p000_v0", "nobody"]}', BadDataError, "train names nobody"),
        ('{"training": []}', ConfigurationError, "training"),
        ('{"train": "p000"}', ConfigurationError, "train"),
        ('{"train": [], "format": 9}', ConfigurationError, "format 9"),
        ("[1]", ConfigurationError, "object"),
        ("{", ConfigurationError, "JSON"),
    ],
)
def test_a_bad_file(tmp_path: Path, content: str, error: type[Exception], words: str) -> None:
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(error, match=rf"^{tmp_path}/s\.json: [^\n]*{words}[^\n]*$"):
        read_splits(tmp_path / "s.json", people(2))


def test_a_case_that_could_not_be_prepared_may_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "s.json", train=["p000_v0", "broken"])
    assert read_splits(path, people(2), absent=["broken"]).train == ("p000_v0",)


# Overlap ----------------------------------------------------------------------------------------------------


def test_published_lists_that_share_subjects_are_refused(tmp_path: Path) -> None:
    """As the method's published lists do: 77 people of OASIS, each with one visit on either side."""
    folders = [f"OAS1_{k:04d}_MR{v}/mri/norm.mgz" for k in range(100) for v in (1, 2)]
    for folder in folders:
        (tmp_path / "oasis" / folder).parent.mkdir(parents=True)
        (tmp_path / "oasis" / folder).write_bytes(b"")
    cases = find_cases(tmp_path / "oasis")
    path = write(
        tmp_path / "published.json",
        train=[f"OAS1_{k:04d}_MR1" for k in range(90)],
        test=[f"OAS1_{k:04d}_MR2" for k in range(13, 100)],
    )
    with pytest.raises(BadDataError) as caught:
        settle_splits(cases, identities(cases, {}), 0, (0.15, 0.0), given=path)
    message = str(caught.value)
    assert message.startswith(f"{path}: train and test share 77 subjects (OAS1_0013, OAS1_0014, OAS1_0015, ...)")
    assert "\n" not in message


def test_the_same_image_under_two_subjects_is_refused(tmp_path: Path) -> None:
    contents = {"a": b"1" * 500_000, "b": b"2" * 500_000, "c": b"1" * 500_000, "d": b"1" * 499_999}
    for name, content in contents.items():
        (tmp_path / f"{name}.nii").write_bytes(content)
    cases = [case(name, path=tmp_path / f"{name}.nii") for name in contents]
    hashes = repeated_images(cases)
    assert hashes["a"] == hashes["c"] and hashes["a"] != hashes.get("b") and "d" not in hashes
    whose = identities(cases, hashes)
    with pytest.raises(BadDataError, match=r"^lists: train and validation share 1 image \(a and c\); "):
        check_splits({"train": ["a", "b"], "validation": ["c", "d"]}, whose, "lists")
    check_splits({"train": ["a", "c"], "validation": ["b", "d"]}, whose, "lists")


def test_the_volumes_of_one_file_are_different_images(tmp_path: Path) -> None:
    (tmp_path / "four.nii").write_bytes(b"1" * 1000)
    (tmp_path / "copy.nii").write_bytes(b"1" * 1000)

    def volume(name: str, file: str, index: int) -> TrainingCase:
        return TrainingCase(name, {"t1": ImageFile(tmp_path / file, index)})

    cases = [volume("a", "four.nii", 0), volume("b", "four.nii", 1), volume("c", "copy.nii", 0)]
    hashes = repeated_images(cases)
    assert hashes["a"] == hashes["c"] and "b" not in hashes


def test_a_case_on_both_sides_is_refused() -> None:
    with pytest.raises(BadDataError, match=r"share 1 case \(x\)"):
        check_splits({"train": ["x"], "test": ["x"]}, {}, "lists")


# Which splits a run takes -----------------------------------------------------------------------------------


def test_given_goes_before_stored_and_stored_before_drawn(tmp_path: Path) -> None:
    cases = people(8)
    whose = identities(cases, {})
    drawn = settle_splits(cases, whose, 1, (0.25, 0.0), stored=tmp_path / "none.json")
    assert drawn == make_splits(whose, 1, 0.25)
    stored = write(tmp_path / "stored.json", train=["p000_v0"], validation=["p001_v0"])
    given = write(tmp_path / "given.json", train=["p002_v0"], validation=["p003_v0"])
    assert settle_splits(cases, whose, 1, (0.25, 0.0), stored=stored) == Splits(("p000_v0",), ("p001_v0",))
    taken = settle_splits(cases, whose, 1, (0.25, 0.0), given=given, stored=stored)
    assert taken == Splits(("p002_v0",), ("p003_v0",))
    with pytest.raises(MissingInputError, match=r"none\.json: no such file"):
        settle_splits(cases, whose, 1, (0.25, 0.0), given=tmp_path / "none.json", stored=stored)
