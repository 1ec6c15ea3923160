"""Measure how time and peak memory grow with image side, batch, classes, objects and images.

    python benchmarks/curves.py [--out DIR] [--only NAME] [--quick] [--threads N]

Each point is measured in a process of its own: the median time after the first calls, and the peak
memory of one more call, with an allocator that returns freed memory to the system. Calls over 20
seconds are measured once. Writes an image per curve and ``curves.json``, which keeps the other
curves of the same machine: ``--only`` measures one again. Takes a quarter of an hour on four cores;
``--quick`` (tiny sizes and networks) half a minute.
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
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retinanet.anchors import feature_sizes, level_anchors
from retinanet.bench.limits import clock
from retinanet.bench.machine import describe_machine
from retinanet.bench.run import peak_of
from retinanet.bench.samples import (
    anchors_for,
    class_loss_input,
    jpeg,
    outputs_like,
    random_boxes,
)
from retinanet.config import LossConfig, TrainConfig
from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.evaluation.run import evaluate
from retinanet.files import write_atomic
from retinanet.inference.backends import build_network
from retinanet.inference.detector import Detector
from retinanet.losses import classification_loss, detection_losses
from retinanet.matching import match_anchors
from retinanet.model.checkpoint import Checkpoint
from retinanet.model.precision import autocast, choose_dtype
from retinanet.model.retinanet import RetinaNet, to_channels_last
from retinanet.postprocess import postprocess
from retinanet.report.figure import COLOURS, GREY, open_figure
from retinanet.structures import Outputs, Targets, flatten_level
from retinanet.training.optim import build_optimizer

CPU = torch.device("cpu")
MAX_LINEAR_EXPONENT = 1.15  # above it growth is called faster than linear; below may be noise
MIN_VALUES = {"seconds": 1e-3, "memory": 10e6}  # smaller values depend on the process
SLOW = 20.0  # seconds of a call that is measured once
MIN_DRAWN = {"seconds": 1e-3, "memory": 0.1}  # ms, MB: a logarithmic axis has no zero
Work = Callable[[], Any]


@dataclass(frozen=True)
class Curve:
    """Cost against one quantity.

    Attributes:
        axis: label of the quantity.
        points: its values.
        quick: its values with ``--quick``.
        lines: functions of (value, quick) that set a computation up.
        power: the work grows with this power of the quantity (pixels: square of the side).
    """

    axis: str
    points: Sequence[int]
    quick: Sequence[int]
    lines: dict[str, Callable[[int, bool], Work]]
    power: float = 1.0


def network(backbone: str, quick: bool, classes: int = 80) -> RetinaNet:
    """Build a network with random weights."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"channels": 16, "head_depth": 1, "norm": "group"} if quick else {}
    name = "mobilenet_v2" if quick else backbone
    return to_channels_last(RetinaNet(backbone=name, num_classes=classes, **small))


def random_images(batch: int, side: int) -> torch.Tensor:
    """(B, 3, side, side) uint8 in channels_last memory."""
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    return images.contiguous(memory_format=torch.channels_last)


def random_targets(count: int, batch: int, height: int, width: int) -> Targets:
    """`count` ground-truth boxes of 80 classes per image."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.stack([random_boxes(count, height, width, generator) for _ in range(batch)])
    return Targets(boxes, torch.randint(0, 80, (batch, count), generator=generator))


def inference(batch: int, side: int, quick: bool) -> Work:
    """ResNet-50's forward pass."""
    built = build_network(network("resnet50", quick).eval(), CPU)
    return partial(built, random_images(batch, side))


def train_step(side: int, quick: bool) -> Work:
    """A training step of ResNet-18 on one image."""
    model = network("resnet18", quick).train()
    images, targets = random_images(1, side), random_targets(10, 1, side, side)
    precision = "bf16" if choose_dtype("auto", CPU) == torch.bfloat16 else "float32"
    optimizer = build_optimizer(model, TrainConfig(lr=1e-6))
    sizes = feature_sizes(model.anchors.strides, side, side)

    def call() -> None:
        with autocast(precision, CPU):
            outputs = model(images)
        anchors = level_anchors(model.anchors, sizes, CPU)
        losses = detection_losses(outputs, anchors, targets, num_classes=80)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses.total)
        optimizer.step()

    return call


def class_loss(batch: int, classes: int, side: int) -> Work:
    """The class loss and its gradient."""
    levels, labels = class_loss_input(side, side, batch, classes, 20, CPU)
    levels = [level.requires_grad_() for level in levels]
    weights = torch.ones(batch)

    def call() -> Any:
        flat = [flatten_level(level, classes) for level in levels]
        loss = classification_loss(flat, labels, weights, LossConfig())
        return torch.autograd.grad(loss, levels)

    return call


def post_processing(classes: int, side: int) -> Work:
    """Post-processing of one image."""
    outputs, anchors = outputs_like(side, side, 1, classes, CPU), anchors_for(side, side, CPU)
    sizes = torch.tensor([[side, side]])
    return partial(postprocess, outputs, anchors, sizes, num_classes=classes)


