"""Our plugin in TensorRT's own Python package, without its libraries: ``run_tensorrt_plugin.py LIBRARY...``.

The libraries stand for TensorRT's (``tensorrt_without_gpu.cpp``). What TensorRT's native half does with the plugin
as it builds an engine is done here in its order, by the methods that it calls; sizes are plain numbers in the place of
its symbolic expressions. Prints what came out as JSON; nothing else may be on stdout.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from types import SimpleNamespace
from typing import Any


class Size:
    """IDimensionExpr."""

    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


class Sizes(list[Any]):
    """DimsExprs."""

    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class Builder:
    """IExprBuilder."""

    def constant(self, value: int) -> Size:
        return Size(value)

    def operation(self, operation: Any, a: Size, b: Size) -> Size:
        if operation.name == "CEIL_DIV":
            return Size(-(-a.value // b.value))
        return Size({"SUM": a.value + b.value, "PROD": a.value * b.value}[operation.name])


class Scalar:
    """ISymExpr, made by the package from its own SymInt32."""

    def __init__(self, expression: Any) -> None:
        self.type, self.value = type(expression).__name__, expression._expr.value


class Scalars(dict[int, Scalar]):
    """ISymExprs."""

    nbSymExprs = 0  # noqa: N815  (TensorRT's own name)


def import_package() -> Any:
    """The bindings under the name that ``tensorrt`` gives them."""
    for library in sys.argv[1:]:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    package = importlib.import_module("tensorrt_bindings")
    package.__name__ = "tensorrt"
    sys.modules["tensorrt"] = package
    sys.modules["tensorrt.tensorrt"] = package.tensorrt
    return package


def described(trt: Any, shape: tuple[int, ...], kind: Any) -> Any:
    desc = SimpleNamespace(type=kind, format=trt.TensorFormat.LINEAR, scale=1.0, dims=shape)
    return SimpleNamespace(desc=desc, min=shape, opt=shape, max=shape)


def main() -> None:
    trt = import_package()
    from jrs.runtime.engines import kernel

    kernel.compile_ptx = lambda capability: b"ptx"
    result: dict[str, Any] = {"version": trt.__version__, "takes_plugins": kernel.takes_plugins(trt)}
    if result["takes_plugins"]:
        kernel.register_plugin(trt, (8, 7))
        result["kernels"] = {name: drive(trt, name) for name in ("float32", "float16")}
    print(json.dumps(result))


def drive(trt: Any, kind: str) -> dict[str, Any]:
    """What the plugin asks TensorRT to launch for volumes of this type, and the shape of its output."""
    tensor = importlib.import_module("tensorrt.plugin._tensor")
    library = importlib.import_module("tensorrt.plugin._lib")
    plugin_class = importlib.import_module("tensorrt.plugin._plugin_class")
    trt.IDimensionExpr, trt.DimsExprs, tensor.SymExprImpl = Size, Sizes, Scalar
    plugin_class.Shape = lambda desc: desc

    creator = library._TemplatePluginCreator("JrsGridSample3D", "jrs", {})
    ahead = trt.QuickPluginCreationRequest.STRICT_AOT
    plugin = creator.create_plugin("JrsGridSample3D", "jrs", [], trt.TensorRTPhase.BUILD, ahead)
    volume, coords = (2, 4, 10, 12, 14), (2, 3, 5, 6, 7)
    types = [getattr(trt, kind), trt.float32]
    outputs = plugin.get_output_data_types(types, [5, 5])
    sizes = [[Size(n) for n in shape] for shape in (volume, coords)]
    (shape,) = plugin.get_output_shapes(sizes, [], Builder())
    of = [*zip((volume, coords), types, strict=True), (tuple(s.value for s in shape), outputs[0])]
    in_out = [described(trt, size, kind) for size, kind in of]
    taken = plugin.get_supported_format_combinations(in_out, 2)
    plugin.configure_plugin(in_out[:2], in_out[2:])
    plugin.get_valid_tactics()
    plugin.set_tactic(0)
    launch, scalars = SimpleNamespace(), Scalars()
    plugin.get_launch_params(sizes, in_out, 2, launch, scalars, Builder())
    name, ptx = plugin.clone().get_kernel([d.desc for d in in_out[:2]], [d.desc for d in in_out[2:]])
    return {
        "shape": [s.value for s in shape],
        "combinations": [[t.type.name for t in taken[i : i + 3]] for i in range(0, len(taken), 3)],
        "formats": sorted({t.format.name for t in taken}),
        "launch": {key: value.value for key, value in vars(launch).items()},
        "scalars": [[scalars[i].type, scalars[i].value] for i in range(scalars.nbSymExprs)],
        "kernel": name.decode(),
        "ptx": ptx.decode(),
    }


if __name__ == "__main__":
    main()
