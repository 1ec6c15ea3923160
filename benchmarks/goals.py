"""Goals of each stage at full size, and whether a row meets them; see docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from retinanet.bench import Row
from retinanet.bench.benchmark import seconds

Goals = Mapping[tuple[str, str], Mapping[str, float]]

CPU_GOALS: Goals = {
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
    ("inference", "float32"): {"speedup": 1.6, "limit_fraction": 0.8},
    ("inference", "auto"): {"speedup": 3.3, "limit_fraction": 0.8},
    ("inference", "int8"): {"speedup": 7},
    ("inference", "MobileNetV2"): {"speedup": 2},
    ("inference", "MobileNetV2 OpenVINO"): {"speedup": 2.5},
    ("inference", "MobileNetV2 int8"): {"speedup": 4},
    ("inference", "EfficientNet-Lite2"): {"speedup": 2},
    ("inference", "EfficientNet-Lite2 OpenVINO"): {"speedup": 2.5},
    ("inference", "EfficientNet-Lite2 int8"): {"speedup": 4},
    ("train-step", "ResNet-50 float32"): {"speedup": 1, "memory_of_rival": 0.75},
    ("train-step", "ResNet-50 bf16"): {"speedup": 2, "memory_of_rival": 0.75},
    ("train-step", "ResNet-18 float32"): {"speedup": 1, "memory_of_rival": 0.75},
    ("train-step", "ResNet-18 bf16"): {"speedup": 1.5, "memory_of_rival": 0.75},
    ("train-step", "MobileNetV2 float32"): {"speedup": 1.5, "memory_of_rival": 0.6},
    ("data", "one core"): {"speedup": 8},
    ("evaluation", "the twelve metrics"): {"speedup": 50, "memory": 1e9},
    ("evaluation", "with error analysis"): {"speedup": 50, "memory": 1e9},
    ("startup", "retinanet --help"): {"seconds": 0.3},
    ("startup", "import retinanet"): {"seconds": 0.3},
}
"""By stage and case, on 2 or 4 CPU cores, against torchvision (pycocotools).

``speedup`` and ``limit_fraction`` are lower bounds, all others upper bounds: ``seconds`` of ours,
``memory`` of ours in bytes, relative to the rival's (``memory_of_rival``) or to the logits
(``memory_of_input``).
"""

GPU_GOALS: Goals = {
    # Within 1.3 times of a copy of the logits.
    ("class-loss", "float32, 2 images"): {"speedup": 1, "limit_fraction": 1 / 1.3},
    ("class-loss", "float32, 8 images"): {"speedup": 1, "limit_fraction": 1 / 1.3},
    ("class-loss", "heads' layout, 2 images"): {"speedup": 1, "limit_fraction": 1 / 1.3},
    ("class-loss", "bf16, 2 images"): {"speedup": 1, "limit_fraction": 1 / 1.3},
    ("inference", "auto"): {"speedup": 4},
    ("inference", "auto, 16 images"): {"speedup": 4},
    ("train-step", "ResNet-50 bf16"): {"speedup": 1.5},
}
"""The same on a GPU."""

_PURE_TORCH_CLASS_LOSS = 10.0  # speedup without a native kernel
_FP16_SPEEDUP = 2.0  # on a GPU against torchvision under fp16 autocast

_FORMATS: dict[str, Callable[[float], str]] = {
    "speedup": lambda goal: f"{goal:g} x",
    "limit_fraction": lambda goal: f"{goal:.0%} of the limit",
    "seconds": seconds,
    "memory": lambda goal: f"under {goal / 1e6:,.0f} MB",
    "memory_of_rival": lambda goal: f"memory under {goal:g} of theirs",
    "memory_of_input": lambda goal: f"memory under {goal:g} x the logits",
}


def goals_of(row: Row, *, on_gpu: bool, native: bool, bf16: bool) -> dict[str, float]:
    """Goals of a row; empty: none was set.

    Args:
        row: at full size.
        on_gpu: whether it ran on a GPU.
        native: whether the class loss has a kernel of its own there.
        bf16: whether ``auto`` is bfloat16 there, for which its goals are set.
    """
    if row.case.startswith("auto") and not bf16:
        return {}
    goals = dict((GPU_GOALS if on_gpu else CPU_GOALS).get((row.stage, row.case), {}))
    if "compiled" in row.rival:
        goals.pop("speedup", None)
    elif "fp16" in row.rival and "speedup" in goals:
        goals["speedup"] = _FP16_SPEEDUP
    if row.stage == "class-loss" and not native and "speedup" in goals:
        goals["speedup"] = min(goals["speedup"], _PURE_TORCH_CLASS_LOSS)
    return goals


def check_goals(row: Row, goals: Mapping[str, float]) -> dict[str, bool]:
    """Whether the row meets each goal; goals without a measurement are left out."""
    figures = {
        "speedup": row.speedup.median if row.speedup else None,
        "limit_fraction": row.limit_fraction,
        "seconds": row.ours.median if row.ours else None,
        "memory": row.memory,
        "memory_of_rival": _ratio(row.memory, row.rival_memory),
        "memory_of_input": _ratio(row.memory, row.input_bytes),
    }
    met = {}
    for name, goal in goals.items():
        figure = figures[name]
        if figure is not None:
            is_lower_bound = name in ("speedup", "limit_fraction")
            met[name] = figure >= goal if is_lower_bound else figure <= goal
    return met


def describe_goals(row: Row, goals: Mapping[str, float]) -> str:
    """Format goals and whether they are met, as a cell of a table."""
    met = check_goals(row, goals)
    marks = {True: ": met", False: ": **missed**", None: ""}
    texts = [_FORMATS[name](goal) + marks[met.get(name)] for name, goal in goals.items()]
    return "; ".join(texts) or "-"


def _ratio(part: int | None, whole: int | None) -> float | None:
    return None if part is None or not whole else part / whole
