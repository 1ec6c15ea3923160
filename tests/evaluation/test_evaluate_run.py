"""Evaluation of models: boxes in original pixels, classes by name, the loss of training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_coco_metrics import assert_same, pycocotools_numbers
from torch import Tensor, nn

from retinanet.anchors import default_anchor_spec, feature_sizes, level_anchors
from retinanet.boxes import encode_boxes
from retinanet.config import LossSettings
from retinanet.data import read_dataset
from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.data.loading import eval_loader
from retinanet.errors import ConfigError, DataError, WeightsError
from retinanet.evaluation.coco import evaluate_detections
from retinanet.evaluation.metrics import Metrics
from retinanet.evaluation.predict import Predictions, group_by_size, run_inference
from retinanet.evaluation.run import evaluate, match_classes
from retinanet.inference.backends import build_network
from retinanet.inference.detector import Detector
from retinanet.losses.detection import detection_losses
from retinanet.model.checkpoint import Checkpoint, save_checkpoint
from retinanet.model.retinanet import RetinaNet, build_retinanet
from retinanet.structures import Batch, Outputs, pad_targets

COLOURS = {"red": 0, "green": 1, "blue": 2}
SIZES = ((64, 96), (96, 64), (64, 96), (80, 80))  # (height, width)


class Painter(nn.Module):
    """A detector of coloured rectangles on black: it knows class k by colour `channels[k]`."""

    def __init__(self, channels: Sequence[int] = (0, 1, 2)) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.num_classes = len(channels)
        self.anchors = default_anchor_spec()
        self.register_buffer("pixel_mean", torch.zeros(3))

    def forward(self, images: Tensor) -> Outputs:
        _, _, height, width = images.shape
        shapes = feature_sizes(self.anchors.strides, height, width)
        levels = level_anchors(self.anchors, shapes)
        anchors = torch.cat(levels)
        logits = torch.full((len(images), len(anchors), self.num_classes), -9.0)
        deltas = torch.zeros(len(images), len(anchors), 4)
        for i, image in enumerate(images.float()):
            for label, channel in enumerate(self.channels):
                rows, columns = torch.nonzero(image[channel] > 127, as_tuple=True)
                if not len(rows):
                    continue
                box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                near = (anchors[:, :2] - box[:2]).abs().sum(1) + (
                    anchors[:, 2:] - box[2:]
                ).abs().sum(1)
                best = int(near.argmin())
                logits[i, best, label] = 4.0 + label
                deltas[i, best] = encode_boxes(anchors[best], box.float())
        cut = [len(one) for one in levels]

        def to_levels(flat: Tensor, last: int) -> tuple[Tensor, ...]:
            return tuple(
                part.reshape(len(images), h, w, -1).permute(0, 3, 1, 2)
                for part, (h, w) in zip(flat.split(cut, dim=1), shapes, strict=True)
            )

        return Outputs(to_levels(logits, self.num_classes), to_levels(deltas, 4))


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO folder of four images: a red and a green rectangle in each, a blue one in one."""
    folder = tmp_path_factory.mktemp("painted")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, (height, width) in enumerate(SIZES):
        pixels = np.zeros((height, width, 3), np.uint8)
        boxes = {"red": [4 + i, 6, 24, 20], "green": [30, 36, 28, 24]}
        if i == 2:
            boxes["blue"] = [60, 5, 30, 22]
        for name, (x, y, w, h) in boxes.items():
            pixels[y : y + h, x : x + w, COLOURS[name]] = 255
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + i,
                    "category_id": 10 * (COLOURS[name] + 1),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": width, "height": height})
    categories = [{"id": 10 * (k + 1), "name": name} for name, k in COLOURS.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "val.json").write_text(json.dumps(content))
    return folder


PLAIN: dict[str, Any] = {"device": "cpu", "precision": "float32"}


@pytest.fixture
def val(painted: Path) -> Dataset:
    return read_dataset(painted, "val")


def painter_checkpoint(
    model: nn.Module, dataset: Dataset, *, image_size: int = 128, max_size: int = 256, **info: Any
) -> Checkpoint:
    ids = dataset.category_ids
    return Checkpoint(model, dataset.classes, ids, image_size, max_size, info)  # type: ignore[arg-type]


