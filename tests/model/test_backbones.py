"""Backbones: which there are, what they give, what is frozen, and weights from files."""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from retinanet.errors import ConfigError, MissingExtraError, WeightsError
from retinanet.model import build_retinanet
from retinanet.model.backbone import BACKBONES, build_backbone
from retinanet.model.networks import Backbone
from retinanet.model.norms import BackboneConv2d, FrozenBatchNorm2d, adapt_timm, group_norm

# C2 to C5 of the published networks.
CHANNELS = {
    "resnet10_half": (32, 64, 128, 256),
    "resnet18": (64, 128, 256, 512),
    "resnet34": (64, 128, 256, 512),
    "resnet50": (256, 512, 1024, 2048),
    "resnet101": (256, 512, 1024, 2048),
    "resnet152": (256, 512, 1024, 2048),
    "resnext101_32x8d": (256, 512, 1024, 2048),
    "mobilenet_v2": (24, 32, 96, 1280),
}


@pytest.mark.parametrize("name", ["resnet10_half", "resnet18", "resnet50", "mobilenet_v2"])
@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_backbone_gives_c2_to_c5(name: str, padding: str) -> None:
    with torch.no_grad():
        maps = build_backbone(name, stride_padding=padding)(torch.zeros(1, 3, 32, 96))
    widths = zip(CHANNELS[name], (4, 8, 16, 32), strict=True)
    expected = [(1, width, 32 // s, 96 // s) for width, s in widths]
    assert [tuple(one.shape) for one in maps] == expected


@pytest.mark.parametrize("name", sorted(BACKBONES.keys() & set(torchvision.models.list_models())))
def test_modules_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        ours = build_backbone(name, norm="trained")
        theirs = torchvision.models.get_model(name, weights=None)
    assert ours.channels == CHANNELS[name]
    # The printed form has each setting of a module: stride, padding, groups, ...
    printed = {n: repr(m) for n, m in theirs.named_modules() if not list(m.children())}
    unused = ("fc", "avgpool", "classifier.0", "classifier.1")
    assert {n: repr(m) for n, m in ours.named_modules() if not list(m.children())} == {
        n: text for n, text in printed.items() if n not in unused
    }


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
@pytest.mark.parametrize("norm", ["trained", "group"])
def test_seed_gives_torchvisions_weights_and_next_number(name: str, norm: str) -> None:
    layer = group_norm if norm == "group" else nn.BatchNorm2d
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, weights=None, norm_layer=layer, num_classes=1)
    expected, next_number = theirs.state_dict(), torch.rand(1)
    torch.manual_seed(0)
    ours = build_backbone(name, norm=norm).state_dict()
    assert torch.equal(torch.rand(1), next_number)
    assert list(ours) == [k for k in expected if not k.startswith(("fc.", "classifier."))]
    assert all(torch.equal(value, expected[key]) for key, value in ours.items())


# Parts of torchvision's network up to the last that gives stride 4, 8, 16 and 32.
@pytest.mark.parametrize(
    ("name", "ends"),
    [("resnet18", (5, 6, 7, 8)), ("mobilenet_v2", (4, 7, 14, 19))],
)
def test_the_maps_are_torchvisions_last_of_each_stride(name: str, ends: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name, norm="trained").eval()
    theirs = torchvision.models.get_model(name, weights=None).eval()
    theirs.load_state_dict(backbone.state_dict(), strict=False)
    parts = theirs.features if name == "mobilenet_v2" else nn.Sequential(*theirs.children())
    images = torch.randn(1, 3, 64, 64)
    for one, end in zip(backbone(images), ends, strict=True):
        torch.testing.assert_close(one, parts[:end](images))


def test_same_padding_is_tensorflows_at_the_right_and_bottom() -> None:
    convolution = build_backbone("mobilenet_v2", stride_padding="same").features[0][0]
    image = torch.zeros(1, 3, 4, 4)
    image[0, 0, 3, 3] = 1.0  # the corner that TensorFlow's padding stands beside
    convolution.weight.data.zero_()
    convolution.weight.data[0, 0, 1, 1] = 1.0  # looks at (2 i + 1, 2 j + 1): no padding before
    expected = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(convolution(image)[0, 0], expected)
    # A 7x7 kernel pads 2 before and 3 after (5 in all).
    stem = build_backbone("resnet18", stride_padding="same").conv1
    img = torch.rand(1, 3, 32, 32)
    by_hand = F.conv2d(F.pad(img, (2, 3, 2, 3)), stem.weight, stride=2)
    torch.testing.assert_close(stem(img), by_hand)


@pytest.mark.parametrize("same_padding", [False, True])
def test_strided_depthwise_convolutions_are_trained_in_float32_under_bf16_autocast(
    same_padding: bool,
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
    module = BackboneConv2d(conv, None, same_padding=same_padding)
    images = torch.randn(2, 8, 16, 16).bfloat16()
    padded = F.pad(images.float(), (0, 1, 0, 1) if same_padding else (1, 1, 1, 1))
    expected = F.conv2d(padded, conv.weight, conv.bias, 2, 0, 1, 8)
    (gradient,) = torch.autograd.grad(expected.sum(), conv.weight)
    with torch.autocast("cpu", torch.bfloat16):
        result = module(images)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected.bfloat16())
    (found,) = torch.autograd.grad(result.sum(), conv.weight)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-5)
    # Nothing to train: bf16, with the padding in the kernel.
    kernel = F.pad(conv.weight, (1, 0, 1, 0)) if same_padding else conv.weight
    conv.weight.requires_grad = False
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.conv2d(images, kernel, conv.bias, 2, 1, 1, 8)
        torch.testing.assert_close(module(images), expected, rtol=0, atol=0)


