"""Names and colours of the tumour's classes, and the tables that other programs colour labels with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LabelColor:
    """One label: its number, its class, and red, green, blue of 0 to 255."""

    value: int
    name: str
    rgb: tuple[int, int, int]

    @property
    def hex(self) -> str:
        """The colour as ``#rrggbb``."""
        return "#" + bytes(self.rgb).hex()


CLASS_NAMES = ("Background", "Necrotic and non-enhancing core", "Oedema", "Enhancing tumour")
CLASS_COLORS = ((0, 0, 0), (0xF0, 0xE4, 0x42), (0x56, 0xB4, 0xE9), (0xD5, 0x5E, 0x00))
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""


def label_colors(label_values: Mapping[str, int]) -> list[LabelColor]:
    """Each class of a bundle, background first; classes that are not BraTS's keep their own names."""
    brats = len(label_values) == len(CLASS_NAMES)
    spare = [*CLASS_COLORS, (0x00, 0x9E, 0x73), (0xCC, 0x79, 0xA7), (0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)]
    return [
        LabelColor(value, CLASS_NAMES[i] if brats else name, spare[i if i < len(spare) else 1 + (i - 1) % 7])
        for i, (name, value) in enumerate(label_values.items())
    ]


def slicer_table(colors: Sequence[LabelColor], scheme: str) -> str:
    """3D Slicer's colour table: number, name without blanks, red, green, blue, alpha of 0 to 255."""
    lines = [f"# Color table of the tumour labels, scheme {scheme}", "# number name red green blue alpha"]
    for color in colors:
        name = color.name.replace(" ", "_")
        lines.append(f"{color.value} {name} {' '.join(map(str, color.rgb))} {255 if color.value else 0}")
    return "\n".join(lines) + "\n"


def itksnap_table(colors: Sequence[LabelColor], scheme: str) -> str:
    """ITK-SNAP's label descriptions: number, red, green, blue, alpha 0 to 1, visible, in the mesh, name."""
    rule = "#" * 48
    lines = [
        *(rule, "# ITK-SnAP Label Description File", f"# Tumour labels, scheme {scheme}"),
        *("# File format: IDX -R- -G- -B- -A-- VIS MSH LABEL", rule),
    ]
    for color in colors:
        shown = 1 if color.value else 0
        name = color.name if color.value else "Clear Label"
        red, green, blue = color.rgb
        lines.append(f'{color.value:5d} {red:5d} {green:4d} {blue:4d} {shown:8d} {shown:2d} {shown:2d}    "{name}"')
    return "\n".join(lines) + "\n"


def bids_table(colors: Sequence[LabelColor]) -> str:
    """The BIDS lookup table of a discrete segmentation: index, name, colour."""
    lines = ["index\tname\tcolor", *(f"{color.value}\t{color.name}\t{color.hex}" for color in colors)]
    return "\n".join(lines) + "\n"
