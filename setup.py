"""The compiled kernels; all else is in pyproject.toml.

They are optional: without a C compiler the package is built without them and works, more slowly.
"""

import sys

from setuptools import Extension, setup

FAST = [] if sys.platform == "win32" else ["-O3", "-fno-math-errno", "-fno-trapping-math"]

setup(
    ext_modules=[
        Extension(
            "jrs.runtime._kernels",
            ["runtime/kernels.c", "runtime/refinement.c"],
            depends=["runtime/kernels.h"],
            extra_compile_args=FAST,
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
