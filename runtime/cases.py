"""What CASE on the command line means: one patient's images, found and read.

A CASE is a folder with one file a modality, a 3-D file of one modality, or a 4-D file of several. The
modalities of a case may lie on different grids; each carries its own geometry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, takewhile
from pathlib import Path

import numpy as np

from jrs.errors import MissingInputError, UsageError
from jrs.headers import shown
from jrs.manifest import MODALITIES
from jrs.reading import count_channels, read_channels, read_volume
from jrs.runtime.bids import MOVED
from jrs.volume import Volume, foreground_mask

ENDINGS: dict[str, tuple[str, ...]] = {
    "t1": ("t1", "t1n", "t1w"),
    "t1ce": ("t1ce", "t1c", "t1gd"),
    "t2": ("t2", "t2w"),
    "flair": ("flair", "t2f", "fla"),
}
"""The last part of a file's name, after ``_`` or ``-`` and in any case, that tells its modality.

BraTS of every year and BIDS; in BIDS a ``ce-`` entity turns a T1w into t1ce.
"""

_MODALITY_OF = {ending: modality for modality, endings in ENDINGS.items() for ending in endings}
IMAGE_FILE = re.compile(r"\.(nii|nii\.gz|mgz)$", re.IGNORECASE)
"""How the name of an image ends that a folder is searched for."""
_ANY_IMAGE = re.compile(r"\.(nii|mgz|mgh|hdr|img)(\.gz)?$", re.IGNORECASE)
_CONTRAST_WORDS = frozenset({"ce", "gd", "gad", "gado", "gadolinium", "contrast", "postcontrast", "postgd", "km"})
"""That make a T1 a T1ce, anywhere in the name of a file whose end tells nothing."""
_MOVED = f"_desc-{MOVED}_"
_LEAST_SHARED = 0.85
"""Of two modalities' foregrounds; a brain that was moved by 15 mm shares less with itself."""
_LEAST_SEEN = 0.3
"""Of the smaller foreground, in the other image's field of view; parts of one brain may be cut off in each."""
_POINTS = 20_000
_LONGEST_NAME = 120  # bytes: output names add up to about 80, file systems take 255


@dataclass(frozen=True)
class Case:
    """One patient's images by modality, in the order of `MODALITIES`.

    ``name`` is safe as a part of a file name. ``source`` is the path that was given, None where each
    modality was named by itself. ``notes`` say what was assumed to find them, ``guess`` what a single image was taken
    for.
    """

    name: str
    images: dict[str, Volume]
    source: Path | None = None
    notes: tuple[str, ...] = ()
    guess: str | None = None

    @cached_property
    def doubts(self) -> list[str]:
        """What makes the images poor input, a line each: what was assumed, skulls, one image for two modalities, and
        modalities that do not lie on the first.
        """
        unstripped = {name: note for name, volume in self.images.items() if (note := volume.unstripped) is not None}
        doubts = [*self.notes, *([] if self.guess is None else [self.guess])]
        doubts += [f"{', '.join(unstripped)}: {note}; do not trust the results" for note in [*unstripped.values()][:1]]
        doubts += [
            f"{one} and {other} are the same image, voxel by voxel; give each modality its own, or leave one out"
            for one, other in combinations(self.images, 2)
            if _same(self.images[one], self.images[other])
        ]
        first, *others = self.images
        for name in others:
            if (apart := _apart(self.images[first], self.images[name])) is not None:
                doubts.append(
                    f"{name}: does not lie where {first} lies ({apart}); register the modalities of a case to each "
                    "other first, or check their headers"
                )
        return doubts


def _same(one: Volume, other: Volume) -> bool:
    alike = one.data.shape == other.data.shape and np.array_equal(one.thinned, other.thinned)
    return bool(alike and np.array_equal(one.data, other.data))


