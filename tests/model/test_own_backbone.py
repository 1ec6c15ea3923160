"""A backbone of the user: a class named by its import path."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import retinanet as rn
from retinanet.model.backbone import build_backbone, import_own

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


def not_a_class() -> nn.Module:
    raise AssertionError("must not be called")


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


def test_keyword_of_training_becomes_an_import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes: list[rn.Recipe] = []
    monkeypatch.setattr(
        "retinanet.api.train_by_recipe", lambda recipe, *_, **__: recipes.append(recipe)
    )
    rn.train("data", out="out", backbone=Net)
    assert recipes[0].model.backbone == f"{__name__}:Net"


def test_checkpoint_of_a_module_that_is_not_imported_names_it(tmp_path: Path) -> None:
    model = rn.build_retinanet(1, backbone=Net, **SMALL)
    folder = rn.save_checkpoint(tmp_path / "m", rn.Checkpoint(model, ("a",), (1,), 64, 96))
    file = folder / "model.json"
    text = json.loads(file.read_text())
    for backbone, message in (
        ("some.nets:Net", "module some.nets is not imported; import it before"),
        (f"{__name__}:Missing", "has no class Missing of torch.nn.Module"),
        (f"{__name__}:not_a_class", "has no class not_a_class of torch.nn.Module"),
        ("os:abort", "os has no class abort of torch.nn.Module"),
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
    import_own("resnet18")
    with pytest.raises(rn.ConfigError, match="cannot be imported: No module named 'no_nets'"):
        import_own("no_nets:Net")


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


def test_settings_of_other_backbones_are_errors() -> None:
    with pytest.raises(rn.ConfigError, match="load them in its constructor"):
        rn.build_retinanet(1, backbone=Net, backbone_weights="w.safetensors", **SMALL)
    with pytest.raises(rn.ConfigError, match="set frozen_stages=0 and freeze its parameters"):
        build_backbone(f"{__name__}:Net", frozen_stages=2)

    class Local(Net):
        pass

    with pytest.raises(rn.ConfigError, match="define it at the top level of a module"):
        rn.build_retinanet(1, backbone=Local, **SMALL)
