"""What a command must not import: it would take longer than the work itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retinanet import Checkpoint, build_retinanet, save_checkpoint
from retinanet.kernels import native

# torchvision imports torch's compiler (torch._dynamo, with sympy): 1,000 modules.
HEAVY = (
    "torchvision", "torch._dynamo", "torch._inductor", "torch.onnx", "sympy", "accelerate",
    "hotcoco", "matplotlib", "onnx", "onnxruntime", "openvino", "pandas", "scipy", "timm",
)  # fmt: skip


def imported(*words: object) -> list[str]:
    """Run a command in a fresh process and return the heavy modules that it imported."""
    code = (
        "import sys; from retinanet.cli import main\n"
        f"assert main({[str(word) for word in words]!r}) == 0\n"
        f"print(*(name for name in {HEAVY!r} if name in sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "a.png"
    path.parent.mkdir()
    Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(path)
    path.with_suffix(".txt").write_text("0 .5 .5 .5 .5\n")
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    network = build_retinanet(
        1, backbone="mobilenet_v2", backbone_weights="none", norm="trained", channels=8,
        head_depth=1, prior=0.5,
    )  # fmt: skip
    checkpoint = Checkpoint(network.eval(), ("0",), (0,), 64, 64, {"loss": {}})
    return save_checkpoint(tmp_path / "model", checkpoint)


# Without the library, NMS is torchvision's.
@pytest.mark.skipif(not native.available(), reason="the native library is not in use")
def test_detect_and_evaluate_import_nothing_heavy(tmp_path: Path, model: Path, image: Path) -> None:
    out = tmp_path / "found"
    options = ("--out", out, "--device", "cpu")
    assert imported("detect", model, image, "--draw-threshold", ".1", *options) == []
    assert (out / "detections.json").is_file()
    # The metrics are hotcoco's; matplotlib draws the plots.
    evaluate = imported("evaluate", model, image.parent, "--split=all", *options)
    assert set(evaluate) <= {"hotcoco", "matplotlib"}
    assert (out / "metrics.json").is_file()


def test_data_check_imports_nothing_heavy(image: Path) -> None:
    assert imported("data", "check", image.parent) == []


def test_data_check_prints_its_first_line_before_importing_torch(image: Path) -> None:
    code = (
        "import os, sys; import retinanet.cli.data as command; from retinanet.cli import main\n"
        "command.note = lambda *_, **options: (\n"
        "    print(len(sys.modules), *({'torch', 'pandas'} & {*sys.modules}), flush=True),\n"
        "    os._exit(0),\n"
        ")\n"
        f"main(['data', 'check', {str(image.parent)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    count, *heavy = done.stdout.split()
    assert heavy == []
    assert int(count) < 650  # under two seconds
