"""The script that shows on a GPU that a step does not wait for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step_syncs.py"


def _run(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(_SCRIPT), "--steps", "4", "data.image_size=256", "data.max_size=256"],
        env=dict(os.environ, **environment),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_without_a_gpu_it_says_so_in_a_line() -> None:
    done = _run(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: no CUDA device; run on a machine with a GPU\n"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_waits_for_nothing() -> None:
    done = _run()
    assert done.returncode == 0, done.stdout + done.stderr
