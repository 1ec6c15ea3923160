"""How cost grows: time and peak memory against image side, batch, classes, objects and images.

    python benchmarks/curves.py [--out DIR] [--only NAME] [--quick] [--threads N]

Each point is measured in a process of its own: first calls pay for what is set up once, the
median of those that follow is the time, and one more, with an allocator that gives freed memory
back, tells the memory at its peak beyond that before it. Where a call takes over 20 seconds, one
call tells both. Writes an image a curve and, after each, ``curves.json``, where other curves of
the same machine stay: ``--only`` does one again. About a quarter of an hour on four cores;
``--quick`` (tiny sizes and networks, to see that it works) half a minute.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retinanet.anchors import feature_sizes, level_anchors
from retinanet.bench.limits import clock
from retinanet.bench.machine import Machine, describe_machine
from retinanet.bench.run import peak_of
from retinanet.bench.samples import anchors_for, class_work, jpeg, outputs_like, random_boxes
from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.evaluation.run import evaluate
from retinanet.files import write_atomic
from retinanet.inference.backends import build_network
from retinanet.inference.detections import Failure
from retinanet.inference.detector import Detector
from retinanet.inference.writers import open_outputs
from retinanet.losses.detection import CLASSIFICATION_LOSSES, detection_losses
from retinanet.matching import match_anchors
from retinanet.model.checkpoint import Checkpoint
from retinanet.model.precision import autocast, choose_dtype
from retinanet.model.retinanet import RetinaNet, to_channels_last
from retinanet.postprocess import postprocess
from retinanet.report.plots import COLOURS, GREY, open_figure
from retinanet.structures import Outputs, Targets, flatten_level
from retinanet.training.optim import build_optimizer

_PRELOADED = ["retinanet.evaluation.run", "retinanet.report.plots", "retinanet.bench.stages"]

CPU = torch.device("cpu")

WORSE_FROM = 1.15
"""Exponents over it are called worse than linear; below is what a noisy machine may do."""

# A time or memory under these says more of the process than of the work.
_LEAST = {"seconds": 1e-3, "memory": 10e6}

# Calls that take longer are measured once: what varies from call to call is little beside them.
_SLOW = 20.0

# Logarithms have no zero: in the images less than this (ms, MB) is drawn as this.
_DRAWN_FROM = {"seconds": 1e-3, "memory": 0.1}


@dataclass(frozen=True)
class Work:
    """A call to measure.

    Attributes:
        call: does it once.
        first: what is done before the first measured call; None: the call itself.
    """

    call: Callable[[], Any]
    first: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Curve:
    """Cost against one quantity.

    Attributes:
        axis: what the quantity is.
        points: where it is measured.
        quick: the same for a look.
        lines: what is measured: makes the work at a point, in small if asked.
        power: work grows with this power of the quantity (pixels with the square of a side).
    """

    axis: str
    points: Sequence[int]
    quick: Sequence[int]
    lines: dict[str, Callable[[int, bool], Work]]
    power: float = 1.0


def network(backbone: str, quick: bool, classes: int = 80) -> RetinaNet:
    """A network with random weights; a small one if asked."""
    torch.manual_seed(0)
    small = {"channels": 16, "head_depth": 1, "norm": "group"} if quick else {}
    name = "mobilenet_v2" if quick else backbone
    return to_channels_last(RetinaNet(backbone=name, num_classes=classes, **small))  # type: ignore[arg-type]


def imgs(batch: int, side: int) -> torch.Tensor:
    """(B, 3, side, side) uint8 in channels_last memory."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=generator)
    return images.contiguous(memory_format=torch.channels_last)