def _apart(one: Volume, other: Volume) -> str | None:
    """What tells that two images of a head do not lie on each other, off some thousand points; None if they do."""
    larger, smaller = sorted((one, other), key=lambda volume: -volume.foreground_ml)
    index = np.argwhere(foreground_mask(smaller.thinned)) * smaller.thinning
    index = index[:: max(1, len(index) // _POINTS)]
    found = np.rint(larger.geometry.to_voxels(smaller.geometry.to_ras(index))).astype(int)
    inside = ((found >= 0) & (found < larger.geometry.shape)).all(axis=1)
    if not len(index) or inside.mean() < _LEAST_SEEN:
        return "they hardly show the same part of the world"
    # What one of them shows beyond the other's field of view tells nothing.
    shared = float(foreground_mask(larger.raised[tuple(found[inside].T)]).mean())
    if shared >= _LEAST_SHARED:
        return None
    return f"{100 * shared:.0f} % of the smaller foreground is in the other's"


def find_case(folder: Path | str, only: str | None = None) -> dict[str, Path]:
    """The image file of each modality in a folder, in the order of `MODALITIES`; ``only`` that one is asked for.

    Segmentations, masks and whatever else has no known ending are ignored, and moved images beside their sources.
    Raises MissingInputError if there is none, UsageError if two files claim one modality.
    """
    folder = Path(folder)
    candidates: dict[str, list[str]] = {}
    entries = _entries(folder)
    gone: dict[str, str] = {}
    for name, is_file in entries:
        modality = split_name(name)[1]
        # Hidden files: macOS leaves ._ twins of every image on foreign disks.
        if modality is None or name.startswith(".") or not IMAGE_FILE.search(name):
            continue
        if is_file:
            candidates.setdefault(modality, []).append(name)
        elif (folder / name).is_symlink() and not (folder / name).exists() and _MOVED not in name:
            gone[modality] = name
    for modality in gone.keys() - candidates.keys():
        if only in (None, modality):
            raise MissingInputError(
                f"{shown(folder / gone[modality])}: is a link to a file that is not there; fetch that (git annex get, "
                "datalad get), or remove the link"
            )
    found: dict[str, Path] = {}
    for modality, names in candidates.items():
        # What an earlier run wrote beside its input does not stand for it.
        names = [name for name in names if _MOVED not in name] or names
        if len(names) > 1:
            both = f"{shown(names[0])} and {shown(names[1])}"
            raise UsageError(f"{shown(folder)}: two files for {modality}: {both}; pass files with --t1, ...")
        found[modality] = folder / names[0]
    if not found:
        accepted = ", ".join(ending for endings in ENDINGS.values() for ending in endings)
        there = ", ".join(shown(name) for name, _ in entries[:5]) or "nothing"
        more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
        folders = ""
        if entries and not any(is_file for _, is_file in entries):
            folders = f"; if these folders are cases, name them: {shown(folder)}/*"
        raise MissingInputError(
            f"{shown(folder)}: no image whose modality is known, only {there}{more}; "
            f"end names of .nii, .nii.gz or .mgz files in _ or - and one of {accepted}, or pass --t1, ...{folders}"
        )
    return {modality: found[modality] for modality in MODALITIES if modality in found}


def load_case(
    path: Path | str | None,
    *,
    modality: str | None = None,
    channels: Sequence[str] | None = None,
    default_channels: Sequence[str] = MODALITIES,
    modalities: Mapping[str, Path] | None = None,
) -> Case:
    """Read a case from a folder, a 3-D file, a 4-D file, or from one named file a modality.

    ``modality`` says what a 3-D file is (else its name tells, else t1), and picks one image of a folder.
    ``channels`` are the volumes of a 4-D file in its order, ``default_channels`` where they are not given.
    ``modalities`` maps modality to file and excludes ``path``.
    Raises UsageError for a request that contradicts itself or the file, and what `jrs.reading` raises.
    """
    if modality is not None and channels is not None:
        raise UsageError("--modality is for a 3-D file and --channels for a 4-D one; give one of them")
    modality = None if modality is None else _known(modality, "--modality")
    names = [_known(name, "--channels") for name in (default_channels if channels is None else channels)]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--channels names {','.join(names) or 'nothing'}; name each modality once")
    if path is None or modalities:
        return _named_case(path, modality is not None or channels is not None, modalities or {})
    path = Path(path)
    if not _is_folder(path):
        return _case_of_file(path, modality, None if channels is None else names, names)
    if channels is not None:
        raise UsageError(f"{shown(path)}: is a folder and --channels is for a 4-D file; leave it out")
    path = _bids_folder(path)
    files = find_case(path, modality)
    if modality is not None and modality not in files:
        raise UsageError(f"{shown(path)}: holds no {modality}, only {', '.join(files)}; choose one of these")
    name, notes = _common_name(list(files.values())), () if modality else _strangers(files)
    return Case(name, _read({modality: files[modality]} if modality else files), path, notes)


def _bids_folder(folder: Path) -> Path:
    """The folder with the images of a BIDS subject or session (``sub-01``, ``sub-01/ses-1``), any other as it is."""
    name = folder.resolve().name
    if not name.startswith(("sub-", "ses-")):
        return folder
    there = [folder / "anat", *(folder.glob("ses-*/anat") if name.startswith("sub-") else ())]
    found = sorted(path for path in there if path.is_dir())
    if len(found) > 1:
        sessions = ", ".join(shown(path.parent.name) for path in found)
        raise UsageError(f"{shown(folder)}: holds {len(found)} sessions, {sessions}; name the folder of one of them")
    return found[0] if found else folder


def _named_case(path: Path | str | None, described: bool, modalities: Mapping[str, Path]) -> Case:
    if not modalities:
        raise UsageError("no case given; name a folder, a file, or files with --t1, --t1ce, --t2, --flair")
    if path is not None or described:
        other = f"CASE {shown(path)}" if path is not None else "--modality or --channels"
        raise UsageError(f"{other} and files by modality (--t1, --flair, ...) exclude each other; give one")
    files = {_known(key, f"--{key}"): Path(file) for key, file in modalities.items()}
    says = {key: split_name(file.name)[1] for key, file in files.items()}
    notes = [
        f"--{key} {shown(files[key])}: its name says {word}; make sure that it is {key}"
        for key, word in says.items()
        if word not in (None, key)
    ]
    return Case(_common_name(list(files.values())), _read(files), None, tuple(notes))


def _case_of_file(path: Path, modality: str | None, channels: list[str] | None, default_channels: list[str]) -> Case:
    count = count_channels(path)
    name = _common_name([path])
    if count == 1 and channels is None:
        told = None
        if modality is None:
            modality, told = _guessed(path.name)
        return Case(name, _read({modality: path}), path, guess=told)
    if modality is not None:
        raise UsageError(f"{shown(path)}: file has {count} volumes, --modality is for a single one; use --channels")
    from jrs.runtime.msd import channels_of

    listed_there = channels_of(path) if channels is None else None
    names = listed_there or (default_channels if channels is None else channels)
    if count != len(names):
        volumes = f"file has {count} volume{'s' if count > 1 else ''}"
        listed = f"{len(names)}: {','.join(names)}"
        if channels is None:
            raise UsageError(f"{shown(path)}: {volumes}, the default is {listed}; name its own with --channels")
        raise UsageError(f"{shown(path)}: {volumes}, --channels names {listed}; name one modality for each volume")
    notes: tuple[str, ...] = ()
    if channels is None and listed_there is None:
        notes = (
            f"its volumes are taken for {', '.join(names)}, in this order; what else they are a case's --channels "
            "tells, or a folder with a file for each",
        )
    volumes_by_name = dict(zip(names, read_channels(path), strict=True))
    return Case(name, _in_order(volumes_by_name), path, notes)


def _read(files: Mapping[str, Path]) -> dict[str, Volume]:
    """Read one 3-D file a modality, side by side: unpacking gzip takes most of the time."""
    with ThreadPoolExecutor(max_workers=len(files)) as pool:
        volumes = list(pool.map(read_volume, files.values()))
    return _in_order(dict(zip(files, volumes, strict=True)))


def _in_order(images: Mapping[str, Volume]) -> dict[str, Volume]:
    return {modality: images[modality] for modality in MODALITIES if modality in images}


def _known(name: str, option: str) -> str:
    modality = name.strip().lower()
    if modality not in MODALITIES:
        raise UsageError(f"{option}: unknown modality {name!r}; choose from {', '.join(MODALITIES)}")
    return modality


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # reading it as a file says why
        return False


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """What lies in a folder, and whether it is a file."""
    try:
        return sorted((entry.name, entry.is_file()) for entry in folder.iterdir())
    except PermissionError as error:
        message = f"{shown(folder)}: cannot be read (permission denied); change its permissions"
        raise MissingInputError(message) from error
    except (OSError, ValueError) as error:
        raise MissingInputError(f"{shown(folder)}: no such folder; check the path") from error


def known_modality(word: str) -> str | None:
    """The modality that a word such as ``t1gd`` or ``T2w`` stands for."""
    return _MODALITY_OF.get(word.strip().lower())


def split_name(name: str) -> tuple[str, str | None]:
    """A file's name without what tells its format and modality, and the modality, if it tells one.

    >>> split_name("BraTS-GLI-00000-000-t1n.nii.gz")
    ('BraTS-GLI-00000-000', 't1')
    >>> split_name("sub-01_ce-gadolinium_T1w.nii.gz")
    ('sub-01', 't1ce')
    >>> split_name("BraTS20_001_seg.nii.gz")
    ('BraTS20_001_seg', None)
    """
    stem = _ANY_IMAGE.sub("", name)
    cut = max(stem.rfind("_"), stem.rfind("-"))
    modality = _MODALITY_OF.get(stem[cut + 1 :].lower())
    if modality is None:
        return stem, None
    rest = stem[: max(cut, 0)]
    if modality == "t1":
        parts = rest.split("_")
        kept = [part for part in parts if not part.lower().startswith("ce-")]
        if len(kept) < len(parts):
            return "_".join(kept), "t1ce"
    return rest, modality


def _guessed(name: str) -> tuple[str, str | None]:
    """What a 3-D file that nobody said anything of is taken for; and a line that says so, unless its name is plain."""
    plain = split_name(name)[1]
    if plain is not None:
        return plain, None
    words = re.split(r"[^a-z0-9]+", _ANY_IMAGE.sub("", name).lower())
    named = {_MODALITY_OF[word] for word in words if word in _MODALITY_OF}
    if named == {"t2", "flair"}:  # FLAIR is T2-weighted
        named = {"flair"}
    if named == {"t1"} and _CONTRAST_WORDS.intersection(words):
        named = {"t1ce"}
    if named == {"t1"}:
        return "t1", None
    guess, why = (named.pop(), "by words in its name") if len(named) == 1 else ("t1", "as its name tells nothing else")
    if named and guess == "t1":
        why = f"though its name says {' and '.join(sorted(named))}"
    remedy = "end its name in _t1, _t1ce, _t2 or _flair, or say --modality"
    return guess, f"the image is taken for {guess}, {why}; if it is another, {remedy}"


def _common_name(files: list[Path]) -> str:
    """What the files' names have in common, else the name of the folder that they lie in."""
    # By whole words: what case_12 and case_13 have in common is case, not case_1.
    words = [re.split(r"([_.-])", split_name(file.name)[0]) for file in files]
    shared = takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))
    common = _safe("".join(column[0] for column in shared))
    return common or _safe(files[0].resolve().parent.name) or "case"


