"""Build of the optional C library, which pyproject.toml cannot describe."""

from __future__ import annotations

import sys
from pathlib import Path
from zlib import crc32

from setuptools import Extension, setup
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

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Return none: on Windows the default is PyInit_..., which this library does not have."""
        return []


setup(
    ext_modules=[
        Extension(
            "retinanet.kernels._library",
            sources=SOURCES[:1],
            depends=SOURCES[1:],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary},
)
