"""A bundle's graphs on one backend: encode an image, segment it, register two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Lock
from types import TracebackType

import numpy as np
import numpy.typing as npt

from jrs.bundle import SAMPLING, Bundle
from jrs.errors import BackendError, OutOfMemoryError
from jrs.runtime import native
from jrs.runtime.engines import (
    Engine,
    EngineInfo,
    EngineOptions,
    Value,
    choose_backend,
    fallbacks,
    hosted,
    on_gpu,
    on_host,
    open_engine,
    why_unavailable,
)
from jrs.runtime.engines.onnxruntime import OnnxRuntimeEngine
from jrs.runtime.precision import Choice, choose_precision
from jrs.runtime.sampling import Sampled, Warp

Array = npt.NDArray[np.float32]
_MANY_VOXELS = 1_500_000
"""Of a grid on which an engine of the CPU that is open takes a quarter of a gigabyte."""
Codes = Mapping[str, Value]
"""code1..code5, as the backend keeps them: a GPU's never leave it between graphs."""


@dataclass(frozen=True)
class Registered:
    """``moved`` (1,C,X,Y,Z) and ``displacement`` (1,3,X,Y,Z) in voxels, on the network's grid."""

    moved: Array
    displacement: Array


def engine_options(
    bundle: Bundle, name: str, precision: str, threads: int | None = None, lean: bool = False
) -> EngineOptions:
    """How a bundle's graph is opened where the network computes in ``precision``."""
    if name in SAMPLING:  # FP32 whatever the bundle's precision
        return EngineOptions("fp32", threads)
    graphs, codes = bundle.manifest.precision, precision
    if bundle.manifest.model.passes > 1 and graphs != "bf16":
        # Passes add up what rounding does to codes and to the registration's last layers: 0.05 mm in place of 0.12,
        # for 0.05 s a pass.
        codes = "fp32"
        precision = "fp32" if name == "registration" else precision
    return EngineOptions(precision, threads, graphs, codes, lean)


