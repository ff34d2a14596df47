"""A bundle as a model repository of the Triton Inference Server, on its stock ONNX Runtime backend.

One model a graph, the registration once more with a fixed image's codes inside it, and an ensemble ``jrs`` that takes
a normalised image and gives everything: the codes of the atlas are computed here, once, and never again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

from jrs.bundle import Bundle
from jrs.errors import AlreadyThereError, ConfigurationError
from jrs.export.custom_op import model_of
from jrs.export.graphs import code_names
from jrs.files import whole_folder
from jrs.geometry import Geometry
from jrs.resources import atlas_path
from jrs.runtime.cases import load_case
from jrs.runtime.engines import Array, hosted
from jrs.runtime.names import atlas_label
from jrs.runtime.network import Network
from jrs.runtime.preprocess import network_input, place_grid

ENSEMBLE = "jrs"
PREFIX = "jrs_"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Step:
    """One model of the ensemble: its own tensor names to the ensemble's."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


def check_triton(repository: str | Path, atlas: str, precision: str, overwrite: bool = False) -> Path:
    """The fixed image's file; raises what ``export_triton`` would, for a bundle of ``precision``."""
    if precision == "bf16":
        raise ConfigurationError("Triton runs graphs by ONNX Runtime, which has no BF16 convolutions; export in fp16")
    if Path(repository).exists() and not overwrite:
        raise AlreadyThereError(Path(repository), "choose another name or pass --overwrite")
    return atlas_path(atlas)


def export_triton(bundle: Bundle, repository: str | Path, atlas: str = "sri24", overwrite: bool = False) -> Path:
    """Write the repository of a bundle for one fixed image (a shipped name, a file or a folder).

    Raises ConfigurationError for a bundle that the ONNX Runtime backend cannot run, CannotCreateError if the folder
    exists without ``overwrite``.
    """
    repository = Path(repository)
    path = check_triton(repository, atlas, bundle.manifest.precision, overwrite)
    label = "".join(c if c.isalnum() else "_" for c in atlas_label(path, atlas if path != Path(atlas) else None))
    with whole_folder(repository, overwrite) as folder:
        models = {}
        for name in bundle.manifest.graphs:
            models[PREFIX + name] = onnx.load(bundle.graph(name))
            _write_model(folder, PREFIX + name, models[PREFIX + name], bundle.graph(name))
        model = bundle.manifest.model
        if model.mirroring and "segmentation" in bundle.manifest.graphs:
            added = _mirroring(models, 2 + model.grid.axis_along("LR"))
            models |= added
            for name, graph in added.items():
                _write_model(folder, name, graph)
        with_atlas = None
        if bundle.manifest.model.architecture.registration:
            codes, grid = _fixed_codes(bundle, path)
            with_atlas = f"{PREFIX}registration_{label}"
            models[with_atlas] = _with_fixed_codes(models[PREFIX + "registration"], codes)
            _write_model(folder, with_atlas, models[with_atlas])
            _write_grid(folder, label, grid)
        _write_ensemble(folder, models, with_atlas, bundle.manifest.model.passes)
    return repository


def _fixed_codes(bundle: Bundle, atlas: Path) -> tuple[dict[str, Array], Geometry]:
    spec = bundle.manifest.model
    case = load_case(atlas, default_channels=spec.channels)
    grid, _ = place_grid(spec.grid, next(iter(case.images.values())))
    image = network_input(case.images, spec, grid, whose=f"the atlas {atlas}").tensor
    with Network(bundle, "ort-cpu") as network:
        return hosted(network.encode(image)), grid


def _with_fixed_codes(registration: onnx.ModelProto, codes: Mapping[str, Array]) -> onnx.ModelProto:
    """The registration graph whose inputs are the moving codes alone."""
    model = onnx.ModelProto()
    model.CopyFrom(registration)
    fixed = set(code_names("fixed_"))
    kept = [value for value in model.graph.input if value.name not in fixed]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for name in code_names():
        model.graph.initializer.append(numpy_helper.from_array(codes[name], f"fixed_{name}"))
    onnx.checker.check_model(model)
    return model


def _mirroring(models: Mapping[str, onnx.ModelProto], axis: int) -> dict[str, onnx.ModelProto]:
    """Two models: an image mirrored along ``axis``; the mean of probabilities and of mirrored ones mirrored back."""
    (image,) = _tensors(models[PREFIX + "encoder"].graph.input).values()
    (classes,) = _tensors(models[PREFIX + "segmentation"].graph.output).values()
    image_type, classes_type = (f"float[{', '.join(map(str, shape))}]" for shape in (image, classes))
    reverse = f"int64[1] start = {{-1}}, int64[1] end = {{{np.iinfo(np.int64).min}}}"
    reverse += f", int64[1] axis = {{{axis}}}, int64[1] step = {{-1}}"
    flip = "Slice({}, start, end, axis, step)".format
    texts = {
        "mirror": f"mirror ({image_type} image) => ({image_type} mirrored) <{reverse}>"
        f"{{ mirrored = {flip('image')} }}",
        "mean": f"mean ({classes_type} direct, {classes_type} mirrored) => ({classes_type} probabilities) <{reverse}>"
        f"{{ back = {flip('mirrored')} probabilities = Mean(direct, back) }}",
    }
    built = {PREFIX + name: model_of(onnx.parser.parse_graph(text)) for name, text in texts.items()}
    for model in built.values():
        onnx.checker.check_model(model, full_check=True)
    return built


def _write_grid(folder: Path, label: str, grid: Geometry) -> None:
    """Beside the models, for clients: where the network's grid lies in the fixed image's world."""
    import json

    text = json.dumps({"atlas": label, "shape": list(grid.shape), "affine_ras_mm": grid.affine.tolist()}, indent=2)
    (folder / f"{PREFIX}registration_{label}" / "grid.json").write_text(text + "\n", encoding="utf-8")


