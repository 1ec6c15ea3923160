"""Loading of training batches."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

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
from retinanet.model.backbone import IMAGENET_MEAN, IMAGENET_STD
from retinanet.structures import BACKGROUND, Batch

_HEIGHT, _WIDTH, _OBJECTS = 480, 640, 7
_Expected = list[tuple[Tensor, Tensor]]


def data(setting: Setting) -> list[Case]:
    """JPEG files to a flipped and padded batch on one core, against torchvision's reference."""
    images = setting.pick(2, 8, 32)
    shorter, longest = setting.pick((240, 400), (480, 800), (800, 1333))
    size = f"{images} JPEG of {_WIDTH} x {_HEIGHT} to {shorter} px"
    return [Case("one core", size, partial(_benchmark, setting, images, shorter, longest))]


def _benchmark(setting: Setting, images: int, shorter: int, longest: int) -> Benchmark:
    folder = Path(tempfile.mkdtemp(prefix="retinanet-bench-"))
    dataset = _dataset(folder, images)
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

    rivals = []
    if "torchvision" in setting.vs:
        rivals.append(Rival("torchvision", _reference(dataset, shorter, longest), _compare))
    return Benchmark(ours, rivals, memory=False, note="ours leaves normalising to the network")


def _dataset(folder: Path, count: int) -> Dataset:
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    images = []
    for i in range(count):
        file = folder / f"{i}.jpg"
        file.write_bytes(jpeg(_HEIGHT, _WIDTH, rng))
        boxes = random_boxes(_OBJECTS, _HEIGHT, _WIDTH, generator).tolist()
        objects = tuple(Annotation((x1, y1, x2, y2), 0) for x1, y1, x2, y2 in boxes)
        images.append(LabelledImage(file, i, objects, _WIDTH, _HEIGHT))
    return Dataset(tuple(images), ("thing",), (0,), "train", "coco", folder)


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


def _compare(output: Batch, expected: _Expected) -> str:
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


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
