"""Backends: each gives the outputs of the network itself."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from retinanet.errors import ConfigError, MissingExtraError
from retinanet.inference import Detector, openvino_backend
from retinanet.inference.backends import Network, build_network, detect_batch, to_original
from retinanet.model.checkpoint import Checkpoint
from retinanet.model.retinanet import RetinaNet
from retinanet.structures import Outputs
from tiny_backbone import QUICK_COMPILE, tiny_network, two_level_network
from white_finder import WhiteFinder, black

CPU = torch.device("cpu")
needs_openvino = pytest.mark.skipif(
    not (importlib.util.find_spec("openvino") and importlib.util.find_spec("nncf")),
    reason="openvino and nncf are not installed",
)


SPREAD: dict[str, Any] = {"norm": "frozen", "spread": True}


@pytest.fixture(scope="module")
def model() -> RetinaNet:
    return tiny_network(20, **SPREAD)


def random_images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def max_error(got: Outputs, expected: Outputs) -> float:
    """Largest relative error of a level; the smallest two levels have too few values."""
    return max(
        float((ours.float() - theirs).norm() / theirs.norm())
        for got_part, expected_part in zip(got[:2], expected[:2], strict=True)
        for ours, theirs in zip(got_part[:3], expected_part[:3], strict=True)
    )


def check_network(
    network: Network, model: RetinaNet, precision: str, backend: str, *shapes: tuple[int, ...]
) -> float:
    """Return the largest error over images of these shapes."""
    assert (network.precision, network.backend) == (precision, backend)
    assert precision in network.description
    errors = []
    for shape in shapes:
        images = random_images(*shape)
        with torch.inference_mode():
            expected = model(images)
        got = network(images)
        errors.append(max_error(got, expected))
        assert [part.shape for part in got.logits] == [part.shape for part in expected.logits]
        # In channels_last memory post-processing reads them without a copy.
        assert got.logits[0].is_contiguous(memory_format=torch.channels_last)
    return max(errors)


SHAPES = ((1, 3, 96, 128), (2, 3, 64, 64), (1, 3, 32, 32))


def test_torch_network_outputs_equal_the_model(model: RetinaNet) -> None:
    network = build_network(model, CPU, precision="float32")
    assert check_network(network, model, "float32", "torch", *SHAPES) <= 1e-4
    network = build_network(model, CPU, precision="bf16", backend="torch")
    assert check_network(network, model, "bf16", "torch", *SHAPES) <= 0.1


@pytest.mark.slow
def test_compiled_network_outputs_equal_the_model() -> None:
    model = two_level_network(20, **SPREAD)
    network = build_network(model, CPU, precision="float32", backend="compile")
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert copied.description == network.description
    with torch._inductor.config.patch(QUICK_COMPILE):
        assert check_network(network, model, "float32", "compile", (1, 3, 32, 32)) <= 1e-4


@needs_openvino
@pytest.mark.filterwarnings("ignore:int8 outputs differ")
@pytest.mark.parametrize(
    ("model", "tolerances"),
    [
        (lambda: tiny_network(20, **SPREAD, backbone="resnet10_half"), {"float32": 1e-4}),
        (lambda: two_level_network(20, **SPREAD, box_bins=8), {"bf16": 0.1, "int8": 0.3}),
    ],
    ids=["deltas", "distributions"],
)
@pytest.mark.slow
def test_openvino_network_outputs_equal_the_model(
    model: Callable[[], RetinaNet], tolerances: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = cache(openvino_backend.convert)  # once for all precisions
    monkeypatch.setattr(openvino_backend, "convert", lambda model: convert(model).clone())
    given = model()
    for precision, tolerance in tolerances.items():
        calibration = [random_images(1, 3, 96, 128)] * 2 if precision == "int8" else None
        network = build_network(
            given, CPU, precision=precision, backend="openvino", calibration=calibration
        )
        assert check_network(network, given, precision, "openvino", *SHAPES) <= tolerance
        images = random_images(1, 3, 64, 64)
        expected = network(images)
        for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert copied.description == network.description
            torch.testing.assert_close(copied(images), expected)
        torch.testing.assert_close(network(images.float() + 0.2), expected)


def test_detector_copies_and_pickles(model: RetinaNet, tmp_path: Path) -> None:
    checkpoint = Checkpoint(model, tuple(map(str, range(20))), tuple(range(20)), 64, 64, {})
    detector = Detector(checkpoint, device="cpu", precision="float32")
    image = random_images(3, 64, 64)
    for _ in range(3):  # weights are packed for a size that came twice
        (expected,) = detector.detect([image], score_threshold=0.0)
    torch.save(detector, tmp_path / "detector.pt")
    copies = (
        copy.deepcopy(detector),
        pickle.loads(pickle.dumps(detector)),
        torch.load(tmp_path / "detector.pt", weights_only=False),
    )
    for other in copies:
        (found,) = other.detect([image], score_threshold=0.0)
        torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.scores, expected.scores)
        assert other.network.description == detector.network.description


@pytest.mark.parametrize(
    ("machine", "vnni", "expected"),
    [("x86_64", False, False), ("AMD64", True, True), ("arm64", False, True)],
)
def test_overflow_fix_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, machine: str, vnni: bool, expected: bool
) -> None:
    monkeypatch.setattr(openvino_backend.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni, raising=False)
    assert openvino_backend.has_vnni() is expected


def test_network_is_not_affected_by_later_training(model: RetinaNet) -> None:
    model = copy.deepcopy(model)
    network = build_network(model, CPU, precision="float32")
    images = random_images(1, 3, 64, 64)
    before = network(images)
    with torch.no_grad():
        model.class_head.last.bias.add_(1)
    torch.testing.assert_close(network(images).logits, before.logits)
    after = build_network(model, CPU, precision="float32")(images)
    torch.testing.assert_close(after.logits[0], before.logits[0] + 1)


def test_a_module_of_ones_own_runs_as_it_is() -> None:
    finder = WhiteFinder()
    network = build_network(finder, CPU)  # type: ignore[arg-type]
    network(random_images(1, 3, 32, 32))
    assert finder.batches == [(1, 3, 32, 32)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "openvin"}, r"backend 'openvin' is not .* did you mean openvino"),
        ({"precision": "int8", "backend": "torch"}, "int8 needs backend openvino, got torch"),
        ({"precision": "int4"}, "precision 'int4' is not one of"),
        ({"calibration": [torch.zeros(1, 3, 32, 32)]}, "calibrate on are for precision int8"),
        ({"precision": "int4", "backend": "openvino"}, "precision 'int4' is not one of"),
        pytest.param(
            {"precision": "int8"}, "int8 is calibrated on images .*--calibrate",
            marks=needs_openvino,
        ),
    ],
)  # fmt: skip
def test_build_network_invalid_settings_are_errors(
    model: RetinaNet, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_network(model, CPU, **settings)


def test_openvino_on_another_device_is_an_error(model: RetinaNet) -> None:
    with pytest.raises(ConfigError, match="openvino runs on the CPU, the device is meta"):
        build_network(model, torch.device("meta"), backend="openvino")


@pytest.mark.parametrize("missing", ["openvino", pytest.param("nncf", marks=needs_openvino)])
def test_missing_extra_is_named(
    model: RetinaNet, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    converted = SimpleNamespace(outputs=())
    monkeypatch.setattr(openvino_backend, "convert", lambda model: converted)
    with pytest.raises(
        MissingExtraError, match=rf"{missing} is not installed.*retinanet\[openvino"
    ):
        build_network(model, CPU, precision="int8", calibration=[random_images(1, 3, 32, 32)])


def test_compile_without_a_compiler_is_an_error(
    model: RetinaNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    class InvalidCxxCompiler(Exception):
        pass

    def broken(images: Tensor) -> Outputs:
        raise InvalidCxxCompiler("No working C++ compiler found in (g++,)\nmore")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    network = build_network(model, CPU, backend="compile")
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler.*g\+\+,\); --backend torch"):
        network(random_images(1, 3, 32, 32))


def test_to_original_scales_each_side_by_its_own_factor() -> None:
    # 100 x 301 resized to 33 x 100: y by 100 / 33, x by 301 / 100; the last box reaches outside.
    boxes = torch.tensor([[10.0, 3.3, 50.0, 33.0], [-2.0, -1.0, 104.0, 40.0]])
    expected = torch.tensor([[30.1, 10.0, 150.5, 100.0], [0.0, 0.0, 301.0, 100.0]])
    torch.testing.assert_close(to_original(boxes, (33, 100), (100, 301)), expected)
    assert to_original(torch.zeros(0, 4), (10, 10), (20, 20)).shape == (0, 4)


def test_detect_batch_maps_each_image_by_its_own_size() -> None:
    model = WhiteFinder()
    images = torch.stack(
        [
            torch.from_numpy(black(64, 96, (16, 8, 24, 16))),
            torch.from_numpy(black(64, 96, (0, 0, 8, 8), (40, 32, 48, 40))),
        ]
    ).permute(0, 3, 1, 2)
    # The second image ends at 36 of 64 rows and 44 of 96 columns: its second cell is cut there.
    sizes = torch.tensor([[64, 96], [36, 44]])
    first, second = detect_batch(
        build_network(model, CPU),
        images,
        sizes,
        torch.tensor([[128, 96], [72, 176]]),
        score_threshold=0.99,
    )
    torch.testing.assert_close(first.boxes, torch.tensor([[16.0, 16, 24, 32]]))
    torch.testing.assert_close(second.boxes, torch.tensor([[0.0, 0, 32, 16], [160, 64, 176, 72]]))
    assert first.labels.tolist() == [0]
    torch.testing.assert_close(first.scores, torch.sigmoid(torch.tensor([5.5])))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_detects_about_the_same(precision: str) -> None:
    model = tiny_network(3, backbone="mobilenet_v2")
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    sizes = torch.tensor([[64, 96], [60, 90]])
    options = {"score_threshold": 0.0, "nms_threshold": 1.0, "detections_per_image": 100}
    full, half = (
        detect_batch(build_network(model, CPU, precision=one), images, sizes, sizes, **options)
        for one in ("float32", precision)
    )
    for one, other in zip(full, half, strict=True):
        assert len(one) == len(other) == 100
        assert other.boxes.dtype == other.scores.dtype == torch.float32
        # Eight bits of mantissa: a score of .01 is right to a few parts in a hundred.
        torch.testing.assert_close(one.scores, other.scores, rtol=0.1, atol=0)