def eval_metrics(model: nn.Module, dataset: Dataset, **changes: Any) -> Metrics:
    names = ("image_size", "max_size", "loss", "detect")
    checkpoint = painter_checkpoint(
        model, dataset, **{name: changes.pop(name) for name in names if name in changes}
    )
    return evaluate(checkpoint, dataset, **{"batch_size": 3, "workers": 0, **PLAIN, **changes})


def predict(model: nn.Module, dataset: Dataset, **changes: Any) -> Predictions:
    network = build_network(model, torch.device("cpu"))  # type: ignore[arg-type]
    return run_inference(network, dataset, image_size=128, max_size=256, **changes)


def tiny_checkpoint(classes: tuple[str, ...] = ("red", "green", "blue"), **info: Any) -> Checkpoint:
    torch.manual_seed(0)
    model = build_retinanet(
        backbone="resnet18",
        num_classes=len(classes),
        backbone_weights="none",
        channels=16,
        head_depth=1,
        norm="group",
    )
    return Checkpoint(model, classes, tuple(range(len(classes))), 64, 96, dict(info))


def objects_in(dataset: Dataset) -> int:
    return sum(len(image.annotations) for image in dataset.images)


@pytest.mark.parametrize("image_size", [64, 128, 200])
def test_a_detector_that_is_right_has_ap_1_at_any_scale(val: Dataset, image_size: int) -> None:
    metrics = eval_metrics(Painter(), val, image_size=image_size, max_size=1000)
    # Edges are blurred by the resize: the boxes are right to about a pixel.
    assert metrics.ap50 == pytest.approx(1)
    assert metrics.ap75 == pytest.approx(1)
    assert metrics.ap > 0.85
    assert (metrics.images, metrics.objects, metrics.detections) == (4, 9, 9)
    assert metrics.images_per_second is not None
    assert metrics.images_per_second > 0
    assert metrics.loss is None


def test_classes_in_another_order_and_unknown_ones(val: Dataset) -> None:
    # The model says blue, red, green; a fourth class of its own is not judged.
    model = Painter((2, 0, 1, 0))
    label_map = match_classes(("blue", "red", "green", "pink"), val)
    assert label_map == (2, 0, 1, -1)
    metrics = evaluate_detections(val, predict(model, val, label_map=label_map).results)
    assert metrics.ap50 == pytest.approx(1)
    assert metrics.detections == 9
    wrong = eval_metrics(Painter((2, 0, 1)), val)
    assert wrong.ap50 == 0


def test_validation_loss_follows_the_classes_order(val: Dataset) -> None:
    loss = {"normalizer": "image"}
    straight = predict(Painter(), val, loss=loss)
    turned = predict(Painter((2, 0, 1)), val, loss=loss, label_map=(2, 0, 1))
    wrong = predict(Painter((2, 0, 1)), val, loss=loss)
    assert wrong.loss_classification is not None
    assert turned.loss_classification is not None
    assert straight.loss_box == pytest.approx(turned.loss_box, rel=1e-6)
    # Logits of the painter rise with its label, so the sum differs a little and not a lot.
    assert straight.loss_classification == pytest.approx(turned.loss_classification, rel=0.05)
    assert wrong.loss_classification > 1.05 * turned.loss_classification


