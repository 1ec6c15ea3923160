"""Image files with their objects to a batch for the network."""

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

from retinanet.bench.contest import Case, Contest, Rival, Setting
from retinanet.bench.samples import jpeg, random_boxes
from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.data.loading import train_loader
from retinanet.model.backbone import IMAGENET_MEAN, IMAGENET_STD
from retinanet.structures import BACKGROUND, Batch

_HEIGHT, _WIDTH, _OBJECTS = 480, 640, 7
_Theirs = list[tuple[Tensor, Tensor]]


def data(setting: Setting) -> list[Case]:
    """JPEG files to a flipped and padded batch on one core, beside torchvision's reference."""
    images = setting.pick(2, 8, 32)
    shorter, longest = setting.pick((240, 400), (480, 800), (800, 1333))
    size = f"{images} JPEG of {_WIDTH} x {_HEIGHT} to {shorter} px"
    return [Case("one core", size, partial(_contest, setting, images, shorter, longest))]


def _contest(setting: Setting, images: int, shorter: int, longest: int) -> Contest:
    folder = Path(tempfile.mkdtemp(prefix="retinanet-bench-"))
    dataset = _dataset(folder, images)
    # With as many images as the data set has, each batch is all of them, in an order of its own.
    loader = train_loader(
        dataset,
        batch_size=images,
        steps=10**6,
        seed=0,
        image_size=shorter,
        max_size=longest,
        horizontal_flip=1.0,
    )
    weakref.finalize(loader, shutil.rmtree, folder, ignore_errors=True)
    batches = iter(loader)

    def ours() -> Batch:
        with _one_thread():
            return next(batches)

    rivals = []
    if "torchvision" in setting.vs:
        rivals.append(Rival("torchvision", _reference(dataset, shorter, longest), _compare))
    return Contest(ours, rivals, memory=False, note="ours leaves normalising to the network")


def _dataset(folder: Path, count: int) -> Dataset:
    generator, draw = np.random.default_rng(0), torch.Generator().manual_seed(0)
    images = []
    for i in range(count):
        file = folder / f"{i}.jpg"
        file.write_bytes(jpeg(_HEIGHT, _WIDTH, generator))
        objects = tuple(
            Annotation((x1, y1, x2, y2), 0)
            for x1, y1, x2, y2 in random_boxes(_OBJECTS, _HEIGHT, _WIDTH, draw).tolist()
        )
        images.append(LabelledImage(file, i, objects, _WIDTH, _HEIGHT))
    return Dataset(tuple(images), ("thing",), (0,), "train", "coco", folder)


def _reference(dataset: Dataset, shorter: int, longest: int) -> Callable[[], _Theirs]:
    """torchvision's reference for detection: flip of the PIL image, float, then its model's part.

    That part normalises, resizes and batches images and boxes (``GeneralizedRCNNTransform``).
    """
    mean, deviation = ([value / 255 for value in one] for one in (IMAGENET_MEAN, IMAGENET_STD))
    transform = GeneralizedRCNNTransform(shorter, longest, mean, deviation)
    boxes = [torch.tensor([one.box for one in image.annotations]) for image in dataset.images]

    def call() -> _Theirs:
        images, targets = [], []
        with _one_thread():
            for image, own in zip(dataset.images, boxes, strict=True):
                with Image.open(image.path) as file:
                    img = F.horizontal_flip(file.convert("RGB"))
                images.append(F.pil_to_tensor(img).float().div_(255))
                flipped = own.clone()
                flipped[:, [0, 2]] = _WIDTH - own[:, [2, 0]]
                targets.append({"boxes": flipped})
            batch, resized = transform(images, targets)
        return [(one, target["boxes"]) for one, target in zip(batch.tensors, resized, strict=True)]

    return call


def _compare(got: Batch, expected: _Theirs) -> str:
    mean, deviation = (torch.tensor(one)[:, None, None] for one in (IMAGENET_MEAN, IMAGENET_STD))
    gaps, far = [], 0.0
    for place, index in enumerate(got.indices.tolist()):
        pixels, boxes = expected[index]
        height, width = (int(side) - 1 for side in got.sizes[place])
        theirs = (pixels * deviation + mean)[:, :height, :width]
        gaps.append(float((theirs - got.images[place, :, :height, :width]).abs().mean()))
        own = got.targets.boxes[place][got.targets.labels[place] != BACKGROUND]
        far = max(far, float((own - boxes).abs().max()))
    # Ours ends in whole levels; torchvision rounds sides down, which shifts by up to a pixel.
    assert max(gaps) <= 4, f"{max(gaps):.2f} of 255 levels a pixel"
    assert far <= 1.5, f"{far:.2f} pixels between boxes"
    return f"{max(gaps):.1f} of 255 levels a pixel, boxes to {far:.1f} pixels"


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
