"""Backbone, head, losses and assigner of the user, named by their import paths."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.testing import assert_close
from torchvision.ops import box_iou, generalized_box_iou_loss

import retinanet as rn
from retinanet.config import LossSettings, build_model_spec
from retinanet.data.synthetic import synthetic_dataset
from retinanet.losses import detection_losses
from retinanet.losses.assignment import assign_anchors
from retinanet.model.backbone import build_backbone
from retinanet.model.checkpoint import transfer_weights
from retinanet.own import IMPORT_VARIABLE, classification_loss, import_own

SMALL: dict[str, Any] = {"channels": 16, "head_depth": 1}


class Net(nn.Module):
    """Feature maps at strides 4, 8, 16 and 32, in a dict."""

    strides = (4, 8, 16, 32)
    channels = (4, 8, 16, 32)

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 4, 5, 4, 2), *(nn.Conv2d(2 * n, 4 * n, 3, 2, 1) for n in (2, 4, 8))]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = {}
        for i, layer in enumerate(self.layers):
            x = maps[f"c{i + 2}"] = layer(x).relu()
        return maps


class Silent(nn.Module):
    """States neither strides nor channels."""


class Coarse(Net):
    """Lacks stride 8."""

    strides = (2, 4, 16, 32)


class Outer:
    class Inner(Net):
        """Found by its qualified name."""


def unnamed() -> nn.Module:
    raise AssertionError("must not be called")


def build_net() -> Net:
    return Net()


def build_head(channels: int, outputs: int) -> nn.Module:
    return OwnHead(channels, outputs)


def build_nothing() -> int:
    return 3


def test_own_backbone_is_the_networks_and_its_checkpoints(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = rn.build_retinanet(2, backbone=Net, p2=True, **SMALL)
    path = f"{__name__}:Net"
    assert model.spec.backbone == path
    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    outputs = model.eval()(image)
    pixels = (image.float() - model.pixel_mean) / model.pixel_std
    maps = list(model.backbone.net(pixels).values())
    assert_close(outputs.logits[0], model.class_head(model.pyramid(maps)[0]))
    checkpoint = rn.Checkpoint(model, ("a", "b"), (1, 2), 64, 96)
    folder = rn.save_checkpoint(tmp_path / "model", checkpoint)
    again = rn.load_checkpoint(folder)
    assert isinstance(again.model.backbone.net, Net)
    for level, expected in zip(again.model(image).logits, outputs.logits, strict=True):
        assert_close(level, expected)
    found = rn.Detector(again, device="cpu", score_threshold=0.009).detect(image[0])
    assert isinstance(found, rn.ImageDetections)
    losses = model.loss(image, [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": [1]}])
    losses.total.backward()
    assert model.backbone.net.layers[0].weight.grad.abs().sum() > 0


def test_class_in_a_class_is_found() -> None:
    model = rn.RetinaNet(1, backbone=Outer.Inner, frozen_stages=0, **SMALL)
    assert isinstance(model.backbone.net, Outer.Inner)


def test_functions_build_backbone_and_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rn.build_retinanet(1, backbone=build_net, head=build_head, **SMALL)
    assert isinstance(model.backbone.net, Net)
    assert isinstance(model.class_head, OwnHead)
    folder = rn.save_checkpoint(tmp_path / "m", rn.Checkpoint(model, ("a",), (1,), 64, 96))
    assert isinstance(rn.load_checkpoint(folder).model.box_head, OwnHead)
    # In another process the user has named nothing yet.
    monkeypatch.setattr("retinanet.own._named", set())
    with pytest.raises(rn.WeightsError, match=f"set {IMPORT_VARIABLE}={__name__}, or make it a"):
        rn.load_checkpoint(folder)
    monkeypatch.setenv(IMPORT_VARIABLE, __name__)
    rn.load_checkpoint(folder)


def test_checkpoint_of_a_module_that_is_not_imported_names_it(tmp_path: Path) -> None:
    model = rn.build_retinanet(1, backbone=Net, **SMALL)
    folder = rn.save_checkpoint(tmp_path / "m", rn.Checkpoint(model, ("a",), (1,), 64, 96))
    file = folder / "model.json"
    text = json.loads(file.read_text())
    for backbone, message in (
        ("some.nets:Net", "module some.nets is not imported; import it before"),
        (f"{__name__}:Missing", "has no class or function Missing of torch.nn.Module"),
        (f"{__name__}:Path", "has no class or function Path of torch.nn.Module"),
        (f"{__name__}:unnamed", "which a checkpoint does not call by itself: set RETINANET_IMP"),
        ("os:abort", "os:abort' is a function, which a checkpoint does not call by itself"),
    ):
        text["network"]["backbone"] = backbone
        file.write_text(json.dumps(text))
        with pytest.raises(rn.WeightsError, match=message):
            rn.load_checkpoint(folder)


def test_module_is_imported_where_the_user_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_nets.py").write_text(
        f"from {__name__} import Net\n\n\nclass Mine(Net):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = rn.build_retinanet(1, backbone="my_nets:Mine", **SMALL)
    assert type(model.backbone.net).__name__ == "Mine"
    sys.modules.pop("my_nets")
    text = json.loads(json.dumps(model.spec.model_dump()))
    with pytest.raises(rn.ConfigError, match=f"import it before, or set {IMPORT_VARIABLE}=my_nets"):
        rn.RetinaNet(1, build_model_spec(**text))
    monkeypatch.setenv(IMPORT_VARIABLE, "other,my_nets")
    rn.RetinaNet(1, build_model_spec(**text))
    for path, message in (
        ("no:Net", "imported: No module named 'no'"),
        ("os:Net", "has no class or"),
        (":Net", "imported: Empty module name"),
        (".no:Net", "imported: .* relative import"),
    ):
        with pytest.raises(rn.ConfigError, match=f"model.backbone '{path}'.*{message}"):
            import_own({"model.backbone": path})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Silent, "states strides None and channels None; give it attributes"),
        (Coarse, r"has feature maps at strides \[2, 4, 16, 32\]; \[8\] are needed"),
    ],
)
def test_backbone_without_the_feature_maps_is_an_error(kind: type, message: str) -> None:
    with pytest.raises(rn.ConfigError, match=message):
        rn.build_retinanet(1, backbone=kind, **SMALL)


class Wide(Net):
    """States channels that its maps do not have."""

    channels = (99, *Net.channels[1:])


class Sized(Net):
    """Takes an argument."""

    def __init__(self, width: int) -> None:
        super().__init__()


class Faulty(Net):
    """Its constructor has an error of its own."""

    def __init__(self) -> None:
        super().__init__()
        len(3)  # type: ignore[arg-type]


def test_faulty_backbones_are_named() -> None:
    wide = rn.build_retinanet(1, backbone=Wide, p2=True, **SMALL)
    with pytest.raises(
        ValueError, match=r"returned a map \(1, \d+, 16, 16\) for 99 channels and s"
    ):
        wide.detect(torch.zeros(1, 3, 64, 64))
    with pytest.raises(rn.ConfigError, match=r"Sized' is built as Sized\(\): .* 'width'"):
        rn.build_retinanet(1, backbone=Sized, **SMALL)
    with pytest.raises(rn.ConfigError, match=r"build_nothing' returned int: return a torch.nn.Mod"):
        rn.build_retinanet(1, backbone=build_nothing, **SMALL)
    with pytest.raises(TypeError, match="'int' has no len"):
        rn.build_retinanet(1, backbone=Faulty, **SMALL)


def test_settings_of_other_backbones_are_errors() -> None:
    with pytest.raises(rn.ConfigError, match="load them in its constructor"):
        rn.build_retinanet(1, backbone=Net, backbone_weights="w.safetensors", **SMALL)
    with pytest.raises(rn.ConfigError, match="set frozen_stages=0 and freeze its parameters"):
        build_backbone(f"{__name__}:Net", frozen_stages=2)

    class Local(Net):
        pass

    with pytest.raises(rn.ConfigError, match="define it at the top level of a module"):
        rn.build_retinanet(1, backbone=Local, **SMALL)
    with pytest.raises(rn.ConfigError, match="give the class Net, not an instance"):
        rn.build_retinanet(1, backbone=Net(), **SMALL)


# --- heads, losses, assigners ---------------------------------------------------------------------


class OwnHead(nn.Sequential):
    def __init__(self, channels: int, outputs: int) -> None:
        first = nn.Conv2d(channels, channels, 3, padding=1)
        super().__init__(first, nn.SiLU(), nn.Conv2d(channels, outputs, 1))


class Unbiased(nn.Sequential):
    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__(nn.Conv2d(channels, outputs, 1, bias=False))


def own_classification(logits: Tensor, targets: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(logits, targets, reduction="none")


class OwnBox(nn.Module):
    def forward(self, predicted: Tensor, boxes: Tensor) -> Tensor:
        return generalized_box_iou_loss(predicted, boxes)


def own_assigner(anchors: Tensor, targets: rn.Targets, outputs: rn.Outputs) -> Tensor:
    assert len(outputs.logits[0]) == len(targets.boxes)
    return rn.match_anchors(anchors, targets)


OWN: dict[str, Any] = {
    "classification": own_classification,
    "box": OwnBox,
    "assignment": own_assigner,
}
PATHS = {name: f"{__name__}:{part.__name__}" for name, part in OWN.items()}


def outputs_and_targets() -> tuple[rn.RetinaNet, rn.Outputs, list[Tensor], rn.Targets]:
    torch.manual_seed(0)
    model = rn.build_retinanet(2, backbone=Net, head=OwnHead, **SMALL)
    outputs = model(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    sizes = rn.feature_sizes(model.strides, 64, 64)
    anchors = rn.level_anchors(model.anchors, sizes)
    boxes = [torch.tensor([[4.0, 4, 40, 44], [30, 30, 60, 60]]), torch.tensor([[8.0, 8, 24, 24]])]
    return (
        model,
        outputs,
        anchors,
        rn.pad_targets(boxes, [torch.tensor([0, -2]), torch.tensor([1])]),
    )


def test_own_losses_and_assigner_equal_the_packages() -> None:
    model, outputs, anchors, targets = outputs_and_targets()
    gradients = []
    for settings in (
        LossSettings(classification="cross_entropy", box="giou"),
        LossSettings(**OWN),
    ):
        losses = detection_losses(outputs, anchors, targets, num_classes=2, settings=settings)
        weights = list(model.parameters())
        gradients.append(torch.autograd.grad(losses.total, weights, retain_graph=True))
    assert_close(gradients[1], gradients[0])
    assert settings.needs_outputs


def highest_iou(anchors: Tensor, targets: rn.Targets, outputs: rn.Outputs) -> Tensor:
    values, indices = (
        box_iou(anchors, targets.boxes.flatten(0, 1))
        .view(len(anchors), *targets.labels.shape)
        .max(dim=2)
    )
    return indices.where(values >= 0.4, -1).T


def test_own_assigner_cannot_train_on_ignored_regions_and_padding() -> None:
    _, outputs, anchors, targets = outputs_and_targets()
    all_anchors = torch.cat(anchors)
    assignment = assign_anchors(
        outputs,
        anchors,
        targets,
        num_classes=2,
        settings=LossSettings(assignment=highest_iou),
    )
    given = highest_iou(all_anchors, targets, outputs)
    assert (given[0] == 1).any()  # the ignored region
    assert_close(assignment.matches, torch.where(given == 1, -2, given))


def exponential(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.exp() - targets).abs()


def test_own_loss_does_not_see_ignored_anchors() -> None:
    logits = torch.tensor([[[0.5], [1000.0]]], requires_grad=True)  # whose exponential is infinite
    labels, weights = torch.tensor([[0, rn.IGNORED]]), torch.ones(1)
    loss = classification_loss(f"{__name__}:exponential", logits, labels, weights)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.exp(0.5) - 1)
    assert logits.grad is not None
    assert_close(logits.grad.flatten(), torch.tensor([math.exp(0.5), 0.0]))


def test_own_parts_train_and_are_in_the_checkpoint(tmp_path: Path) -> None:
    splits = synthetic_dataset(tmp_path / "data", splits={"train": 4, "val": 2}, image_size=64)
    settings = dict(OWN, backbone=Net, head=OwnHead, channels=16, steps=2, image_size=64, workers=0)
    run = rn.train(splits, out=tmp_path / "run", device="cpu", batch_size=2, **settings)
    text = json.loads((run.model / "model.json").read_text())
    assert {name: text["info"]["loss"][name] for name in OWN} == PATHS
    loaded = rn.load(run.model, device="cpu")
    assert isinstance(loaded.network.model.class_head, OwnHead)
    assert rn.evaluate(loaded, splits["val"]).loss == pytest.approx(run.metrics["loss"], rel=1e-3)
    rn.train(splits, out=tmp_path / "run", device="cpu", batch_size=2, **settings)  # is finished


def test_own_head_starts_at_the_prior_and_keeps_rows_of_classes() -> None:
    source = rn.build_retinanet(2, backbone=Net, head=OwnHead, **SMALL)
    assert source.class_head[2].bias.sigmoid().tolist() == pytest.approx([0.01] * 18)
    model = rn.build_retinanet(2, backbone=Net, head=OwnHead, **SMALL)
    checkpoint = rn.Checkpoint(source, ("a", "b"), (1, 2), 64, 96)
    report = transfer_weights(model, ("b", "c"), checkpoint)
    assert report.rows == ("b",)
    rows, source_rows = (m.class_head[2].weight.view(9, 2, -1) for m in (model, source))
    assert_close(rows[:, 0], source_rows[:, 1])
    assert not torch.equal(rows[:, 1], source_rows[:, 0])


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits - targets).mean()


def scores_as_matches(anchors: Tensor, targets: rn.Targets, outputs: rn.Outputs) -> Tensor:
    return torch.zeros(len(targets.boxes), len(anchors))


def too_large_matches(anchors: Tensor, targets: rn.Targets, outputs: rn.Outputs) -> Tensor:
    return scores_as_matches(anchors, targets, outputs).int() + 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"classification": mean_loss},
            r"mean_loss' returned torch.float32 \(\).*reduction='none'",
        ),
        (
            {"box": mean_loss},
            r"loss.box '.*:mean_loss' returned torch.float32 \(\).* for \(\d+, 4\)",
        ),
        ({"assignment": scores_as_matches}, r"returned torch.float32 \(2, 774\) of 0 to 0: return"),
        ({"assignment": too_large_matches}, r"\(2, 774\) of 2 to 2: .* the index 0..1 of each"),
        ({"box": "subprocess:call"}, "loss.box 'subprocess:call': subprocess has no function"),
        ({"box": "torch:os.popen"}, "loss.box 'torch:os.popen': torch has no function"),
        (
            {"box": lambda a, b: a},
            "has no function or class .*<lambda>.*define it at the top level",
        ),
        ({"box": "no.such:loss"}, "the module no.such is not imported"),
    ],
)
def test_own_losses_that_cannot_be_used_are_named(settings: dict[str, Any], message: str) -> None:
    _, outputs, anchors, targets = outputs_and_targets()
    with pytest.raises(rn.ConfigError, match=message):
        detection_losses(
            outputs, anchors, targets, num_classes=2, settings=LossSettings(**settings)
        )


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (Net, r"is built as Net\(channels, outputs\): too many positional"),
        (Unbiased, "Unbiased needs a last convolution of 18 channels with a bias"),
    ],
)
def test_heads_that_do_not_fit_are_named(head: type, message: str) -> None:
    with pytest.raises(rn.ConfigError, match=message):
        rn.build_retinanet(2, backbone=Net, head=head, **SMALL)
