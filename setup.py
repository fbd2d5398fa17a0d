"""Builds the Cython modules: the table of C kernels and the engine. All else is in pyproject.toml.

Every instruction set is compiled in, each file names its own by a target pragma, and the widest one the CPU
runs is chosen at run time. OpenMP is used if the compiler has it. Environment: QWEN3C_OPENMP=0 builds without
it; QWEN3C_CFLAGS adds compiler flags (for sanitizers, say).

`python setup.py missing` says in one line what this machine lacks and exits with 1. Pythons that are too old
read this file too, to say that they are: it uses nothing newer than Python 3.6 until their version is known.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

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
KERNELS = Path("qwen3c/kernels")
METADATA = ("egg_info", "dist_info", "sdist")  # commands that compile nothing


# ----------------------------------------------------------------------------
# What this machine lacks


def missing(environment):
    """What this machine lacks to build, in one line, or "". environment: the module venv is needed too."""
    if old_python():
        return old_python()
    if environment:
        try:
            import ensurepip  # noqa: F401
            import venv  # noqa: F401
        except ImportError:
            return f"{sys.executable} lacks the module venv (Debian: apt install python3-venv)"
    return missing_compiler()


def old_python():
    if sys.version_info >= (3, 10):  # noqa: UP036  older ones come here to be refused
        return ""
    version = ".".join(map(str, sys.version_info[:3]))
    return (
        f"Python 3.10 or later is needed, {sys.executable} is {version} (make run PYTHON=python3.12 names "
        "another)"
    )


def missing_compiler():
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    headers = sysconfig.get_path("include")
    try:
        fault = fault_of(compiler, "")
    except OSError:
        hint = (
            "macOS: xcode-select --install"
            if sys.platform == "darwin"
            else "Debian: apt install gcc libc6-dev"
        )
        return f"a C compiler is needed, {compiler[0]} is not one ({hint}; CC=... names another)"
    if fault:
        return f"the C compiler {compiler[0]} does not work: {fault}"
    if fault_of([*compiler, f"-I{headers}"], "#include <Python.h>\n"):
        return f"Python's headers are needed, {headers} has no Python.h (Debian: apt install python3-dev)"
    return ""


def fault_of(compiler, program):
    """The first error of a compiler on a small program, or "". OSError if it cannot be run."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "program.c")
        source.write_text("#include <stdlib.h>\n" + program + "int main(void) { return EXIT_SUCCESS; }\n")
        command = [*compiler, "-c", str(source), "-o", str(Path(directory, "program.o"))]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    lines = [line.strip() for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return "" if done.returncode == 0 else (errors or lines or [f"it ends with status {done.returncode}"])[0]


# ----------------------------------------------------------------------------
# The modules


def build_command():
    from setuptools.command.build_ext import build_ext

    class BuildEngine(build_ext):
        def build_extensions(self) -> None:
            compile_flags, link_flags = self.find_openmp()
            for extension in self.extensions:
                extension.extra_compile_args += compile_flags
                extension.extra_link_args += link_flags
            super().build_extensions()

        def find_openmp(self):
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

    return BuildEngine


def modules():
    from Cython.Build import cythonize
    from setuptools import Extension

    extra = shlex.split(os.environ.get("QWEN3C_CFLAGS", ""))
    headers = [str(path) for path in [*KERNELS.glob("*.h"), *Path("qwen3c").rglob("*.pxd")]]

    def extension(name, sources):
        return Extension(
            f"qwen3c.{name}",
            sources=[f"qwen3c/{name.replace('.', '/')}.pyx", *sources],
            include_dirs=["qwen3c"],
            depends=headers,
            extra_compile_args=CFLAGS + extra,
            extra_link_args=[flag for flag in extra if flag.startswith("-fsanitize")],
            libraries=["m"],
        )

    # a .c beside the .pyx of its name was left by Cython, which now writes to build/
    kernels = sorted(str(path) for path in KERNELS.glob("*.c") if not path.with_suffix(".pyx").exists())
    return cythonize(
        [
            extension("kernels.table", kernels),
            extension("kernels.draw", []),
            extension("engine.forward", []),
            extension("engine.engine", []),
            extension("drivers.lookup", []),
        ],
        build_dir="build",  # the C that Cython writes lies apart from the sources
    )


def main():
    # "": only options, such as --version
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    compiles = command not in ("", *METADATA)
    lacking = missing(environment="venv" in sys.argv) if compiles else old_python()
    if lacking or command == "missing":
        return f"qwen3c: {lacking}" if lacking else 0
    from setuptools import setup

    setup(ext_modules=modules() if compiles else [], cmdclass={"build_ext": build_command()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
