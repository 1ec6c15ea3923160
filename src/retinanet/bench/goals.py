"""What each stage is meant to reach, and whether a row does."""

from __future__ import annotations

from collections.abc import Mapping

from retinanet.bench.contest import Row

GOALS: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("class-loss", "float32, 2 images"): {"speedup": 40, "memory_of_input": 1.1},
    ("class-loss", "float32, 8 images"): {"speedup": 40, "memory_of_input": 1.1},
    ("class-loss", "heads' layout, 2 images"): {"speedup": 40, "memory_of_input": 1.1},
    ("class-loss", "overwriting, 2 images"): {"speedup": 40, "memory_of_input": 0.1},
    ("class-loss", "bf16, 2 images"): {"speedup": 80, "memory_of_input": 1.1},
    ("class-loss", "1 class, 2 images"): {"speedup": 1},
    ("class-loss", "2,000 objects, 2 images"): {"speedup": 1},
    ("matching", "10 objects, 8 images"): {"speedup": 3, "memory": 100e6},
    ("matching", "100 objects, 8 images"): {"speedup": 3, "memory": 100e6},
    ("matching", "1,000 objects, 8 images"): {"speedup": 3, "memory": 100e6},
    ("postprocess", "8 images"): {"speedup": 6},
    ("postprocess", "1 image"): {"speedup": 1},
    ("postprocess", "1 image, 1 class"): {"speedup": 1},
    ("postprocess", "8 images, 1 class"): {"speedup": 1},
    ("postprocess", "many candidates"): {"speedup": 1},
    ("postprocess", "no candidates"): {"speedup": 1},
    ("inference", "float32"): {"speedup": 1.6, "share": 0.8},
    ("inference", "auto"): {"speedup": 3.3, "share": 0.8},
    ("inference", "int8"): {"speedup": 7},
    ("train-step", "ResNet-50 float32"): {"speedup": 1, "memory_of_rival": 0.75},
    ("train-step", "ResNet-50 bf16"): {"speedup": 2, "memory_of_rival": 0.75},
    ("train-step", "ResNet-18 float32"): {"speedup": 1, "memory_of_rival": 0.75},
    ("train-step", "ResNet-18 bf16"): {"speedup": 1.5, "memory_of_rival": 0.75},
    ("data", "one core"): {"speedup": 8},
    ("evaluation", "the twelve numbers"): {"speedup": 50, "memory": 1e9},
    ("evaluation", "with error analysis"): {"speedup": 50, "memory": 1e9},
    ("startup", "retinanet --help"): {"seconds": 0.3},
    ("startup", "import retinanet"): {"seconds": 0.3},
}
"""By stage and way, on 2 or 4 cores of a CPU, at full size and against torchvision (pycocotools).

``speedup`` and ``share`` are at least so much, all others at most: ``seconds`` of ours, ``memory``
bytes of ours, and the same as a share of the rival's (``memory_of_rival``) or of the logits
(``memory_of_input``).
"""

GPU_GOALS: Mapping[tuple[str, str], Mapping[str, float]] = {
    # Within 1.3 times of a copy of the logits.
    ("class-loss", "float32, 2 images"): {"speedup": 1, "share": 1 / 1.3},
    ("class-loss", "float32, 8 images"): {"speedup": 1, "share": 1 / 1.3},
    ("class-loss", "heads' layout, 2 images"): {"speedup": 1, "share": 1 / 1.3},
    ("class-loss", "bf16, 2 images"): {"speedup": 1, "share": 1 / 1.3},
    ("inference", "auto"): {"speedup": 4},
    ("inference", "auto, 16 images"): {"speedup": 4},
    ("train-step", "ResNet-50 bf16"): {"speedup": 1.5},
}
"""The same on a GPU."""

PURE_TORCH_CLASS_LOSS = 10.0
"""The speedup meant for the class loss where no native kernel is at hand."""

FP16_SPEEDUP = 2.0
"""The speedup meant on a GPU against torchvision under fp16 autocast."""

_AT_LEAST = ("speedup", "share")


def goals_of(
    stage: str,
    way: str,
    *,
    on_gpu: bool = False,
    rival: str = "torchvision",
    native: bool = True,
    bf16: bool = True,
) -> dict[str, float]:
    """What a row is meant to reach; empty: nothing was set.

    Args:
        stage, way: of the row.
        on_gpu: whether it ran on one.
        rival: whom it was compared with: the speedups are meant against torchvision's plain way.
        native: whether the class loss ran a kernel of its own rather than torch's operations.
        bf16: whether ``auto`` is bfloat16 here: its goals are meant for that.
    """
    if way.startswith("auto") and not bf16:
        return {}
    goals = dict((GPU_GOALS if on_gpu else GOALS).get((stage, way), {}))
    if "fp16" in rival and "speedup" in goals:
        goals["speedup"] = FP16_SPEEDUP
    if stage == "class-loss" and not native and goals.get("speedup", 0) > PURE_TORCH_CLASS_LOSS:
        goals["speedup"] = PURE_TORCH_CLASS_LOSS
    return goals


def judge(row: Row) -> dict[str, bool]:
    """Which of its goals a row meets; those whose figure was not measured are left out."""
    figures = {
        "speedup": row.speedup,
        "share": row.share,
        "seconds": row.ours.median if row.ours else None,
        "memory": row.memory,
        "memory_of_rival": _ratio(row.memory, row.rival_memory),
        "memory_of_input": _ratio(row.memory, row.input_bytes),
    }
    met = {}
    for name, goal in row.goals.items():
        figure = figures[name]
        if figure is not None:
            met[name] = figure >= goal if name in _AT_LEAST else figure <= goal
    return met


def _ratio(part: int | None, whole: int | None) -> float | None:
    return None if part is None or not whole else part / whole
