"""torchvision's RetinaNets with the same random weights: the same logits, deltas and boxes."""

from __future__ import annotations

import hashlib
from email.message import Message
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from retinanet.errors import WeightsError
from retinanet.model import load_checkpoint
from retinanet.model.foreign_weights import V1, V2, convert
from retinanet.model.retinanet import RetinaNet
from retinanet.model.weight_files import TensorFile
from retinanet.structures import Outputs, flatten_level

HEIGHT, WIDTHS = 128, (160, 192)
BUILDERS = {V1: detection.retinanet_resnet50_fpn, V2: detection.retinanet_resnet50_fpn_v2}
WEIGHTS = {
    V1: detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1,
    V2: detection.RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1,
}


def converted(state: dict[str, Tensor]) -> RetinaNet:
    return convert(TensorFile(state, {}, {}), "the file").eval()


@pytest.fixture(scope="module", params=[V1, V2], ids=["v1", "v2"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def theirs(name: str) -> nn.Module:
    """torchvision's model, with weights that find something."""
    torch.manual_seed(0)
    # Resizing is the data's part: at this size torchvision's transform leaves images as they are.
    model = BUILDERS[name](
        weights=None, weights_backbone=None, min_size=HEIGHT, max_size=max(WIDTHS)
    )
    generator = torch.Generator().manual_seed(1)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1, generator=generator)
            part.running_var.uniform_(0.5, 1.5, generator=generator)
            part.weight.data.uniform_(0.3, 0.8, generator=generator)
            part.bias.data.normal_(0, 0.1, generator=generator)
    for part in model.head.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.data.normal_(0, (2 / 9 / part.in_channels) ** 0.5, generator=generator)
    last = model.head.classification_head.cls_logits
    last.weight.data.mul_(1.5)
    last.bias.data.uniform_(-7, -4, generator=generator)
    model.head.regression_head.bbox_reg.weight.data.mul_(0.3)
    return model.eval()


@pytest.fixture(scope="module")
def ours(theirs: nn.Module) -> RetinaNet:
    return converted(theirs.state_dict())


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(3, HEIGHT, width, generator=generator) for width in WIDTHS]


@pytest.fixture(scope="module")
def batch(images: list[Tensor], ours: RetinaNet) -> Tensor:
    """The images as one batch of 0..255, padded with the mean: 0 after normalisation, as there."""
    padded = ours.pixel_mean.expand(2, 3, HEIGHT, max(WIDTHS)).clone()
    for row, image in zip(padded, images, strict=True):
        row[:, :, : image.shape[2]] = image * 255
    return padded


@pytest.fixture(scope="module")
def outputs(ours: RetinaNet, batch: Tensor) -> Outputs:
    with torch.no_grad():
        return ours(batch)


