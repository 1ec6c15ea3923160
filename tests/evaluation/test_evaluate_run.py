"""Evaluation of models: boxes in original pixels, classes by name, the loss of training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from painter import PLAIN, Painter, eval_painter, tiny_checkpoint, without_splits
from PIL import Image
from test_coco_metrics import assert_same, pycocotools_numbers
from torch import Tensor

from retinanet.anchors import level_anchors
from retinanet.boxes import encode_boxes
from retinanet.config import LossSettings
from retinanet.data import read_dataset
from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.data.loading import eval_loader
from retinanet.errors import ConfigError, DataError, WeightsError
from retinanet.evaluation.metrics import Metrics
from retinanet.evaluation.predict import Predictions, group_by_size, run_inference
from retinanet.evaluation.run import evaluate, match_classes
from retinanet.inference.backends import build_network
from retinanet.inference.detector import Detector
from retinanet.losses.detection import detection_losses
from retinanet.model.checkpoint import Checkpoint, save_checkpoint
from retinanet.structures import Batch, Outputs, pad_targets


def predict(model: torch.nn.Module, dataset: Dataset, **changes: Any) -> Predictions:
    network = build_network(model, torch.device("cpu"))  # type: ignore[arg-type]
    return run_inference(network, dataset, image_size=128, max_size=256, **changes)


@pytest.mark.parametrize("image_size", [64, 128, 200])
def test_evaluate_exact_detector_has_ap_1_at_any_scale(val: Dataset, image_size: int) -> None:
    metrics = eval_painter(Painter(), val, sizes=(image_size, 1000))
    # Edges are blurred by the resize: the boxes are right to about a pixel.
    assert metrics.ap50 == pytest.approx(1)
    assert metrics.ap75 == pytest.approx(1)
    assert metrics.ap > 0.85
    assert (metrics.images, metrics.objects, metrics.detections) == (4, 9, 9)
    assert metrics.images_per_second is not None
    assert metrics.images_per_second > 0
    assert metrics.loss is None


def test_run_inference_maps_classes_and_the_loss_follows(val: Dataset) -> None:
    # The model's order is blue, red, green; its fourth class is not evaluated.
    label_map = match_classes(("blue", "red", "green", "pink"), val)
    assert label_map == (2, 0, 1, -1)
    metrics = predict(Painter((2, 0, 1, 0)), val, label_map=label_map).evaluate()
    assert (metrics.ap50, metrics.detections) == (pytest.approx(1), 9)
    loss = {"normalizer": "image"}
    straight = predict(Painter(), val, loss=loss)
    turned = predict(Painter((2, 0, 1)), val, loss=loss, label_map=(2, 0, 1))
    wrong = predict(Painter((2, 0, 1)), val, loss=loss)
    assert wrong.evaluate().ap50 == 0
    assert wrong.loss_classification is not None
    assert turned.loss_classification is not None
    assert straight.loss_box == pytest.approx(turned.loss_box, rel=1e-6)
    # Logits of the painter rise with its label, so the sum differs a little and not a lot.
    assert straight.loss_classification == pytest.approx(turned.loss_classification, rel=0.05)
    assert wrong.loss_classification > 1.05 * turned.loss_classification


@pytest.mark.parametrize("normalizer", ["image", "batch", "running"])
@pytest.mark.parametrize("mining", ["none", "ohem", "ohem_1_3"])
def test_evaluate_loss_is_that_of_training(val: Dataset, normalizer: str, mining: str) -> None:
    # Images of one size, so that batches are padded alike; the last one has no object.
    same = (val.images[0], val.images[2], replace(val.images[0], annotations=()))
    dataset = replace(val, images=same)
    model = Painter()
    options = {"gamma": 1.5, "box": "giou", "normalizer": normalizer, "foreground_iou": 0.4,
               "mining": mining, "mining_size": 16}  # fmt: skip
    batch = next(iter(eval_loader(dataset, batch_size=3, image_size=128, max_size=256)))
    outputs = model(batch.images)
    shapes = [(level.shape[-2], level.shape[-1]) for level in outputs.logits]
    of_batch = "image" if normalizer == "image" else "batch"
    expected = detection_losses(
        outputs,
        level_anchors(model.anchors, shapes),
        batch.targets,
        num_classes=3,
        settings=LossSettings(**{**options, "normalizer": of_batch}),
    )
    for batch_size in (1, 2, 3):
        metrics = eval_painter(model, dataset, {"loss": options}, batch_size=batch_size)
        losses = (metrics.loss, metrics.loss_classification, metrics.loss_box)
        by_hand = (expected.total, expected.classification, expected.box)
        assert losses == pytest.approx([float(loss) for loss in by_hand], rel=1e-5)


def test_evaluate_ignored_and_invalid_objects_do_not_break_the_loss(val: Dataset) -> None:
    nan = float("nan")
    extra = (
        Annotation((nan, 0, 10, 10), 0),
        Annotation((10, 10, 10, 40), 0),
        Annotation((40, 40, 20, 20), 0),
        Annotation((0, 0, 60, 60), 1, crowd=True),
    )
    first = val.images[0]
    spoilt = replace(val, images=(replace(first, annotations=(*first.annotations, *extra)),))
    metrics = eval_painter(Painter(), spoilt, {"loss": {"gamma": 2.0}})
    assert metrics.loss is not None
    assert metrics.loss > 0
    # NaN and inverted: no objects. Without width: an object, as COCO has it.
    assert (metrics.objects, metrics.left_out, metrics.ignored) == (3, 2, 1)


def test_evaluate_progress_thresholds_and_no_image(val: Dataset) -> None:
    seen: list[tuple[int, int]] = []
    eval_painter(Painter(), val, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(2, 4), (3, 4), (4, 4)]  # batches of one size: two wide, a tall, a square
    assert eval_painter(Painter(), val, score_threshold=0.995).detections == 1  # sigmoid(6) is .998
    empty = eval_painter(Painter(), replace(val, images=()), {"loss": {"gamma": 2.0}})
    assert np.isnan(empty.ap)
    assert empty.loss is None


@pytest.mark.parametrize("options", [{}, {"tile": 64}])
def test_evaluate_unreadable_images_are_left_out_and_named(
    val: Dataset, tmp_path: Path, options: dict[str, Any]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    spoilt = replace(val.images[1], path=broken, id=7)
    dataset = replace(val, images=(val.images[0], spoilt, *val.images[1:]))
    metrics = eval_painter(Painter(), dataset, out=tmp_path / "out", **options)
    assert list(metrics.unreadable) == [str(broken)]
    assert "broken.png" in metrics.unreadable[str(broken)]
    without = eval_painter(Painter(), val, **options)
    assert (metrics.images, metrics.objects, metrics.ap) == (4, 9, without.ap)
    stored = Metrics.from_dict(json.loads((tmp_path / "out" / "metrics.json").read_text()))
    assert stored.unreadable == metrics.unreadable
    many = replace(val, images=(spoilt, replace(spoilt, id=8), *val.images))
    with pytest.raises(DataError, match="too many unreadable images: 2 of 6, the last"):
        eval_painter(Painter(), many, **options)


def test_evaluate_written_results_give_the_same_ap(
    val: Dataset, painted: Path, tmp_path: Path
) -> None:
    metrics = eval_painter(Painter(), val, out=tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.json", "results.json"]
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {row["image_id"] for row in rows} == {100, 101, 102, 103}
    assert {row["category_id"] for row in rows} == {10, 20, 30}
    truth = json.loads((painted / "val.json").read_text())
    assert_same(metrics, pycocotools_numbers(truth, rows))
    for data in (painted, painted / "val.json", val):
        assert evaluate(tmp_path / "results.json", data).ap == metrics.ap
    assert evaluate(rows, val).ap == metrics.ap


def test_evaluate_other_formats_get_their_labels_written(val: Dataset, tmp_path: Path) -> None:
    images = tuple(replace(image, id=f"{image.path.stem}x") for image in val.images)
    named = replace(val, format="voc", images=images)
    metrics = eval_painter(Painter(), named, out=tmp_path)
    truth = json.loads((tmp_path / "instances.json").read_text())
    rows = json.loads((tmp_path / "results.json").read_text())
    assert_same(metrics, pycocotools_numbers(truth, rows))
    for data in (named, tmp_path / "instances.json"):
        assert evaluate(str(tmp_path / "results.json"), data).ap == metrics.ap


def test_evaluate_run_folder_checkpoint_and_detector_agree(painted: Path, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(
        ("blue", "red", "green"), detect={"score_threshold": 0.001}, loss={"gamma": 1.0}
    )
    save_checkpoint(tmp_path / "run" / "best", checkpoint)
    options: dict[str, Any] = {"workers": 0, **PLAIN}
    metrics = evaluate(tmp_path / "run", painted, out=tmp_path / "out", **options)
    assert metrics.detections > 0  # of a random model at .001
    assert metrics.loss is not None
    assert metrics.loss == pytest.approx(metrics.loss_classification + metrics.loss_box)  # type: ignore[operator]
    best = tmp_path / "run" / "best"
    for model in (best, best / "model.safetensors", checkpoint, Detector(checkpoint, **PLAIN)):
        again = evaluate(model, painted, **options)
        assert (again.ap, again.detections) == (metrics.ap, metrics.detections)
        assert again.loss == pytest.approx(metrics.loss)
    assert evaluate(tmp_path / "out" / "results.json", painted).ap == metrics.ap
    assert evaluate(checkpoint, painted, score_threshold=0.9, **options).detections == 0


def test_evaluate_split_that_is_made_is_that_of_the_training(tmp_path: Path, painted: Path) -> None:
    folder = without_splits(painted, tmp_path / "data")
    # Image 102 has three objects: a seed with it in val differs from a seed without.
    counts = {}
    for seed in range(20):
        dataset = read_dataset(folder, "val", seed=seed, val_fraction=0.5)
        counts[seed] = sum(len(image.annotations) for image in dataset.images)
    seed = next(seed for seed, count in counts.items() if count != counts[0])
    for data in (folder, folder / "labels.json"):
        made = tiny_checkpoint(split={"seed": seed, "val_fraction": 0.5})
        metrics = evaluate(made, data, workers=0, **PLAIN)
        assert (metrics.images, metrics.objects) == (2, counts[seed])
    # Results are of the whole file.
    assert evaluate([], folder / "labels.json").images == 4
    assert evaluate([], folder / "labels.json", split="train").images == 3


def test_match_classes_names_what_the_model_lacks(val: Dataset) -> None:
    with pytest.raises(
        WeightsError,
        match=r"lacks 1 classes of objects .*: 'blue'; its 2 classes are 'red', 'green'; --classes",
    ):
        evaluate(tiny_checkpoint(("red", "green")), val, device="cpu")
    with pytest.raises(
        WeightsError, match=r"lacks 3 classes .*: 'red', 'green', 'blue'; its 1 classes"
    ):
        match_classes(("Red",), val)
    with pytest.raises(WeightsError, match="several classes of the model are named 'red': rename"):
        match_classes(("red", "green", "red", "blue"), val)
    # A class without an object in this part of the data may be unknown.
    without = replace(val, images=val.images[:1])
    assert match_classes(("green", "red"), without) == (1, 0)


def test_evaluate_takes_data_sets_by_split_and_map_style_ones(val: Dataset) -> None:
    class MapStyle:
        classes = val.classes

        def __len__(self) -> int:
            return len(val)

        def __getitem__(self, index: int) -> Any:
            image = val.images[index]
            labels = [item.label for item in image.annotations]
            return image.path, {"boxes": [a.box for a in image.annotations], "labels": labels}

    expected = evaluate([], val)
    assert evaluate([], {"val": val}) == expected
    assert evaluate([], {"val": MapStyle()}).objects == expected.objects
    assert evaluate([], MapStyle()).objects == expected.objects


def test_evaluate_invalid_arguments(painted: Path, tmp_path: Path) -> None:
    row = {"image_id": 5, "category_id": 10, "bbox": [0, 0, 1, 1], "score": 1}
    cases: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
        (tmp_path / "nothing", painted, {}, WeightsError, "there is no checkpoint"),
        (tmp_path / "nothing.json", painted, {}, DataError, "no such file"),
        ([], painted, {"split": "tset"}, DataError, "no split 'tset'"),
        ([], tmp_path / "nowhere", {}, DataError, "no such file or folder"),
        ([], {"test": painted}, {}, DataError, "the data has no split 'val': found test"),
        ([], None, {}, ConfigError, "data is a NoneType: give a path, a data set"),
        (tiny_checkpoint(), None, {}, ConfigError, "data is a NoneType: give a path, a data set"),
        (None, painted, {}, WeightsError, "a detector is .*, got NoneType"),
        ([row], painted, {}, DataError, "entry 0 is of image 5, which .* does not have"),
        (tiny_checkpoint(), painted, {"precision": "bf17"}, ConfigError, "precision"),
        ([], painted, {"precision": "bf16"}, ConfigError, "given for a results file"),
    ]
    for model, data, options, error, message in cases:
        with pytest.raises(error, match=message):
            evaluate(model, data, device="cpu", **options)


# --- limits of detections -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """An image with 144 squares, half of them red and half green."""
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


class SquareDetector(Painter):
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


@pytest.mark.parametrize(
    ("detect", "options", "expected"),
    [
        # All 144 objects are detected exactly; 100 and 1,000 are the model's own limits.
        ({}, {}, {"max_detections": 144, "detections": 144, "ar": 1}),
        (
            {"detections_per_image": 10, "topk_candidates": 20},
            {"max_detections": 150},
            {"max_detections": 150, "detections": 144, "ar": 1},
        ),
        (
            {"detections_per_image": 10, "topk_candidates": 20},
            {"max_detections": 150, "tile": 192},
            {"detections": 144, "ar": 1},
        ),
        # A limit of this call is not raised, and what it cuts is counted.
        (
            {},
            {"max_detections": 150, "detections_per_image": 90},
            {"detections": 90, "objects_over_limit": 54},
        ),
        # 72 red and 72 green: of 144 objects the model gives 100.
        ({}, {"max_detections": 60}, {"objects_over_limit": 44}),
        # 60 of each class can be matched, 12 of each cannot.
        (
            {"detections_per_image": 200},
            {"max_detections": 60},
            {"objects_over_limit": 24, "detections_over_limit": 24},
        ),
    ],
)
def test_evaluate_limits_of_detections(
    crowded: Dataset, detect: dict[str, int], options: dict[str, Any], expected: dict[str, float]
) -> None:
    model: Any = SquareDetector()
    checkpoint = Checkpoint(model, ("red", "green"), (1, 2), 192, 192, {"detect": detect})
    metrics = evaluate(checkpoint, crowded, workers=0, **PLAIN, **options)
    assert {name: getattr(metrics, name) for name in expected} == expected


# --- batches --------------------------------------------------------------------------------------


def test_run_inference_batch_size_changes_no_detection_and_no_loss(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = []
    for i, (height, width) in enumerate([(64, 64), (64, 96), (90, 64), (50, 64), (64, 90)] * 2):
        pixels = random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(tmp_path / f"{i}.png")
        box = Annotation((4.0, 4.0, 44.0, 40.0), 0)
        images.append(LabelledImage(tmp_path / f"{i}.png", i + 1, (box,), width, height))
    mixed = Dataset(tuple(images), ("red",), (1,), "val", "coco", tmp_path)
    model = tiny_checkpoint(("red",)).model
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
        losses = joined.loss_classification, joined.loss_box
        assert losses == pytest.approx((alone.loss_classification, alone.loss_box), rel=1e-6)


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

    yielded: list[int] = []
    for batch in group_by_size(images(), 2):
        assert len(batch.images) in (1, 2)
        assert len(set(batch.indices.remainder(50).tolist())) == 1  # of one size
        yielded += batch.indices.tolist()
        assert taken - len(yielded) <= 8
    assert sorted(yielded) == list(range(100))


def test_evaluate_some_classes_gives_their_metrics_of_an_evaluation_on_all(
    painted: Path, val: Dataset, tmp_path: Path
) -> None:
    # Blue is detected as red: wrong for red, missed for blue, nothing to green.
    model = Painter((0, 1, 0))
    every = eval_painter(model, val, {"loss": {}}, out=tmp_path / "all")
    some = eval_painter(model, val, {"loss": {}}, classes=["green", "blue"], out=tmp_path / "some")
    assert [row.name for row in some.per_class] == ["green", "blue"]
    assert some.per_class == tuple(row for row in every.per_class if row.name != "red")
    assert (some.images, some.objects) == (4, 5)
    assert every.loss is not None
    assert some.loss is None  # red rectangles would count as background
    of_results = evaluate(str(tmp_path / "all" / "results.json"), val, classes=["green", "blue"])
    assert of_results.per_class == some.per_class
    rows = json.loads((tmp_path / "some" / "results.json").read_text())
    assert {row["category_id"] for row in rows} <= {20, 30}
    with pytest.raises(ConfigError, match=r"unknown class 'grean'.*did you mean green\?"):
        eval_painter(model, val, classes=["grean"])


def test_evaluate_selects_and_merges_classes_as_the_training_did(
    painted: Path, val: Dataset, tmp_path: Path
) -> None:
    selection: dict[str, Any] = {"classes": ["red", "green"], "single_class": False}
    checkpoint = tiny_checkpoint(("red", "green"), selection=selection)
    metrics = evaluate(checkpoint, painted, **PLAIN)
    assert [row.name for row in metrics.per_class] == ["red", "green"]
    assert metrics.objects == 8
    assert any("2 of 3 classes are selected: red, green" in note for note in metrics.notes)
    merged = tiny_checkpoint(("object",), selection={"classes": [], "single_class": True})
    metrics = evaluate(merged, val, out=tmp_path, **PLAIN)
    assert [(row.name, row.objects) for row in metrics.per_class] == [("object", 9)]
    again = evaluate(str(tmp_path / "results.json"), tmp_path / "instances.json")
    assert again.per_class == metrics.per_class