def objects(count: int, batch: int, height: int, width: int, classes: int) -> Targets:
    """So many objects in each of `batch` images."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.stack([random_boxes(count, height, width, generator) for _ in range(batch)])
    labels = torch.randint(0, classes, (batch, count), generator=generator)
    return Targets(boxes, labels)


def inference(batch: int, side: int, quick: bool) -> Work:
    built = build_network(network("resnet50", quick).eval(), CPU)
    images = imgs(batch, side)

    return Work(lambda: built(images))


def train_step(side: int, quick: bool) -> Work:
    model = network("resnet18", quick).train()
    images, targets = imgs(1, side), objects(10, 1, side, side, 80)
    precision = "bf16" if choose_dtype("auto", CPU) == torch.bfloat16 else "float32"
    optimizer = build_optimizer(model, optimizer="sgd", lr=1e-6, momentum=0.9, weight_decay=1e-4)
    sizes = feature_sizes(model.anchors.strides, side, side)

    def call() -> None:
        with autocast(precision, CPU):
            outputs = model(images)
        anchors = level_anchors(model.anchors, sizes, CPU)
        losses = detection_losses(outputs, anchors, targets, num_classes=80)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses.total)
        optimizer.step()

    return Work(call)


def class_loss(batch: int, classes: int, side: int) -> Work:
    work = class_work(side, side, batch, classes, 20, CPU)
    levels = [level.requires_grad_() for level in work.levels]
    labels, weights = work.labels, torch.ones(batch)

    def call() -> Any:
        flat = [flatten_level(level, classes) for level in levels]
        loss = CLASSIFICATION_LOSSES["focal"](flat, labels, weights, 0.25, 2.0, 0.0)
        return torch.autograd.grad(loss, levels)

    return Work(call)


def post_processing(classes: int, side: int) -> Work:
    outputs = outputs_like(side, side, 1, classes, CPU)
    anchors, sizes = anchors_for(side, side, CPU), torch.tensor([[side, side]])
    return Work(lambda: postprocess(outputs, anchors, sizes, num_classes=classes))


def matching(count: int, height: int, width: int) -> Work:
    anchors = torch.cat(anchors_for(height, width, CPU))
    targets = objects(count, 2, height, width, 80)
    return Work(lambda: match_anchors(anchors, targets))


def whole_loss(count: int, height: int, width: int) -> Work:
    like = outputs_like(height, width, 2, 80, CPU)
    outputs = Outputs(*(tuple(one.requires_grad_() for one in kind) for kind in like))
    anchors, targets = anchors_for(height, width, CPU), objects(count, 2, height, width, 80)

    def call() -> None:
        losses = detection_losses(outputs, anchors, targets, num_classes=80)
        torch.autograd.grad(losses.total, [*outputs.logits, *outputs.deltas])

    return Work(call)


def detect(count: int, quick: bool) -> Work:
    """``retinanet detect`` of a folder, without the command line around it."""
    detector = small_detector()

    def search(folder: Path) -> None:
        with (
            tempfile.TemporaryDirectory() as out,
            open_outputs(Path(out), ["json"], drawn_score=0.3) as write,
        ):
            for found in detector.stream(folder):
                if isinstance(found, Failure):
                    raise found.error
                write(found)

    folder = many_images(count)
    return Work(lambda: search(folder), first=lambda: search(many_images(1)))


def judge(count: int, quick: bool) -> Work:
    """``retinanet evaluate`` of a folder, in this process alone."""
    detector = small_detector()

    def run(number: int) -> None:
        generator = torch.Generator().manual_seed(0)
        boxes = random_boxes(4, 64, 64, generator).tolist()
        truth = tuple(Annotation((a, b, c, d), 0) for a, b, c, d in boxes)
        folder = many_images(number)
        images = [
            LabelledImage(file, i, truth, 64, 64) for i, file in enumerate(sorted(folder.iterdir()))
        ]
        names = detector.classes
        ids = tuple(range(len(names)))
        dataset = Dataset(tuple(images), names, ids, "val", "coco", folder)
        evaluate(detector, dataset, batch_size=1, workers=0)

    many_images(count)
    return Work(lambda: run(count), first=lambda: run(1))


def small_detector() -> Detector:
    """A network that takes milliseconds and finds something in any image."""
    model = network("", True, classes=3)
    torch.nn.init.normal_(model.class_head.last.weight, std=0.2)
    info = {"detect": {"detections_per_image": 20, "topk_candidates": 100}}
    checkpoint = Checkpoint(model, ("a", "b", "c"), (0, 1, 2), 64, 64, info)
    return Detector(checkpoint, device="cpu")


def many_images(count: int) -> Path:
    """A folder with so many JPEG files: links to a hundred different ones."""
    folder = Path(os.environ["RETINANET_CURVES"]) / f"{count}"
    if folder.is_dir():
        return folder
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    originals: list[Path] = []
    for i in range(count):
        file = folder / f"{i:06}.jpg"
        if i < 100:
            file.write_bytes(jpeg(64, 64, generator))
            originals.append(file)
        else:
            os.link(originals[i % 100], file)
    return folder


CURVES: dict[str, Curve] = {
    "image-side": Curve(
        "side of a square image, pixels",
        (256, 384, 512, 768, 1024, 1280, 1600),
        (64, 128),
        {
            "inference, ResNet-50": lambda x, quick: inference(1, x, quick),
            "training step, ResNet-18": train_step,
        },
        power=2.0,
    ),
    "batch": Curve(
        "images in a batch",
        (1, 2, 4, 8, 16, 32),
        (1, 4),
        {
            "inference, ResNet-50, 256 px": lambda x, quick: inference(
                x, 64 if quick else 256, quick
            ),
            "class loss, 80 classes, 512 px": lambda x, quick: class_loss(
                x, 80, 64 if quick else 512
            ),
        },
    ),
    "classes": Curve(
        "classes",
        (1, 3, 10, 30, 100, 300, 1000),
        (1, 100),
        {
            "class loss, 512 px": lambda x, quick: class_loss(1, x, _side(quick)),
            "post-processing, 512 px": lambda x, quick: post_processing(x, _side(quick)),
        },
    ),
    "objects": Curve(
        "objects in an image",
        (0, 1, 10, 100, 500, 2000),
        (0, 10, 100),
        {
            "matching, 800 x 1088 px, 2 images": lambda x, quick: matching(x, *_sides(quick)),
            "both losses, 80 classes, the same": lambda x, quick: whole_loss(x, *_sides(quick)),
        },
    ),
    "images": Curve(
        "images in a folder",
        (1, 10, 100, 1000, 10_000),
        (1, 10),
        {"detect": detect, "evaluate": judge},
    ),
}


def _side(quick: bool, full: int = 512) -> int:
    return 64 if quick else full


def _sides(quick: bool) -> tuple[int, int]:
    return (64, 96) if quick else (800, 1088)


def measure(curve: str, line: str, x: int, quick: bool, threads: int) -> dict[str, Any]:
    """A point: runs in a process of its own."""
    torch.set_num_threads(threads)
    work = CURVES[curve].lines[line](x, quick)
    slow = False
    for _ in range(3):  # a size that comes again may have something arranged for it
        slow = clock(work.first or work.call) > _SLOW
        if slow:
            break
    times: list[float] = []
    together = slow or work.first is not None  # as long as it takes: once, for both figures
    if together:
        if slow:  # what clearing pages takes is little beside it
            gc.collect()
            give_back_memory()
        memory = peak_of(lambda: times.append(clock(work.call)), CPU)
    end = time.perf_counter() + (0 if quick else 2)
    while not times or (times[0] <= _SLOW and time.perf_counter() < end and len(times) < 15):
        times.append(clock(work.call))
    if not together:
        gc.collect()
        give_back_memory()
        memory = peak_of(work.call, CPU)
    return {"x": x, "seconds": statistics.median(times), "rounds": len(times), "memory": memory}


def give_back_memory() -> None:
    """Freed memory goes back to the system, now and from here on, so that the peak is what is used.

    Not while the clock runs: memory that comes again has to be cleared page by page.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):  # glibc
        libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 0)  # M_TRIM_THRESHOLD
        libc.malloc_trim(0)


