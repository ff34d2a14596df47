"""A fixed image and all of it that does not depend on what is registered to it: kept in memory and on disk.

On disk by content: what is stored is found again under any file name, and by nothing that differs in a voxel, in the
network, in the processor, in a library or in the code, so that a hit gives the same bits as a miss.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from jrs.geometry import Geometry
from jrs.manifest import ModelSpec
from jrs.resources import DATA
from jrs.runtime.affine import block_of
from jrs.runtime.affine_search import Block
from jrs.runtime.caching import Entry, Store, digest
from jrs.runtime.cases import Case, load_case
from jrs.runtime.engines import ChannelsLast, hosted, on_gpu
from jrs.runtime.machine import code_digest, numerics
from jrs.runtime.network import Codes, Network
from jrs.runtime.preprocess import NetworkInput, network_input, place_grid
from jrs.runtime.pyramid import Pyramid
from jrs.runtime.tumors import Tumors
from jrs.volume import Volume

_FORMAT = 1
_PYRAMIDS = 2
"""Kept in memory: one for each set of modalities and levels, of some 100 MB with four."""
_SAMPLED = ("jrs.geometry", "jrs.volume", "jrs.runtime.sampling", "jrs.runtime.native", "jrs.runtime.affine")
_ENGINES = tuple(f"jrs.runtime.engines.{name}" for name in ("base", "openvino", "openvino_graph", "onnxruntime"))
# The sources of what makes an entry of each kind.
_CODE = {
    "input": (*_SAMPLED, "jrs.runtime.preprocess", "jrs.runtime.affine_search", "jrs.runtime.affine_climb"),
    "codes": (*_SAMPLED, "jrs.runtime.preprocess", "jrs.runtime.network", "jrs.runtime.fixed", *_ENGINES),
    "affine": (*_SAMPLED, "jrs.runtime.affine_search"),
    "pyramid": (*_SAMPLED, "jrs.runtime.pyramid"),
}


class Shelf:
    """What is stored on disk of one fixed image, by its content."""

    def __init__(self, store: Store, case: Case, threads: int | None = None) -> None:
        self.store, self.case, self.threads = store, case, threads
        self._contents: dict[str, str] = {}

    def content(self, modality: str) -> str:
        """SHA-256 of an image's voxels and of where they lie."""
        if modality not in self._contents:
            volume = self.case.images[modality]
            described = json.dumps([volume.data.dtype.str, volume.data.shape, volume.geometry.affine.tolist()])
            total = hashlib.sha256(described.encode())
            total.update(np.ascontiguousarray(volume.data).data)
            self._contents[modality] = total.hexdigest()
        return self._contents[modality]

    def key(self, kind: str, modalities: Sequence[str], **more: Any) -> dict[str, Any]:
        """The key of an entry made from these modalities and ``more``, plain JSON."""
        return {
            "format": _FORMAT,
            "images": [[name, self.content(name)] for name in modalities],
            "code": code_digest(*_CODE[kind]),
            **numerics(self.threads),
            **more,
        }

    def input_key(self, spec: ModelSpec) -> dict[str, Any]:
        """The key of the image as a network of this specification takes it."""
        wanted = ("channels", "optional_channels", "grid", "normalization")
        parts = {name: value for name, value in asdict(spec).items() if name in wanted}
        return self.key("input", list(self.case.images), spec=parts)

    def entry(self, kind: str, key: dict[str, Any], make: Callable[[], Entry]) -> Entry:
        """What is stored under a key, or made now and stored."""
        found = self.store.load(kind, key)
        if found is None:
            found = make()
            self.store.save(kind, key, found)
        return found


@dataclass
class FixedImage:
    """An atlas as all that looks at it takes it: what every case registered to it can share."""

    label: str
    case: Case
    grid: Geometry
    input: NetworkInput
    encode: Callable[[], Codes]
    healthy: bool
    shelf: Shelf
    notes: tuple[str, ...] = ()
    tumors: Tumors | None = None
    pyramids: dict[Any, Pyramid] = field(default_factory=dict)
    blocks: dict[str, Block] = field(default_factory=dict)

    @cached_property
    def codes(self) -> Codes:
        """The network's codes, computed or fetched from the disk when they are first asked for."""
        return self.encode()

    def block(self, modality: str) -> Block:
        """One image as the affine alignment takes it."""
        if modality not in self.blocks:
            volume, shelf = self.case.images[modality], self.shelf
            found = shelf.entry("affine", shelf.key("affine", [modality]), lambda: _block_entry(volume, shelf.threads))
            self.blocks[modality] = Block(found.arrays["data"], _grid(found.value))
        return self.blocks[modality]

    def pyramid(
        self,
        grids: tuple[Geometry, ...],
        modalities: Sequence[str],
        tumors: Tumors,
        make: Callable[[], Pyramid],
    ) -> Pyramid:
        """The image as the refinement takes it; on disk where it has no tumours, whose masks are no key."""
        known = grids, tuple(modalities), tumors.mask is None
        if known not in self.pyramids:
            while len(self.pyramids) >= _PYRAMIDS:
                del self.pyramids[next(iter(self.pyramids))]
            made = make()
            if tumors.mask is None:
                levels = range(len(grids))
                key = self.shelf.key("pyramid", modalities, grids=[_described(grid) for grid in grids])
                found = self.shelf.entry(
                    "pyramid", key, lambda: Entry({str(level): made.image(level) for level in levels})
                )
                kept = {level: found.arrays[str(level)] for level in levels}
                made = replace(made, make=lambda _: kept, _made={})
            self.pyramids[known] = made
        return self.pyramids[known]


