"""Check and time on a GPU what no other machine can: minutes, without network.

    python benchmarks/on_gpu.py [--out on_gpu.json] [--minutes 8]
    python benchmarks/record.py --from on_gpu.json

The first runs, as long as the time lasts: the tests marked ``gpu``; the training step's device
syncs (`step_syncs.py`); and the stages of `retinanet bench` against torchvision, eager, under fp16
autocast and compiled, for 1 and 16 images, with peak memory. The class loss has a copy of its
logits as the limit. A part that fails is reported in the file and the others still run. The second
stores the file's rows and writes them into docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # also when a test loads this file
from step_syncs import count_syncs

from retinanet.bench import bench, describe_machine

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("class-loss", "matching", "postprocess", "train-step", "inference", "detect")
"""The most important first: later ones are left out when the time is over."""

_TESTS_SECONDS = 150
_CASE_SECONDS = 5.0


def run_tests(tests: Sequence[str], seconds: float) -> str:
    """Run the tests marked ``gpu``; returns pytest's last line, such as ``7 passed in 20s``."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not finished in {seconds:.0f} s"
    lines = [line for line in done.stdout.splitlines() if re.search(r"\d+ \w+", line)]
    return lines[-1].strip("= ") if lines else f"pytest failed with exit code {done.returncode}"


def describe_syncs(device: torch.device) -> str:
    """Count the device syncs of training steps; returns a line."""
    if device.type != "cuda":
        return "not counted: no CUDA device"
    try:
        syncs = count_syncs(12)
    except Exception as error:  # the other parts still run
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())}"
    others = {**syncs["blocking"], **syncs["lines"]}
    found = ", ".join(f"{number} x {name}" for name, number in others.items())
    return f"{found or 'none'} in 12 steps, besides reading the losses of the step before"


def measure(
    device: torch.device,
    *,
    size: Any = "full",
    stages: Sequence[str] = STAGES,
    tests: Sequence[str] = ("tests",),
    minutes: float = 8.0,
) -> dict[str, Any]:
    """Run everything and return what the file contains."""
    end = time.monotonic() + 60 * minutes
    checks = {"tests marked gpu": run_tests(tests, min(_TESTS_SECONDS, 60 * minutes))}
    checks["device syncs of a training step"] = describe_syncs(device)
    rows, left_out = [], []
    for stage in stages:
        if time.monotonic() > end:
            left_out.append(stage)
            continue
        options: dict[str, Any] = {"size": size, "device": str(device), "seconds": _CASE_SECONDS}
        for row in bench([stage], **options, memory=device.type == "cuda"):
            rows.append(asdict(row))
            print(row, file=sys.stderr, flush=True)
            if time.monotonic() > end:
                left_out.append(f"the rest of {stage}")
                break
    if left_out:
        checks["left out, as the time was over"] = ", ".join(left_out)
    machine = asdict(describe_machine(device))
    return {"machine": machine, "checks": checks, "seconds": _CASE_SECONDS, "rows": rows}


def main() -> int:
    """Run the command line; the exit code is 1 if a row or the tests failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("on_gpu.json"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=("tiny", "small", "full"), default="full")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device; run on a machine with a GPU", file=sys.stderr)
        return 2
    options = {name: getattr(arguments, name) for name in ("size", "stages", "minutes")}
    result = measure(device, **options)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    for name, text in result["checks"].items():
        print(f"{name}: {text}")
    failed = [row for row in result["rows"] if row["error"]]
    print(f"{len(result['rows'])} rows, {len(failed)} failed, in {arguments.out}")
    return 1 if failed or "failed" in " ".join(result["checks"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
