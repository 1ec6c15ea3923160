"""Time, AP, file size and memory of each exported form of a run.

    python benchmarks/export_table.py RUN DATA --split S [--formats ...] [--images N] [--rounds R]

Exports the run (a file that exists in --out is reused), then detects in the same prepared images
with each file and with the run itself through ``Detector.detect_prepared``, in interleaved rounds
whose order is reversed every second round. Prints a Markdown table: milliseconds per image (median,
minimum and maximum of the rounds), AP on the split, MB of the file with what belongs to it, and the
peak memory of a process that loads the form and detects in five images.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

# As the command line does, for all forms alike; OpenMP reads it when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from retinanet.bench.machine import describe_machine
from retinanet.evaluation.run import evaluate, read_eval_dataset
from retinanet.exporters.run import export
from retinanet.inference import Detector, load

EXPORTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "onnx": ("onnx", ".onnx", {}),
    "openvino": ("openvino", ".xml", {}),
    "fp16": ("openvino", ".xml", {"precision": "fp16"}),
    "int8": ("openvino", ".xml", {"precision": "int8"}),
    "torch": ("torch", ".pt2", {}),
    "aot": ("aotinductor", ".pt2", {}),
}
"""Target, suffix and options by format."""

NAMES = {
    "eager float32": "the run, float32",
    "eager auto": "the run, auto",
    "onnx": "ONNX",
    "openvino": "OpenVINO, float32",
    "fp16": "OpenVINO, float16 weights",
    "int8": "OpenVINO, int8",
    "torch": "`.pt2`",
    "aot": "`.pt2`, AOTInductor",
}

_MEMORY_IMAGES = 5


def exported(run: str, data: str, folder: Path, formats: list[str]) -> dict[str, str]:
    """The files by format; written where they are not there."""
    files = {}
    for name in formats:
        target, suffix, options = EXPORTS[name]
        file = folder / f"{name}{suffix}"
        if not file.is_file():
            given = {**options, "calibrate": data} if name == "int8" else options
            report = export(run, target, out=file, images=4, **given)
            print(f"{file}: {'; '.join(report.failures) or 'as the network'}", file=sys.stderr)
        files[name] = str(file)
    return files


def opened(model: str, precision: str) -> Detector:
    """The detector of a form, on the CPU."""
    return load(model, "cpu", precision=precision)


def size(model: str) -> float:
    """MB of a file and the .bin beside it; of a run its weights."""
    path = Path(model)
    if path.is_dir():
        return max(one.stat().st_size for one in path.rglob("model.safetensors")) / 1e6
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
    return sum(one.stat().st_size for one in files) / 1e6


def own_peak() -> float:
    """MB that this process held at the most.

    getrusage's figure would not do on Linux: it is handed on by the process that started this one,
    and is never less than what that one held.
    """
    try:
        for line in Path("/proc/self/status").read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6


def memory(model: str, precision: str, images: list[str], threads: int) -> float:
    """Return the peak memory in MB of a process that loads a form and detects in `images`."""
    asked = {"model": model, "precision": precision, "images": images, "threads": threads}
    command = [sys.executable, __file__, "--tell-memory", json.dumps(asked)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def tell_memory(asked: dict[str, Any]) -> None:
    """Detect and print the peak, in the process that :func:`memory` starts."""
    torch.set_num_threads(asked["threads"])
    detector = opened(asked["model"], asked["precision"])
    for image in asked["images"]:
        detector.detect_prepared([detector.prepare(image)])
    print(own_peak())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("data")
    parser.add_argument("--split", default="val")
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=[name for name in EXPORTS if name != "aot"],
        default=[name for name in EXPORTS if name != "aot"],
    )
    parser.add_argument("--aot", action="store_true", help="AOTInductor too; compiles for minutes")
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eval-images", type=int, help="images for AP; all of the split, or 0")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("exports"), help="where the files go")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    formats = chosen.formats + (["aot"] if chosen.aot else [])
    files = exported(chosen.run, chosen.data, chosen.out, formats)
    forms = {"eager float32": (chosen.run, "float32"), "eager auto": (chosen.run, "auto")}
    forms |= {name: (file, "auto") for name, file in files.items()}
    detectors = {name: opened(*form) for name, form in forms.items()}
    dataset = read_eval_dataset(chosen.data, chosen.split, info=detectors["eager float32"].info)
    paths = [str(image.path) for image in dataset.images[: chosen.images]]
    prepared = [detectors["eager float32"].prepare(path) for path in paths]

    device = torch.device("cpu")
    print("\n".join(describe_machine(device).lines()))
    if "onnx" in formats:
        print(f"onnxruntime {metadata.version('onnxruntime')}")
    for name, detector in detectors.items():
        print(f"{name}: {detector.network.description}")
    print(f"load {os.getloadavg()[0]:.1f} before the clock", flush=True)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(chosen.rounds + 1):
        for name in list(forms)[:: -1 if turn % 2 else 1]:
            began = time.perf_counter()
            for one in prepared:
                detectors[name].detect_prepared([one])
            took = time.perf_counter() - began
            if turn:  # first calls set things up
                times[name].append(1000 * took / len(prepared))
    print(f"load {os.getloadavg()[0]:.1f} after it\n", flush=True)

    subset = dataclasses.replace(dataset, images=dataset.images[: chosen.eval_images])
    on = f"AP, {len(subset)} images"
    print(f"| form | ms an image | {on} | MB of the file | MB of memory |\n|---|---|---|---|---|")
    for name, form in forms.items():
        many = times[name]
        ap = f"{evaluate(detectors[name], subset).ap:.4f}" if len(subset) else ""
        peak = memory(*form, paths[:_MEMORY_IMAGES], chosen.threads)
        print(
            f"| {NAMES[name]} | {statistics.median(many):.1f} ({min(many):.1f} to {max(many):.1f}) "
            f"| {ap} | {size(form[0]):.1f} | {peak:.0f} |",
            flush=True,
        )
    print(f"\nload {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--tell-memory"]:
        tell_memory(json.loads(sys.argv[2]))
    else:
        main()
