"""Count the device syncs of a training step; there should be none.

    python benchmarks/step_syncs.py [--steps 12] [key=value ...]

Trains on synthetic images with `retinanet.training.trainer.train` and counts from the fifth step
on the syncs that torch warns of (`torch.cuda.set_sync_debug_mode`), with their lines, and the CUDA
calls that block, from the profiler. `cudaEventSynchronize` once per step is intended: it reads the
losses of the previous step while the GPU computes this one. The first steps compile kernels and
make anchors.

Exit code 0: no other sync; 1: some; 2: no CUDA device.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from retinanet.config import load_recipe
from retinanet.data.synthetic import synthetic_dataset
from retinanet.training.events import Event
from retinanet.training.trainer import train

WARM_UP = 4
BLOCKING_CALLS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
)
SETTINGS = (
    "model.backbone=resnet50",
    "model.backbone_weights=none",
    "model.norm=group",
    "model.frozen_stages=0",
    "train.batch_size=4",
    "train.validate_every=100000",
    "train.save_every=100000",
)


def count_syncs(steps: int, settings: Sequence[str] = ()) -> dict[str, Any]:
    """Train on synthetic images and count the device syncs of `steps` steps.

    Returns:
        "intended": syncs for the losses of the previous step; "blocking": other blocking calls by
        name; "lines": lines that torch warns of, with their number.
    """
    last = WARM_UP + steps
    recipe = load_recipe("quick", [*SETTINGS, *settings, f"train.steps={last + 3}"])
    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def watch(event: Event) -> None:
        """Start and stop the profiler; a step's event comes while the next step runs."""
        if event.kind != "step":
            return
        if event.data["step"] == WARM_UP:
            profiler.start()
            torch.cuda.set_sync_debug_mode("warn")
        elif event.data["step"] == last:
            torch.cuda.set_sync_debug_mode("default")
            profiler.stop()

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = Path(folder) / "data"
        size = recipe.data.image_size
        synthetic_dataset(data, splits={"train": 32, "val": 4}, image_size=size, seed=0)
        train(recipe, data, Path(folder) / "run", device="cuda", on_event=watch)
    lines = Counter(
        f"{warning.filename}:{warning.lineno}"
        for warning in caught
        if "synchronizing" in str(warning.message)
    )
    blocking = {
        event.key: event.count
        for event in profiler.key_averages()
        if event.key.startswith(BLOCKING_CALLS) and "Async" not in event.key
    }
    intended = blocking.pop("cudaEventSynchronize", 0)
    return {"intended": intended, "blocking": blocking, "lines": dict(lines)}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="number of measured steps")
    parser.add_argument("settings", nargs="*", help="recipe settings, such as data.image_size=800")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device; run on a machine with a GPU", file=sys.stderr)
        return 2
    syncs = count_syncs(arguments.steps, arguments.settings)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.steps} steps")
    print(f"syncs for the losses of the previous step (cudaEventSynchronize): {syncs['intended']}")
    print(f"other blocking calls: {syncs['blocking'] or 'none'}")
    print(f"lines that torch warns of: {len(syncs['lines']) or 'none'}")
    for line, count in syncs["lines"].items():
        print(f"  {count} x {line}")
    return 1 if syncs["blocking"] or syncs["lines"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
