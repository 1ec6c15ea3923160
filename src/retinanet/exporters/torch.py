"""Write a detector as a torch package: a ``torch.export`` program, or AOTInductor's code."""

from __future__ import annotations

import shutil
import warnings
import zipfile
from pathlib import Path

import torch

from retinanet.errors import ConfigError
from retinanet.inference.exported import TEXT_KEY
from retinanet.inference.openvino_backend import quiet


def write_torch(
    program: torch.export.ExportedProgram, file: Path, text: str, *, compiled: bool
) -> None:
    """Write a program for ``torch.export.load``, with the text in ``extra/retinanet``.

    `compiled`: as machine code for this CPU, for ``aoti_load_package``; needs a C++ compiler.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from torch
        if not compiled:
            torch.export.save(program, file, extra_files={TEXT_KEY: text})
            return
        try:
            with quiet():
                torch._inductor.aoti_compile_and_package(program, package_path=str(file))
        except Exception as error:
            if "compiler" not in f"{type(error).__name__} {error}".lower():
                raise
            raise ConfigError(
                "--aot needs a working C++ compiler: "
                f"{str(error).strip().splitlines()[0]}; export without --aot"
            ) from None
    # Drop the generated C++ sources, which contain paths of this machine.
    stripped = file.with_suffix(".stripped")
    with zipfile.ZipFile(file) as package, zipfile.ZipFile(stripped, "w") as out:
        for entry in package.infolist():
            if not entry.filename.endswith(".cpp"):
                with package.open(entry) as source, out.open(entry.filename, "w") as target:
                    shutil.copyfileobj(source, target)
        root = package.namelist()[0].split("/")[0]
        out.writestr(f"{root}/extra/{TEXT_KEY}", text)
    stripped.replace(file)
