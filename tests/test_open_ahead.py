"""Engines opened in the background: once each, their errors raised where the engine is used."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jrs.bundle import Bundle
from jrs.errors import BackendError
from jrs.runtime import network as network_module
from jrs.runtime.network import Network

IMAGE = np.random.default_rng(0).normal(size=(1, 4, 32, 32, 32)).astype(np.float32)


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Every engine that is opened, and whether in the background."""
    log: list[tuple[str, bool]] = []
    real = network_module.open_engine

    def noted(graph: Path, name: str, *rest: Any) -> Any:
        log.append((name, threading.current_thread() is not threading.main_thread()))
        return real(graph, name, *rest)

    monkeypatch.setattr(network_module, "open_engine", noted)
    return log


def test_engines_are_opened_once_in_the_order_asked_for(
    bundle: Bundle, opened: list[tuple[str, bool]], kernels: str
) -> None:
    with Network(bundle, "ort-cpu", threads=1) as network:
        network.open_ahead(["encoder", "registration", "nothing_of_that_name"])
        network.open_ahead(["encoder", "transformer"])
        codes = network.encode(IMAGE)
        ahead = network.register(IMAGE, codes, codes)
        network.segment(IMAGE, codes)
        network.open_ahead(["encoder", "segmentation"])
    # With the compiled kernels a head that gives the displacement itself needs no transformer.
    transformer = [("transformer", True)] if kernels == "portable" else []
    assert opened == [("encoder", True), ("registration", True), *transformer, ("segmentation", False)]
    with Network(bundle, "ort-cpu", threads=1) as network:
        codes = network.encode(IMAGE)
        np.testing.assert_array_equal(network.register(IMAGE, codes, codes).moved, ahead.moved)


@pytest.mark.parametrize("mirroring", [False, True])
def test_on_a_large_grid_two_engines_are_open_at_most(
    bundle: Bundle, mirroring: bool, opened: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dataclasses.replace(bundle.manifest.model, mirroring=mirroring)
    bundle = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, model=model))
    monkeypatch.setattr(network_module, "_MANY_VOXELS", 1000)
    monkeypatch.setenv("JRS_KERNELS", "off")
    graphs = ["encoder", "segmentation", "registration", "transformer"]
    with Network(bundle, "ort-cpu", threads=1) as network:
        network.open_ahead(graphs)
        codes = network.encode(IMAGE)
        assert [name for name, _ in opened] == graphs[:2] and set(network._engines) == {"encoder"}
        probabilities = network.segment(IMAGE, codes)
        found = network.register(IMAGE, codes, codes)
        assert opened == [(name, True) for name in graphs]
        assert set(network._engines) == {"transformer"} and not network._coming
        assert network.info.backend == "ort-cpu" and len(opened) == 4
        # A second case finds them open, and so does a third.
        for _ in range(2):
            network.open_ahead(graphs)
            network.register(IMAGE, network.encode(IMAGE), codes)
            network.segment(IMAGE, codes)
            assert set(network._engines) == set(graphs) and len(opened) == 7
    monkeypatch.undo()
    with Network(bundle, "ort-cpu", threads=1) as network:
        codes = network.encode(IMAGE)
        np.testing.assert_array_equal(network.segment(IMAGE, codes), probabilities)
        np.testing.assert_allclose(network.register(IMAGE, codes, codes).displacement, found.displacement, atol=2e-5)


def test_an_error_is_raised_where_the_engine_is_used(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    real = network_module.open_engine

    def broken(graph: Path, name: str, *rest: Any) -> Any:
        if name == "segmentation":
            raise BackendError("backend ort-cpu: cannot load it")
        return real(graph, name, *rest)

    monkeypatch.setattr(network_module, "open_engine", broken)
    with Network(bundle, "ort-cpu", threads=1) as network:
        network.open_ahead(["segmentation", "encoder"])
        codes = network.encode(IMAGE)
        for _ in range(2):
            with pytest.raises(BackendError, match="backend ort-cpu: cannot load it"):
                network.segment(IMAGE, codes)


def test_leaving_closes_what_was_never_used(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go = threading.Event(), threading.Event()
    closed: list[str] = []

    class Slow:
        def __init__(self, name: str) -> None:
            self.name = name
            started.set()
            go.wait(20)

        def __enter__(self) -> Slow:
            return self

        def __exit__(self, *error: Any) -> None:
            closed.append(self.name)

    monkeypatch.setattr(network_module, "open_engine", lambda graph, name, *rest: Slow(name))
    with Network(bundle, "ort-cpu", threads=1) as network:
        network.open_ahead(["encoder", "registration"])
        assert started.wait(20)
        threading.Timer(0.2, go.set).start()
    assert closed == ["encoder"]  # the one behind it was never begun


def test_a_gpus_engines_are_opened_where_they_are_used(
    bundle: Bundle, opened: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_module, "on_gpu", lambda backend: True)
    with Network(bundle, "ort-cpu", threads=1) as network:
        network.open_ahead(["encoder"])
        network.encode(IMAGE)
    assert opened == [("encoder", False)]