class Network:
    """The engines of a bundle, opened when first needed; a context manager.

    With backend ``auto``, a GPU whose memory runs out is left for the CPU, a library that fails for the next one;
    ``notes`` says so.
    """

    def __init__(
        self, bundle: Bundle, backend: str = "auto", precision: str = "auto", threads: int | None = None
    ) -> None:
        self.bundle, self.threads = bundle, threads
        self.backend, _ = choose_backend(backend, precision)
        self.notes: list[str] = []
        self._free_to_choose = backend == "auto"
        self._asked = self.backend, precision
        self._engines: dict[str, Engine] = {}
        self._coming: dict[str, Future[Engine]] = {}
        self._planned: list[str] = []
        self._opener: ThreadPoolExecutor | None = None
        self._info: EngineInfo | None = None
        self._closed: set[str] = set()
        self._again = False
        self._stack = ExitStack()
        self._choosing = Lock()

    @property
    def _spare(self) -> bool:
        """Whether to keep one engine open at a time: on a large grid, until one is asked for again."""
        large = int(np.prod(self.bundle.manifest.model.grid.shape)) > _MANY_VOXELS
        return large and not self._again and not on_gpu(self.backend)

    @property
    def _flow_moves(self) -> bool:
        """Whether the flow is the displacement and the compiled kernels sample, so that no transformer is needed."""
        architecture = self.bundle.manifest.model.architecture
        return architecture.head == "displacement" and not on_gpu(self.backend) and native.available()

    @property
    def choice(self) -> Choice:
        """The precision and why; found when first asked for, which may take a run of the gate."""
        with self._choosing:
            return self._choice

    @cached_property
    def _choice(self) -> Choice:
        choice = choose_precision(self.bundle, *self._asked, self.threads)
        lacking = why_unavailable("openvino") if self._free_to_choose and self.backend == "ort-cpu" else None
        return choice if lacking is None else replace(choice, reason=f"{choice.reason}; {lacking}")

    @property
    def info(self) -> EngineInfo:
        """What runs the convolutions, and why in that precision."""
        info = self._info or self._engine("encoder").info
        verdict = self.choice.verdict
        return replace(info, reason=self.choice.reason, gate=None if verdict is None else verdict.record())

    def open_ahead(self, graphs: Sequence[str]) -> None:
        """Begin to open the engines of these graphs, in this order, while the caller does something else.

        On a large grid, where each holds much memory, no more than the one in use and the next are open; from the
        second case on all stay open, which is faster.
        What goes wrong is raised where the engine is first used. A GPU's are opened there too: its context is its
        thread's, and opening them on one that is full would hide which run filled it.
        """
        if on_gpu(self.backend):
            return
        if self._opener is None:
            self._opener = ThreadPoolExecutor(1, "jrs-engines")
        self._again = self._again or any(name in self._closed for name in graphs)
        needless = {*self._engines, *self._coming, *(["transformer"] if self._flow_moves else [])}
        self._planned = [name for name in graphs if name in self.bundle.manifest.graphs and name not in needless]
        self._open_planned(2 if self._spare else len(self._planned))

    def _open_planned(self, count: int) -> None:
        while self._opener is not None and self._planned and count > 0:
            name = self._planned.pop(0)
            self._coming[name] = self._opener.submit(self._open, name)
            count -= 1

    def encode(self, image: Value) -> Codes:
        """code1..code5 of a normalised image (1,C,X,Y,Z)."""
        return self._keep("encoder", {"image": image})

    def segment(self, image: Array, codes: Codes) -> Array:
        """Probabilities (K,X,Y,Z) of ``image`` (1,C,X,Y,Z), whose codes are ``codes``.

        Where the model says so, the mean with those of the mirrored image, which is encoded for it.
        """
        model = self.bundle.manifest.model
        if not model.mirroring:
            return self._segmented(codes)
        lateral = model.grid.axis_along("LR")
        # Encoded first: on a large grid the segmentation's engine closes the encoder's.
        mirrored = self.encode(np.ascontiguousarray(np.flip(image, 2 + lateral)))
        direct, back = self._segmented(codes), np.flip(self._segmented(mirrored), 1 + lateral)
        return np.float32(0.5) * (direct + back)

    def _segmented(self, codes: Codes) -> Array:
        probabilities: Array = self._run("segmentation", codes)["probabilities"][0]
        return probabilities

    def register(self, image: Array, moving: Codes, fixed: Codes) -> Registered:
        """Deform ``image`` (1,C,X,Y,Z), whose codes are ``moving``, on the fixed image, in as many passes as it takes.

        After the first, the moved image is encoded and registered again: u(x) = v(x) + u_before(x + v(x)).
        """
        if on_gpu(self.backend) or not native.available():
            try:
                return self._registered_by_graphs(image, moving, fixed)
            except (OutOfMemoryError, BackendError) as error:
                # What a device was given to do fails at the latest where its results are copied.
                moving, fixed = self._leave_gpu(error, moving, fixed)
                return self.register(image, moving, fixed)
        displacement = self._displacement(image, self._flow(moving, fixed))
        for _ in range(self.bundle.manifest.model.passes - 1):
            between = self._pulled(image, displacement)
            further = self._displacement(between, self._flow(self.encode(between), fixed))
            displacement = further + self._pulled(displacement, further)
        return Registered(self._pulled(image, displacement), displacement)

    def _registered_by_graphs(self, image: Array, moving: Codes, fixed: Codes) -> Registered:
        """The same by graphs alone: on a GPU that samples nothing comes to the host before the end."""
        flow = self._flow(moving, fixed)
        placed = self._placed(image)
        done = self._keep("transformer", {"image": placed, "flow": flow})
        for _ in range(self.bundle.manifest.model.passes - 1):
            flow = self._flow(self.encode(done["moved"]), fixed)
            further = self._keep("transformer", {"image": done["moved"], "flow": flow})["displacement"]
            done = self._keep("composer", {"image": placed, "first": done["displacement"], "further": further})
        return Registered(on_host(done["moved"]), on_host(done["displacement"]))

    def _flow(self, moving: Codes, fixed: Codes) -> Value:
        inputs = {f"moving_{name}": code for name, code in moving.items()}
        inputs |= {f"fixed_{name}": code for name, code in fixed.items()}
        return self._keep("registration", inputs)["flow"]

    def _displacement(self, image: Array, flow: Value) -> Array:
        """One pass's displacement, on the CPU: the compiled sampler moves images several times faster than a graph."""
        if self._flow_moves:
            displacement = on_host(flow)
            if origin := self.bundle.manifest.model.architecture.grid_origin:
                displacement = displacement + np.float32(origin)
            return displacement
        transformer = self._engine("transformer")
        assert isinstance(transformer, OnnxRuntimeEngine)
        return transformer.only(["displacement"], {"image": image, "flow": flow})["displacement"]

    def _pulled(self, volume: Array, displacement: Array) -> Array:
        """``volume`` (1,C,X,Y,Z) sampled at x + ``displacement`` (1,3,X,Y,Z), voxels, the border repeated outside."""
        warp = Warp(Sampled(displacement[0], self.threads), np.eye(4), np.eye(3))
        return Sampled(volume[0], self.threads).pull(volume.shape[2:], np.eye(4), warp, None)[None]

    def _placed(self, image: Array) -> Value:
        """The image where the graphs that sample take it, so that it goes to a device once for all of them."""
        try:
            return self._engine("transformer").place(image)
        except (OutOfMemoryError, BackendError) as error:
            self._leave_gpu(error)
            return image

    def _run(self, name: str, inputs: Codes) -> Mapping[str, Array]:
        outputs = self._keep(name, inputs)
        try:
            return hosted(outputs)
        except (OutOfMemoryError, BackendError) as error:
            (inputs,) = self._leave_gpu(error, inputs)
            return self._run(name, inputs)

    def _keep(self, name: str, inputs: Codes) -> Codes:
        try:
            return self._engine(name).keep(inputs)
        except (OutOfMemoryError, BackendError) as error:
            (inputs,) = self._leave_gpu(error, inputs)
            return self._keep(name, inputs)

    def _leave_gpu(self, error: Exception, *held: Codes) -> list[dict[str, Array]]:
        """Go on with the next backend, or of the CPU if memory ran out; what is ``held``, on the host.

        Raises the error where there is none, where the user has chosen, or where the device shows nothing any more.
        """
        left = fallbacks(self.backend, gpus=isinstance(error, BackendError)) if on_gpu(self.backend) else []
        if not left or not self._free_to_choose:
            raise error
        try:
            kept = [hosted(values) for values in held]
        except (OutOfMemoryError, BackendError):
            raise error from None
        self.notes.append(f"{error}; went on with {left[0]}")
        self.backend = left[0]
        if self._asked[1] == "auto":  # what is on the device already was computed in the graphs' own precision
            self._choice = Choice("fp32", f"went on with {left[0]} in the middle of a case")
        self._close()
        return kept

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            self._again = self._again or name in self._closed
            coming = self._coming.pop(name, None)
            if name in self._planned:
                self._planned.remove(name)
            engine = self._open(name) if coming is None else coming.result()
            if self._spare and self._engines:
                self._closed.update(self._engines)
                self._close_engines()
                self._open_planned(1)
            self._engines[name] = self._stack.enter_context(engine)
            if name == "encoder":
                self._info = engine.info
        return self._engines[name]

    def _close_engines(self) -> None:
        self._engines.clear()
        self._stack.close()

    def _open(self, name: str) -> Engine:
        options = engine_options(self.bundle, name, self.choice.precision, self.threads, self._spare)
        return open_engine(self.bundle.graph(name), name, self.backend, options)

    def _close(self) -> None:
        coming, self._coming, self._planned, self._info = list(self._coming.values()), {}, [], None
        for future in coming:
            future.cancel()
        if self._opener is not None:
            self._opener.shutdown()
            self._opener = None
        for future in coming:
            if not future.cancelled() and future.exception() is None:
                self._stack.enter_context(future.result())
        self._close_engines()

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
