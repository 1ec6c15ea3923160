"""The one part of the build that pyproject.toml has no words for: the optional C library."""

from __future__ import annotations

import sys
from pathlib import Path
from zlib import crc32

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

# In the order in which retinanet.native takes their checksum.
SOURCES = ["src/retinanet/native/native.c", "src/retinanet/native/kernels.h"]


class BuildLibrary(build_ext):
    """Builds a library that ctypes loads, with threads where the compiler has OpenMP.

    Where it cannot be built at all, the extension being optional, the installation goes on.
    """

    def build_extension(self, ext: Extension) -> None:
        version = 0
        for source in SOURCES:
            version = crc32(Path(source).read_bytes(), version)
        ext.define_macros = [("VERSION", f"{version}u")]
        # A file's date may be older than the library's though the file is another.
        self.force = True
        if self.compiler.compiler_type == "msvc":
            ext.extra_compile_args = ["/O2", "/openmp"]
            super().build_extension(ext)
            return
        # No -ffast-math: a NaN must come through, and overlaps must be torchvision's to the bit.
        plain = ["-O3", "-g0", "-std=gnu11", "-fvisibility=hidden"]
        exact = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
        ext.libraries = ["m"]
        ways = ((["-fopenmp"], ["-fopenmp"]), (["-fopenmp-simd"], []), ([], []))
        if sys.platform == "darwin":
            # A second libomp beside torch's would end the process ("OMP: Error #15").
            ways = ways[1:]
        for place, (compiling, linking) in enumerate(ways):
            ext.extra_compile_args = plain + exact + compiling
            ext.extra_link_args = linking
            try:
                super().build_extension(ext)
                return
            except CCompilerError:
                # A compiler without OpenMP (Apple's) still makes a library of one thread.
                if place == len(ways) - 1:
                    self.warn("no native library: retinanet works without it, but more slowly")
                    raise

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None: on Windows the usual answer is PyInit_..., which this library does not have."""
        return []


setup(
    ext_modules=[
        Extension(
            "retinanet.native._library",
            sources=SOURCES[:1],
            depends=SOURCES[1:],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary},
)
