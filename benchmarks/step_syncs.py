"""Where a training step makes the host wait for the GPU: it should be nowhere.

    python benchmarks/step_syncs.py [--steps 12] [key=value ...]

Trains on synthetic images with `retinanet.training.trainer.train` and from the fifth step on
counts two things: the waits that torch warns of (`torch.cuda.set_sync_debug_mode`), with the line
that caused each, and the CUDA calls that wait, as the profiler sees them. One wait a step is meant:
`cudaEventSynchronize`, for the numbers of the step before, while the GPU is at work on this one.
The first steps don't count: kernels are compiled and anchors are made there.

Exit code 0: no other wait; 1: some; 2: no CUDA device.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

WARM_UP = 4
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def main() -> int:
    parser = argparse.ArgumentParser(description="Where a training step waits for the GPU.")
    parser.add_argument("--steps", type=int, default=12, help="steps that are looked at")
    parser.add_argument("settings", nargs="*", help="recipe settings, such as data.image_size=800")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device: nothing to wait for", file=sys.stderr)
        return 2

    from retinanet.config import load_recipe
    from retinanet.data.synthetic import synthetic_dataset
    from retinanet.training.events import Event
    from retinanet.training.trainer import train

    last = WARM_UP + arguments.steps
    recipe = load_recipe(
        "quick",
        [
            "model.backbone=resnet50",
            "model.backbone_weights=none",
            "model.norm=group",
            "model.frozen_stages=0",
            "train.batch_size=4",
            "train.validate_every=100000",
            "train.save_every=100000",
            *arguments.settings,
            f"train.steps={last + 3}",
        ],
    )
    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def watch(event: Event) -> None:
        """Told of a step while the next one is in flight."""
        if event.kind != "step":
            return
        if event.data["step"] == WARM_UP:
            profiler.start()
            torch.cuda.set_sync_debug_mode("warn")
        elif event.data["step"] == last:
            torch.cuda.set_sync_debug_mode("default")
            profiler.stop()

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        data = Path(folder) / "data"
        size = recipe.data.image_size
        synthetic_dataset(data, splits={"train": 32, "val": 4}, image_size=size, seed=0)
        train(recipe, data, Path(folder) / "run", device="cuda", on_event=watch)

    places = Counter(
        f"{one.filename}:{one.lineno}" for one in heard if "synchronizing" in str(one.message)
    )
    calls = Counter(
        {one.key: one.count for one in profiler.key_averages() if one.key.startswith(WAITS)}
    )
    copies = Counter(name for name in calls.elements() if "Async" in name)
    waits = calls - copies
    meant = waits.pop("cudaEventSynchronize", 0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.steps} steps")
    print(f"waits for the numbers of the step before (cudaEventSynchronize): {meant}")
    print(f"other calls that wait: {dict(waits) or 'none'}")
    print(f"places that torch warns of: {len(places) or 'none'}")
    for place, times in places.most_common():
        print(f"  {times} x {place}")
    return 1 if waits or places else 0


if __name__ == "__main__":
    raise SystemExit(main())
