"""A bundle's graphs on one backend: encode an image, segment it, register two."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt

from jrs.bundle import Bundle
from jrs.runtime.engines import Engine, EngineInfo, EngineOptions, choose_backend, open_engine

Array = npt.NDArray[np.float32]
Codes = dict[str, Array]


@dataclass(frozen=True)
class Registered:
    """``moved`` (1,C,X,Y,Z) and ``displacement`` (1,3,X,Y,Z) in voxels, on the network's grid."""

    moved: Array
    displacement: Array


class Network:
    """The engines of a bundle, opened when first needed; a context manager."""

    def __init__(
        self, bundle: Bundle, backend: str = "auto", precision: str = "auto", threads: int | None = None
    ) -> None:
        self.bundle = bundle
        self.backend, self.precision = choose_backend(backend, precision)
        self._options = EngineOptions(self.precision, threads)
        self._engines: dict[str, Engine] = {}
        self._stack = ExitStack()

    @property
    def info(self) -> EngineInfo:
        """What runs the convolutions."""
        return self._engine("encoder").info

    def encode(self, image: Array) -> Codes:
        """code1..code5 of a normalised image (1,C,X,Y,Z)."""
        return self._engine("encoder")({"image": image})

    def segment(self, codes: Codes) -> Array:
        """Probabilities (K,X,Y,Z)."""
        probabilities: Array = self._engine("segmentation")(codes)["probabilities"][0]
        return probabilities

    def register(self, image: Array, moving: Codes, fixed: Codes) -> Registered:
        """Deform ``image`` (1,C,X,Y,Z), whose codes are ``moving``, on the fixed image."""
        inputs = {f"moving_{name}": code for name, code in moving.items()}
        inputs |= {f"fixed_{name}": code for name, code in fixed.items()}
        flow = self._engine("registration")(inputs)["flow"]
        result = self._engine("transformer")({"image": image, "flow": flow})
        return Registered(result["moved"], result["displacement"])

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            engine = open_engine(self.bundle.graph(name), name, self.backend, self._options)
            self._engines[name] = self._stack.enter_context(engine)
        return self._engines[name]

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engines.clear()
        self._stack.close()