def exponents(points: Sequence[dict[str, Any]], figure: str, power: float) -> list[float | None]:
    """By which power of the work a figure grows from each point to the next; None: not known."""
    found: list[float | None] = []
    for one, other in pairwise(points):
        low, high = one[figure], other[figure]
        if not (one["x"] and low and high and high > _LEAST[figure]):
            found.append(None)
            continue
        low = max(low, _LEAST[figure])
        found.append(math.log(high / low) / (power * math.log(other["x"] / one["x"])))
    return found


def sentences(curve: Curve, line: str, points: Sequence[dict[str, Any]]) -> list[str]:
    """What a line says: its ends, and where it is worse than linear in the work."""
    first, last = points[0], points[-1]
    said = [
        f"{line}: {_both(first)} at {first['x']:,}, {_both(last)} at {last['x']:,}",
    ]
    for figure, name in (("seconds", "time"), ("memory", "memory")):
        grown = exponents(points, figure, curve.power)
        worse = [
            f"{one['x']:,} to {other['x']:,} ({power:.2f})"
            for one, other, power in zip(points, points[1:], grown, strict=False)
            if power is not None and power > WORSE_FROM
        ]
        if worse:
            said.append(f"{name} grows faster than the work from {', '.join(worse)}")
    return said


def _both(point: dict[str, Any]) -> str:
    seconds, memory = point["seconds"], point["memory"]
    took = f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
    return took if memory is None else f"{took} and {memory / 1e6:.3g} MB"


