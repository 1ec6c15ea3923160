"""What this machine is, as far as speed goes."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from retinanet import native, triton_probe
from retinanet.bench.markdown import count
from retinanet.data.loading import usable_cpus


@dataclass(frozen=True, slots=True)
class Machine:
    """Of what a row's figures depend on.

    Attributes:
        processor: its name.
        cores: that this process may use.
        threads: that torch computes with.
        instructions: the widest set that torch uses, and units for bfloat16 where there are any.
        memory: bytes; None: not known here.
        gpu: its name; empty: the run was on the CPU.
        kernel: what runs where this package has kernels of its own.
        native: whether those do.
        versions: of Python, torch and what else is timed.
    """

    processor: str
    cores: int
    threads: int
    instructions: str
    memory: int | None
    gpu: str
    kernel: str
    native: bool
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The machine in a few lines."""
        cores = f"{count(self.cores, 'core')}, {count(self.threads, 'thread')}"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"{self.processor}, {cores}, {self.instructions}", self.kernel, versions]
        return ([self.gpu] if self.gpu else []) + lines

    def same_as(self, other: Machine) -> bool:
        """Whether figures of both may stand under one heading: all that they depend on is equal.

        How much memory there is does not count, nor a package that one of them lacks.
        """
        kept = [{**one.to_dict(), "memory": None, "versions": None} for one in (self, other)]
        both = self.versions.keys() & other.versions.keys()
        return kept[0] == kept[1] and all(self.versions[x] == other.versions[x] for x in both)

    @property
    def name(self) -> str:
        """What tells it from others: the GPU, or the processor with its threads."""
        return self.gpu or f"{self.processor}, {count(self.threads, 'thread')}"


def describe_machine(device: torch.device) -> Machine:
    """This machine, with `device` as the place where things run."""
    kernel, native = describe_kernel(device)
    names = ["torch", "torchvision", "numpy", "pillow", "hotcoco", "pycocotools", "openvino"]
    versions = {"Python": sys.version.split()[0]}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Machine(
        processor=_processor(),
        cores=usable_cpus(),
        threads=torch.get_num_threads(),
        instructions=_instructions(),
        memory=_memory(),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        kernel=kernel,
        native=native,
        versions=versions,
    )


def describe_kernel(device: torch.device) -> tuple[str, bool]:
    """Which code runs where the package has kernels of its own, and whether those do."""
    if device.type == "cpu":
        text = f"class loss and post-processing: {native.description()}"
        return text, native.available()
    served = device.type == "cuda" and triton_probe.usable(device)
    return f"class loss and matching: {'Triton' if served else 'pure torch'}", served


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _instructions() -> str:
    found = [torch.backends.cpu.get_cpu_capability()]
    units = {
        "_is_avx512_bf16_supported": "AVX-512 BF16",
        "_is_avx512_vnni_supported": "VNNI",
        "_is_amx_tile_supported": "AMX",
    }
    found += [name for ask, name in units.items() if getattr(torch.cpu, ask, bool)()]
    return ", ".join(found)


def _memory() -> int | None:
    import psutil

    return int(psutil.virtual_memory().total)
