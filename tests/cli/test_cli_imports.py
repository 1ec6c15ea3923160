"""What a command must not import: it would take longer than the work itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retinanet import Checkpoint, save_checkpoint
from retinanet.kernels import native
from tiny_backbone import tiny_network

# torchvision imports torch's compiler (torch._dynamo, with sympy): 1,000 modules.
HEAVY = (
    "torchvision", "torch._dynamo", "torch._inductor", "torch.onnx", "sympy", "accelerate",
    "hotcoco", "matplotlib", "onnx", "onnxruntime", "openvino", "pandas", "scipy", "timm",
)  # fmt: skip


def imported(*commands: tuple[object, ...], first: str = "") -> list[list[str]]:
    """Run commands in a fresh process; return the heavy modules imported after each of them."""
    words = [[str(word) for word in command] for command in commands]
    code = (
        f"import sys; from retinanet.cli import main\n{first}\n"
        f"for words in {words!r}:\n"
        "    assert main(words) == 0\n"
        f"    print('heavy', *(name for name in {HEAVY!r} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return [line[1:] for line in lines if line[:1] == ["heavy"]]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "a.png"
    path.parent.mkdir()
    Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(path)
    path.with_suffix(".txt").write_text("0 .5 .5 .5 .5\n")
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    network = tiny_network(1, backbone="mobilenet_v2", norm="trained", prior=0.5)
    checkpoint = Checkpoint(network, ("0",), (0,), 64, 64, {"loss": {}})
    return save_checkpoint(tmp_path / "model", checkpoint)


# Without the library, NMS is torchvision's.
@pytest.mark.skipif(not native.available(), reason="the native library is not in use")
def test_detect_and_evaluate_import_nothing_heavy(tmp_path: Path, model: Path, image: Path) -> None:
    out = tmp_path / "found"
    options = ("--out", out, "--device", "cpu")
    detect, evaluate = imported(
        ("detect", model, image, "--draw-threshold", ".1", *options),
        ("evaluate", model, image.parent, "--split=all", *options),
    )
    assert detect == []
    assert (out / "detections.json").is_file()
    # The metrics are hotcoco's; matplotlib draws the plots.
    assert set(evaluate) <= {"hotcoco", "matplotlib"}
    assert (out / "metrics.json").is_file()


def test_data_check_imports_nothing_heavy_and_no_torch_before_its_first_line(image: Path) -> None:
    first = (
        "import retinanet.cli.data as command; note = command.note\n"
        "def look(*words, **options):\n"
        "    print('heavy', len(sys.modules), *({'torch', 'pandas'} & {*sys.modules}))\n"
        "    command.note = note; note(*words, **options)\n"
        "command.note = look"
    )
    (count, *heavy), after = imported(("data", "check", image.parent), first=first)
    assert heavy == after == []
    assert int(count) < 650  # under two seconds
