"""The network for inference is the network: folded, fused and packed, it says the same."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from retinanet.model import fused as fused_module
from retinanet.model import norms
from retinanet.model.backbone import OwnBackbone
from retinanet.model.fused import FusedConv2d, can_pack, fused_copy
from retinanet.model.networks import Backbone
from retinanet.model.retinanet import RetinaNet
from retinanet.training.processes import synchronize_batch_norm

PACK = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(not can_pack(torch.float32), reason="no oneDNN")),
]


def network(**settings: Any) -> RetinaNet:
    """A small network whose batch norm is not that of its start, and whose heads say something."""
    torch.manual_seed(0)
    given = {
        "backbone": "resnet10_half",
        "num_classes": 3,
        "channels": 16,
        "head_depth": 2,
    } | settings
    model = RetinaNet(**given).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    for head in (model.class_head, model.box_head):
        for parameter in head.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter)
    return model


def network_on(backbone: Backbone, channels: int) -> RetinaNet:
    """A small network on a backbone whose maps all have `channels`."""
    model = network()
    model.backbone = backbone.eval()
    for i, conv in enumerate(model.pyramid.lateral):
        model.pyramid.lateral[i] = nn.Conv2d(channels, conv.out_channels, 1)  # type: ignore[arg-type]
    model.pyramid.p6 = nn.Conv2d(channels, 16, 3, stride=2, padding=1)
    return model


def random_images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    given = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return given.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def assert_same(model: RetinaNet, fused: RetinaNet, images: Tensor, tolerance: float) -> None:
    for got, expected in zip(fused(images), model(images), strict=True):
        for one, other in zip(got, expected, strict=True):
            assert one.shape == other.shape
            error = (one.float() - other).norm() / other.norm()
            assert error <= tolerance, f"relative rms {error:.1e}"


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"backbone": "resnet50"},
        {"backbone": "resnet50", "stride_in_1x1": True, "p7_relu": False},
        {"backbone": "mobilenet_v2"},
        {"backbone": "resnet34", "p2": True, "p6_from": "p5"},
        {"stride_padding": "same"},
        {"norm": "group"},
        {"head_norm": "group"},
        {"box_bins": 8},
        {"head_depth": 0},
        {"backbone": "timm/resnet18"},
        {"backbone": "timm/efficientnet_b0", "norm": "trained"},
        {"backbone": "timm/mobilenetv3_small_050"},
        {"backbone": "timm/tf_efficientnet_lite0"},
        {"backbone": "timm/convnext_atto"},
    ],
    ids=lambda one: "-".join(map(str, one.values())) or "resnet10_half",
)
def test_says_what_the_network_says(settings: dict[str, Any], pack: bool) -> None:
    if str(settings.get("backbone")).startswith("timm/"):
        pytest.importorskip("timm")
    model = network(**settings)
    fused = fused_copy(model, torch.float32, pack=pack)
    for _ in range(3):  # oneDNN's weights are arranged from the second time on
        assert_same(model, fused, random_images(2, 3, 64, 96), 2e-5)


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize(
    ("backbone", "sums"),
    [("resnet18", 8), ("resnet50", 16), ("mobilenet_v2", 10), ("timm/tf_efficientnet_lite2", 14)],
)
def test_no_batch_norm_and_no_separate_relu_is_left(backbone: str, sums: int, pack: bool) -> None:
    if backbone.startswith("timm/"):
        pytest.importorskip("timm")
    fused = fused_copy(network(backbone=backbone), torch.float32, pack=pack)
    left = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Conv2d)
    assert not [module for module in fused.modules() if isinstance(module, left)]
    calls = [node for node in fused.backbone.graph.nodes if node.op == "call_module"]  # type: ignore[union-attr]
    assert len([node for node in calls if len(node.args) == 2]) == sums


@pytest.mark.parametrize("norm", ["frozen", "trained"])
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv3_small_050", "efficientnet_b0", "tf_efficientnet_lite0"]
)
def test_timm_backbone_batch_norm_and_activations_are_folded(name: str, norm: str) -> None:
    pytest.importorskip("timm")
    fused = fused_copy(network(backbone=f"timm/{name}", norm=norm), torch.float32)
    left = (nn.BatchNorm2d, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Conv2d, nn.Identity)
    assert not [module for module in fused.modules() if isinstance(module, left)]


class Foreign(nn.Module):
    """A network of a user with frozen batch norm of torchvision and of timm."""

    channels, strides = (8, 8, 8), (8, 16, 32)

    def __init__(self) -> None:
        super().__init__()
        from timm.layers import FrozenBatchNormAct2d

        self.one, self.norm = nn.Conv2d(3, 8, 3, 8, padding=1), FrozenBatchNorm2d(8)
        self.two, self.act = nn.Conv2d(8, 8, 1), FrozenBatchNormAct2d(8, act_layer=nn.SiLU)
        for norm in (self.norm, self.act):
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(0.5, 1.5)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.act(self.two(self.norm(self.one(images))))
        return x, nn.functional.avg_pool2d(x, 2), nn.functional.avg_pool2d(x, 4)


@pytest.mark.parametrize("pack", PACK)
def test_frozen_norms_of_torchvision_and_timm_are_folded(pack: bool) -> None:
    pytest.importorskip("timm")
    model = network_on(OwnBackbone(Foreign(), "foreign"), 8)
    fused = fused_copy(model, torch.float32, pack=pack)
    left = {type(module).__name__ for module in fused.backbone.modules()}
    assert not [name for name in left if "Norm" in name]
    for _ in range(3):
        assert_same(model, fused, random_images(1, 3, 64, 96), 2e-5)


def test_synchronized_batch_norm_is_folded() -> None:
    model = network(norm="sync")
    synchronize_batch_norm(model, torch.device("cuda"))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    fused = fused_copy(model, torch.float32)
    assert not [module for module in fused.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert_same(model, fused, random_images(2, 3, 64, 96), 2e-5)


def test_bfloat16_is_as_near_as_autocast() -> None:
    model = network(backbone="resnet50")
    images = random_images(1, 3, 64, 64)
    assert_same(model, fused_copy(model, torch.bfloat16), images, 0.05)
    outputs = fused_copy(model, torch.bfloat16)(images)
    assert {one.dtype for part in outputs for one in part} == {torch.bfloat16}


@pytest.mark.skipif(not can_pack(torch.float32), reason="no oneDNN")
def test_sizes_come_and_go() -> None:
    """Weights that were arranged for one size must not serve another, and are few."""
    model = network()
    fused = fused_copy(model, torch.float32)
    sizes = [(64, 64), (96, 64), (64, 96), (128, 64)]
    for _ in range(3):
        for size in sizes:
            for _ in range(2):
                assert_same(model, fused, random_images(1, 3, *size), 2e-5)
    for module in fused.backbone.modules():
        if isinstance(module, FusedConv2d):
            (packed,) = module.packed.values()
            assert len(packed) == fused_module.SHAPES_KEPT
    last = fused.class_head.last
    assert isinstance(last, FusedConv2d)
    (packed,) = last.packed.values()
    assert len(packed) == 5  # the levels of the last size
    assert any(weight is not None for weight in packed.values())
    # A layout for another number of threads takes several times as long.
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert_same(model, fused, random_images(1, 3, 64, 64), 2e-5)
    finally:
        torch.set_num_threads(threads)
    assert set(last.packed) == {threads, threads + 1}


def test_the_network_stays_as_it_is() -> None:
    model = network().train()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    fused = fused_copy(model, torch.bfloat16)
    fused(random_images(1, 3, 64, 64))
    assert model.training
    assert not fused.training
    assert any(one.requires_grad for one in model.parameters())
    for name, one in model.state_dict().items():
        torch.testing.assert_close(one, before[name], rtol=0, atol=0)
    assert model.pixel_mean.dtype == torch.float32


def test_a_backbone_that_cannot_be_traced_is_run_as_it_is() -> None:
    class Looking(Backbone):
        """Looks at a value, which no trace can follow."""

        channels = (4, 8, 8, 8)

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, images: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
            x = self.norm(self.conv(images))
            if float(x.sum()) > 1e9:
                x = x * 2
            pooled = [nn.functional.avg_pool2d(x, stride) for stride in (8, 16, 32)]
            return None, pooled[0], pooled[1], pooled[2]

    model = network_on(Looking(), 8)
    assert_same(model, fused_copy(model, torch.float32), random_images(1, 3, 64, 64), 2e-5)


class Sums(Backbone):
    """Two convolutions whose outputs meet in a sum that may not be made in place, or not at all."""

    channels = (4, 16, 16, 16)

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, images: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        x = self.one(images)
        y = self.norm(self.two(x))
        if self.kind == "its own input":
            y = torch.relu(y + x)
        elif self.kind == "a number":
            y = torch.relu(y + 1.0)
        else:
            y = torch.relu(y + self.one(images.mean(dim=(2, 3), keepdim=True)))
        three, four, five = (nn.functional.avg_pool2d(y, stride) for stride in (8, 16, 32))
        return None, three, four, five


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("kind", ["its own input", "a number", "a map of one cell"])
def test_sums_that_a_convolution_cannot_make_in_place(kind: str, pack: bool) -> None:
    model = network_on(Sums(kind), 16)
    fused = fused_copy(model, torch.float32, pack=pack)
    for _ in range(3):
        assert_same(model, fused, random_images(1, 3, 64, 64), 2e-5)


@pytest.mark.skipif(not can_pack(torch.float32), reason="no oneDNN")
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "hardswish"])
def test_packed_convolution_activation_after_sum_matches(activation: str, adds: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
    fused = FusedConv2d(conv, None, activation, adds)
    fused.shapes_kept = 1
    x, other = 9 * torch.randn(2, 1, 8, 16, 16)
    expected = conv(x) + other if adds else conv(x)
    if activation != "none":
        expected = getattr(nn.functional, activation)(expected)
    for _ in range(3):
        result = fused(x, other.clone()) if adds else fused(x)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


class DetrFrozenBatchNorm2d(nn.Module):
    """DETR's frozen batch norm, which has the name of torchvision's and no attribute eps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