def test_logits_and_deltas(theirs: nn.Module, images: list[Tensor], outputs: Outputs) -> None:
    seen: dict[str, Tensor] = {}
    handle = theirs.head.register_forward_hook(lambda *call: seen.update(call[2]))
    with torch.no_grad():
        theirs(images)
    handle.remove()
    logits = torch.cat([flatten_level(level, 91) for level in outputs.logits], 1)
    deltas = torch.cat([flatten_level(level, 4) for level in outputs.deltas], 1)
    assert logits.std() > 0.5  # weights that say something
    torch.testing.assert_close(logits, seen["cls_logits"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(deltas, seen["bbox_regression"], atol=1e-4, rtol=1e-4)


def test_a_state_dict_with_the_old_names_loads_too(name: str, theirs: nn.Module) -> None:
    state = theirs.state_dict()
    old = {}
    for key, value in state.items():
        parts = key.split(".")
        if "_blocks" in key and "extra" not in key:
            parts.remove("0") if parts[3] != "0" else parts.pop(4)
        if ".conv." in key and name == V1:
            parts[3:5] = [str(2 * int(parts[3]))]
        old[".".join(parts)] = value
    assert set(old) != set(state)
    model, again = converted(old).state_dict(), converted(state).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.items())


def test_a_foreign_state_dict_is_refused(theirs: nn.Module) -> None:
    state = dict(theirs.state_dict())
    state.pop("backbone.fpn.extra_blocks.p7.weight")
    state["head.mask.weight"] = torch.zeros(1)
    with pytest.raises(
        WeightsError, match=r"1 missing \(pyramid.p7.weight\); 1 unknown \(head.mask"
    ):
        converted(state)


def test_the_zoo_gives_the_80_classes_of_coco(
    name: str, theirs: nn.Module, batch: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the download would leave in torch's cache; v1's published file lacks the batch counts.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / Path(WEIGHTS[name].url).name
    file.parent.mkdir(parents=True)
    state = dict(theirs.state_dict())
    if name == V1:
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    for key in [key for key in state if key.endswith("running_var")]:
        # The same function, in which an epsilon of 1e-5 would be felt.
        weight = key.replace("running_var", "weight")
        state |= {key: state[key] * 1e-4, weight: state[weight] * 1e-2}
    torch.save(state, file)

    checkpoint = load_checkpoint(name)

    assert len(checkpoint.classes) == len(set(checkpoint.classes)) == 80
    assert (checkpoint.classes[0], checkpoint.category_ids[0]) == ("person", 1)
    assert (checkpoint.classes[-1], checkpoint.category_ids[-1]) == ("toothbrush", 90)
    assert not {"N/A", "__background__"} & set(checkpoint.classes)
    assert (checkpoint.image_size, checkpoint.max_size) == (800, 1333)
    assert checkpoint.info["detect"]["score_threshold"] == 0.05
    assert not checkpoint.model.training

    # torchvision's own way of loading its file, which takes the epsilon out of v1's batch norm.
    published = BUILDERS[name](weights=WEIGHTS[name], min_size=HEIGHT, max_size=HEIGHT).eval()
    frozen = [m for m in published.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert (len(frozen) > 0) == (name == V1)
    assert all(m.eps == 0 for m in frozen)
    seen: dict[str, Any] = {}
    published.head.register_forward_hook(lambda *call: seen.update(call[2]))
    image = batch[0, :, :, :HEIGHT]
    with torch.no_grad():
        published([image / 255])
        logits = checkpoint.model(image[None]).logits
    ours = torch.cat([flatten_level(level, 80) for level in logits], 1)
    living = seen["cls_logits"][..., list(checkpoint.category_ids)]
    torch.testing.assert_close(ours, living, atol=1e-4, rtol=1e-4)


def test_own_file_of_torchvisions_is_the_same_network(
    name: str,
    theirs: nn.Module,
    batch: Tensor,
    outputs: Outputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "mine.pth"
    torch.save({"model": theirs.state_dict(), "epoch": 25}, file)
    checkpoint = load_checkpoint(file)
    assert checkpoint.classes[0] == "person"
    assert checkpoint.model.spec.norm_eps == 1e-5
    with torch.no_grad():
        logits = checkpoint.model(batch).logits[0]
    kept = flatten_level(outputs.logits[0], 91)[..., list(checkpoint.category_ids)]
    torch.testing.assert_close(flatten_level(logits, 80), kept, atol=1e-4, rtol=1e-4)

    # The published file of v1 has no epsilon; it is known by its hash, whatever its name.
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    entry = SimpleNamespace(url=f"https://host/retinanet-{digest}.pth", meta=WEIGHTS[name].meta)
    entries = {**WEIGHTS, name: entry}
    monkeypatch.setattr("retinanet.model.foreign_weights.weights_entry", entries.__getitem__)
    assert load_checkpoint(file).model.spec.norm_eps == (0 if name == V1 else 1e-5)


def test_without_internet_one_line_says_what_to_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(WeightsError) as caught:
        load_checkpoint(name)
    message = str(caught.value)
    assert WEIGHTS[name].url in message
    assert "no route to host" in message
    assert f"put the file into {tmp_path / 'hub' / 'checkpoints'}" in message
    assert "\n" not in message


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(WeightsError, match="choose torchvision/retinanet_resnet50_fpn or"):
        load_checkpoint("torchvision/fasterrcnn_resnet50_fpn")


@pytest.mark.parametrize(
    ("short", "published"),
    [
        ("coco", V2),
        ("COCO_V1", V2),
        ("RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1", V2),
        ("RetinaNet_ResNet50_FPN_Weights.COCO_V1", V1),
    ],
)
def test_short_name_is_the_published_file(
    short: str, published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(url: Any, *_: object, **__: object) -> None:
        raise URLError(f"asked for {getattr(url, 'full_url', url)}")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(WeightsError, match=f"asked for {WEIGHTS[published].url}"):
        load_checkpoint(short)


def test_download_with_another_hash_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Response(BytesIO):
        headers: ClassVar[dict[str, str]] = {}

        def info(self) -> Any:
            return Message()

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", lambda *_, **__: Response(b"truncated"))
    with pytest.raises(WeightsError, match=r"5905b1c5.*invalid hash value") as caught:
        load_checkpoint("coco")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())


def test_short_name_of_a_local_checkpoint_is_ambiguous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco" / "best").mkdir(parents=True)
    (tmp_path / "coco" / "best" / "model.json").write_text("{}")
    with pytest.raises(WeightsError, match=f"coco names both .*: give {tmp_path}/coco or {V2}"):
        load_checkpoint("coco")
