"""Files that ship inside the package: atlases, bundles, configurations, the resampling graph."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from jrs.errors import MissingInputError

DATA = Path(str(resources.files("jrs"))) / "data"
DEFAULT_BUNDLE = "default"
ATLASES = {"sri24": "sri24_t1"}
"""The atlases that ship with jrs: name and file."""


def atlas_path(name: str | Path) -> Path:
    """The file of an atlas that ships with jrs (``sri24``), or the path itself."""
    return _find(name, DATA / "atlases", ".nii.gz", "atlas", ATLASES)


def config_path(name: str | Path) -> Path:
    """The file of a training configuration that ships with jrs, or the path itself."""
    return _find(name, DATA / "configs", ".toml", "configuration", {})


def bundle_path(name: str | Path = DEFAULT_BUNDLE) -> Path:
    """The folder of a bundle that ships with jrs (``default``), or the path itself."""
    return _find(name, DATA / "bundles", "", "bundle", {})


def _find(name: str | Path, folder: Path, ending: str, kind: str, aliases: dict[str, str]) -> Path:
    path = Path(name)
    if path.exists():
        return path
    shipped = folder / f"{aliases.get(str(name), str(name))}{ending}"
    if path.parent == Path() and shipped.exists():
        return shipped
    known = sorted(aliases) or sorted(p.name.removesuffix(ending) for p in folder.glob(f"*{ending}"))
    raise MissingInputError(f"{name}: no such {kind}; give a path or one that ships with jrs: {', '.join(known)}")