DetrFrozenBatchNorm2d.__name__ = "FrozenBatchNorm2d"


class Own(nn.Module):
    """A network of the user: a stem of stride 8, a function of its map, and pooling."""

    channels, strides = (8, 8, 8), (8, 16, 32)

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.one = nn.Conv2d(3, 8, 3, 8, padding=1), nn.Conv2d(8, 8, 1)
        self.two, self.three = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 8, 1)
        self.relu = nn.ReLU(inplace=True)
        self.detr = DetrFrozenBatchNorm2d(8) if kind == "norm of DETR" else nn.Identity()
        folded = norms.FrozenBatchNorm2d(8)
        folded.running_mean.normal_()
        self.own_norm = norms.BackboneConv2d(nn.Conv2d(8, 8, 1), folded, same_padding=False)
        self.other_norm = folded
        self.reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(8, 8, 3, padding="same", dilation=2)
        self.uneven = nn.Conv2d(8, 8, (2, 3), padding="same")
        self.valid = nn.Conv2d(8, 8, 1, padding="valid")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.compute(self.stem(images))
        return x, nn.functional.avg_pool2d(x, 2), nn.functional.avg_pool2d(x, 4)

    def compute(self, x: Tensor) -> Tensor:
        if self.kind == "chunks read later":
            first, second = x.chunk(2, 1)
            return (x + self.one(nn.functional.relu(x))) * torch.cat([first, second], 1)
        if self.kind == "flattened map read later":
            flat = x.flatten(2)
            y = x + self.one(x.sigmoid())
            return y * flat.view_as(y)
        if self.kind == "input is a view":
            return x + self.three(x.chunk(2, 1)[1])
        if self.kind == "activation in place":
            y = self.relu(x)
            return (x + self.one(self.two(y))) * y
        if self.kind == "activation after the sum":
            y, z = self.one(torch.sigmoid(x)), self.two(x)
            return (y + x) * nn.functional.relu(z)
        if self.kind == "norm of DETR":
            return self.detr(self.one(x))
        return getattr(self, self.kind)(x)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize(
    "kind",
    [
        *("chunks read later", "flattened map read later", "input is a view"),
        *("activation in place", "activation after the sum", "norm of DETR"),
        *("own_norm", "reflect", "same", "uneven", "valid"),
    ],
)
def test_fused_copy_of_own_backbone_matches(kind: str, pack: bool) -> None:
    model = network_on(OwnBackbone(Own(kind), "own"), 8)
    fused = fused_copy(model, torch.float32, pack=pack)
    for _ in range(3):
        assert_same(model, fused, random_images(1, 3, 64, 96), 2e-5)


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize(
    "settings", [{"padding": 1, "padding_mode": "reflect"}, {"padding": "same"}]
)
def test_fused_copy_keeps_padding_outside_the_backbone(
    settings: dict[str, Any], pack: bool
) -> None:
    model = network()
    model.pyramid.lateral[0] = nn.Conv2d(64, 16, 3, **settings)
    fused = fused_copy(model, torch.float32, pack=pack)
    for _ in range(3):
        assert_same(model, fused, random_images(1, 3, 64, 96), 2e-5)