@pytest.mark.parametrize("normalizer", ["image", "batch", "running"])
@pytest.mark.parametrize("mining", ["none", "ohem", "ohem_1_3"])
def test_validation_loss_is_that_of_training(val: Dataset, normalizer: str, mining: str) -> None:
    # Images of one size, so that batches are padded alike; the last one has no object.
    same = [val.images[0], val.images[2], replace(val.images[0], annotations=())]
    dataset = replace(val, images=tuple(same))
    model = Painter()
    options = {"gamma": 1.5, "box": "giou", "normalizer": normalizer, "foreground_iou": 0.4,
               "mining": mining, "mining_size": 16}  # fmt: skip
    batch = next(iter(eval_loader(dataset, batch_size=3, image_size=128, max_size=256)))
    outputs = model(batch.images)
    anchors = level_anchors(
        model.anchors, [(one.shape[-2], one.shape[-1]) for one in outputs.logits]
    )
    expected = detection_losses(
        outputs,
        anchors,
        batch.targets,
        num_classes=3,
        settings=LossSettings(
            **{**options, "normalizer": "image" if normalizer == "image" else "batch"}
        ),
    )
    for batch_size in (1, 2, 3):
        metrics = eval_metrics(model, dataset, batch_size=batch_size, loss=options)
        assert metrics.loss == pytest.approx(float(expected.total), rel=1e-5)
        assert metrics.loss_classification == pytest.approx(
            float(expected.classification), rel=1e-5
        )
        assert metrics.loss_box == pytest.approx(float(expected.box), rel=1e-5)


def test_ignored_and_impossible_objects_do_not_break_the_loss(val: Dataset) -> None:
    nan = float("nan")
    extra = (
        Annotation((nan, 0, 10, 10), 0),
        Annotation((10, 10, 10, 40), 0),
        Annotation((40, 40, 20, 20), 0),
        Annotation((0, 0, 60, 60), 1, crowd=True),
    )
    first = val.images[0]
    spoilt = replace(val, images=(replace(first, annotations=(*first.annotations, *extra)),))
    metrics = eval_metrics(Painter(), spoilt, loss={})
    assert metrics.loss is not None
    assert metrics.loss > 0
    # Not a number and inverted: no objects. Without width: an object, as COCO has it.
    assert (metrics.objects, metrics.left_out, metrics.ignored) == (3, 2, 1)


def test_progress_and_thresholds(val: Dataset) -> None:
    seen: list[tuple[int, int]] = []
    eval_metrics(Painter(), val, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(2, 4), (3, 4), (4, 4)]  # batches of one size: two wide, a tall, a square
    assert eval_metrics(Painter(), val, score_threshold=0.995).detections == 1  # sigmoid(6) is .998


def test_evaluate_without_an_image(val: Dataset) -> None:
    metrics = eval_metrics(Painter(), replace(val, images=()), loss={})
    assert np.isnan(metrics.ap)
    assert metrics.loss is None


