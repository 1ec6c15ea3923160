"""The whole detector as a package of torch: ``torch.export``'s program, or compiled code."""

from __future__ import annotations

import shutil
import warnings
import zipfile
from pathlib import Path

import torch

from retinanet.errors import ConfigError
from retinanet.inference.exported import TEXT_KEY
from retinanet.inference.openvino_backend import quiet


def save_program(program: torch.export.ExportedProgram, file: Path, text: str) -> None:
    """Write a program that ``torch.export.load`` reads, with the text in ``extra/retinanet``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        torch.export.save(program, file, extra_files={TEXT_KEY: text})


def compile_program(program: torch.export.ExportedProgram, file: Path, text: str) -> None:
    """Write machine code for this processor that ``torch._inductor.aoti_load_package`` reads.

    Raises:
        ConfigError: there is no C++ compiler that works.
    """
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    except Exception as error:
        if "compiler" not in f"{type(error).__name__} {error}".lower():
            raise
        raise ConfigError(
            "--aot needs a C++ compiler that works: "
            f"{str(error).strip().splitlines()[0]}; without --aot none is needed"
        ) from None
    _without_sources(file, text)


def _without_sources(file: Path, text: str) -> None:
    """Add the text; leave out the generated C++, which tells paths of this machine."""
    beside = file.with_suffix(".slim")
    with zipfile.ZipFile(file) as package, zipfile.ZipFile(beside, "w") as slim:
        for entry in package.infolist():
            if not entry.filename.endswith(".cpp"):
                with package.open(entry) as source, slim.open(entry.filename, "w") as target:
                    shutil.copyfileobj(source, target)
        root = package.namelist()[0].split("/")[0]
        slim.writestr(f"{root}/extra/{TEXT_KEY}", text)
    beside.replace(file)
