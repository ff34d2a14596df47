"""A bundle's graphs on one backend: encode an image, segment it, register two."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt

from jrs.bundle import Bundle
from jrs.errors import BackendError, OutOfMemoryError
from jrs.runtime.engines import (
    Engine,
    EngineInfo,
    EngineOptions,
    Value,
    available_backends,
    choose_backend,
    hosted,
    on_gpu,
    open_engine,
)

Array = npt.NDArray[np.float32]
Codes = Mapping[str, Value]
"""code1..code5, where the backend keeps them: a GPU's never leave it between graphs."""


@dataclass(frozen=True)
class Registered:
    """``moved`` (1,C,X,Y,Z) and ``displacement`` (1,3,X,Y,Z) in voxels, on the network's grid."""

    moved: Array
    displacement: Array


class Network:
    """The engines of a bundle, opened when first needed; a context manager.

    With backend ``auto``, a GPU whose memory runs out or whose library fails is left for the CPU; ``notes`` says so.
    """

    def __init__(
        self, bundle: Bundle, backend: str = "auto", precision: str = "auto", threads: int | None = None
    ) -> None:
        self.bundle = bundle
        self.backend, self.precision = choose_backend(backend, precision)
        self.notes: list[str] = []
        self._free_to_choose = backend == "auto"
        self._options = EngineOptions(self.precision, threads, bundle.manifest.precision)
        self._engines: dict[str, Engine] = {}
        self._stack = ExitStack()

    @property
    def info(self) -> EngineInfo:
        """What runs the convolutions."""
        return self._engine("encoder").info

    def encode(self, image: Array) -> Codes:
        """code1..code5 of a normalised image (1,C,X,Y,Z)."""
        return self._keep("encoder", {"image": image})

    def segment(self, codes: Codes) -> Array:
        """Probabilities (K,X,Y,Z)."""
        probabilities: Array = self._run("segmentation", codes)["probabilities"][0]
        return probabilities

    def register(self, image: Array, moving: Codes, fixed: Codes) -> Registered:
        """Deform ``image`` (1,C,X,Y,Z), whose codes are ``moving``, on the fixed image."""
        inputs = {f"moving_{name}": code for name, code in moving.items()}
        inputs |= {f"fixed_{name}": code for name, code in fixed.items()}
        flow = self._keep("registration", inputs)["flow"]
        result = self._run("transformer", {"image": image, "flow": flow})
        return Registered(result["moved"], result["displacement"])

    def _run(self, name: str, inputs: Codes) -> Mapping[str, Array]:
        return hosted(self._keep(name, inputs))

    def _keep(self, name: str, inputs: Codes) -> Codes:
        try:
            return self._engine(name).keep(inputs)
        except (OutOfMemoryError, BackendError) as error:
            if not (self._free_to_choose and on_gpu(self.backend)):
                raise
            inputs = hosted(inputs)
            self._leave_gpu(error)
            return self._keep(name, inputs)

    def _leave_gpu(self, error: Exception) -> None:
        """Go on with the best backend of the CPU; codes on the device stay readable."""
        left = [backend for backend in available_backends() if not on_gpu(backend)]
        if not left:
            raise error
        self.notes.append(f"{error}; went on with {left[0]}")
        self.backend = left[0]
        self._close()

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            options = self._options
            if name == "transformer":  # FP32 whatever the bundle's precision
                options = EngineOptions("fp32", options.threads)
            engine = open_engine(self.bundle.graph(name), name, self.backend, options)
            self._engines[name] = self._stack.enter_context(engine)
        return self._engines[name]

    def _close(self) -> None:
        self._engines.clear()
        self._stack.close()

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