@pytest.mark.parametrize("options", [{}, {"tile": 64}])
def test_evaluate_unreadable_images_are_left_out_and_named(
    val: Dataset, tmp_path: Path, options: dict[str, Any]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    spoilt = replace(val.images[1], path=broken, id=7)
    dataset = replace(val, images=(val.images[0], spoilt, *val.images[1:]))
    metrics = eval_metrics(Painter(), dataset, out=tmp_path / "out", **options)
    assert list(metrics.unreadable) == [str(broken)]
    assert "broken.png" in metrics.unreadable[str(broken)]
    without = eval_metrics(Painter(), val, **options)
    assert (metrics.images, metrics.objects, metrics.ap) == (4, 9, without.ap)
    stored = Metrics.from_dict(json.loads((tmp_path / "out" / "metrics.json").read_text()))
    assert stored.unreadable == metrics.unreadable
    many = replace(val, images=(spoilt, replace(spoilt, id=8), *val.images))
    with pytest.raises(DataError, match="too many unreadable images: 2 of 6, the last"):
        eval_metrics(Painter(), many, **options)


def test_written_results_are_read_back_to_the_same_ap(
    val: Dataset, painted: Path, tmp_path: Path
) -> None:
    metrics = eval_metrics(Painter(), val, out=tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.json", "results.json"]
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {row["image_id"] for row in rows} == {100, 101, 102, 103}
    assert {row["category_id"] for row in rows} == {10, 20, 30}
    truth = json.loads((painted / "val.json").read_text())
    assert_same(metrics, pycocotools_numbers(truth, rows))
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert Metrics.from_dict(stored).ap == metrics.ap
    for data in (painted, painted / "val.json", val):
        again = evaluate(tmp_path / "results.json", data)
        assert again.ap == metrics.ap
    assert evaluate(rows, val).ap == metrics.ap


def test_data_that_is_not_cocos_gets_its_labels_written(val: Dataset, tmp_path: Path) -> None:
    named = replace(
        val,
        format="voc",
        images=tuple(replace(one, id=one.path.stem + "x") for one in val.images),
    )
    metrics = eval_metrics(Painter(), named, out=tmp_path)
    truth = json.loads((tmp_path / "instances.json").read_text())
    rows = json.loads((tmp_path / "results.json").read_text())
    assert_same(metrics, pycocotools_numbers(truth, rows))
    assert evaluate(str(tmp_path / "results.json"), named).ap == metrics.ap
    assert evaluate(tmp_path / "results.json", tmp_path / "instances.json").ap == metrics.ap


def test_run_folder_checkpoint_detector_and_file_agree(painted: Path, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(
        ("blue", "red", "green"), detect={"score_threshold": 0.001}, loss={"gamma": 1.0}
    )
    save_checkpoint(tmp_path / "run" / "best", checkpoint)
    options: dict[str, Any] = {"device": "cpu", "precision": "float32", "workers": 0}
    metrics = evaluate(tmp_path / "run", painted, out=tmp_path / "out", **options)
    assert metrics.detections > 0  # a random model says something at .001
    assert metrics.loss is not None
    assert (tmp_path / "out" / "metrics.json").is_file()
    for model in (tmp_path / "run" / "best", tmp_path / "run" / "best" / "model.safetensors"):
        again = evaluate(model, painted, **options)
        assert (again.ap, again.detections) == (metrics.ap, metrics.detections)
        assert again.loss == pytest.approx(metrics.loss)
    detector = Detector(checkpoint, device="cpu", precision="float32")
    assert evaluate(detector, painted, workers=0).detections == metrics.detections
    assert evaluate(checkpoint, painted, **options).loss == pytest.approx(metrics.loss)
    from_file = evaluate(tmp_path / "out" / "results.json", painted)
    assert from_file.ap == metrics.ap
    assert evaluate(checkpoint, painted, score_threshold=0.9, **options).detections == 0


def test_made_split_is_that_of_the_training(tmp_path: Path, painted: Path) -> None:
    # One file without splits: what was held out in training is what is judged.
    folder = tmp_path / "data"
    folder.mkdir()
    content = json.loads((painted / "val.json").read_text())
    for i in range(4):
        (folder / f"{i}.png").write_bytes((painted / f"{i}.png").read_bytes())
    (folder / "labels.json").write_text(json.dumps(content))
    options: dict[str, Any] = {"device": "cpu", "precision": "float32", "workers": 0}
    # Image 102 has three objects, so a seed that holds it out is told from one that does not.
    counts = {
        seed: objects_in(read_dataset(folder, "val", seed=seed, val_fraction=0.5))
        for seed in range(20)
    }
    seed = next(seed for seed, count in counts.items() if count != counts[0])
    for data in (folder, folder / "labels.json"):
        made = tiny_checkpoint(split={"seed": seed, "val_fraction": 0.5})
        metrics = evaluate(made, data, **options)
        assert (metrics.images, metrics.objects) == (2, counts[seed])
    # Results are of the whole file.
    assert evaluate([], folder / "labels.json").images == 4
    assert evaluate([], folder / "labels.json", split="train").images == 3


def test_classes_that_the_model_lacks_are_named(val: Dataset) -> None:
    with pytest.raises(
        WeightsError,
        match=r"lacks 1 classes of objects .*: 'blue'; its 2 classes are 'red', 'green'",
    ) as caught:
        evaluate(tiny_checkpoint(("red", "green")), val, device="cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(
        WeightsError, match=r"lacks 3 classes .*: 'red', 'green', 'blue'; its 1 classes"
    ):
        match_classes(("Red",), val)
    # A class without an object in this part of the data may be unknown.
    without = replace(
        val,
        images=tuple(
            replace(one, annotations=tuple(a for a in one.annotations if a.label != 2))
            for one in val.images
        ),
    )
    assert match_classes(("green", "red"), without) == (1, 0)


def test_arguments_that_cannot_be_used(val: Dataset, painted: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no checkpoint"):
        evaluate(tmp_path / "nothing", painted)
    with pytest.raises(DataError, match="no such file"):
        evaluate(tmp_path / "nothing.json", painted)
    with pytest.raises(DataError, match="no split 'tset'"):
        evaluate([], painted, split="tset")
    with pytest.raises(DataError, match="no such file or folder"):
        evaluate([], tmp_path / "nowhere")
    with pytest.raises(DataError, match="does not have: 5"):
        evaluate([{"image_id": 5, "category_id": 10, "bbox": [0, 0, 1, 1], "score": 1}], painted)
    with pytest.raises(ConfigError, match="precision"):
        evaluate(tiny_checkpoint(), painted, device="cpu", precision="bf17")


def test_model_is_a_real_one_too(val: Dataset) -> None:
    model = tiny_checkpoint().model
    assert isinstance(model, RetinaNet)
    metrics = eval_metrics(model, val, loss={}, score_threshold=0.001, precision="bf16")
    assert metrics.loss is not None
    assert metrics.loss_classification == pytest.approx(metrics.loss - metrics.loss_box, rel=1e-6)


@pytest.mark.data
def test_published_figures_from_the_two_files(real_data: Path) -> None:
    folder = real_data / "coco_eval"
    metrics = evaluate(
        folder / "instances_val2014_fakebbox100_results.json",
        folder / "instances_val2014_100.json",
    )
    assert [f"{value:.3f}" for value in metrics.summary().values()] == [
        *("0.505", "0.697", "0.573", "0.586", "0.519", "0.501"),
        *("0.387", "0.594", "0.595", "0.640", "0.566", "0.564"),
    ]


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """One image with 144 squares, half of them red and half green."""
    folder = tmp_path_factory.mktemp("crowded")
    pixels = np.zeros((192, 192, 3), np.uint8)
    annotations = []
    for i in range(144):
        x, y, label = 16 * (i % 12), 16 * (i // 12), i % 2
        pixels[y + 2 : y + 14, x + 2 : x + 14, label] = 255
        annotations.append(Annotation((x + 2.0, y + 2.0, x + 14.0, y + 14.0), label))
    Image.fromarray(pixels).save(folder / "0.png")
    image = LabelledImage(folder / "0.png", 1, tuple(annotations), 192, 192)
    return Dataset((image,), ("red", "green"), (1, 2), "val", "coco", folder)


class SquareFinder(Painter):
    """Detect each of the squares of `crowded` by the anchor of its cell of the finest level."""

    def __init__(self) -> None:
        super().__init__((0, 1))

    def forward(self, images: Tensor) -> Outputs:
        outputs = super().forward(torch.zeros_like(images))
        anchors = torch.cat(
            level_anchors(self.anchors, [(24, 24), (12, 12), (6, 6), (3, 3), (2, 2)])
        )
        logits, deltas = outputs.logits[0], outputs.deltas[0]
        for i in range(144):
            row, column = 2 * (i // 12), 2 * (i % 12)
            x, y = 16 * (i % 12), 16 * (i // 12)
            box = torch.tensor([x + 2.0, y + 2.0, x + 14.0, y + 14.0])
            logits[0, i % 2, row, column] = 3.0 + i / 100
            deltas[0, :4, row, column] = encode_boxes(anchors[9 * (24 * row + column)], box)
        return outputs


def square_finder(**detect: Any) -> Checkpoint:
    model: Any = SquareFinder()
    return Checkpoint(model, ("red", "green"), (1, 2), 192, 192, {"detect": detect})


def test_max_detections_default_is_raised_to_the_objects_of_an_image(crowded: Dataset) -> None:
    # 144 objects, all found exactly: with 100 detections recall is at most 100/144.
    for metrics in (
        evaluate(square_finder(), crowded, workers=0, **PLAIN),
        eval_metrics(
            SquareFinder(), crowded, image_size=192, max_size=192, detect={"topk_candidates": 100}
        ),
    ):
        assert (metrics.max_detections, metrics.detections) == (144, 144)
        assert metrics.ap == pytest.approx(1)
        assert (metrics.objects_over_limit, metrics.detections_over_limit) == (0, 0)


def test_max_detections_given_raises_the_models_own_limits(crowded: Dataset) -> None:
    few = square_finder(detections_per_image=10, topk_candidates=20)
    metrics = evaluate(few, crowded, max_detections=150, workers=0, **PLAIN)
    assert (metrics.max_detections, metrics.detections, metrics.ar) == (150, 144, 1)
    tiled = evaluate(few, crowded, max_detections=150, tile=192, **PLAIN)
    assert (tiled.detections, tiled.ar) == (144, 1)
    # A limit that is given for this call is not raised, and what it cuts is counted.
    cut = evaluate(few, crowded, max_detections=150, detections_per_image=90, workers=0, **PLAIN)
    assert (cut.detections, cut.objects_over_limit) == (90, 54)


def test_max_detections_below_the_objects_counts_what_is_cut(crowded: Dataset) -> None:
    # 72 red and 72 green: 60 of each class can be matched, 12 of each cannot.
    metrics = evaluate(square_finder(), crowded, max_detections=60, workers=0, **PLAIN)
    assert metrics.objects_over_limit == 44  # of 144 objects the model gives 100
    results = json.loads(json.dumps(metrics.to_dict()))
    assert results["objects_over_limit"] == 44
    plenty = evaluate(
        square_finder(detections_per_image=200), crowded, max_detections=60, workers=0, **PLAIN
    )
    assert (plenty.objects_over_limit, plenty.detections_over_limit) == (24, 24)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Nine images of noise in five sizes, each with the squares that a random network sees."""
    folder = tmp_path_factory.mktemp("mixed")
    random = np.random.default_rng(0)
    images = []
    for i, (height, width) in enumerate([(64, 64), (64, 96), (90, 64), (50, 64), (64, 90)] * 2):
        pixels = random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / f"{i}.png")
        box = Annotation((4.0, 4.0, 44.0, 40.0), 0)
        images.append(LabelledImage(folder / f"{i}.png", i + 1, (box,), width, height))
    return Dataset(tuple(images), ("red",), (1,), "val", "coco", folder)


def test_batch_size_changes_no_detection_and_no_loss(mixed: Dataset) -> None:
    torch.manual_seed(0)
    model = build_retinanet(
        backbone="resnet18", num_classes=1, backbone_weights="none", channels=16, head_depth=1,
        norm="group",
    )  # fmt: skip
    torch.nn.init.normal_(model.class_head.last.weight, std=0.5)
    options: dict[str, Any] = {"image_size": 64, "max_size": 96, "score_threshold": 0.02}
    network = build_network(model, torch.device("cpu"))
    alone = run_inference(network, mixed, batch_size=1, loss={}, **options)
    expected = alone.results.table()
    assert len(expected) > 100
    for batch_size in (2, 4, 10):
        joined = run_inference(network, mixed, batch_size=batch_size, loss={}, **options)
        table = joined.results.table()
        assert table[:, 0].tolist() == expected[:, 0].tolist()  # in the order of the data
        np.testing.assert_allclose(table, expected, rtol=0, atol=2e-4)
        assert joined.loss == pytest.approx(alone.loss, rel=1e-6)


def test_group_by_size_holds_back_a_bounded_number_of_images() -> None:
    def image(index: int, side: int) -> Batch:
        targets = pad_targets([torch.zeros(index % 3, 4)], [torch.zeros(index % 3).long()])
        size = torch.tensor([[side, side]])
        pixels = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        return Batch(pixels, targets, size, size, torch.tensor([index]))

    taken = 0

    def images() -> Iterator[Batch]:
        nonlocal taken
        for index in range(100):
            taken += 1
            yield image(index, 32 * (1 + index % 50))

    given: list[int] = []
    for batch in group_by_size(images(), 2):
        assert len(batch.images) in (1, 2)
        assert len(set(batch.indices.div(50, rounding_mode="floor").tolist())) <= 2
        given += batch.indices.tolist()
        assert taken - len(given) <= 8
    assert sorted(given) == list(range(100))


def test_match_classes_with_two_classes_of_one_name_raises(val: Dataset) -> None:
    with pytest.raises(WeightsError, match="several classes of the model are named 'red': rename"):
        match_classes(("red", "green", "red", "blue"), val)
