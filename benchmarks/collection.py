"""Measure speed and memory of detection in collections on Ray.

    python benchmarks/collection.py rates MODEL IMAGES [--images N] [--rounds N]
    python benchmarks/collection.py memory IMAGES [--sizes 1000,20000]

``rates`` detects in the same images with the local engine and with 1, 2 and 4 workers on a local
cluster of four cores, interleaved. ``memory`` detects in collections of each size (the images
repeated through symbolic links) with a small random network at 64 pixels, and samples the memory of
driver, workers, Ray and its object store. Each measurement is a process of its own. Both print a
Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from retinanet.bench.machine import describe_machine

CORES = 4


def links(source: Path, folder: Path, count: int) -> Path:
    """Link `count` images into `folder`, repeating those of `source`."""
    files = sorted(f for f in source.rglob("*") if f.suffix.lower() in (".jpg", ".png"))
    if not files:
        sys.exit(f"{source} has no .jpg or .png")
    for i in range(count):
        link = folder / f"{i // 1000:04d}" / f"{i:07d}{files[i % len(files)].suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(files[i % len(files)].resolve())
    return folder


def small_model(folder: Path) -> Path:
    """Save a network that takes milliseconds, so that everything else dominates."""
    from retinanet.model.checkpoint import Checkpoint, save_checkpoint
    from retinanet.model.retinanet import RetinaNet

    torch.manual_seed(0)
    model = RetinaNet(backbone="mobilenet_v2", num_classes=2, channels=16, head_depth=1, prior=0.3)
    info = {"detect": {"score_threshold": 0.29, "detections_per_image": 20}}
    return save_checkpoint(folder, Checkpoint(model, ("a", "b"), (1, 2), 64, 128, info))


def one(engine: str, model: str, images: str, out: str, workers: int, size: int | None) -> None:
    """Detect once in this process, and print the seconds as JSON."""
    began = time.perf_counter()
    times: list[tuple[float, int]] = []
    if engine == "local":
        from retinanet.inference import load
        from retinanet.inference.writers import open_outputs

        detector = load(model, "cpu", image_size=size)
        with open_outputs(Path(out), ["json"]) as write:
            for done, found in enumerate(detector.stream(images), start=1):
                write(found)
                times.append((time.perf_counter(), done))
        count = len(times)
    else:
        from retinanet.batch.collection import detect_collection

        def tick(done: int, _: int) -> None:
            times.append((time.perf_counter(), done))

        summary = detect_collection(
            model, images, out, device="cpu", workers=workers, image_size=size, on_progress=tick
        )
        count = summary.images
        # Shards are of one size (but for the last); the start ends with the first round of them.
        times = [(at, round(done * count / summary.shards)) for at, done in times[workers:]]
    (first, before), (last, _) = times[0], times[-1]
    print(
        json.dumps(
            {
                "images": count,
                "seconds": time.perf_counter() - began,
                "rate": (count - before) / (last - first),
            }
        )
    )


def run(*arguments: str, sample: list[tuple[float, ...]] | None = None) -> dict[str, Any]:
    """A measurement in a process of its own; `sample` gets the memory of its parts, in MB."""
    environment = {**os.environ, "RAY_ADDRESS": "local", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, __file__, "one", *arguments]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        stop = threading.Event()
        thread = threading.Thread(target=watch, args=(process.pid, stop, sample))
        if sample is not None:
            thread.start()
        printed, complaint = process.communicate()
        stop.set()
        if sample is not None:
            thread.join()
    if process.returncode:
        sys.exit(complaint)
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def watch(pid: int, stop: threading.Event, sample: list[tuple[float, ...]] | None) -> None:
    """Every two seconds: driver, workers, the rest of Ray, and pages of shared memory."""
    assert sample is not None
    root = psutil.Process(pid)
    while not stop.wait(2):
        driver = workers = rest = 0.0
        try:
            driver = root.memory_full_info().pss
            for child in root.children(recursive=True):
                try:
                    pss = child.memory_full_info().pss
                    name = " ".join(child.cmdline()[:1])
                except psutil.Error:
                    continue
                if "ShardDetector" in name:
                    workers += pss
                else:
                    rest += pss
        except psutil.Error:
            continue
        sample.append((driver / 1e6, workers / 1e6, rest / 1e6))


def heading() -> str:
    lines = describe_machine(torch.device("cpu")).lines()
    load = os.getloadavg()
    return "\n".join([*lines, f"load average {load[0]:.1f} before the measurement"])


def rates(model: str, source: Path, count: int, rounds: int, size: int | None) -> None:
    print(heading() + "\n")
    engines = [("local", 1), ("ray", 1), ("ray", 2), ("ray", 4)]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {engine: [] for engine in engines}
    with tempfile.TemporaryDirectory(prefix="collection-") as where:
        folder = links(source, Path(where, "images"), count)
        for round_ in range(rounds):
            for engine, workers in engines[round_ % 4 :] + engines[: round_ % 4]:
                out = Path(where, f"out-{round_}-{engine}-{workers}")
                arguments = [engine, model, str(folder), str(out), str(workers), str(size or 0)]
                found[engine, workers].append(run(*arguments))
                print(engine, workers, found[engine, workers][-1], os.getloadavg(), file=sys.stderr)
    print("| engine | images/s, median (least to most) | with the start |\n|---|---|---|")
    for (engine, workers), results in found.items():
        steady = [result["rate"] for result in results]
        with_start = [result["images"] / result["seconds"] for result in results]
        name = "local" if engine == "local" else f"ray, {workers} x {CORES // workers} cores"
        cells = [
            f"{statistics.median(each):.1f} ({min(each):.1f} to {max(each):.1f})"
            for each in (steady, with_start)
        ]
        print(f"| {name} | {cells[0]} | {cells[1]} |")
    print(f"\nload average {os.getloadavg()[0]:.1f} after")


def memory(source: Path, sizes: list[int]) -> None:
    print(heading() + "\n")
    print("| images | seconds | driver | workers | Ray | together |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="collection-") as where:
        model = small_model(Path(where, "model"))
        for size in sizes:
            folder = links(source, Path(where, f"images-{size}"), size)
            sample: list[tuple[float, ...]] = []
            arguments = ["ray", str(model), str(folder), str(Path(where, f"out-{size}")), "2", "0"]
            result = run(*arguments, sample=sample)
            peaks = [max(row[i] for row in sample) for i in range(3)]
            together = max(sum(row[:3]) for row in sample)
            cells = " | ".join(f"{peak:.0f} MB" for peak in [*peaks, together])
            print(f"| {result['images']:,} | {result['seconds']:.0f} | {cells} |", flush=True)
            print(result, sample[:: max(1, len(sample) // 10)], file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    what = parser.add_subparsers(dest="what", required=True)
    each = what.add_parser("rates")
    each.add_argument("model")
    each.add_argument("source", type=Path)
    each.add_argument("--images", type=int, default=300)
    each.add_argument("--rounds", type=int, default=3)
    each.add_argument("--image-size", type=int)
    each = what.add_parser("memory")
    each.add_argument("source", type=Path)
    each.add_argument("--sizes", default="1000,20000")
    each = what.add_parser("one")
    for name in ("engine", "model", "images", "out", "workers", "size"):
        each.add_argument(name)
    given = parser.parse_args()
    if given.what == "rates":
        rates(given.model, given.source, given.images, given.rounds, given.image_size)
    elif given.what == "memory":
        memory(given.source, [int(size) for size in given.sizes.split(",")])
    else:
        size = int(given.size) or None
        one(given.engine, given.model, given.images, given.out, int(given.workers), size)


if __name__ == "__main__":
    main()
