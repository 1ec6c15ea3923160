"""Count the files of this package that one training step and one detection enter.

    python benchmarks/files_entered.py

Counts with `sys.setprofile` every Python function of `src/retinanet` called by one step of
`retinanet.training.trainer.train` (images loaded in the same process) and by
`Detector.detect` of one PNG, after one of each to fill caches. The goals are 14 and 18 files: a
reader should be able to follow either through few files. Exit code 1 where a goal is missed.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import retinanet as rn
from retinanet.data.synthetic import synthetic_dataset
from retinanet.training.events import Event
from retinanet.training.loop import Trainer
from retinanet.training.trainer import train

GOALS = {"training step": 14, "detection": 18}
PACKAGE = str(Path(rn.__file__).parent)
TINY = [
    "auto=false",
    "model.backbone=resnet18",
    "model.backbone_weights=none",
    "model.norm=group",
    "model.channels=16",
    "model.head_depth=1",
    "data.image_size=64",
    "data.max_size=64",
    "data.workers=0",
    "train.batch_size=2",
    "train.steps=3",
    "train.validate_every=1000",
    "train.save_every=1000",
]


@contextmanager
def count_files(calls: Counter[str], enabled: bool = True) -> Iterator[None]:
    """Count calls of this package's functions by file, within."""

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls[frame.f_code.co_filename.removeprefix(f"{PACKAGE}/")] += 1

    if enabled:
        sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


def training_step(data: Path, out: Path) -> Counter[str]:
    """Files entered by the second step of a training."""
    calls: Counter[str] = Counter()
    step = Trainer.step

    def counted(self: Trainer, batch: Any) -> None:
        with count_files(calls, enabled=self.progress.step == 1):
            step(self, batch)

    def ignore(event: Event) -> None: ...

    Trainer.step = counted  # type: ignore[method-assign]
    try:
        train(rn.load_recipe("quick", TINY), data, out, device="cpu", on_event=ignore)
    finally:
        Trainer.step = step  # type: ignore[method-assign]
    return calls


def detection(run: Path, image: Path) -> Counter[str]:
    """Files entered by the second detection of one PNG."""
    calls: Counter[str] = Counter()
    detector = rn.load(run, "cpu", backend="torch")
    detector.detect(image)
    with count_files(calls):
        detector.detect(image)
    return calls


def main() -> int:
    """Print both counts, and the files by number of calls."""
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "data", Path(folder) / "run"
        splits = synthetic_dataset(data, splits={"train": 4, "val": 2}, image_size=64)
        found = {"training step": training_step(data, run)}
        found["detection"] = detection(run, splits["val"].images[0].path)
    for name, calls in found.items():
        print(f"{name}: {len(calls)} files entered (goal {GOALS[name]}), {calls.total()} calls")
        for file, count in calls.most_common():
            print(f"  {count:5} {file}")
    return int(any(len(calls) > GOALS[name] for name, calls in found.items()))


if __name__ == "__main__":
    raise SystemExit(main())
