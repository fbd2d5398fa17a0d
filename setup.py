"""Builds three Cython modules: the C kernels, the forward pass, which calls them, and the engine around it.

Every instruction set is compiled in, each file names its own by a target pragma, and the widest one the CPU
runs is chosen at run time. OpenMP is used if the compiler has it. Environment: QWEN3C_OPENMP=0 builds without it;
QWEN3C_CFLAGS adds compiler flags (for sanitizers, say). Everything else is in pyproject.toml.
"""

import os
import shlex
import sys
import tempfile
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# no flag may change a float: no contraction (the kernels write fmaf where they mean it), no fast math
CFLAGS = [
    "-O3",
    "-std=c11",
    "-D_POSIX_C_SOURCE=200809L",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
]
OPENMP = (
    [(["-Xpreprocessor", "-fopenmp"], ["-lomp"]), (["-fopenmp"], ["-fopenmp"])]
    if sys.platform == "darwin"
    else [(["-fopenmp"], ["-fopenmp"])]
)
PROGRAM = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"


class BuildEngine(build_ext):
    def build_extensions(self) -> None:
        compile_flags, link_flags = self.find_openmp()
        for extension in self.extensions:
            extension.extra_compile_args += compile_flags
            extension.extra_link_args += link_flags
        super().build_extensions()

    def find_openmp(self) -> tuple[list[str], list[str]]:
        if os.environ.get("QWEN3C_OPENMP") == "0":
            return [], []
        for compile_flags, link_flags in OPENMP:
            with tempfile.TemporaryDirectory() as directory:
                source = Path(directory, "openmp.c")
                source.write_text(PROGRAM)
                try:
                    objects = self.compiler.compile(
                        [str(source)], output_dir=directory, extra_postargs=compile_flags
                    )
                    self.compiler.link_executable(
                        objects, str(Path(directory, "openmp")), extra_postargs=link_flags
                    )
                except Exception:
                    continue
                return compile_flags, link_flags
        print("qwen3c: the compiler has no OpenMP; the engine will run on one thread", file=sys.stderr)
        return [], []


KERNELS = Path("qwen3c/kernels")
extra = shlex.split(os.environ.get("QWEN3C_CFLAGS", ""))
headers = [str(path) for path in [*KERNELS.glob("*.h"), *Path("qwen3c").glob("*.pxd")]]


def extension(name: str, sources: list[str]) -> Extension:
    return Extension(
        f"qwen3c.{name}",
        sources=[f"qwen3c/{name}.pyx", *sources],
        depends=headers,
        extra_compile_args=CFLAGS + extra,
        extra_link_args=[flag for flag in extra if flag.startswith("-fsanitize")],
        libraries=["m"],
    )


modules = [
    extension("kernels", sorted(str(path) for path in KERNELS.glob("*.c"))),
    extension("forward", []),
    extension("engine", []),
]
setup(ext_modules=cythonize(modules), cmdclass={"build_ext": BuildEngine})
