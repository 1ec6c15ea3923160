"""The rivals' networks, with torchvision's own detectors as the reference."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rivals_setup import batch_of, rival_recipe, tiny_rival
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from retinanet.errors import ConfigError, WeightsError
from retinanet.model.backbone import build_backbone
from retinanet.paper import rivals
from retinanet.paper.rivals import (
    RIVALS,
    RivalNetwork,
    as_torchvision,
    check_rival,
    load_rival,
    write_rival,
)
from retinanet.structures import BACKGROUND, IGNORED, Targets

# --- against torchvision's own --------------------------------------------------------------------


class _Maps(nn.Module):
    """Our backbone and levels as torchvision's detectors take them."""

    def __init__(self, network: RivalNetwork, widths: Any, first: int = 0) -> None:
        super().__init__()
        self.first = first
        self.backbone, self.levels = network.backbone, network.detector.backbone.levels
        self.out_channels = widths

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.backbone(images)[self.first :]
        return self.levels(OrderedDict((str(i), level) for i, level in enumerate(maps)))


def reference_of(network: RivalNetwork) -> nn.Module:
    """Build torchvision's detector for images of 64 px in 0..255, with the same weights."""
    spec = network.settings.spec
    pixels = {"image_mean": spec.pixel_mean, "image_std": spec.pixel_std}
    if network.settings.rival == "faster_rcnn":
        sizes = ((8,), (16,), (32,), (64,), (128,))
        reference = FasterRCNN(
            _Maps(network, 16), 4, min_size=64, max_size=64,
            rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5), **pixels,
        )  # fmt: skip
        reference.rpn.load_state_dict(network.detector.rpn.state_dict())
        reference.roi_heads.load_state_dict(network.detector.roi_heads.state_dict())
        return reference
    if network.settings.rival == "torchvision_retinanet":
        sizes = tuple((size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3)))
                      for size in (8, 16, 32, 64, 128))  # fmt: skip
        reference = RetinaNet(
            _Maps(network, 16, first=1), 4, min_size=64, max_size=64, score_thresh=0.001,
            anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
            detections_per_img=100, **pixels,
        )  # fmt: skip
        reference.head.load_state_dict(network.detector.head.state_dict())
        return reference
    # By hand, at 64 px with anchors from 8: a level with stride 64 has one cell. The smallest box
    # has 3/4 of 8 px, the next SSD512's .1 for .04, and from there it is even up to .9.
    generator = DefaultBoxGenerator(
        [[2], [2, 3], [2], [2]],
        scales=[6 / 64, 15 / 64, (15 / 64 + 0.9) / 2, 0.9, 1.06],
        steps=[8, 16, 32, 64],
    )
    reference = SSD(
        _Maps(network, [*network.backbone.channels[-3:], 16]), generator, (64, 64), 4,
        score_thresh=0.05, nms_thresh=0.5, detections_per_img=100, topk_candidates=1000, **pixels,
    )  # fmt: skip
    reference.head.load_state_dict(network.detector.head.state_dict())
    return reference


def low_threshold(name: str) -> list[str]:
    """RetinaNet's scores start at its prior, .01."""
    return ["detect.score_threshold=0.001"] if name == "torchvision_retinanet" else []


@pytest.mark.parametrize("name", RIVALS)
def test_losses_equal_torchvisions(name: str) -> None:
    network = tiny_rival(name).train()
    reference = reference_of(network).train()
    reference.transform.torch_choice = max  # draws no random number for the only scale
    batch = batch_of()
    torch.manual_seed(5)
    losses = network.losses(batch)
    torch.manual_seed(5)
    expected = reference(
        list(batch.images.float()),
        [
            {"boxes": torch.tensor([[4.0, 6, 24, 30], [30, 30, 60, 62]]),
             "labels": torch.tensor([1, 3])},
            {"boxes": torch.tensor([[10.0, 8, 40, 36]]), "labels": torch.tensor([2])},
        ],
    )  # fmt: skip
    box = sum(loss for key, loss in expected.items() if "box" in key)
    torch.testing.assert_close(losses.box, box, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.total, sum(expected.values()), rtol=1e-5, atol=0)
    assert losses.foreground.tolist() == [2, 1]


