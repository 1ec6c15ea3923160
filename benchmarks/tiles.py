"""Compare tiles with the whole image: AP on mosaics, objects at seams, cost of a huge TIFF.

    python benchmarks/tiles.py accuracy RUN DATA [--tile 256] [--per-mosaic 33] [--keep FOLDER]
    python benchmarks/tiles.py cost RUN DATA [--tile 1024] [--sides 5000 20000]

``accuracy`` puts the validation images of DATA (COCO: a folder with val.json) side by side into
mosaics, in which the objects are too small for the network's input, and evaluates the model of RUN
on them: without tiles, and with tiles of several overlaps and merging rules. The reference is the
model on the separate images. It takes a minute or two per overlap on four cores.

``cost`` writes TIFFs of such images in deflated tiles, and measures detection in each in a process
of its own: peak memory, and time against a plain loop that reads the TIFF at once, cuts it and
detects in a crop at a time, interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou, nms

from retinanet.bench.machine import describe_machine
from retinanet.data import read_dataset
from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.data.images import read_image
from retinanet.data.tiling import tile_windows
from retinanet.data.windows import open_windows
from retinanet.evaluation.coco import evaluate_detections
from retinanet.inference import Detector, load
from retinanet.inference.tiles import Part, merge_parts
from retinanet.structures import Detections

OVERLAPS = (0.0, 0.1, 0.2, 0.3)
MOST = 5000
"""Boxes evaluated per mosaic: more than it has objects."""

SEEN = 0.3
"""Score from which an object counts as found at a seam."""

Rule = Callable[[list[Part], tuple[int, int], float], Detections]


def make_mosaics(data: Dataset, folder: Path, each: int, width: int = 2600) -> Dataset:
    """Put images into rows, in random order (seed 0), the higher images of a mosaic first."""
    order = np.random.default_rng(0).permutation(len(data.images))
    mosaics = []
    for number, start in enumerate(range(0, len(order) - each + 1, each)):
        chosen = [int(i) for i in order[start : start + each]]
        pixels = {data.images[i].path: read_image(data.images[i].path) for i in chosen}
        chosen.sort(key=lambda i: -pixels[data.images[i].path].shape[1])
        placed, places, x, y, row = [], [], 0, 0, 0
        for image in (data.images[i] for i in chosen):
            high, wide = pixels[image.path].shape[1:]
            if x + wide > width:
                x, y, row = 0, y + row, 0
            placed.append((image, x, y))
            places.append((x, y))
            x, row = x + wide, max(row, high)
        right = max(x + pixels[image.path].shape[2] for image, x, _ in placed)
        canvas = np.zeros((y + row, right, 3), np.uint8)
        objects = []
        for image, x, y in placed:
            part = pixels[image.path].permute(1, 2, 0).numpy()
            canvas[y : y + part.shape[0], x : x + part.shape[1]] = part
            for one in image.annotations:
                x1, y1, x2, y2 = one.box
                box = (x1 + x, y1 + y, x2 + x, y2 + y)
                objects.append(Annotation(box, one.label, len(objects), one.crowd, area=one.area))
        file = folder / f"mosaic_{number}.png"
        Image.fromarray(canvas).save(file)
        laid = {"laid": list(zip(chosen, places, strict=True))}
        high = canvas.shape[0]
        mosaics.append(LabelledImage(file, number, tuple(objects), right, high, extra=laid))
    return Dataset(tuple(mosaics), data.classes, data.category_ids, "val", "coco", folder)


def search_parts(
    detector: Detector, file: Path, tile: int, overlap: float, batch_size: int = 8
) -> tuple[tuple[int, int], list[Part]]:
    """Detect in an image and in its tiles, before merging."""
    windows = open_windows(file)
    parts: list[Part] = []
    wanted = [None, *tile_windows(windows.size, tile, overlap)]
    for start in range(0, len(wanted), batch_size):
        some = wanted[start : start + batch_size]
        prepared = [detector.prepare(file if one is None else windows.read(one)) for one in some]
        found = detector.detect_prepared(prepared)
        parts += [Part(one, objects) for one, objects in zip(some, found, strict=True)]
    return windows.size, parts


def laid_out(found: Sequence[Detections], mosaic: LabelledImage) -> Detections:
    """Move the detections of single images to their positions in a mosaic."""
    moved = [
        (found[i].boxes + torch.tensor([x, y, x, y]), found[i].scores, found[i].labels)
        for i, (x, y) in mosaic.extra["laid"]
    ]
    boxes, scores, labels = (torch.cat(values) for values in zip(*moved, strict=True))
    order = scores.argsort(descending=True)
    return Detections(boxes[order], scores[order], labels[order])


def placed(part: Part) -> Tensor:
    """Convert boxes to pixels of the image."""
    x, y = (0, 0) if part.window is None else part.window[:2]
    return part.objects.boxes + torch.tensor([x, y, x, y])


def all_boxes(parts: list[Part]) -> Detections:
    """Concatenate the detections of all parts, best first."""
    boxes = torch.cat([placed(part) for part in parts])
    scores = torch.cat([part.objects.scores for part in parts])
    labels = torch.cat([part.objects.labels for part in parts])
    order = scores.argsort(descending=True)
    return Detections(boxes[order], scores[order], labels[order])


def suppressed(found: Detections, threshold: float) -> Detections:
    kept = nms(found.boxes, found.scores, threshold)  # the data has one class
    return Detections(found.boxes[kept], found.scores[kept], found.labels[kept])


def ours(parts: list[Part], size: tuple[int, int], threshold: float) -> Detections:
    return merge_parts(parts, size, nms_threshold=threshold)


def tiles_alone(parts: list[Part], size: tuple[int, int], threshold: float) -> Detections:
    return merge_parts(parts[1:], size, nms_threshold=threshold)


def nms_alone(parts: list[Part], size: tuple[int, int], threshold: float) -> Detections:
    return suppressed(all_boxes(parts), threshold)


def by_smaller(union: bool) -> Rule:
    """Merge as sahi does: a box that shares over half of the smaller box with a better one.

    With `union` (its GREEDYNMM) the better box grows over the other, else the other goes.
    """

    def merge(parts: list[Part], size: tuple[int, int], threshold: float) -> Detections:
        found = all_boxes(parts)
        boxes = found.boxes.clone()
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        alive = torch.ones(len(boxes), dtype=torch.bool)
        kept = []
        for i in range(len(boxes)):
            if not alive[i]:
                continue
            alive[i] = False
            kept.append(i)
            own = found.boxes[i]
            near = (alive & (found.boxes[:, :2] < own[2:]).all(1)).nonzero()[:, 0]
            near = near[(found.boxes[near, 2:] > own[:2]).all(1)]
            low = torch.maximum(found.boxes[near, :2], own[:2])
            high = torch.minimum(found.boxes[near, 2:], own[2:])
            shared = (high - low).prod(dim=1) / torch.minimum(areas[near], areas[i])
            gone = near[shared > 0.5]
            alive[gone] = False
            if union and len(gone):
                boxes[i, :2] = torch.minimum(own[:2], found.boxes[gone, :2].amin(dim=0))
                boxes[i, 2:] = torch.maximum(own[2:], found.boxes[gone, 2:].amax(dim=0))
        return Detections(boxes[kept], found.scores[kept], found.labels[kept])

    return merge


RULES: dict[str, Rule] = {
    "ours": ours,
    "ours, without the whole": tiles_alone,
    "NMS alone": nms_alone,
    "NMS by the smaller box": (smaller := by_smaller(False)),
    "NMM by the smaller box (sahi)": (union := by_smaller(True)),
}
SLOW = (smaller, union)


def on_seams(
    mosaics: Dataset, found: Sequence[Detections], windows: Sequence[list[Any]]
) -> tuple[int, float, float]:
    """Count objects cut by a tile's border; return the shares found, and found more than once."""
    count = hit = twice = 0
    for image, objects, tiles in zip(mosaics.images, found, windows, strict=True):
        boxes = torch.tensor([one.box for one in image.annotations])
        edges = torch.tensor(sorted({x for tile in tiles for x in (tile[0], tile[2])} - {0}))
        downs = torch.tensor(sorted({y for tile in tiles for y in (tile[1], tile[3])} - {0}))
        cut = torch.zeros(len(boxes), dtype=torch.bool)
        for axis, lines in ((0, edges), (1, downs)):
            cut |= ((boxes[:, axis, None] < lines) & (lines < boxes[:, axis + 2, None])).any(1)
        sure = objects.boxes[objects.scores >= SEEN]
        matches = (box_iou(boxes[cut].float(), sure) >= 0.5).sum(dim=1)
        count += int(cut.sum())
        hit += int((matches > 0).sum())
        twice += int((matches > 1).sum())
    return count, hit / max(1, count), twice / max(1, count)


