"""The machine that a benchmark runs on."""

from __future__ import annotations

import platform
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import torch

from retinanet.bench.benchmark import count
from retinanet.data.cpus import usable_cpus
from retinanet.kernels import native, triton_probe

_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "hotcoco", "pycocotools", "openvino")
_UNITS = {
    "_is_avx512_bf16_supported": "AVX-512 BF16",
    "_is_avx512_vnni_supported": "VNNI",
    "_is_amx_tile_supported": "AMX",
}


@dataclass(frozen=True, slots=True)
class Machine:
    """Properties of a machine that the results depend on.

    `kernel` describes what is in use where this package has kernels of its own; `native`: whether
    it is those. An empty `gpu`: none. `memory` is bytes of RAM.
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

    def lines(self) -> list[str]:
        """Describe the machine in a few lines."""
        cores = f"{count(self.cores, 'core')}, {count(self.threads, 'thread')}"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"{self.processor}, {cores}, {self.instructions}", self.kernel, versions]
        return ([self.gpu] if self.gpu else []) + lines

    @property
    def name(self) -> str:
        """Name of the GPU, or of the processor with its threads."""
        return self.gpu or f"{self.processor}, {count(self.threads, 'thread')}"


def describe_machine(device: torch.device) -> Machine:
    """Describe this machine for computations on `device`."""
    kernel, is_native = describe_kernel(device)
    versions = {"Python": sys.version.split()[0]}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    units = [name for query, name in _UNITS.items() if getattr(torch.cpu, query, bool)()]
    return Machine(
        processor=_processor(),
        cores=usable_cpus(),
        threads=torch.get_num_threads(),
        instructions=", ".join([torch.backends.cpu.get_cpu_capability(), *units]),
        memory=int(psutil.virtual_memory().total),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        kernel=kernel,
        native=is_native,
        versions=versions,
    )


def describe_kernel(device: torch.device) -> tuple[str, bool]:
    """Kernels used on the device, and whether they are this package's own."""
    if device.type == "cpu":
        text = f"class loss and post-processing: {native.description()}"
        return text, native.available()
    has_triton = device.type == "cuda" and triton_probe.is_usable(device)
    return f"class loss and matching: {'Triton' if has_triton else 'pure torch'}", has_triton


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # Linux
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