@pytest.mark.parametrize("name", RIVALS)
def test_detections_equal_torchvisions(name: str) -> None:
    network = tiny_rival(name, *low_threshold(name)).eval()
    reference = reference_of(network).eval()
    batch = batch_of()
    found = network.detect(batch)
    with torch.inference_mode():
        expected = reference(list(batch.images.float()))
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) > 10
        torch.testing.assert_close(ours.boxes, theirs["boxes"])
        torch.testing.assert_close(ours.scores, theirs["scores"])
        torch.testing.assert_close(ours.labels, theirs["labels"] - 1)


# --- inputs ---------------------------------------------------------------------------------------


def test_as_torchvision_by_hand() -> None:
    boxes = torch.arange(16.0).reshape(2, 2, 4)
    labels = torch.tensor([[0, IGNORED], [2, BACKGROUND]])
    first, second = as_torchvision(Targets(boxes, labels))
    assert first["labels"].tolist() == [1]  # 0 is the background
    assert first["boxes"].tolist() == [[0, 1, 2, 3]]
    assert second["labels"].tolist() == [3]
    assert second["boxes"].tolist() == [[8, 9, 10, 11]]


@pytest.mark.parametrize("name", RIVALS)
def test_images_without_objects_train(name: str) -> None:
    network = tiny_rival(name).train()
    losses = network.losses(batch_of(boxes=((), ()), labels=((), ())))
    losses.total.backward()
    assert losses.foreground.tolist() == [0, 0]
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", RIVALS)
def test_bfloat16_moves_no_anchor_and_gives_finite_gradients(name: str) -> None:
    network = tiny_rival(name, "model.backbone=mobilenet_v2").train()
    batch = batch_of(64, 320, ((), ((270.0, 8.0, 300.0, 36.0),)), ((), (1,)))
    torch.manual_seed(3)
    exact = network.losses(batch)
    torch.manual_seed(3)
    rough = network.losses(batch, "bf16")
    assert rough.total != exact.total
    assert rough.total.dtype == torch.float32
    torch.testing.assert_close(rough.total, exact.total, rtol=0.1, atol=0)
    rough.total.backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def outputs_of(network: RivalNetwork, part: nn.Module, height: int, width: int, size: int) -> Any:
    """Return what a part of the detector gives for an image of `size` px beside a larger one."""
    outputs: list[Any] = []
    hook = part.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    sizes = torch.tensor([[size, size], [height, width]])
    batch = dataclasses.replace(batch_of(height, width, ((), ()), ((), ())), sizes=sizes)
    network.eval().detect(batch, "bf16")
    hook.remove()
    return outputs[0]


def test_faster_rcnn_anchors_are_one_level_below_retinanets() -> None:
    network = tiny_rival("faster_rcnn", "model.p2=true", "anchors.sizes=[4, 8, 16, 32, 64, 128]")
    assert network.settings.sizes == (4, 8, 16, 32, 64)  # with P2 they start there
    network = tiny_rival("faster_rcnn")
    assert network.settings.sizes == (8, 16, 32, 64, 128)
    anchors, _ = outputs_of(network, network.detector.rpn.anchor_generator, 64, 288, 64)
    assert anchors.dtype == torch.float32
    # 16 x 72 cells at P2: the last has its corner at (284, 60), its square anchor 8 px.
    assert anchors[16 * 72 * 3 - 2].tolist() == [280, 56, 288, 64]


def test_faster_rcnn_strides_do_not_depend_on_the_first_image() -> None:
    """An image of 33 px in a batch of 64: 16 cells at P2 suggest a stride of 2."""
    network = tiny_rival("faster_rcnn").eval()
    network.detect(dataclasses.replace(batch_of(), sizes=torch.full((2, 2), 33)))
    assert network.detector.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


# --- SSD's default boxes --------------------------------------------------------------------------


def tiny_ssd(side: int, sizes: str = "none") -> RivalNetwork:
    return tiny_rival(
        "ssd", f"data.image_size={side}", f"data.max_size={side}", f"anchors.sizes={sizes}"
    )