def matching(objects: int, height: int, width: int) -> Work:
    """Matching of two images."""
    anchors = torch.cat(anchors_for(height, width, CPU))
    return partial(match_anchors, anchors, random_targets(objects, 2, height, width))


def both_losses(objects: int, height: int, width: int) -> Work:
    """Matching and both losses of two images, and their gradients."""
    like = outputs_like(height, width, 2, 80, CPU)
    outputs = Outputs(*(tuple(level.requires_grad_() for level in kind) for kind in like))
    anchors, targets = anchors_for(height, width, CPU), random_targets(objects, 2, height, width)

    def call() -> None:
        losses = detection_losses(outputs, anchors, targets, num_classes=80)
        torch.autograd.grad(losses.total, [*outputs.logits, *outputs.deltas])

    return call


def detect(count: int, quick: bool) -> Work:
    """Detection in a folder."""
    detector, folder = small_detector(), folder_of_images(count)
    return lambda: sum(1 for _ in detector.stream(folder))


def evaluation(count: int, quick: bool) -> Work:
    """Evaluation on a folder."""
    boxes = random_boxes(4, 64, 64, torch.Generator().manual_seed(0)).tolist()
    truth = tuple(Annotation(tuple(box), 0) for box in boxes)
    folder = folder_of_images(count)
    files = sorted(folder.iterdir())
    images = tuple(LabelledImage(file, i, truth, 64, 64) for i, file in enumerate(files))
    dataset = Dataset(images, ("a", "b", "c"), (0, 1, 2), "val", "coco", folder)
    return partial(evaluate, small_detector(), dataset, batch_size=1, workers=0)


def small_detector() -> Detector:
    """A detector that takes milliseconds and finds something in any image."""
    model = network("", True, classes=3)
    torch.nn.init.normal_(model.class_head.last.weight, std=0.2)
    info = {"detect": {"detections_per_image": 20, "topk_candidates": 100}}
    return Detector(Checkpoint(model, ("a", "b", "c"), (0, 1, 2), 64, 64, info), device="cpu")


def folder_of_images(count: int) -> Path:
    """Make a folder of JPEG files: links to a hundred different ones."""
    folder = Path(os.environ["RETINANET_CURVES"]) / f"{count}"
    if folder.is_dir():
        return folder
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        if i < 100:
            (folder / f"{i:06}.jpg").write_bytes(jpeg(64, 64, rng))
        else:
            os.link(folder / f"{i % 100:06}.jpg", folder / f"{i:06}.jpg")
    return folder


def _side(quick: bool, full: int = 512) -> int:
    return 64 if quick else full


def _sides(quick: bool) -> tuple[int, int]:
    return (64, 96) if quick else (800, 1088)


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
            "inference, ResNet-50, 256 px": lambda x, q: inference(x, _side(q, 256), q),
            "class loss, 80 classes, 512 px": lambda x, q: class_loss(x, 80, _side(q)),
        },
    ),
    "classes": Curve(
        "classes",
        (1, 3, 10, 30, 100, 300, 1000),
        (1, 100),
        {
            "class loss, 512 px": lambda x, q: class_loss(1, x, _side(q)),
            "post-processing, 512 px": lambda x, q: post_processing(x, _side(q)),
        },
    ),
    "objects": Curve(
        "objects in an image",
        (0, 1, 10, 100, 500, 2000),
        (0, 10, 100),
        {
            "matching, 800 x 1088 px, 2 images": lambda x, q: matching(x, *_sides(q)),
            "both losses, 80 classes, the same": lambda x, q: both_losses(x, *_sides(q)),
        },
    ),
    "images": Curve(
        "images in a folder",
        (1, 10, 100, 1000, 10_000),
        (1, 10),
        {"detect": detect, "evaluate": evaluation},
    ),
}


def measure(curve: str, line: str, x: int, quick: bool, threads: int) -> dict[str, Any]:
    """Measure a point in this process."""
    torch.set_num_threads(threads)
    call = CURVES[curve].lines[line](x, quick)
    for _ in range(3):  # weights are packed when a size comes again
        slow = clock(call) > SLOW
        if slow:
            break
    times: list[float] = []
    end = time.perf_counter() + (0 if quick else 2)
    while not slow and (not times or (time.perf_counter() < end and len(times) < 15)):
        times.append(clock(call))
    gc.collect()
    return_freed_memory()
    memory = peak_of(lambda: times.append(clock(call)) if slow else call(), CPU)
    return {"x": x, "seconds": statistics.median(times), "rounds": len(times), "memory": memory}


