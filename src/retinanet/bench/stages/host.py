"""Stages on the host: loading of training batches, COCO metrics and start-up."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms.v2 import functional as F

from retinanet.bench.benchmark import Benchmark, Case, Rival, Setting
from retinanet.bench.samples import jpeg, random_boxes
from retinanet.config import DataConfig
from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.data.loading import train_loader
from retinanet.errors import RetinaNetError
from retinanet.evaluation.coco import evaluate_detections
from retinanet.evaluation.results import ground_truth
from retinanet.model.backbone import IMAGENET_MEAN, IMAGENET_STD
from retinanet.structures import BACKGROUND, Batch

_HEIGHT, _WIDTH, _OBJECTS = 480, 640, 7
_Expected = list[tuple[Tensor, Tensor]]

_HELP = "from retinanet.cli import main; raise SystemExit(main(['--help']))"
# Prints the seconds of the statement alone, after torch is imported.
_AFTER_TORCH = (
    "import sys, time, torch; start = time.perf_counter(); {}; "
    "sys.stdout.write(str(time.perf_counter() - start))"
)


def data(setting: Setting) -> list[Case]:
    """JPEG files to a flipped and padded batch on one core, against torchvision's reference."""
    images = setting.pick(2, 8, 32)
    shorter, longest = setting.pick((240, 400), (480, 800), (800, 1333))
    size = f"{images} JPEG of {_WIDTH} x {_HEIGHT} to {shorter} px"
    return [Case("one core", size, partial(_data, setting, images, shorter, longest))]


def _data(setting: Setting, images: int, shorter: int, longest: int) -> Benchmark:
    folder = Path(tempfile.mkdtemp(prefix="retinanet-bench-"))
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    labelled = []
    for i in range(images):
        file = folder / f"{i}.jpg"
        file.write_bytes(jpeg(_HEIGHT, _WIDTH, rng))
        objects = [Annotation(box, 0) for box in _boxes(generator)]
        labelled.append(LabelledImage(file, i, tuple(objects), _WIDTH, _HEIGHT))
    dataset = Dataset(tuple(labelled), ("thing",), (0,), "train", "coco", folder)
    # The batch is the whole data set, in an order that differs from batch to batch.
    loader = train_loader(
        dataset,
        DataConfig(image_size=shorter, max_size=longest, horizontal_flip=1.0),
        batch_size=images,
        steps=range(10**6),
        seed=0,
    )
    weakref.finalize(loader, shutil.rmtree, folder, ignore_errors=True)
    batches = iter(loader)

    def ours() -> Batch:
        with _one_thread():
            return next(batches)

    rival = Rival("torchvision", _reference(dataset, shorter, longest), _compare_batches)
    return Benchmark(
        ours,
        [rival],
        memory=False,
        note="ours leaves normalising to the network",
    )


def _boxes(generator: torch.Generator) -> list[tuple[float, float, float, float]]:
    boxes = random_boxes(_OBJECTS, _HEIGHT, _WIDTH, generator).tolist()
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in boxes]


