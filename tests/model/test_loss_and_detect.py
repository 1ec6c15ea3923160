"""``model.loss`` and ``model.detect``: forms of images and targets, and their faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import retinanet as rn
from retinanet.anchors import feature_sizes, level_anchors
from tiny_backbone import tiny_network


@pytest.fixture(scope="module")
def model() -> rn.RetinaNet:
    return tiny_network(3)


def pixels(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *shape), generator=generator, dtype=torch.uint8)


TARGETS = [
    {"boxes": torch.tensor([[4.0, 4, 36, 36], [10, 20, 40, 60]]), "labels": torch.tensor([2, 0])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]


def padded(model: rn.RetinaNet, image: Tensor, height: int, width: int) -> Tensor:
    whole = model.pixel_mean.round().to(torch.uint8).expand(3, height, width).clone()
    whole[:, : image.shape[1], : image.shape[2]] = image
    return whole


def test_loss_equals_the_pure_function(model: rn.RetinaNet) -> None:
    images = [pixels(60, 50), pixels(64, 90, seed=1)]
    losses = model.loss(images, TARGETS)
    batch = torch.stack([padded(model, image, 64, 96) for image in images])
    targets = rn.Targets(
        torch.stack([TARGETS[0]["boxes"], torch.zeros(2, 4)]), torch.tensor([[2, 0], [-1, -1]])
    )
    anchors = level_anchors(model.anchors, feature_sizes(model.strides, 64, 96))
    expected = rn.detection_losses(model(batch), anchors, targets, num_classes=3)
    assert_close(losses.classification, expected.classification)
    assert_close(losses.box, expected.box)
    assert losses.foreground.tolist() == expected.foreground.tolist()
    assert losses.foreground[0] > 0
    losses.total.backward()
    assert all(parameter.grad is not None for parameter in model.class_head.parameters())


def test_loss_settings_are_those_of_the_pure_function(model: rn.RetinaNet) -> None:
    images = torch.stack([pixels(64, 64)] * 2)
    plain = model.loss(images, TARGETS, settings=rn.LossSettings(classification="cross_entropy"))
    assert plain.classification > 2 * model.loss(images, TARGETS).classification


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_float_images_of_0_to_255_equal_uint8(model: rn.RetinaNet, dtype: torch.dtype) -> None:
    image = pixels(64, 64)
    (expected,) = model.detect([image], score_threshold=0.009)
    (found,) = model.detect(image[None].to(dtype), score_threshold=0.009)
    assert len(found) > 10
    assert_close(found.boxes, expected.boxes)
    assert_close(found.scores, expected.scores)


def test_detections_are_in_pixels_of_each_image(model: rn.RetinaNet) -> None:
    small, large = pixels(40, 50), pixels(64, 90, seed=1)
    found = model.detect([small, large], score_threshold=0.009)
    assert [type(each) for each in found] == [rn.Detections] * 2
    assert found[0].boxes[:, 0::2].max() <= 50
    assert found[0].boxes[:, 1::2].max() <= 40
    (alone,) = model.detect([padded(model, small, 64, 96)], score_threshold=0.009)
    # The same scores; boxes are clipped to the image without its padding.
    assert_close(alone.scores.max(), found[0].scores.max())
    assert not found[0].boxes.requires_grad


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (lambda x: x / 255, r"found values 0 to 1; multiply by 255, or pass uint8"),
        (lambda x: (x / 255 - 0.45) / 0.22, r"found values -2.05 to 2.5; pass them before"),
        (lambda x: x * 257, r"to 6.55e\+04; scale them to 0..255"),
    ],
)
def test_float_images_of_other_ranges_are_rejected(
    model: rn.RetinaNet, scale: Any, message: str
) -> None:
    image = scale(pixels(64, 64).float())
    for call in (lambda: model.detect([image]), lambda: model.loss(image[None], TARGETS[:1])):
        with pytest.raises(ValueError, match=message):
            call()


def test_black_float_images_are_accepted(model: rn.RetinaNet) -> None:
    assert len(model.detect(torch.zeros(1, 3, 64, 64))) == 1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pixels(64, 64), r"found Tensor \(3, 64, 64\); of a single image give image\[None\]"),
        (pixels(64, 64).numpy()[None], r"found ndarray \(1, 3, 64, 64\)"),
        ([pixels(64, 64).numpy()], r"found ndarray \(3, 64, 64\); convert it: "),
        ([pixels(64, 64).permute(1, 2, 0)], r"found Tensor \(64, 64, 3\); three channels come"),
        (
            [pixels(64, 0)],
            r"found Tensor \(3, 64, 0\); three channels come first, and no side is 0",
        ),
        ([], r"found list$"),
        ("street.jpg", "found str; convert it"),
        ([torch.full((3, 64, 64), torch.nan)], "values nan to nan; replace NaN"),
        ([pixels(64, 64), pixels(64, 64).float()], "found torch.float32, torch.uint8"),
        (pixels(64, 64).long()[None], "found torch.int64; convert"),
    ],
)
def test_other_images_are_rejected(model: rn.RetinaNet, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.detect(images)


BOX, LABEL = torch.tensor([[4.0, 4, 36, 36]]), torch.tensor([0])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"boxes": BOX, "labels": LABEL}, "found dict; wrap"),
        ([], "found 0 for 1 images"),
        (None, "found NoneType; wrap"),
        ([{"boxes": BOX, "classes": LABEL}], "image 0 has no labels, only boxes, classes"),
        ([{"boxes": BOX[0], "labels": LABEL}], r"boxes \(4,\) and labels \(1,\)"),
        ([{"boxes": BOX, "labels": LABEL.float()}], "integers: found torch.float32"),
        ([{"boxes": BOX, "labels": LABEL + 3}], "labels are 0..2: found 3; there is no background"),
        ([{"boxes": BOX, "labels": LABEL - 1}], "labels are 0..2: found -1"),
        ([{"boxes": BOX / 64, "labels": LABEL}], "in pixels: found none over 0.562; multiply"),
        (
            [{"boxes": torch.tensor([[40.0, 30, 10, 20]]), "labels": LABEL}],
            r"found \[40.0, 30.0, 10.0, 20.0\]; convert x, y, width, height",
        ),
        ([{"boxes": BOX * torch.nan, "labels": LABEL}], r"found \[nan"),
    ],
)
def test_faults_of_targets_are_named(model: rn.RetinaNet, targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.loss(pixels(64, 64)[None], targets)


def test_freeze_keeps_weights_and_statistics_of_parts() -> None:
    settings: dict[str, Any] = {"norm": "trained", "channels": 16, "head_depth": 1}
    model = rn.build_retinanet(2, backbone="resnet18", backbone_weights="none", **settings)
    assert model.train().freeze().freeze("box_head") is model
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    model.loss(
        images, [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": [1]}]
    ).total.backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"pyramid", "class_head"}
    assert_close(model.backbone.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(rn.ConfigError, match="part 'neck' is not one of backbone, pyramid"):
        model.freeze("neck")


def test_loss_takes_fields_of_the_settings(model: rn.RetinaNet) -> None:
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    targets = [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": [1]}]
    expected = model.loss(images, targets, settings=rn.LossSettings(gamma=1.0)).total
    assert_close(model.loss(images, targets, gamma=1.0).total, expected)
    with pytest.raises(rn.ConfigError, match="unknown setting 'gama'; did you"):
        model.loss(images, targets, gama=1.0)
    with pytest.raises(rn.ConfigError, match="settings and gamma are given"):
        model.loss(images, targets, settings=rn.LossSettings(), gamma=1.0)
    with pytest.raises(ValueError, match="got list; "):
        model([images[0]])
    with pytest.raises(ValueError, match=r"losses = model\.loss\(images, targets\)"):
        model(images, targets)


@pytest.mark.parametrize("num_classes", [0, 2.0, "3", None])
def test_num_classes_is_a_whole_number(num_classes: Any) -> None:
    with pytest.raises(rn.ConfigError, match="num_classes is a whole number of at least 1, got"):
        rn.build_retinanet(num_classes)


def test_no_backbone_weights_are_named_none() -> None:
    with pytest.raises(rn.ConfigError, match=r'backbone_weights is None: give "none" \(random\)'):
        rn.build_retinanet(2, backbone_weights=None)


def test_unknown_threshold_names_the_setting(model: rn.RetinaNet) -> None:
    with pytest.raises(rn.ConfigError, match=r"'conf'; did you mean detect\.score_threshold"):
        model.detect([pixels(64, 64)], conf=0.5)


def test_detect_needs_batch_norm_in_eval_mode() -> None:
    model = rn.RetinaNet(1, backbone="tiny", norm="trained", channels=16, head_depth=0)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        model.detect([pixels(64, 64)])
    assert len(model.eval().detect([pixels(64, 64)])) == 1
