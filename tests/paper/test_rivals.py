"""The rivals' networks: torchvision's own detectors are the referee."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from rivals_setup import batch_of, rival_recipe, tiny_rival
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from retinanet.errors import ConfigError, WeightsError
from retinanet.paper import rivals
from retinanet.paper.rivals import (
    RIVALS,
    Rival,
    RivalNetwork,
    as_torchvision,
    build_rival,
    load_rival,
    write_rival,
)
from retinanet.structures import BACKGROUND, IGNORED, Batch, Targets

NAMES = tuple(RIVALS)


# --- against torchvision's own --------------------------------------------------------------------


class _Maps(nn.Module):
    """Our backbone as torchvision's detectors take one."""

    def __init__(self, backbone: nn.Module, widths: Any, after: Any) -> None:
        super().__init__()
        self.backbone, self.after, self.out_channels = backbone, after, widths

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.backbone(images)
        return self.after(OrderedDict((str(i), one) for i, one in enumerate(maps)))


def _pixels(network: RivalNetwork) -> dict[str, list[float]]:
    """torchvision's images are 0..1."""
    return {
        "image_mean": (network.pixel_mean.flatten() / 255).tolist(),
        "image_std": (network.pixel_std.flatten() / 255).tolist(),
    }


def _faster_rcnn(network: RivalNetwork, height: int, width: int) -> nn.Module:
    settings = network.settings
    pyramid = FeaturePyramidNetwork(list(network.backbone.channels), 16, LastLevelMaxPool())
    pyramid.load_state_dict(network.pyramid.state_dict())
    reference = FasterRCNN(
        _Maps(network.backbone, 16, pyramid),
        4,
        min_size=height,
        max_size=width,
        rpn_anchor_generator=AnchorGenerator(
            ((8,), (16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 5
        ),
        box_score_thresh=settings.score_threshold,
        **_pixels(network),
    )
    reference.rpn.load_state_dict(network.rpn.state_dict())
    reference.roi_heads.load_state_dict(network.roi_heads.state_dict())
    return reference


def _ssd(network: RivalNetwork, height: int, width: int) -> nn.Module:
    def last_and_more(maps: dict[str, Tensor]) -> dict[str, Tensor]:
        levels = list(maps.values())[-rivals.SSD_MAPS :]
        for block in network.extra:
            levels.append(block(levels[-1]))
        return OrderedDict((str(i), one) for i, one in enumerate(levels))

    # By hand, at 64 px, where anchors begin at 8: a level of stride 64 holds one cell. The smallest
    # box has 3/4 of 8 px, the next has SSD512's .1 for .04, and from there it is even up to .9.
    generator = DefaultBoxGenerator(
        [[2], [2, 3], [2], [2]],
        scales=[6 / 64, 15 / 64, (15 / 64 + 0.9) / 2, 0.9, 1.06],
        steps=[8, 16, 32, 64],
    )
    widths = [*network.backbone.channels[-rivals.SSD_MAPS :], 16]
    reference = SSD(
        _Maps(network.backbone, widths, last_and_more),
        generator,
        (height, width),
        4,
        score_thresh=network.settings.score_threshold,
        nms_thresh=0.5,
        detections_per_img=100,
        topk_candidates=1000,
        **_pixels(network),
    )
    reference.head.load_state_dict(network.ssd.head.state_dict())
    return reference


def _reference(network: RivalNetwork, height: int, width: int) -> nn.Module:
    build = {"faster_rcnn": _faster_rcnn, "ssd": _ssd}[network.settings.rival]
    return build(network, height, width)


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_torchvisions(name: str) -> None:
    network = tiny_rival(name).train()
    reference = _reference(network, 64, 64).train()
    batch = batch_of()
    torch.manual_seed(5)
    found = network.losses(batch)
    torch.manual_seed(5)
    expected = reference(
        list(batch.images.float() / 255),
        [
            {"boxes": torch.tensor([[4.0, 6, 24, 30], [30, 30, 60, 62]]),
             "labels": torch.tensor([1, 3])},
            {"boxes": torch.tensor([[10.0, 8, 40, 36]]), "labels": torch.tensor([2])},
        ],
    )  # fmt: skip
    box = [one for key, one in expected.items() if "box" in key]
    classes = [one for key, one in expected.items() if "box" not in key]
    # Pixels of 0..255 and of 0..1 are not rounded alike.
    torch.testing.assert_close(found.box, torch.stack(box).sum(), rtol=1e-3, atol=0)
    torch.testing.assert_close(found.classification, torch.stack(classes).sum(), rtol=1e-3, atol=0)
    assert (found.foreground > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_detections_are_torchvisions(name: str) -> None:
    network = tiny_rival(name).eval()
    reference = _reference(network, 64, 64).eval()
    batch = batch_of()
    found = network.detect(batch)
    with torch.inference_mode():
        expected = reference(list(batch.images.float() / 255))
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) > 10
        torch.testing.assert_close(ours.boxes, theirs["boxes"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(ours.scores, theirs["scores"], rtol=1e-3, atol=0)
        torch.testing.assert_close(ours.labels, theirs["labels"] - 1)


# --- what goes in ---------------------------------------------------------------------------------


def test_torchvisions_targets_by_hand() -> None:
    boxes = torch.arange(16.0).reshape(2, 2, 4)
    labels = torch.tensor([[0, IGNORED], [2, BACKGROUND]])
    first, second = as_torchvision(Targets(boxes, labels))
    assert first["labels"].tolist() == [1]  # 0 is the background there
    assert first["boxes"].tolist() == [[0, 1, 2, 3]]
    assert second["labels"].tolist() == [3]
    assert second["boxes"].tolist() == [[8, 9, 10, 11]]


@pytest.mark.parametrize("name", NAMES)
def test_an_ignored_object_counts_for_nothing(name: str) -> None:
    network = tiny_rival(name).train()
    with_crowd = batch_of(labels=((0, IGNORED), (1,)))
    without = batch_of(boxes=(((4.0, 6, 24, 30),), ((10.0, 8, 40, 36),)), labels=((0,), (1,)))
    torch.manual_seed(2)
    first = network.losses(with_crowd)
    torch.manual_seed(2)
    second = network.losses(without)
    assert torch.equal(first.total, second.total)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labels", [((), ()), ((), (1,))])
def test_images_without_objects_train(name: str, labels: tuple[tuple[int, ...], ...]) -> None:
    network = tiny_rival(name).train()
    boxes = tuple(((10.0, 8.0, 40.0, 36.0),) * len(one) for one in labels)
    losses = network.losses(batch_of(boxes=boxes, labels=labels))
    losses.total.backward()
    assert losses.foreground[0] == 0
    gradients = [one.grad for one in network.parameters() if one.grad is not None]
    assert gradients
    assert all(one.isfinite().all() for one in gradients)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_moves_no_anchor_and_gives_a_finite_gradient(name: str) -> None:
    network = tiny_rival(name).train()
    batch = batch_of(64, 512, ((), ((400.0, 8.0, 430.0, 36.0),)), ((), (1,)))
    torch.manual_seed(3)
    exact = network.losses(batch)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(3)
        rough = network.losses(batch)
    assert rough.total.dtype == torch.float32
    assert torch.equal(rough.foreground > 0, exact.foreground > 0)
    torch.testing.assert_close(rough.total, exact.total, rtol=0.1, atol=0)
    rough.total.backward()
    assert all(one.grad.isfinite().all() for one in network.parameters() if one.grad is not None)


def test_faster_rcnns_anchors_are_one_level_below_retinanets() -> None:
    network = tiny_rival("faster_rcnn")
    assert network.settings.sizes == (8, 16, 32, 64, 128)
    generator = network.rpn.anchor_generator
    assert generator.sizes == ((8,), (16,), (32,), (64,), (128,))
    strides = (4, 8, 16, 32, 64)
    maps = [torch.empty(1, 16, -(-64 // s), -(-256 // s), dtype=torch.bfloat16) for s in strides]
    images = rivals.ImageList(torch.empty(1, 3, 64, 256), [(64, 256)])
    (anchors,) = generator(images, maps)
    assert anchors.dtype == torch.float32
    # Last cell of the last row of P2: its corner is at (252, 60), the square anchor has 8 px.
    assert anchors[16 * 64 * 3 - 2].tolist() == [248, 56, 256, 64]


def test_faster_rcnns_outputs_are_float32_whatever_autocast_says() -> None:
    network, batch = tiny_rival("faster_rcnn").eval(), batch_of()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        features = network._features(batch.images)
        outputs = network.rpn.head(list(features.values()))
        last = network._second_stage(features, [torch.tensor([[2.0, 3.0, 40.0, 50.0]])] * 2, batch)
    assert features["0"].dtype == torch.bfloat16
    assert {one.dtype for one in (*outputs[0], *outputs[1], *last)} == {torch.float32}


def test_with_p2_the_sizes_are_given_from_p2_on() -> None:
    network = tiny_rival("faster_rcnn", "model.p2=true", "anchors.sizes=[4, 8, 16, 32, 64, 128]")
    assert network.settings.sizes == (4, 8, 16, 32, 64)


def _default_boxes(network: RivalNetwork) -> Tensor:
    """(R, 4) of a square image with sides of `image_size`, padded as a batch is."""
    side = network.settings.image_size
    padded = -(-side // 32) * 32
    batch = batch_of(padded, padded, ((),), ((),))
    with torch.no_grad():
        boxes: Tensor = network.eval()._outputs(
            dataclasses.replace(batch, sizes=torch.full((1, 2), side))
        )[1][0]
    return boxes


def _ssd_of(side: int, sizes: str = "none") -> RivalNetwork:
    return tiny_rival(
        "ssd", f"data.image_size={side}", f"data.max_size={side}", f"anchors.sizes={sizes}"
    )


SMALL = "[8, 16, 32, 64, 128]"


def test_ssd512s_strides_and_shares_come_back() -> None:
    assert rivals.ssd_strides(512) == [8, 16, 32, 64, 128, 256, 512]
    published = [0.04, 0.1, 0.26, 0.42, 0.58, 0.74, 0.9, 1.06]
    assert rivals.ssd_shares(7, 32 / 600) == pytest.approx(published)


@pytest.mark.parametrize(
    ("side", "coarsest"), [(32, 32), (64, 64), (192, 256), (384, 512), (600, 1024), (800, 1024)]
)
def test_ssds_coarsest_level_is_one_cell(side: int, coarsest: int) -> None:
    assert rivals.ssd_strides(side)[-1] == coarsest


@pytest.mark.parametrize(("side", "smallest"), [(600, 32), (384, 32), (128, 16), (64, 32)])
def test_ssds_smallest_box_goes_with_retinanets_smallest_anchor(side: int, smallest: int) -> None:
    shares = rivals.ssd_shares(5, smallest / side)
    assert shares[0] * side == pytest.approx(0.75 * smallest)
    assert shares == sorted(shares)
    assert shares[-2:] == [0.9, 1.06]


@pytest.mark.parametrize("sizes", [SMALL, "none"])
@pytest.mark.parametrize("side", [128, 192, 320, 384, 500, 512, 600])
def test_ssds_default_boxes_lie_in_the_image_and_fill_it(side: int, sizes: str) -> None:
    network = _ssd_of(side, sizes)
    boxes = _default_boxes(network)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    # To the rounding of float32.
    assert centres.min() > -0.01
    assert centres.max() < side + 0.01
    # As far from one edge as from the other, on the coarsest level in the middle.
    assert (centres.min() + centres.max()).item() == pytest.approx(side, abs=0.01)
    assert centres[-1].tolist() == pytest.approx([side / 2] * 2, abs=0.01)
    assert boxes[0, 2] - boxes[0, 0] == pytest.approx(0.75 * network.settings.sizes[0], abs=0.01)
    margin = 0.05 * side
    large = torch.tensor([[margin, margin, side - margin, side - margin]])
    assert rivals.box_iou(large, boxes).max() >= 0.5


def test_ssds_default_boxes_by_hand_and_whatever_the_padding() -> None:
    network = _ssd_of(192)
    small = _default_boxes(network)
    with torch.no_grad():
        wide = network._outputs(batch_of(192, 320))[1][0]
    # The first of a cell is the square of the level's own scale: at stride 8, 3/4 of 32 px.
    assert small[0].tolist() == pytest.approx([4 - 12, 4 - 12, 4 + 12, 4 + 12], abs=1e-4)
    # Stride 128: 2 x 2 cells of 4 boxes hold 256 px, which stick out by 32 on either side.
    level = small[-4 - 4 * 4 : -4]
    centres = (level[:, :2] + level[:, 2:]) / 2
    assert centres[::4].tolist() == [[32, 32], [160, 32], [32, 160], [160, 160]]
    row = 192 // 8 * 4
    torch.testing.assert_close(wide[:row], small[:row])
    torch.testing.assert_close(wide[320 // 8 * 4 :][:row], small[row : 2 * row])


def test_ssd_is_built_again_from_its_settings() -> None:
    network = _ssd_of(192)
    text = network.settings.model_dump_json()
    again = RIVALS["ssd"](type(network.settings).model_validate_json(text))
    again.load_state_dict(network.state_dict())
    assert torch.equal(_default_boxes(again), _default_boxes(network))


def test_the_strides_of_the_levels_are_not_read_from_a_small_image() -> None:
    """33 px in a batch of 64: 16 cells at P2 would be taken for a stride of 2."""
    network = tiny_rival("faster_rcnn").eval()
    batch = batch_of()
    network.detect(dataclasses.replace(batch, sizes=torch.full((2, 2), 33)))
    assert network.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


# --- what comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_boxes_are_in_the_pixels_of_the_original(name: str) -> None:
    network = tiny_rival(name).eval()
    batch = batch_of()
    (one, _) = network.detect(batch)
    doubled = dataclasses.replace(batch, original_sizes=torch.tensor([[128, 192], [64, 64]]))
    (two, _) = network.detect(doubled)
    torch.testing.assert_close(two.boxes, one.boxes * torch.tensor([3.0, 2.0, 3.0, 2.0]))
    assert two.boxes[:, 2].max() <= 192
    assert two.boxes[:, 3].max() <= 128
    assert (one.scores.diff() <= 0).all()
    padded = dataclasses.replace(batch, sizes=torch.tensor([[40, 50], [64, 64]]))
    boxes = network.detect(dataclasses.replace(padded, original_sizes=padded.sizes))[0].boxes
    assert boxes[:, 2].max() <= 50
    assert boxes[:, 3].max() <= 40


@pytest.mark.parametrize("name", NAMES)
def test_labels_count_from_0_without_the_background(name: str) -> None:
    network = tiny_rival(name).eval()
    with torch.no_grad():
        if name == "faster_rcnn":
            biases = [network.roi_heads.box_predictor.cls_score.bias]
        else:
            biases = [one.bias for one in network.ssd.head.classification_head.module_list]
        for bias in biases:
            bias.view(-1, 4)[:, 2] += 50  # background and three classes: the second of these
    found = network.detect(batch_of())
    assert {label for one in found for label in one.labels.tolist()} == {1}
    assert all(len(one) <= 100 for one in found)


@pytest.mark.parametrize("name", NAMES)
def test_the_recipes_thresholds_hold(name: str) -> None:
    wide = tiny_rival(name).eval()
    narrow = tiny_rival(
        name, "detect.detections_per_image=7", "detect.score_threshold=0.2",
        "detect.nms_threshold=0.3", "detect.topk_candidates=50",
    ).eval()  # fmt: skip
    holder = narrow.roi_heads if name == "faster_rcnn" else narrow.ssd
    assert (holder.score_thresh, holder.nms_thresh, holder.detections_per_img) == (0.2, 0.3, 7)
    if name == "ssd":
        assert narrow.ssd.topk_candidates == 50
    assert len(wide.detect(batch_of())[0]) > 7
    assert len(narrow.detect(batch_of())[0]) <= 7


# --- the backbone is RetinaNet's ------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_weights_frozen_stages_and_pixels_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from retinanet.model.backbone import build_backbone

    torch.manual_seed(9)
    given = build_backbone("resnet18", norm="frozen").state_dict()
    file = tmp_path / "weights.safetensors"
    metadata = {"input": "RGB, (x - 127.5) / 127.5", "padding": "SAME"}
    save_file({key: one.clone() for key, one in given.items()}, str(file), metadata=metadata)
    network = tiny_rival(
        name, "model.backbone=resnet18", f"model.backbone_weights={file}", "model.norm=frozen",
        "model.frozen_stages=2",
    )  # fmt: skip
    for key, one in network.backbone.state_dict().items():
        assert torch.equal(one, given[key]), key
    assert network.settings.stride_padding == "same"
    assert network.settings.frozen_stages == 2
    assert not network.backbone.conv1.weight.requires_grad
    assert not network.backbone.layer1[0].conv1.weight.requires_grad
    assert network.backbone.layer2[0].conv1.weight.requires_grad
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert network.normalised(white).unique().tolist() == [1]  # (255 - 127.5) / 127.5


# --- on disk --------------------------------------------------------------------------------------


SPLIT = {"seed": 7, "val_fraction": 0.3}


def _write(folder: Path, name: str = "ssd") -> RivalNetwork:
    folder.mkdir(exist_ok=True)
    network = tiny_rival(name)
    write_rival(folder, Rival(network, ("a", "b", "c"), (4, 5, 9), 64, 96, SPLIT))
    return network


@pytest.mark.parametrize("name", NAMES)
def test_written_and_read_it_finds_the_same(name: str, tmp_path: Path) -> None:
    network = _write(tmp_path / "best", name).eval()
    read = load_rival(tmp_path)
    assert (read.classes, read.category_ids) == (("a", "b", "c"), (4, 5, 9))
    assert (read.image_size, read.max_size) == (64, 96)
    assert read.split == SPLIT
    assert isinstance(read.split["seed"], int)
    assert type(read.network) is RIVALS[name]
    assert read.network.settings == network.settings
    assert not read.network.training
    batch = batch_of()
    for ours, theirs in zip(read.network.detect(batch), network.detect(batch), strict=True):
        assert torch.equal(ours.boxes, theirs.boxes)
        assert torch.equal(ours.scores, theirs.scores)


def _set(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    *path, last = key.split(".")
    inner = values
    for part in path:
        inner = inner[part]
    inner[last] = value
    return values


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("format", "retinanet checkpoint", "is 'retinanet checkpoint' version 1; this package"),
        ("version", 99, "version 99; this package reads 'retinanet rival' up to version 1"),
        ("classes", ["a"], "1 classes, 3 category_ids and a network of 3 classes"),
        ("settings.rival", "yolo", "there is no rival 'yolo', only faster_rcnn, ssd"),
        ("settings.channels", 0, "settings.channels: Input should be greater than or equal to 1"),
        ("settings.backbone", "resnet19", "describes no network: there is no backbone"),
        ("settings.channels", 32, "do not fit the network"),
    ],
)
def test_a_wrong_text_is_refused(tmp_path: Path, key: str, value: Any, why: str) -> None:
    _write(tmp_path)
    file = tmp_path / "rival.json"
    file.write_text(json.dumps(_set(json.loads(file.read_text()), key, value)))
    with pytest.raises(WeightsError, match=why):
        load_rival(tmp_path)


def test_damaged_or_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds no rival\.json, and neither do its best"):
        load_rival(tmp_path)
    _write(tmp_path)
    weights = tmp_path / "rival.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(WeightsError, match=r"rival\.safetensors cannot be read"):
        load_rival(tmp_path)
    (tmp_path / "rival.json").write_text("{")
    with pytest.raises(WeightsError, match=r"rival\.json is not JSON"):
        load_rival(tmp_path)


# --- errors ---------------------------------------------------------------------------------------


def test_names_and_settings_that_do_not_go(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"rival 'fasterrcnn' is not one of .* faster_rcnn\?"):
        build_rival("fasterrcnn", rival_recipe(), 3)
    agnostic = rival_recipe("detect.class_agnostic_nms=true")
    with pytest.raises(ConfigError, match=r"set detect\.class_agnostic_nms=false"):
        build_rival("ssd", agnostic, 3)
    network = tiny_rival("faster_rcnn")
    backbone = network.backbone
    backbone.channels = (0, *backbone.channels[1:])
    monkeypatch.setattr(rivals, "build_backbone", lambda name, **_: backbone)
    with pytest.raises(ConfigError, match="faster_rcnn looks at C2, and backbone 'mobilenet_v2'"):
        RIVALS["faster_rcnn"](network.settings)


@pytest.mark.parametrize("name", NAMES)
def test_the_mode_must_be_right(name: str) -> None:
    network = tiny_rival(name)
    batch: Batch = batch_of()
    with pytest.raises(ValueError, match=r"call train\(\) first"):
        network.eval().losses(batch)
    with pytest.raises(ValueError, match=r"call eval\(\) first"):
        network.train().detect(batch)