@pytest.mark.skipif(not can_pack(torch.float32), reason="no oneDNN")
def test_several_threads_run_one_network() -> None:
    model = network(head_depth=1)
    fused = fused_copy(model, torch.float32)
    sizes = [(32 * rows, 32 * columns) for rows in (1, 2, 3) for columns in (1, 2, 3)]
    with torch.inference_mode():
        expected = {size: model(random_images(1, 3, *size)).logits[0] for size in sizes}

    def run(place: int) -> None:
        for i in range(15):
            size = sizes[(place * 5 + i * (1 + place)) % len(sizes)]
            with torch.inference_mode():
                got = fused(random_images(1, 3, *size)).logits[0]
            torch.testing.assert_close(got, expected[size], rtol=1e-3, atol=1e-3)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(run, range(4)))
    finally:
        sys.setswitchinterval(interval)


def test_fused_network_copied_after_packing_gives_same_outputs() -> None:
    model = network()
    fused = fused_copy(model, torch.float32)
    images = random_images(1, 3, 64, 64)
    for _ in range(3):
        fused(images)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        for _ in range(3):
            assert_same(model, copied, images, 2e-5)


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish"])
def test_exported_activation_is_not_in_place(activation: str) -> None:
    """OpenVINO's converter takes three times as long for an operation in place."""
    module = FusedConv2d(nn.Conv2d(3, 4, 1), None, activation)
    program = torch.export.export(module, (torch.zeros(1, 3, 8, 8),))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert len(names) == 2
    assert not [name for name in names if name.endswith("_.default")]
