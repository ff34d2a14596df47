"""What ``dataset.json`` of the Medical Segmentation Decathlon says of its 4-D images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jrs.errors import BadDataError
from jrs.headers import shown
from jrs.runtime.cases import known_modality

DESCRIPTION = "dataset.json"
_IMAGES = ("imagesTr", "imagesTs")


def channels_of(image: Path) -> list[str] | None:
    """The modalities of an image's volumes, in its order; None for one that lies in no such data set."""
    file = image.absolute().parent.parent / DESCRIPTION
    if image.absolute().parent.name not in _IMAGES or not file.is_file():
        return None
    found = channels(file, described(file))
    return sorted(found, key=found.__getitem__)


def described(file: Path) -> dict[str, Any]:
    """The description; raises BadDataError for what is none."""
    try:
        value: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadDataError(f"{shown(file)}: is not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise BadDataError(f"{shown(file)}: must be an object with modality and labels; download it again")
    return value


def table(file: Path, description: dict[str, Any], key: str) -> dict[int, str]:
    """A table of the description from number to name."""
    value = description.get(key)
    if not isinstance(value, dict) or not all(str(k).isdigit() for k in value):
        raise BadDataError(f"{shown(file)}: has no table {key} from number to name; download it again")
    return {int(number): str(name) for number, name in value.items()}


def channels(file: Path, description: dict[str, Any]) -> dict[str, int]:
    """Modality to volume of the 4-D files."""
    found: dict[str, int] = {}
    for index, name in table(file, description, "modality").items():
        modality = known_modality(name)
        if modality is None or modality in found:
            raise BadDataError(
                f"{shown(file)}: channel {index} is {name!r}, T1w, T1gd, T2w and FLAIR are needed, each once; "
                "is it the brain tumour task?"
            )
        found[modality] = index
    return found