_PERSONS = ("sub", "ses")
_NO_PERSONS = ("run", "acq", "echo", "rec", "part", "inv", "desc", "chunk", "res", "series", "scan")
"""Words before a number that may differ between images of one patient."""
_NUMBERED = re.compile(r"([a-z]*)\d+")


def _strangers(files: Mapping[str, Path]) -> tuple[str, ...]:
    """A line if the images of a folder are named as two patients' or two sessions' are."""
    words = {key: re.split(r"[_.-]", split_name(file.name)[0].lower()) for key, file in files.items()}
    (first, ours), *others = words.items()
    for key, theirs in others:
        place = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if place is not None and _name_persons(ours, theirs, place):
            both = f"{shown(files[first].name)} and {shown(files[key].name)}"
            return (f"{both} are named as images of two patients or sessions; make sure that they are one's",)
    return ()


def _name_persons(ours: list[str], theirs: list[str], place: int) -> bool:
    """Whether what differs is a person's number: pat12 and pat13, case_12 and case_13, sub-A and sub-B."""
    before = ours[place - 1] if place else ""
    if before in _PERSONS:
        return True
    numbers = [_NUMBERED.fullmatch(words[place]) for words in (ours, theirs)]
    stems = {number[1] for number in numbers if number is not None}
    if None in numbers or len(stems) > 1 or (stem := stems.pop()) in _NO_PERSONS:
        return False
    # Numbers alone may be of series, behind an identifier that is the same.
    return bool(stem) or (before.isalpha() and before not in _NO_PERSONS)


def _safe(text: str) -> str:
    """The text as a part of a file name on any system; no leading dash or dot, no trailing separator."""
    cleaned = re.sub(r"[^\w.+-]+", "_", text).lstrip("_-.")
    return cleaned.encode()[:_LONGEST_NAME].decode(errors="ignore").strip("_-.")
