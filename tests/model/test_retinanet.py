"""The network: shapes, the paper's start, frozen parts, export."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from retinanet.anchors import feature_sizes, level_anchors
from retinanet.errors import ConfigError
from retinanet.model import RetinaNet, build_retinanet
from retinanet.structures import Outputs, flatten_levels


def _net(num_classes: int = 2, **settings: Any) -> RetinaNet:
    """A ResNet-18 from nothing, with the same seed each time."""
    torch.manual_seed(0)
    plain = {"backbone": "resnet18", "backbone_weights": "none", "norm": "group", "channels": 32}
    return build_retinanet(num_classes, **{**plain, **settings})


@pytest.fixture(scope="module")
def small() -> RetinaNet:
    """A network with narrow heads."""
    return _net(3, channels=64)


def _pixels(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def test_outputs_have_the_heads_layout_on_p3_to_p7(small: RetinaNet) -> None:
    outputs = small(_pixels(2, 3, 64, 96))
    # Strides 8, 16, 32, 64, 128 of 64 x 96, rounded up.
    cells = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    assert isinstance(outputs, Outputs)
    assert [tuple(x.shape) for x in outputs.logits] == [(2, 9 * 3, h, w) for h, w in cells]
    assert [tuple(x.shape) for x in outputs.deltas] == [(2, 9 * 4, h, w) for h, w in cells]
    assert small.strides == (8, 16, 32, 64, 128)


def test_outputs_fit_the_anchors_at_an_odd_number_of_cells(small: RetinaNet) -> None:
    outputs = small(_pixels(1, 3, 32 * 5, 32 * 7))
    sizes = feature_sizes(small.anchors.strides, 32 * 5, 32 * 7)
    assert tuple(tuple(x.shape[2:]) for x in outputs.logits) == sizes
    anchors = level_anchors(small.anchors, sizes)
    assert flatten_levels(outputs.logits, 3).shape == (1, sum(len(a) for a in anchors), 3)


def test_p2_adds_a_level_at_stride_4() -> None:
    model = _net(p2=True)
    outputs = model(_pixels(1, 3, 64, 64))
    assert [x.shape[-1] for x in outputs.logits] == [16, 8, 4, 2, 1, 1]
    assert model.strides[0] == 4
    assert model.anchors.sizes[0] == 16


def test_training_and_evaluation_give_the_same_outputs(small: RetinaNet) -> None:
    images = _pixels(1, 3, 64, 64)
    with torch.no_grad():
        trained, evaluated = small.train()(images), small.eval()(images)
    assert type(trained) is type(evaluated) is Outputs
    torch.testing.assert_close(trained, evaluated)


def test_every_anchor_starts_at_the_prior() -> None:
    # Sec. 3.3: p = .01 at every anchor; nearly, for the last weights are Gaussian, not zero.
    model = _net(4, channels=256)
    with torch.no_grad():
        outputs = model(_pixels(1, 3, 128, 128))
    scores = flatten_levels(outputs.logits, 4).sigmoid()
    assert scores.min() > 0.009
    assert scores.max() < 0.011
    assert flatten_levels(outputs.deltas, 4).abs().max() < 0.1


def test_the_prior_is_the_bias_of_the_class_head_alone() -> None:
    model = _net(channels=256, prior=0.2)
    # -log(.8 / .2) = -log 4
    torch.testing.assert_close(
        model.class_head.last.bias.detach(), torch.full((18,), -math.log(4.0))
    )
    convolutions = [
        (name, part)
        for name, part in model.named_modules()
        if isinstance(part, nn.Conv2d) and name.startswith(("class_head", "box_head"))
    ]
    assert len(convolutions) == 10
    for name, part in convolutions:
        assert part.weight.std().item() == pytest.approx(0.01, rel=0.05), name
        if name != "class_head.last":
            assert part.bias is not None
            assert not part.bias.any()


def test_p6_comes_from_c5_in_the_paper() -> None:
    widths = {}
    for source in ("c5", "p5"):
        model = _net(p6_from=source)
        widths[source] = model.pyramid.p6.in_channels
        maps = [
            torch.rand(1, width, 64 // s, 64 // s) for width, s in ((128, 2), (256, 4), (512, 8))
        ]
        levels = model.pyramid(maps)
        p6 = model.pyramid.p6(maps[-1] if source == "c5" else levels[2])
        torch.testing.assert_close(levels[3], p6)
        torch.testing.assert_close(levels[4], model.pyramid.p7(levels[3].relu()))
    assert widths == {"c5": 512, "p5": 32}


def test_heads_are_shared_over_levels_and_not_with_each_other(small: RetinaNet) -> None:
    names = {name.split(".")[0] for name, _ in small.named_parameters()}
    assert names == {"backbone", "pyramid", "class_head", "box_head"}
    # 4 convolutions and the last, weight and bias each, once for all levels.
    assert sum(name.startswith("class_head") for name, _ in small.named_parameters()) == 10


def test_group_norm_in_the_heads() -> None:
    model = _net(channels=64, head_norm="group", head_depth=2)
    norms = [part for part in model.class_head.modules() if isinstance(part, nn.GroupNorm)]
    assert [norm.num_groups for norm in norms] == [32, 32]
    assert all(block[0].bias is None for block in model.class_head.tower)


def test_normalisation_is_inside(small: RetinaNet) -> None:
    seen = []
    handle = small.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = _pixels(1, 3, 32, 32)
    small(images)
    small(images.float())
    handle.remove()
    # (red - 123.675) / 58.395, ImageNet's figures times 255.
    expected = (images[:, 0].double() - 0.485 * 255) / (0.229 * 255)
    torch.testing.assert_close(seen[0][:, 0].double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(seen[0], seen[1], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 64, 65), "multiples of 32, got 64 x 65"),
        ((1, 3, 40, 64), "multiples of 32, got 40 x 64"),
        ((1, 1, 64, 64), r"\(B, 3, H, W\), got \(1, 1, 64, 64\)"),
        ((3, 64, 64), r"\(B, 3, H, W\), got \(3, 64, 64\)"),
    ],
)
def test_images_of_another_shape_are_refused(
    small: RetinaNet, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        small(_pixels(*shape))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "resnet51"}, "no backbone 'resnet51'.*did you mean resnet"),
        ({"norm": "layer"}, "norm: Input should be 'frozen', 'trained', 'sync' or 'group'"),
        ({"norm": "frozen"}, "set norm to group"),
        ({"backbone_weights": "default"}, "set backbone_weights to none"),
        ({"p6_from": "c6"}, "p6_from: .*got 'c6'"),
        ({"head_norm": "batch"}, "head_norm: .*got 'batch'"),
        ({"prior": 1.0}, "prior: Input should be less than 1"),
        ({"chanels": 8}, "unknown setting 'chanels'; did you mean model.channels"),
        ({"num_classes": 0}, "num_classes is a whole number of at least 1, got 0"),
        ({"num_classes": True}, "num_classes is a whole number of at least 1, got True"),
        ({"channels": 0}, "channels: Input should be greater than or equal to 1"),
        ({"head_depth": -1}, "head_depth: Input should be greater than or equal to 0"),
        ({"sizes": (32.0, 64.0)}, "one size per level"),
        ({"pixel_std": (1.0, 0.0, 1.0)}, "pixel_std must be above 0"),
        ({"frozen_stages": 6}, "frozen_stages: Input should be less than or equal to 5"),
        ({"stride_padding": "left"}, "stride_padding: .*got 'left'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _net(**settings)


@pytest.mark.parametrize("norm", ["frozen", "trained"])
def test_export_with_dynamic_batch_and_size_equals_eager(norm: str) -> None:
    torch.manual_seed(0)
    model = RetinaNet(backbone="resnet10_half", num_classes=2, norm=norm, channels=16, head_depth=1)
    model.eval()
    # From 160 px on every level has two cells; torch.export takes one cell for a constant.
    batch = torch.export.Dim("batch", min=1, max=8)
    height, width = (32 * torch.export.Dim(name, min=5, max=40) for name in ("rows", "columns"))
    exported = torch.export.export(
        model, (_pixels(2, 3, 160, 192),), dynamic_shapes=({0: batch, 2: height, 3: width},)
    ).module()
    for shape in ((2, 3, 160, 192), (1, 3, 256, 160), (3, 3, 160, 352)):
        images = _pixels(*shape)
        with torch.no_grad():
            expected, got = model(images), exported(images)
        torch.testing.assert_close(tuple(got), tuple(expected), msg=str(shape))


def test_bfloat16_weights_take_uint8_images() -> None:
    model = RetinaNet(backbone="resnet18", num_classes=2, channels=16, head_depth=1).eval()
    logits = model.to(torch.bfloat16)(_pixels(1, 3, 32, 32)).logits
    assert logits[0].dtype is torch.bfloat16


@pytest.mark.data
def test_the_mobilenet_of_the_data_folder_says_how_it_wants_its_input(real_weights: Path) -> None:
    torch.manual_seed(0)
    model = build_retinanet(backbone="mobilenet_v2", num_classes=3, backbone_weights=real_weights)
    assert model.spec.pixel_mean == model.spec.pixel_std == (127.5, 127.5, 127.5)
    assert model.spec.stride_padding == "same"
    with torch.no_grad():
        scores = flatten_levels(model(_pixels(1, 3, 128, 128)).logits, 3).sigmoid()
    assert scores.min() > 0.008
    assert scores.max() < 0.012