def default_boxes(network: RivalNetwork, height: int, width: int) -> Tensor:
    side = network.settings.image_size
    boxes: Tensor = outputs_of(network, network.detector.anchor_generator, height, width, side)[0]
    return boxes


def test_ssd512_strides_and_scales() -> None:
    assert rivals.ssd_strides(512) == [8, 16, 32, 64, 128, 256, 512]
    assert [rivals.ssd_strides(side)[-1] for side in (32, 192, 600)] == [32, 256, 1024]
    published = [0.04, 0.1, 0.26, 0.42, 0.58, 0.74, 0.9, 1.06]
    assert rivals.ssd_scales(7, 32 / 600) == pytest.approx(published)


@pytest.mark.parametrize("sizes", ["[8, 16, 32, 64, 128]", "none"])
@pytest.mark.parametrize("side", [100, 128])
def test_ssd_default_boxes_are_centred_in_the_image_and_cover_it(side: int, sizes: str) -> None:
    network = tiny_ssd(side, sizes)
    padded = -(-side // 32) * 32
    boxes = default_boxes(network, padded, padded)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    # Up to float32 rounding.
    assert centres.min() > -0.01
    assert centres.max() < side + 0.01
    assert (centres.min() + centres.max()).item() == pytest.approx(side, abs=0.01)
    assert centres[-1].tolist() == pytest.approx([side / 2] * 2, abs=0.01)
    assert boxes[0, 2] - boxes[0, 0] == pytest.approx(0.75 * network.settings.sizes[0], abs=0.01)
    margin = 0.05 * side
    large = torch.tensor([[margin, margin, side - margin, side - margin]])
    assert box_iou(large, boxes).max() >= 0.5


def test_ssd_default_boxes_by_hand_do_not_depend_on_padding() -> None:
    network = tiny_ssd(192)
    small = default_boxes(network, 192, 192)
    wide = default_boxes(network, 192, 320)
    # The first of a cell is the square of the level's scale: at stride 8, 3/4 of 32 px.
    assert small[0].tolist() == pytest.approx([4 - 12, 4 - 12, 4 + 12, 4 + 12], abs=1e-4)
    # Stride 128: 2 x 2 cells with 4 boxes are 256 px wide, 32 more than the image on either side.
    level = small[-4 - 4 * 4 : -4]
    centres = (level[:, :2] + level[:, 2:]) / 2
    assert centres[::4].tolist() == [[32, 32], [160, 32], [32, 160], [160, 160]]
    row = 192 // 8 * 4
    torch.testing.assert_close(wide[:row], small[:row])
    torch.testing.assert_close(wide[320 // 8 * 4 :][:row], small[row : 2 * row])


# --- detections -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RIVALS)
def test_boxes_are_in_pixels_of_the_original(name: str) -> None:
    network = tiny_rival(name, *low_threshold(name)).eval()
    batch = batch_of()
    (plain, _) = network.detect(batch)
    enlarged = dataclasses.replace(batch, original_sizes=torch.tensor([[128, 192], [64, 64]]))
    (large, _) = network.detect(enlarged)
    torch.testing.assert_close(large.boxes, plain.boxes * torch.tensor([3.0, 2.0, 3.0, 2.0]))
    assert (plain.scores.diff() <= 0).all()
    padded = dataclasses.replace(batch, sizes=torch.tensor([[40, 50], [64, 64]]))
    boxes = network.detect(dataclasses.replace(padded, original_sizes=padded.sizes))[0].boxes
    assert boxes[:, 2].max() <= 50
    assert boxes[:, 3].max() <= 40


@pytest.mark.parametrize("name", RIVALS)
def test_detections_follow_the_recipe_and_labels_count_from_0(name: str) -> None:
    network = tiny_rival(
        name, "detect.detections_per_image=7", "detect.score_threshold=0.2",
        "detect.nms_threshold=0.3", "detect.topk_candidates=50",
    ).eval()  # fmt: skip
    detector = network.detector
    faster = name == "faster_rcnn"
    holder = detector.roi_heads if faster else detector
    assert (holder.score_thresh, holder.nms_thresh, holder.detections_per_img) == (0.2, 0.3, 7)
    if faster:
        biases = [detector.roi_heads.box_predictor.cls_score.bias]
    else:
        assert detector.topk_candidates == 50
        head = detector.head.classification_head
        ssd = name == "ssd"
        biases = [layer.bias for layer in head.module_list] if ssd else [head.cls_logits.bias]
    with torch.no_grad():
        for bias in biases:
            bias.view(-1, 4)[:, 2] += 50  # background and three classes: the second of these
    found = network.detect(batch_of())
    assert {label for image in found for label in image.labels.tolist()} == {1}
    assert [len(image) for image in found] == [7, 7]


@pytest.mark.parametrize("name", RIVALS)
def test_backbone_has_weights_frozen_stages_and_pixels_of_the_file(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(9)
    given = build_backbone("resnet18", norm="frozen").state_dict()
    file = tmp_path / "weights.safetensors"
    metadata = {"input": "RGB, (x - 127.5) / 127.5", "padding": "SAME"}
    save_file({key: x.clone() for key, x in given.items()}, str(file), metadata=metadata)
    network = tiny_rival(
        name, "model.backbone=resnet18", f"model.backbone_weights={file}", "model.norm=frozen",
        "model.frozen_stages=2",
    )  # fmt: skip
    for key, value in network.backbone.state_dict().items():
        assert torch.equal(value, given[key]), key
    assert network.settings.spec.stride_padding == "same"
    assert not network.backbone.conv1.weight.requires_grad
    assert not network.backbone.layer1[0].conv1.weight.requires_grad
    assert network.backbone.layer2[0].conv1.weight.requires_grad
    white = torch.full((3, 32, 32), 255.0)
    images, _ = network.detector.transform([white])
    assert images.tensors.unique().tolist() == [1]  # (255 - 127.5) / 127.5


# --- on disk --------------------------------------------------------------------------------------


def write(folder: Path, name: str = "ssd") -> RivalNetwork:
    folder.mkdir(exist_ok=True)
    network = tiny_rival(name)
    write_rival(folder, network)
    return network


@pytest.mark.parametrize("name", RIVALS)
def test_loaded_rival_detects_the_same(name: str, tmp_path: Path) -> None:
    network = write(tmp_path / "best", name).eval()
    loaded = load_rival(tmp_path)
    assert loaded.settings == network.settings
    assert not loaded.training
    batch = batch_of()
    for ours, theirs in zip(loaded.detect(batch), network.detect(batch), strict=True):
        assert torch.equal(ours.boxes, theirs.boxes)
        assert torch.equal(ours.scores, theirs.scores)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('"ssd"', '"yolo"', "Input should be 'faster_rcnn', 'ssd' or"),
        ('"tiny"', '"resnet19"', "no backbone"),
        ('"channels": 16', '"channels": 32', "do not fit the network"),
        ("{", "", "Invalid JSON"),
        ("", "", "is not a checkpoint of a rival"),
    ],
)
def test_damaged_or_missing_file_is_an_error(tmp_path: Path, old: str, new: str, why: str) -> None:
    with pytest.raises(WeightsError, match=r"no rival\.json in .* or its best/ and last/"):
        load_rival(tmp_path)
    write(tmp_path)
    file, weights = tmp_path / "rival.json", tmp_path / "rival.safetensors"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    if not old:
        weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(WeightsError, match=why):
        load_rival(tmp_path)


def test_unsupported_settings_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"rival 'fasterrcnn' is not one of .* faster_rcnn\?"):
        check_rival("fasterrcnn", rival_recipe())
    agnostic = rival_recipe("detect.class_agnostic_nms=true")
    with pytest.raises(ConfigError, match=r"set detect\.class_agnostic_nms=false"):
        check_rival("ssd", agnostic)
    without_c2 = SimpleNamespace(channels=(0, 32, 96, 1280))
    monkeypatch.setattr(rivals, "build_backbone", lambda name: without_c2)
    with pytest.raises(ConfigError, match="at stride 4, which backbone 'tiny'"):
        check_rival("faster_rcnn", rival_recipe())