@pytest.mark.parametrize("stages", range(6))
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_frozen_stages_are_the_stem_then_c2_to_c5(name: str, stages: int) -> None:
    backbone = build_backbone(name, norm="trained", frozen_stages=stages)
    parts = backbone.stage_parameters()
    assert sum(len(part) for part in parts) == len(list(backbone.parameters()))
    for i, part in enumerate(parts):
        assert all(parameter.requires_grad == (i >= stages) for parameter in part)


def _forward_changes(backbone: Backbone) -> set[str]:
    """Buffers that a forward pass in training mode changes."""
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    backbone.train()(torch.rand(2, 3, 64, 64))
    return {k for k, v in backbone.named_buffers() if not torch.equal(v, before[k])}


def test_frozen_batch_norm_stays_as_it_is_in_training() -> None:
    backbone = build_backbone("resnet18", norm="frozen")
    assert _forward_changes(backbone) == set()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 20
    assert not any(p.requires_grad for norm in norms for p in norm.parameters())
    assert backbone.conv1.weight.requires_grad


def test_trained_batch_norm_learns_but_not_in_frozen_stages() -> None:
    backbone = build_backbone("resnet18", norm="trained", frozen_stages=2)
    changed = _forward_changes(backbone)
    assert changed
    assert not any(name.startswith(("bn1", "layer1")) for name in changed)
    assert any(name.startswith("layer2") for name in changed)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_group_norm_takes_the_place_of_batch_norm(name: str) -> None:
    backbone = build_backbone(name, norm="group")
    kinds = [type(m) for m in backbone.modules()]
    assert nn.BatchNorm2d not in kinds
    assert nn.GroupNorm in kinds
    # Nothing is kept from batch to batch, and an image's maps do not depend on the others'.
    assert not dict(backbone.named_buffers())
    images = torch.rand(2, 3, 64, 64)
    together, alone = backbone(images)[3][:1], backbone(images[:1])[3]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (64, 32), (32, 16), (24, 4), (9, 1)])