def accuracy(arguments: argparse.Namespace, folder: Path) -> None:
    detector = load(arguments.run, arguments.device, precision=arguments.precision)
    threshold = detector.thresholds["nms_threshold"]
    data = read_dataset(arguments.data, "val")
    mosaics = make_mosaics(data, folder, arguments.per_mosaic)
    print(f"{len(mosaics.images)} mosaics of {arguments.per_mosaic} images, ", end="")
    sides = ", ".join(f"{image.width} x {image.height}" for image in mosaics.images)
    print(f"{sides}; {sum(len(image.annotations) for image in mosaics.images)} objects\n")
    print("| searched | AP | AP50 | AP75 | APs | APm | seams: objects | found | twice |")
    print("|---|---|---|---|---|---|---|---|---|")

    def show(name: str, dataset: Dataset, found: list[Detections], windows: Any = None) -> None:
        metrics = evaluate_detections(
            dataset, enumerate(found), max_detections=MOST, analysis=False
        )
        numbers = [metrics.ap, metrics.ap50, metrics.ap75, metrics.ap_small, metrics.ap_medium]
        cells = [f"{value:.3f}" for value in numbers]
        if windows is None:
            cells += ["", "", ""]
        else:
            count, hit, twice = on_seams(dataset, found, windows)
            cells += [str(count), f"{hit:.3f}", f"{twice:.3f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)

    def alone(paths: list[Path], **options: Any) -> list[Detections]:
        streamed = detector.stream(paths, detections_per_image=MOST, **options)
        return [Detections(one.boxes, one.scores, one.labels) for one in streamed]  # type: ignore[union-attr]

    paths = [image.path for image in data.images]
    single = alone(paths)
    show("the images one by one", data, single)
    reference = [laid_out(single, mosaic) for mosaic in mosaics.images]
    whole = alone([image.path for image in mosaics.images])
    show("mosaics, whole", mosaics, whole)
    for tile, overlaps in ((arguments.tile, OVERLAPS), (2 * arguments.tile, (0.2,))):
        for overlap in overlaps:
            began = time.perf_counter()
            parts = [search_parts(detector, im.path, tile, overlap) for im in mosaics.images]
            seconds = time.perf_counter() - began
            windows = [[one.window for one in some if one.window] for _, some in parts]
            count = sum(len(some) for _, some in parts)
            rate = f"{count} parts, {count / seconds:.1f}/s"
            show(f"the images one by one, on the seams of {tile}", mosaics, reference, windows)
            for name, rule in RULES.items():
                if rule in SLOW and overlap != 0.2:
                    continue
                found = [rule(some, size, threshold) for size, some in parts]
                title = f"tiles of {tile}, overlap {overlap}: {name} ({rate})"
                show(title, mosaics, found, windows)
    for tile in (arguments.tile, 2 * arguments.tile):
        show(f"the images one by one, tiles of {tile}", data, alone(paths, tile=tile))


def write_tiff(file: Path, side: int, images: list[np.ndarray[Any, Any]]) -> None:
    """Write the mosaics repeatedly, side x side pixels, in deflated tiles of 512."""
    import tifffile

    def tiles() -> Iterator[np.ndarray[Any, Any]]:
        for number in range((-(-side // 512)) ** 2):
            image = images[number % len(images)]
            high, wide = (length // 512 for length in image.shape[:2])
            row, column = divmod(number * 7 % (high * wide), wide)
            yield image[512 * row : 512 * row + 512, 512 * column : 512 * column + 512]

    tifffile.imwrite(
        file,
        tiles(),
        shape=(side, side, 3),
        dtype=np.uint8,
        tile=(512, 512),
        photometric="rgb",
        compression="deflate",
    )


def search_file(arguments: argparse.Namespace) -> None:
    """Measure in this process, and print a line of JSON."""
    Image.MAX_IMAGE_PIXELS = None  # for the plain loop
    detector = load(arguments.run, arguments.device, precision=arguments.precision)
    file = Path(arguments.file)
    detector.detect(np.zeros((arguments.tile, arguments.tile, 3), np.uint8))  # what is made once
    ready = _peak()
    began = time.perf_counter()
    if arguments.plain:
        whole = read_image(file)
        size = (whole.shape[-2], whole.shape[-1])
        windows = list(tile_windows(size, arguments.tile, arguments.overlap))
        objects = 0
        for x1, y1, x2, y2 in windows:
            objects += len(detector.detect(whole[:, y1:y2, x1:x2]))
        count = len(windows)
    else:
        (found,) = detector.stream(
            [file],
            tile=arguments.tile,
            overlap=arguments.overlap,
            batch_size=arguments.batch_size,
        )
        objects = len(found)  # type: ignore[arg-type]
        size = found.size  # type: ignore[union-attr]
        count = 1 + len(list(tile_windows(size, arguments.tile, arguments.overlap)))
    seconds = time.perf_counter() - began
    searched = _peak()
    if arguments.draw and not arguments.plain:
        found.draw().save(arguments.draw)  # type: ignore[union-attr]
    said = {
        "seconds": seconds,
        "parts": count,
        "objects": objects,
        "ready": ready,
        "peak": searched,
        "drawn": _peak(),
    }
    print(json.dumps(said))


def _peak() -> float:
    """Return peak memory in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def cost(arguments: argparse.Namespace, folder: Path) -> None:
    data = read_dataset(arguments.data, "val")
    mosaics = make_mosaics(data, folder, arguments.per_mosaic)
    images = [read_image(one.path).permute(1, 2, 0).numpy() for one in mosaics.images]
    print("| TIFF | how | s | s a Mpx | parts a second | peak MB | of it before | drawn too |")
    print("|---|---|---|---|---|---|---|---|")
    for side in arguments.sides:
        file = folder / f"{side}.tif"
        write_tiff(file, side, images)
        kinds = {"tiles": []} if side > arguments.plain_to else {"tiles": [], "loop": ["--plain"]}
        said: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for _ in range(arguments.rounds if side <= arguments.plain_to else 1):
            for kind, extra in kinds.items():
                command = [sys.executable, __file__, "one", str(arguments.run), str(arguments.data)]
                command += ["--file", str(file), "--tile", str(arguments.tile), *extra]
                command += ["--overlap", str(arguments.overlap), "--device", arguments.device]
                command += ["--batch-size", str(arguments.batch_size)]
                command += ["--precision", arguments.precision, "--draw", str(folder / "drawn.jpg")]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                said[kind].append(json.loads(done.stdout.splitlines()[-1]))
        for kind, runs in said.items():
            times = [one["seconds"] for one in runs]
            middle = statistics.median(times)
            spread = f" ({min(times):.1f} to {max(times):.1f})" if len(times) > 1 else ""
            cells = [
                f"{side} x {side}",
                kind,
                f"{middle:.1f}{spread}",
                f"{middle / (side * side / 1e6):.3f}",
                f"{runs[0]['parts'] / middle:.1f}",
                f"{max(one['peak'] for one in runs):.0f}",
                f"{max(one['ready'] for one in runs):.0f}",
                f"{max(one['drawn'] for one in runs):.0f}" if kind == "tiles" else "",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
        file.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description="Tiles against the whole image.")
    parser.add_argument("what", choices=["accuracy", "cost", "one"])
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("data", type=Path, help="a COCO data set with images for validation")
    parser.add_argument("--tile", type=int, help="accuracy: 256, cost: 1024")
    parser.add_argument("--overlap", type=float, default=0.1, help="cost alone")
    parser.add_argument("--per-mosaic", type=int, default=33)
    parser.add_argument("--sides", type=int, nargs="+", default=[5000, 20_000])
    parser.add_argument("--plain-to", type=int, default=5000, help="largest side of the plain loop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--keep", type=Path, help="where mosaics stay")
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("--draw", help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.tile = arguments.tile or (256 if arguments.what == "accuracy" else 1024)
    if arguments.what == "one":
        search_file(arguments)
        return 0
    for line in describe_machine(torch.device("cpu")).lines():
        print(line)
    print(f"load average {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.keep or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        {"accuracy": accuracy, "cost": cost}[arguments.what](arguments, folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