def return_freed_memory() -> None:
    """Return freed memory to the system, now and later, so that the peak is what is in use.

    Not while timing: the system clears returned pages before it lends them again.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):  # glibc
        libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 0)  # M_TRIM_THRESHOLD
        libc.malloc_trim(0)


def exponents(points: Sequence[dict[str, Any]], key: str, power: float) -> list[float | None]:
    """Exponent of the work with which `key` grows between neighbouring points; None: unknown."""
    values: list[float | None] = []
    for a, b in pairwise(points):
        low, high = a[key], b[key]
        if not (a["x"] and low and high and high > MIN_VALUES[key]):
            values.append(None)
            continue
        low = max(low, MIN_VALUES[key])
        values.append(math.log(high / low) / (power * math.log(b["x"] / a["x"])))
    return values


def summary(curve: Curve, line: str, points: Sequence[dict[str, Any]]) -> str:
    """Describe a line's ends, and where it grows faster than the work."""
    first, last = points[0], points[-1]
    texts = [f"{line}: {_costs(first)} at {first['x']:,}, {_costs(last)} at {last['x']:,}"]
    for key, name in (("seconds", "time"), ("memory", "memory")):
        faster = [
            f"{a['x']:,} to {b['x']:,} ({exponent:.2f})"
            for (a, b), exponent in zip(
                pairwise(points), exponents(points, key, curve.power), strict=True
            )
            if exponent is not None and exponent > MAX_LINEAR_EXPONENT
        ]
        if faster:
            texts.append(f"{name} grows faster than the work from {', '.join(faster)}")
    return "; ".join(texts)


def _costs(point: dict[str, Any]) -> str:
    seconds, memory = point["seconds"], point["memory"]
    text = f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
    return text if memory is None else f"{text} and {memory / 1e6:.3g} MB"


def draw(curve: Curve, lines: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Draw time and memory on logarithmic axes, with dashed lines proportional to the work."""
    with open_figure(9.0, 3.4, file) as figure:
        keys = (("seconds", 1e3, "ms", "Time"), ("memory", 1e-6, "MB", "Peak memory of a call"))
        for axis, (key, scale, unit, title) in zip(figure.subplots(1, 2), keys, strict=True):
            for colour, (line, points) in zip(COLOURS, lines.items(), strict=False):
                known = [point for point in points if point[key] is not None]
                x = [point["x"] for point in known]
                y = [max(scale * point[key], MIN_DRAWN[key]) for point in known]
                axis.plot(x, y, "o-", color=colour, markersize=3.5, label=line)
                ends = [x[1] if x[0] == 0 else x[0], x[-1]] if len(x) > 1 else []
                linear = [y[-1] * (end / x[-1]) ** curve.power for end in ends]
                first = colour == COLOURS[0]
                axis.plot(ends, linear, "--", color=GREY, linewidth=0.8, zorder=1,
                          label="proportional to the work" if first else None)  # fmt: skip
            ticks = sorted({point["x"] for points in lines.values() for point in points})
            axis.set_xscale("symlog", linthresh=1) if 0 in ticks else axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axis.set_xticks([], minor=True)
            axis.yaxis.set_major_formatter("{x:,g}")
            axis.set(xlabel=curve.axis, ylabel=unit, title=title)
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


@contextmanager
def process_pool() -> Iterator[Any]:
    """Measure each point in a new process, forked from one that has imported what it needs."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["retinanet.report.figure", "retinanet.bench.stages"])
    with tempfile.TemporaryDirectory(prefix="retinanet-curves-") as folder:
        os.environ["RETINANET_CURVES"] = folder
        with context.Pool(1, maxtasksperchild=1) as pool:
            yield pool


def store(file: Path, machine: dict[str, Any], name: str, result: Any, *, quick: bool) -> None:
    """Write a curve into the file, next to the others of the same machine."""
    curves: dict[str, Any] = {}
    if file.is_file():
        stored = json.loads(file.read_text("utf-8"))
        if stored["machine"] == machine and stored["quick"] == quick:
            curves = stored["curves"]
    curves[name] = result
    ordered = {curve: curves[curve] for curve in CURVES if curve in curves}
    content = {"machine": machine, "quick": quick, "curves": ordered}
    write_atomic(file, json.dumps(content, indent=1) + "\n")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("curves"), help="output folder")
    parser.add_argument("--only", choices=sorted(CURVES), action="append", help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    machine = asdict(describe_machine(CPU))
    with process_pool() as pool:
        for name, curve in CURVES.items():
            if name not in (options.only or CURVES):
                continue
            lines: dict[str, list[dict[str, Any]]] = {line: [] for line in curve.lines}
            for line, points in lines.items():
                for x in curve.quick if options.quick else curve.points:
                    task = (name, line, x, options.quick, options.threads)
                    points.append(pool.apply(measure, task))
                    print(f"{name}, {line}, {x:,}: {_costs(points[-1])}", file=sys.stderr)
            draw(curve, lines, options.out / f"{name}.png")
            texts = {line: summary(curve, line, points) for line, points in lines.items()}
            result = {
                "axis": curve.axis,
                "lines": {
                    line: {"points": points, "summary": texts[line]}
                    for line, points in lines.items()
                },
            }
            store(options.out / "curves.json", machine, name, result, quick=options.quick)
            print("\n".join(texts.values()), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