def draw(name: str, curve: Curve, lines: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Time and memory in two panels, logarithmic both ways, beside growth in step with the work."""
    with open_figure(9.0, 3.4, file) as figure:
        panels = zip(
            figure.subplots(1, 2), (("seconds", 1e3, "ms"), ("memory", 1e-6, "MB")), strict=True
        )
        for axis, (key, scale, unit) in panels:
            drawn: list[tuple[list[int], list[float]]] = []
            for colour, (line, points) in zip(COLOURS, lines.items(), strict=False):
                kept = [one for one in points if one[key] is not None]
                x = [one["x"] for one in kept]
                y = [max(scale * one[key], _DRAWN_FROM[key]) for one in kept]
                axis.plot(x, y, "o-", color=colour, markersize=3.5, label=line)
                if any(x):
                    drawn.append((x, y))
            for i, (x, y) in enumerate(drawn):
                # From each line's last point back: where the line lies over it, growth was slower.
                start = next(one for one in x if one)
                thin = [y[-1] * (one / x[-1]) ** curve.power for one in (start, x[-1])]
                label = "in step with the work" if i == 0 else None
                axis.plot(
                    (start, x[-1]), thin, "--", color=GREY, linewidth=0.8, zorder=1, label=label
                )
            points_x = sorted({one["x"] for points in lines.values() for one in points})
            axis.set_xscale("symlog", linthresh=1) if 0 in points_x else axis.set_xscale("log")
            axis.set_yscale("log")
            low, high = axis.get_ylim()
            own = [value for _, y in drawn for value in y] or [low, high]
            axis.set_ylim(min(own) / 2, max(own) * 2)
            axis.set_xticks(points_x, [f"{one:,}" for one in points_x])
            axis.set_xticks([], minor=True)
            axis.yaxis.set_major_formatter("{x:,g}")
            axis.set(xlabel=curve.axis, ylabel=unit)
            axis.set_title("Time" if key == "seconds" else "Peak memory beyond the input")
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


@contextmanager
def processes() -> Iterator[Any]:
    """Where points are measured: each in a fresh process that has imported all it needs.

    A fork server has done so once and computed nothing, so forking it is safe and takes no time.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory(prefix="retinanet-curves-") as folder:
        os.environ["RETINANET_CURVES"] = folder
        # One task a process, so that nothing is left over from the last.
        with context.Pool(1, maxtasksperchild=1) as pool:
            yield pool


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("curves"), help="a folder")
    parser.add_argument("--only", choices=sorted(CURVES), action="append", help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    chosen = {name: CURVES[name] for name in CURVES if name in (given.only or CURVES)}
    torch.set_num_threads(given.threads)
    machine = describe_machine(CPU)
    with processes() as pool:
        for name, curve in chosen.items():
            lines: dict[str, list[dict[str, Any]]] = {}
            for line in curve.lines:
                lines[line] = []
                for x in curve.quick if given.quick else curve.points:
                    task = (name, line, x, given.quick, given.threads)
                    point = pool.apply(measure, task)
                    lines[line].append(point)
                    print(f"{name}, {line}, {x:,}: {_both(point)}", file=sys.stderr, flush=True)
            draw(name, curve, lines, given.out / f"{name}.png")
            result: dict[str, Any] = {
                "axis": curve.axis,
                "work": f"x^{curve.power:g}",
                "lines": {
                    line: {
                        "points": points,
                        "time_exponents": exponents(points, "seconds", curve.power),
                        "memory_exponents": exponents(points, "memory", curve.power),
                        "says": sentences(curve, line, points),
                    }
                    for line, points in lines.items()
                },
            }
            keep(given.out / "curves.json", machine, name, result, quick=given.quick)
            for said in result["lines"].values():
                print("; ".join(said["says"]), flush=True)
    return 0


def keep(file: Path, machine: Machine, name: str, result: dict[str, Any], *, quick: bool) -> None:
    """Put a curve into the file, beside the others that it has of the same machine."""
    curves: dict[str, Any] = {}
    if file.is_file():
        before = json.loads(file.read_text("utf-8"))
        if Machine(**before["machine"]).same_as(machine) and before["quick"] == quick:
            curves = before["curves"]
    curves[name] = result
    told = {
        "machine": machine.to_dict(),
        "quick": quick,
        "curves": {one: curves[one] for one in CURVES if one in curves},
    }
    write_atomic(file, json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