def test_groups_divide_the_channels_and_hold_two(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups


def _state(name: str) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return torchvision.models.get_model(name, weights=None).state_dict()


def _build(weights: Path | str, **settings: Any) -> Any:
    plain: dict[str, Any] = {"backbone": "resnet18", "num_classes": 2, "channels": 16}
    return build_retinanet(**{**plain, **settings, "backbone_weights": weights})


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_weights_from_a_file_with_or_without_classifier(tmp_path: Path, name: str) -> None:
    state = _state(name)
    bare = {k: v for k, v in state.items() if not k.startswith(("fc.", "classifier."))}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(bare, tmp_path / "b.pth")
    wrapped = {f"module.{key}": value for key, value in state.items()}  # of DataParallel
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "c.pth")
    for file in ("a.safetensors", "b.pth", "c.pth"):
        model = _build(tmp_path / file, backbone=name)
        for key, value in model.backbone.state_dict().items():
            torch.testing.assert_close(value, state[key], msg=key)
        assert model.spec.frozen_stages == 2


def test_misfits_are_listed(tmp_path: Path) -> None:
    state = _state("resnet18")
    del state["layer4.1.conv2.weight"]
    state["layer9.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError) as caught:
        _build(tmp_path / "a.safetensors")
    assert str(caught.value) == (
        f"backbone weights {tmp_path / 'a.safetensors'} do not fit the network: "
        "1 missing (layer4.1.conv2.weight); 1 unknown (layer9.weight); "
        "1 of another shape (conv1.weight is 64x1x7x7, not 64x3x7x7)"
    )


def test_weights_of_another_backbone_are_named(tmp_path: Path) -> None:
    save_file(_state("mobilenet_v2"), tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"of mobilenet_v2: set model\.backbone=mobilenet_v2"):
        _build(tmp_path / "a.safetensors")


def test_weights_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no such file; give a file"):
        _build(tmp_path / "a.pth")


def test_the_file_says_how_it_wants_its_input_and_settings_go_first(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(
        _state("resnet18"),
        file,
        metadata={"input": "RGB, (x - 100) / 50.5", "padding": "TensorFlow SAME in stride 2"},
    )
    model = _build(file)
    assert model.spec.pixel_mean == (100.0, 100.0, 100.0)
    assert model.spec.pixel_std == (50.5, 50.5, 50.5)
    assert model.spec.stride_padding == "same"
    model = _build(file, pixel_mean=(1, 2, 3), pixel_std=(4, 5, 6), stride_padding="symmetric")
    assert model.spec.pixel_mean == (1.0, 2.0, 3.0)
    assert model.spec.pixel_std == (4.0, 5.0, 6.0)
    assert model.spec.stride_padding == "symmetric"
    save_file(_state("resnet18"), file, metadata={"input": "BGR, as Caffe"})
    with pytest.raises(WeightsError, match=r"input 'BGR, as Caffe'; give model.pixel_mean"):
        _build(file)


def test_folded_batch_norm_is_only_taken_frozen(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(_state("resnet18"), file, metadata={"batch_norm": "folded; keep frozen"})
    assert _build(file).spec.norm == "frozen"
    with pytest.raises(ConfigError, match="norm is \"frozen\" with them, got 'trained'"):
        _build(file, norm="trained")


def test_nothing_is_frozen_when_nothing_was_loaded() -> None:
    model = _build("none", norm="trained", frozen_stages=3)
    assert model.spec.frozen_stages == 0
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture
def no_internet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch's, and nowhere to fetch from."""

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    return tmp_path / "hub" / "checkpoints"


def test_default_weights_come_from_torchs_cache(no_internet: Path) -> None:
    state = _state("resnet18")
    no_internet.mkdir(parents=True)
    torch.save(state, no_internet / "resnet18-f37072fd.pth")
    model = _build("default")
    torch.testing.assert_close(model.backbone.conv1.weight, state["conv1.weight"])
    assert model.spec.pixel_mean == (123.675, 116.28, 103.53)


# By default torchvision's first weights of each: trained as the paper's were.
@pytest.mark.usefixtures("no_internet")
@pytest.mark.parametrize(
    ("weights", "file"),
    [
        ("default", "resnet18-f37072fd"),
        ("default", "resnet50-0676ba61"),
        ("default", "mobilenet_v2-b0353104"),
        ("IMAGENET1K_V2", "resnet50-11ad3fa6"),
        ("ResNet50_Weights.IMAGENET1K_V2", "resnet50-11ad3fa6"),
    ],
)
def test_without_internet_the_choices_are_named(weights: str, file: str) -> None:
    with pytest.raises(WeightsError) as caught:
        _build(weights, backbone=file.split("-")[0])
    message = str(caught.value)
    assert message.startswith(f"cannot fetch https://download.pytorch.org/models/{file}.pth: ")
    assert "--backbone-weights FILE" in message
    assert "none to train from scratch" in message
    assert "\n" not in message


def test_weights_of_a_network_that_is_no_backbone_are_not_fetched() -> None:
    with pytest.raises(
        ConfigError, match=r"weights of vgg16 'IMAGENET1K_V1' is not one of default"
    ):
        _build("IMAGENET1K_V1", backbone="vgg16")


def test_a_timm_backbone() -> None:
    pytest.importorskip("timm")
    backbone = build_backbone("timm/resnet10t", norm="trained", frozen_stages=2)
    maps = backbone(torch.rand(1, 3, 64, 64))
    assert [one.shape[-1] for one in maps] == [16, 8, 4, 2]
    assert tuple(one.shape[1] for one in maps) == backbone.channels
    frozen = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    assert {name.split(".")[1] for name in frozen} == {"conv1", "bn1", "layer1"}
    changed = _forward_changes(backbone)
    assert {name.split(".")[1] for name in changed} == {"layer2", "layer3", "layer4"}
    assert [len(part) > 0 for part in backbone.stage_parameters()] == [True] * 5
    assert _forward_changes(build_backbone("timm/resnet10t", norm="frozen")) == set()


def test_timm_backbone_that_collects_its_maps_by_hooks_can_be_copied() -> None:
    pytest.importorskip("timm")
    backbone = build_backbone("timm/xception41", norm="frozen").eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        maps, expected = deepcopy(backbone)(images), backbone(images)
    for x, y in zip(maps, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("resnet10t", 1.0),
        ("tf_efficientnet_lite0", 1.0),
        ("mobilenetv3_small_050", 1.0),
        ("mobilenetv4_conv_small", 1.0),
        ("resnetv2_50", 0.5),  # norms before the convolutions, some of several convolutions
    ],
)
def test_timm_backbone_with_frozen_norm_equals_timm(name: str, folded: float) -> None:
    """Maps and gradients of sizes whose strided maps have odd sides; names of weights stay."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    backbone = build_backbone(f"timm/{name}", norm="frozen")
    norms = [m for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
    for norm in norms:
        norm.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        norm.weight.data.uniform_(0.3, 0.6)
        norm.bias.data.normal_(0, 0.2)
    assert sum(norm.folded for norm in norms) >= folded * len(norms)
    assert not [m for m in backbone.modules() if type(m).__name__ == "Conv2dSame"]
    plain = timm.create_model(name, features_only=True)
    assert list(plain.state_dict()) == list(backbone.net.state_dict())  # type: ignore[union-attr]
    plain.load_state_dict(backbone.net.state_dict())  # type: ignore[union-attr]
    backbone, plain = deepcopy(backbone).double().train(), plain.double().eval()
    for height, width in ((32, 96), (160, 64)):
        images = torch.randn(1, 3, height, width, dtype=torch.float64)
        maps, expected = backbone(images)[1:], plain(images)[-3:]
        for x, y in zip(maps, expected, strict=True):
            torch.testing.assert_close(x, y)
        torch.stack([x.square().mean() for x in maps]).sum().backward()
        torch.stack([y.square().mean() for y in expected]).sum().backward()
    gradients = dict(plain.named_parameters())
    for key, parameter in backbone.net.named_parameters():  # type: ignore[union-attr]
        if parameter.requires_grad and gradients[key].grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[key].grad)


@pytest.mark.parametrize("constant", [False, True])
def test_same_padding_is_constant_only_where_sides_are_multiples_of_strides(
    constant: bool,
) -> None:
    layers = pytest.importorskip("timm.layers")
    net = nn.Sequential(layers.Conv2dSame(3, 4, 5, 2), layers.Conv2dSame(4, 4, 4, 4, dilation=2))
    adapted = deepcopy(net)
    adapt_timm(adapted, padded=layers.Conv2dSame, constant=constant, frozen=True)
    assert [type(module) is BackboneConv2d for module in adapted] == [constant] * 2
    for height, width in ((32, 64), (96, 160), (48, 24)):
        images = torch.randn(1, 3, height, width)
        torch.testing.assert_close(adapted(images), net(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientnet_lite0", "convnext_atto"])
def test_stages_of_timm_backbones_are_found(name: str) -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        backbone = build_backbone(f"timm/{name}", norm="trained")
    parts = backbone.stage_parameters()
    assert sum(len(part) for part in parts) == len(list(backbone.parameters()))
    assert all(parts[1:])
    assert parts[0] or "convnext" in name  # whose first map is C2: its stem goes with it


def test_group_norm_in_a_timm_backbone() -> None:
    pytest.importorskip("timm")
    backbone = build_backbone("timm/mobilenetv3_small_050", norm="group")
    assert not [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert [one.shape[-1] for one in backbone(torch.rand(1, 3, 64, 64))] == [16, 8, 4, 2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/no_such_net", "timm has no 'no_such_net'"),
        ("timm/hf-hub:someone/something", "timm has no"),
        ("timm/vit_tiny_patch16_224", "feature maps at strides .16.; .8, 32. are needed"),
    ],
)
def test_timm_backbones_that_do_not_serve(name: str, message: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=message):
        build_backbone(name)


def test_timm_weights_without_internet(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(
        WeightsError, match=r"cannot fetch weights of timm/resnet10t: no route.*FILE"
    ):
        _build("default", backbone="timm/resnet10t")


def test_timm_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'retinanet\[timm\]'"):
        build_backbone("timm/resnet10t")


@pytest.mark.parametrize(
    ("name", "stride_padding"),
    [("resnet18", "same"), ("resnet50", "symmetric"), ("mobilenet_v2", "same")],
)
def test_frozen_norm_in_the_convolutions_is_frozen_norm(name: str, stride_padding: str) -> None:
    """Maps and gradients are those of batch norm in eval mode; names of weights stay."""
    torch.manual_seed(0)
    folded = build_backbone(name, norm="frozen", stride_padding=stride_padding)
    plain = build_backbone(name, norm="trained", stride_padding=stride_padding)
    for module in folded.modules():
        if isinstance(module, FrozenBatchNorm2d):
            assert module.folded
            module.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            # Small, or the maps would grow from block to block.
            module.weight.data.uniform_(0.3, 0.6)
            module.bias.data.normal_(0, 0.2)
    assert list(folded.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(folded.state_dict())
    # A copy folds by itself: not by the norms of what it was copied from.
    folded = deepcopy(folded).double().train()
    plain = plain.double().eval()
    images = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    got, expected = folded(images)[1:], plain(images)[1:]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    sum(one.pow(2).mean() for one in got).backward()
    sum(one.pow(2).mean() for one in expected).backward()
    wanted = dict(plain.named_parameters())
    trained = [one for one in folded.named_parameters() if one[1].requires_grad]
    assert len(trained) >= 20
    for parameter_name, parameter in trained:
        torch.testing.assert_close(
            parameter.grad, wanted[parameter_name].grad, rtol=1e-7, atol=1e-9
        )


@pytest.mark.parametrize("backbone", ["resnet18", "timm/resnet18"])
def test_entry_that_torchvision_lacks_is_named(backbone: str) -> None:
    with pytest.raises(ConfigError, match=f"weights of {backbone} 'IMAGENET1K_V2' is not one of"):
        _build("IMAGENET1K_V2", backbone=backbone)


def test_default_weights_of_a_backbone_without_any_is_an_error() -> None:
    with pytest.raises(WeightsError, match=r"no ImageNet weights of resnet10_half; give a file"):
        _build("default", backbone="resnet10_half")


def test_stride_in_the_first_convolution_needs_bottlenecks() -> None:
    with pytest.raises(ConfigError, match="stride_in_1x1 is for ResNets with bottlenecks"):
        build_backbone("resnet18", stride_in_1x1=True)