def _write_model(folder: Path, name: str, model: onnx.ModelProto, file: Path | None = None) -> None:
    version = folder / name / "1"
    version.mkdir(parents=True)
    if file is not None:
        shutil.copyfile(file, version / "model.onnx")
    else:
        (version / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    inputs, outputs = _tensors(model.graph.input), _tensors(model.graph.output)
    head = [
        f'name: "{name}"',
        'backend: "onnxruntime"',
        'default_model_filename: "model.onnx"',
        "max_batch_size: 0",
    ]
    tail = [
        # On every GPU, on the CPU where there is none.
        "instance_group [ { count: 1 kind: KIND_AUTO } ]",
        # Heuristic: the default search can be fifty times slower on 3-D convolutions.
        'parameters [ { key: "cudnn_conv_algo_search" value: { string_value: "1" } } ]',
    ]
    lines = [*head, *_tensor_lines("input", inputs), *_tensor_lines("output", outputs), *tail]
    (folder / name / "config.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_ensemble(
    folder: Path, models: Mapping[str, onnx.ModelProto], with_atlas: str | None, passes: int
) -> None:
    codes = code_names()
    steps = [_Step(PREFIX + "encoder", {"image": "image"}, {name: name for name in codes})]
    if PREFIX + "segmentation" in models:
        steps += _segmentation(mirroring=PREFIX + "mirror" in models)
    if with_atlas is not None:
        steps += _passes(with_atlas, passes)
    shapes: dict[str, Shape] = {}
    for step in steps:
        own = _tensors(models[step.model].graph.output)
        shapes |= {theirs: own[name] for name, theirs in step.outputs.items()}
    image = _tensors(models[PREFIX + "encoder"].graph.input)
    wanted = ("probabilities", "moved", "displacement")
    results: dict[str, Shape] = {name: shapes[name] for name in wanted if name in shapes}
    lines = [f'name: "{ENSEMBLE}"', 'platform: "ensemble"', "max_batch_size: 0"]
    lines += [*_tensor_lines("input", image), *_tensor_lines("output", results), "ensemble_scheduling {", "  step ["]
    for index, step in enumerate(steps):
        lines += [f'    {{ model_name: "{step.model}" model_version: -1']
        lines += [f'      input_map {{ key: "{k}" value: "{v}" }}' for k, v in step.inputs.items()]
        lines += [f'      output_map {{ key: "{k}" value: "{v}" }}' for k, v in step.outputs.items()]
        lines += ["    }" + ("," if index < len(steps) - 1 else "")]
    lines += ["  ]", "}"]
    # An ensemble has no file, and Triton wants the folder of its version all the same.
    (folder / ENSEMBLE / "1").mkdir(parents=True)
    (folder / ENSEMBLE / "config.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _segmentation(mirroring: bool) -> list[_Step]:
    """As ``Network.segment`` does it, the codes of the image at hand."""
    segmentation, codes = PREFIX + "segmentation", {name: name for name in code_names()}
    if not mirroring:
        return [_Step(segmentation, codes, {"probabilities": "probabilities"})]
    mirrored = {name: f"{name}_mirrored" for name in codes}
    return [
        _Step(segmentation, codes, {"probabilities": "direct"}),
        _Step(PREFIX + "mirror", {"image": "image"}, {"mirrored": "image_mirrored"}),
        _Step(PREFIX + "encoder", {"image": "image_mirrored"}, mirrored),
        _Step(segmentation, mirrored, {"probabilities": "probabilities_mirrored"}),
        _Step(
            PREFIX + "mean",
            {"direct": "direct", "mirrored": "probabilities_mirrored"},
            {"probabilities": "probabilities"},
        ),
    ]


def _passes(with_atlas: str, passes: int) -> list[_Step]:
    """The registration, as ``Network.register`` does it: from the second pass on of the moved image, and composed.

    What the last pass leaves is called ``moved`` and ``displacement``, what others leave has the pass's number behind.
    """
    steps: list[_Step] = []
    image, codes, before = "image", {name: name for name in code_names()}, ""
    for index in range(1, passes + 1):
        last = "" if index == passes else f"_{index}"
        if index > 1:
            codes = {name: f"{name}_{index}" for name in code_names()}
            steps.append(_Step(PREFIX + "encoder", {"image": image}, codes))
        flow = f"flow_{index}"
        steps.append(_Step(with_atlas, {f"moving_{own}": name for own, name in codes.items()}, {"flow": flow}))
        ends = {"moved": f"moved{last}", "displacement": f"displacement{last}"}
        if index > 1:
            # Of a further pass only the displacement counts: the image itself is moved once, by all of them.
            ends = {"displacement": f"further_{index}"}
        steps.append(_Step(PREFIX + "transformer", {"image": image, "flow": flow}, ends))
        if index > 1:
            inputs = {"image": "image", "first": before, "further": f"further_{index}"}
            ends = {"moved": f"moved{last}", "displacement": f"displacement{last}"}
            steps.append(_Step(PREFIX + "composer", inputs, ends))
        image, before = f"moved{last}", f"displacement{last}"
    return steps


def _tensors(values: Sequence[onnx.ValueInfoProto]) -> dict[str, Shape]:
    return {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}


def _tensor_lines(kind: str, tensors: Mapping[str, Shape]) -> list[str]:
    shown = [f'  {{ name: "{name}" data_type: TYPE_FP32 dims: {list(shape)} }}' for name, shape in tensors.items()]
    return [f"{kind} [", ",\n".join(shown), "]"]
