"""Build of the optional C library, which pyproject.toml cannot describe."""

from __future__ import annotations

import sys
from pathlib import Path
from zlib import crc32

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

# In the order in which retinanet.kernels.native computes their checksum.
SOURCES = ["src/retinanet/kernels/native.c", "src/retinanet/kernels/kernels.h"]


class BuildLibrary(build_ext):
    """Build a library that ctypes loads, with threads where the compiler has OpenMP.

    The extension is optional: where it cannot be built, the installation succeeds without it.
    """

    def build_extension(self, ext: Extension) -> None:
        version = 0
        for source in SOURCES:
            version = crc32(Path(source).read_bytes(), version)
        ext.define_macros = [("VERSION", f"{version}u")]
        # A changed source may have an older date than the library.
        self.force = True
        if self.compiler.compiler_type == "msvc":
            ext.extra_compile_args = ["/O2", "/openmp"]
            super().build_extension(ext)
            return
        # No -ffast-math: NaN must propagate, and IoU must equal torchvision's exactly.
        plain = ["-O3", "-g0", "-std=gnu11", "-fvisibility=hidden"]
        exact = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
        ext.libraries = ["m"]
        attempts = ((["-fopenmp"], ["-fopenmp"]), (["-fopenmp-simd"], []), ([], []))
        if sys.platform == "darwin":
            # A second libomp besides torch's aborts the process ("OMP: Error #15").
            attempts = attempts[1:]
        for i, (compiling, linking) in enumerate(attempts):
            ext.extra_compile_args = plain + exact + compiling
            ext.extra_link_args = linking
            try:
                super().build_extension(ext)
                return
            except CCompilerError:
                # A compiler without OpenMP (Apple's) still makes a library of one thread.
                if i == len(attempts) - 1:
                    self.warn("no native library: retinanet works without it, but more slowly")
                    raise

    def get_ext_filename(self, fullname: str) -> str:
        """Return a name without the version of Python, which the library does not use."""
        suffix = ".pyd" if sys.platform == "win32" else ".so"
        return str(Path(*fullname.split("."))) + suffix

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Return none: on Windows the default is PyInit_..., which this library does not have."""
        return []


class BuildWheel(bdist_wheel):
    """Tag the wheel for every Python 3 of this platform: ctypes loads the library."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "retinanet.kernels._library",
            sources=SOURCES[:1],
            depends=SOURCES[1:],
            optional=True,
        )
    ],
    cmdclass={"bdist_wheel": BuildWheel, "build_ext": BuildLibrary},
)
