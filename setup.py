"""Builds blaq_kernels._C: C++ kernels on torch's stable ABI. Everything else is in pyproject.toml."""

import platform
from pathlib import Path

from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

COMPILE = [
    "-O3", "-std=c++20", "-fvisibility=hidden", "-Wall",
    "-fopenmp",  # torch's parallel_for runs serially in a file compiled without it
    "-ffp-contract=off",  # every ISA variant rounds alike, so all give the same bits
    "-fno-math-errno", "-fno-trapping-math",  # lets sqrt and compares vectorise; changes no result
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # stable ABI of torch 2.10: serves every later one
]
if platform.machine() == "x86_64":
    COMPILE += ["-Wno-psabi",  # vectors cross only inlined function boundaries
                "-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # gcc 12: its own _mm512_undefined_*

extension = CppExtension(
    "blaq_kernels._C",
    [str(path) for path in sorted(Path("csrc").glob("*.cpp")) + sorted(Path("csrc/cpu").glob("*.cpp"))],
    include_dirs=[str(Path("csrc").absolute())],
    depends=[str(path) for path in sorted(Path("csrc").rglob("*.h"))],
    extra_compile_args=COMPILE,
    extra_link_args=["-fopenmp"],
)

setup(
    packages=["blaq_kernels", "blaq_kernels.triton", *find_packages("python")],
    package_dir={"blaq_kernels": "blaq_kernels", "blaq": "python/blaq"},
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
)
