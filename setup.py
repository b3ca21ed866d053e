"""Builds blaq_kernels._C, C++ kernels on torch's stable ABI, and where a CUDA compiler is and is wanted
blaq_kernels._cuda, a library of ops beside it. Everything else is in pyproject.toml.

``BLAQ_CUDA``: 1 builds the CUDA kernels, ``only`` nothing else, 0 does not; unset, they are built where
torch has CUDA and nvcc is there. ``BLAQ_CUDA_ARCHITECTURES``, like ``"90a"``, builds for some only.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import Extension, find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths, library_paths

STABLE = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # ABI of torch 2.10: serves every later one
COMPILE = [
    "-O3", "-std=c++20", "-fvisibility=hidden", "-Wall",
    "-fopenmp",  # torch's parallel_for runs serially in a file compiled without it
    "-ffp-contract=off",  # every ISA variant rounds alike, so all give the same bits
    "-fno-math-errno", "-fno-trapping-math",  # lets sqrt and compares vectorise; changes no result
    STABLE,
]
if platform.machine() == "x86_64":
    COMPILE += ["-Wno-psabi",  # vectors cross only inlined function boundaries
                "-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # gcc 12: its own _mm512_undefined_*

SANITIZE = []
if os.environ.get("BLAQ_SANITIZE"):  # `make sanitize`
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    COMPILE += [*SANITIZE, "-O1", "-g1", "-fno-omit-frame-pointer"]

WISH = os.environ.get("BLAQ_CUDA", "")
HEADERS = [str(path) for path in sorted(Path("csrc").rglob("*.h"))]
ARCHITECTURES = os.environ.get("BLAQ_CUDA_ARCHITECTURES", "80 90a 100a 120a").split()
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
COMPILE_CUDA = ["-O3", "-std=c++20", "-fmad=false", "-DUSE_CUDA", STABLE, "-Icsrc",
                "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def wants_cuda() -> bool:
    if WISH in ("1", "only") and NVCC is None:
        raise SystemExit(f"setup.py: BLAQ_CUDA={WISH} must find nvcc, got none on PATH or in /usr/local/cuda")
    return WISH in ("1", "only") or (WISH != "0" and NVCC is not None and torch.version.cuda is not None)


class Build(BuildExtension):
    """Compiles .cu files for every architecture, and links without a libcudart of anyone else's: the
    library needs torch, found when it is loaded, and a driver."""

    def build_extension(self, extension: Extension) -> None:
        if not extension.name.endswith("._cuda"):
            super().build_extension(extension)
            return
        files = sources("cuda/*.cu")
        folder, target = Path(self.build_temp) / "cuda", Path(self.get_ext_fullpath(extension.name))
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = [folder / f"{Path(source).stem}.o" for source in files]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(self.compile_cuda, files, objects))
        # libtorch brings in libtorch_cuda where it is one; this machine's need not be.
        folders = [f"-L{path}" for path in library_paths()]
        self.spawn([NVCC, "-shared", "-cudart=static", *map(str, objects), *folders, "-Xlinker",
                    "--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(target)])

    def compile_cuda(self, source: str, out: Path) -> None:
        newest = max(Path(path).stat().st_mtime for path in (source, *HEADERS, "setup.py"))
        if out.exists() and out.stat().st_mtime > newest:
            return
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
        includes = [flag for path in include_paths() for flag in ("-isystem", path)]
        subprocess.run([NVCC, *COMPILE_CUDA, *targets, *includes, "-c", source, "-o", str(out)],
                       check=True)


def sources(*patterns: str) -> list[str]:
    return [str(path) for pattern in patterns for path in sorted(Path("csrc").glob(pattern))]


extensions = [] if WISH == "only" else [CppExtension(
    "blaq_kernels._C", sources("*.cpp", "cpu/*.cpp"), include_dirs=[str(Path("csrc").absolute())],
    depends=HEADERS, extra_compile_args=COMPILE, extra_link_args=["-fopenmp", *SANITIZE],
)]
if wants_cuda():
    # Without sources, since torch would look for a CUDA of its own version.
    extensions.append(Extension("blaq_kernels._cuda", []))

setup(
    packages=["blaq_kernels", "blaq_kernels.cuda", "blaq_kernels.triton", *find_packages("python")],
    package_dir={"blaq_kernels": "blaq_kernels", "blaq": "python/blaq"},
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
)