def _reference(dataset: Dataset, shorter: int, longest: int) -> Callable[[], _Expected]:
    """Run torchvision's detection reference: flip the PIL image, convert to float, transform.

    The transform normalises, resizes and batches images and boxes (``GeneralizedRCNNTransform``).
    """
    mean, std = ([value / 255 for value in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
    transform = GeneralizedRCNNTransform(shorter, longest, mean, std)
    boxes = [torch.tensor([a.box for a in image.annotations]) for image in dataset.images]

    def call() -> _Expected:
        images, targets = [], []
        with _one_thread():
            for image, of_image in zip(dataset.images, boxes, strict=True):
                with Image.open(image.path) as file:
                    img = F.horizontal_flip(file.convert("RGB"))
                images.append(F.pil_to_tensor(img).float().div_(255))
                flipped = of_image.clone()
                flipped[:, [0, 2]] = _WIDTH - of_image[:, [2, 0]]
                targets.append({"boxes": flipped})
            batch, resized = transform(images, targets)
        return [(x, target["boxes"]) for x, target in zip(batch.tensors, resized, strict=True)]

    return call


def _compare_batches(output: Batch, expected: _Expected) -> str:
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixel_error, box_error = 0.0, 0.0
    for position, index in enumerate(output.indices.tolist()):
        pixels, boxes = expected[index]
        height, width = (int(side) - 1 for side in output.sizes[position])
        theirs = (pixels * std + mean)[:, :height, :width]
        ours = output.images[position, :, :height, :width]
        pixel_error = max(pixel_error, float((theirs - ours).abs().mean()))
        is_object = output.targets.labels[position] != BACKGROUND
        difference = (output.targets.boxes[position][is_object] - boxes).abs()
        box_error = max(box_error, float(difference.max()))
    # Ours rounds to whole levels; torchvision rounds sides down, which shifts by up to a pixel.
    assert pixel_error <= 4, f"{pixel_error:.2f} of 255 levels per pixel"
    assert box_error <= 1.5, f"{box_error:.2f} pixels between boxes"
    return f"{pixel_error:.1f} of 255 levels per pixel, boxes to {box_error:.1f} pixels"


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def evaluation(setting: Setting) -> list[Case]:
    """COCO's twelve metrics, with and without error analysis, against pycocotools."""
    images, detections = setting.pick(20, 300, 5000), setting.pick(20, 50, 100)
    size = f"{images:,} images, {images * detections:,} boxes"
    return [
        Case(name, size, partial(_evaluation, setting, images, detections, analysis))
        for name, analysis in (("the twelve metrics", False), ("with error analysis", True))
    ]


def _evaluation(setting: Setting, images: int, detections: int, analysis: bool) -> Benchmark:
    dataset, results = _random_results(images, detections, setting.pick(5, 20, 80))

    def ours() -> list[float]:
        return list(evaluate_detections(dataset, results, analysis=analysis).summary().values())

    if setting.alone or find_spec("pycocotools") is None:
        return Benchmark(ours)
    rival = Rival("pycocotools", _pycocotools(dataset, results), _compare_metrics)
    return Benchmark(ours, [rival])


def _compare_metrics(output: list[float], expected: list[float]) -> str:
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-9)
    return "all twelve equal"


def _random_results(
    images: int, detections: int, classes: int
) -> tuple[Dataset, list[dict[str, Any]]]:
    """Make a random data set and COCO results of which every fifth is near an object."""
    generator = torch.Generator().manual_seed(0)
    truth, results = [], []
    for image in range(images):
        boxes = _boxes(generator)
        labels = torch.randint(0, classes, (_OBJECTS,), generator=generator).tolist()
        objects = tuple(Annotation(box, label) for box, label in zip(boxes, labels, strict=True))
        truth.append(LabelledImage(Path(f"{image}.jpg"), image, objects, _WIDTH, _HEIGHT))
        shifts = (5 * torch.randn(detections, generator=generator)).tolist()
        scores = torch.rand(detections, generator=generator).tolist()
        for i in range(detections):
            x1, y1, x2, y2 = boxes[i % _OBJECTS]
            shift = shifts[i] * (1 if i % 5 == 0 else 30)
            result = {"image_id": image, "category_id": labels[i % _OBJECTS], "score": scores[i]}
            results.append({**result, "bbox": [x1 + shift, y1 + shift, x2 - x1, y2 - y1]})
    names = tuple(str(k) for k in range(classes))
    dataset = Dataset(tuple(truth), names, tuple(range(classes)), "val", "coco", Path("bench"))
    return dataset, results


def _pycocotools(dataset: Dataset, results: list[dict[str, Any]]) -> Callable[[], list[float]]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    labels = ground_truth(dataset)

    def evaluate() -> list[float]:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            truth = COCO()
            truth.dataset = labels
            truth.createIndex()
            detections = truth.loadRes([dict(result) for result in results])
            evaluator = COCOeval(truth, detections, "bbox")
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
        return [float(value) for value in evaluator.stats]

    return evaluate


def startup(setting: Setting) -> list[Case]:
    """Run the command line's help, and imports after ``import torch``; each in a new process."""

    def case(name: str, size: str, code: str, seconds: Callable[[str], float] | None) -> Case:
        call = partial(_run_python, code)
        return Case(name, size, lambda: Benchmark(call, seconds=seconds, memory=False))

    load = "import retinanet; retinanet.load"
    return [
        case("retinanet --help", "a new process", _HELP, None),
        case("import retinanet", "after torch", _AFTER_TORCH.format("import retinanet"), float),
        case("retinanet.load", "after torch", _AFTER_TORCH.format(load), float),
    ]


def _run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RetinaNetError(f"startup: python failed: {last}")
    return done.stdout