class FixedImages:
    """The fixed images of a pipeline, each read once and encoded at most once."""

    def __init__(self, network: Network, threads: int | None = None, store: Store | None = None) -> None:
        self.network, self.threads = network, threads
        self.store = Store.open() if store is None else store
        self._known: dict[str, FixedImage] = {}

    def get(self, path: Path, label: str, stage: Callable[[str], AbstractContextManager[None]]) -> FixedImage:
        """The image of a file or folder; ``stage`` times what is done for it."""
        stamp = path.stat()
        key = f"{path.resolve()}:{stamp.st_mtime_ns}:{stamp.st_size}"
        if key not in self._known:
            spec = self.network.bundle.manifest.model
            with stage("read_atlas"):
                case = load_case(path, default_channels=spec.channels)
            with stage("encode_atlas"):
                shelf = Shelf(self.store, case, self.threads)
                inputs, notes = self._input(shelf, spec, f"the atlas {path}")
            healthy = path.parent == DATA / "atlases"
            encode = partial(self._codes, shelf, spec, inputs)
            # Templates are T1, by whatever name.
            doubts = [note for note in case.doubts if note != case.guess or "t1" not in case.images]
            notes = *notes, *(f"the atlas {path}: {note}" for note in doubts)
            self._known[key] = FixedImage(label, case, inputs.grid, inputs, encode, healthy, shelf, notes)
        return self._known[key]

    def clear(self) -> None:
        """Forget those in memory."""
        self._known.clear()

    def _input(self, shelf: Shelf, spec: ModelSpec, whose: str) -> tuple[NetworkInput, tuple[str, ...]]:
        images = shelf.case.images

        def make() -> Entry:
            grid, note = place_grid(spec.grid, next(iter(images.values())), self.threads)
            made = network_input(images, spec, grid, threads=self.threads, whose=whose)
            return Entry({"present": made.tensor[0, list(made.present)]}, {"grid": _described(grid), "note": note})

        found = shelf.entry("input", shelf.input_key(spec), make)
        present = tuple(channel in images for channel in spec.channels)
        grid, note = _grid(found.value["grid"]), found.value["note"]
        tensor = np.zeros((1, len(spec.channels), *grid.shape), dtype=np.float32)
        tensor[0, list(present)] = found.arrays["present"]
        return NetworkInput(tensor, present, grid), () if note is None else (note,)

    def _codes(self, shelf: Shelf, spec: ModelSpec, inputs: NetworkInput) -> Codes:
        network = self.network
        # A GPU encodes in less time than codes take to come back to it, and keeps them where they are needed.
        if on_gpu(network.backend):
            return network.encode(inputs.tensor)
        key = shelf.key(
            "codes",
            (),
            input=digest(shelf.input_key(spec)),
            grid=_described(inputs.grid),
            bundle=network.bundle.sha256,
            backend=network.backend,
            precision=network.choice.precision,
        )
        return _codes_of(shelf.entry("codes", key, lambda: _codes_entry(network.encode(inputs.tensor))))


def _block_entry(volume: Volume, threads: int | None) -> Entry:
    block = block_of(volume, threads)
    return Entry({"data": block.data}, _described(block.grid))


def _codes_entry(codes: Codes) -> Entry:
    """Codes as the backend keeps them: laid out anew they would have to be turned back, from BF16 in twice the room."""
    kept = {name: code for name, code in codes.items() if isinstance(code, ChannelsLast)}
    others = {name: code for name, code in codes.items() if name not in kept}
    return Entry({**hosted(others), **{name: code.data for name, code in kept.items()}}, {"channels_last": [*kept]})


def _codes_of(entry: Entry) -> Codes:
    last = entry.value["channels_last"]
    return {name: ChannelsLast(array) if name in last else array for name, array in entry.arrays.items()}


def _described(grid: Geometry) -> dict[str, Any]:
    """A grid as JSON, to the last bit."""
    return {"shape": list(grid.shape), "affine": grid.affine.tolist()}


def _grid(described: dict[str, Any]) -> Geometry:
    a, b, c = described["shape"]
    return Geometry((a, b, c), np.array(described["affine"]))
