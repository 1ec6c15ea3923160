"""Batch norm over processes: what can be tested without GPUs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from retinanet.errors import ConfigError
from retinanet.model.backbone import FrozenBatchNorm2d, build_backbone
from retinanet.model.retinanet import RetinaNet
from retinanet.training.processes import synchronize_batch_norm

GPU = torch.device("cuda")


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "timm/efficientnet_b0"])
def test_synchronized_batch_norm_has_the_state_and_outputs_of_plain(backbone: str) -> None:
    if backbone.startswith("timm/"):
        pytest.importorskip("timm")
    model = RetinaNet(2, backbone=backbone, norm="sync", channels=16, head_depth=1, frozen_stages=2)
    weights, images = list(model.parameters()), torch.rand(2, 3, 64, 64) * 255
    before, expected = model.state_dict(), model(images)
    synchronize_batch_norm(model, GPU)
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    assert list(model.state_dict()) == list(before)
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    # One process computes the statistics of plain batch norm; frozen stages keep theirs.
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert {norm.training for norm in norms} == {True, False}
    for level, other in zip(model.train()(images).logits, expected.logits, strict=True):
        torch.testing.assert_close(level, other)


def test_frozen_and_group_norm_are_not_synchronized() -> None:
    for norm, kind in (("frozen", FrozenBatchNorm2d), ("group", nn.GroupNorm)):
        backbone = build_backbone("resnet18", norm=norm)
        synchronize_batch_norm(backbone, GPU)
        assert len([module for module in backbone.modules() if type(module) is kind]) == 20


def test_several_processes_on_a_cpu_are_an_error() -> None:
    backbone = build_backbone("resnet18", norm="sync")
    with pytest.raises(ConfigError, match=r"GPUs only; .* set model.norm to group, or to trained"):
        synchronize_batch_norm(backbone, torch.device("cpu"))
    assert [module for module in backbone.modules() if type(module) is nn.BatchNorm2d]
