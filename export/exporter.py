"""From a checkpoint to a bundle: trace, check, write; no bundle appears if the check misses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jrs import __version__
from jrs.bundle import (
    FORMAT_VERSION,
    MANIFEST,
    AccuracyRecord,
    Bundle,
    BundleManifest,
    GraphFile,
    ParityRecord,
    Precision,
)
from jrs.errors import JrsError
from jrs.export.accuracy import check_accuracy
from jrs.export.graphs import build_graphs, opset_of
from jrs.export.parity import check_parity
from jrs.files import sha256_of, whole_folder, write_json
from jrs.geometry import Shape
from jrs.models.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from jrs.schema import encode


class ParityError(JrsError):
    """An exported graph does not compute what PyTorch computes."""


def export_bundle(
    checkpoint: str | Path,
    out: str | Path,
    precision: Precision = "fp32",
    name: str | None = None,
    shape: Shape | None = None,
    overwrite: bool = False,
    cases: Sequence[str | Path] = (),
    spacing: tuple[float, float, float] | None = None,
) -> Bundle:
    """Write the bundle of a checkpoint (a file, or the folder of a run) into the folder ``out``.

    ``shape`` and ``spacing`` (mm) replace those of the checkpoint's grid (the network is convolutional); every side a
    multiple of 16. What was learnt at one spacing is worth less at another.
    A reduced ``precision`` has to keep near FP32 on the shipped brain and on every one of ``cases``.
    Raises ParityError if a graph or the precision misses its limit, CannotCreateError if ``out`` exists
    without ``overwrite``.
    """
    out = Path(out)
    source = find_checkpoint(Path(checkpoint))
    loaded = load_checkpoint(source)
    spec = dataclasses.replace(loaded.spec, architecture=loaded.spec.architecture.deployed)
    if shape is not None:
        spec = dataclasses.replace(spec, grid=dataclasses.replace(spec.grid, shape=shape))
    if spacing is not None:
        spec = dataclasses.replace(spec, grid=dataclasses.replace(spec.grid, spacing=spacing))
    # The folder first: a refusal to overwrite must not come after minutes of tracing.
    with whole_folder(out, overwrite) as folder:
        net = loaded.network()
        graphs = build_graphs(net, spec, precision)
        parity = check_parity(net, spec, graphs, precision)
        _judge(source, parity)
        accuracy = {}
        if precision != "fp32" or cases:
            accuracy = check_accuracy(net, spec, graphs, precision, cases)
            _judge_accuracy(source, precision, accuracy)
        files = {}
        for graph, model in graphs.items():
            file = folder / f"{graph}.onnx"
            file.write_bytes(model.SerializeToString(deterministic=True))
            files[graph] = GraphFile(file.name, sha256_of(file))
        manifest = BundleManifest(
            format_version=FORMAT_VERSION,
            name=name or out.name,
            model=spec,
            precision=precision,
            opset=opset_of(precision),
            graphs=files,
            training=_training_record(loaded),
            parity=parity,
            accuracy=accuracy,
            jrs_version=__version__,
        )
        write_json(folder / MANIFEST, encode(manifest))
    return Bundle.open(out)


def _judge(source: Path, parity: dict[str, ParityRecord]) -> None:
    missed = [name for name, record in parity.items() if not record.passed]
    if missed:
        record = parity[missed[0]]
        raise ParityError(
            f"{source}: the exported {missed[0]} differs from PyTorch by {getattr(record, record.measure):.3g} "
            f"({record.unit}, limit {record.limit:g}); no bundle was written, export with --precision fp32"
        )


def _judge_accuracy(source: Path, precision: Precision, accuracy: dict[str, AccuracyRecord]) -> None:
    for case, record in accuracy.items():
        if not record.passed:
            measured = (record.field_p99_mm, record.labels_share, record.folding_percent, record.folding_fp32_percent)
            shown = ["-" if value is None else f"{value:.3g}" for value in measured]
            raise ParityError(
                f"{source}: {precision} costs too much on {case} (field {shown[0]} mm, labels {shown[1]}, folding "
                f"{shown[2]} % instead of {shown[3]} %); no bundle was written, export with --precision fp32"
            )


def _training_record(checkpoint: Checkpoint) -> dict[str, object]:
    """What of the training a user of the bundle may want to know; not what resuming needs."""
    training = dict(checkpoint.training)
    config = dict(training.pop("config", {}))
    config.pop("model", None)
    progress = training.pop("progress", {})
    record: dict[str, object] = dict(training)
    if "record" in record:  # where the data lay on the machine that trained is nobody else's business
        record["record"] = {key: value for key, value in training["record"].items() if key != "options"}
    if config:
        record["config"] = config
    if progress:
        record["steps"] = progress.get("step")
        record["validation"] = progress.get("validation")
    return record
