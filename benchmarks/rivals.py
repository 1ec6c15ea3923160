"""AP of detectors that train for the same time on the same images with the same backbone.

    python benchmarks/rivals.py DATA --minutes 5 --backbone-weights FILE --out results.json

`quick` and `paper` are this package's network with the recipes `quick` and `paper_quick`;
`paper_p2` is `paper` with P2 and low-quality matches, which Faster R-CNN has too.
`torchvision_retinanet`, `faster_rcnn` and `ssd` are torchvision's. The limit is that of `train
--time`: start, training and validations. `quick` is always trained, first, and chooses its settings
from the data and the time; image size, batch and augmentation are then those of every detector, as
are backbone, channels, optimizer (AdamW, cosine) and metrics. AP is of the split `val`, with the
weights of the best validation of each. `--plot FILE.png` draws AP over the time since the start.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retinanet.training.events import Event

OURS = {"quick": "quick", "paper": "paper_quick", "paper_p2": "paper_quick"}
"""Recipe by name."""
P2 = (
    *("model.p2=true", "matching.low_quality_matches=true"),
    "anchors.sizes=[16,32,64,128,256,512]",
)
RIVALS = ("torchvision_retinanet", "faster_rcnn", "ssd")
SHARED = (
    "model.backbone",
    *("data.image_size", "data.max_size", "data.crop", "data.vertical_flip", "data.rotate90"),
    *("data.balance", "data.balance_threshold", "train.batch_size", "model.channels"),
    "detect.detections_per_image",
)
"""Settings of `quick` that the other detectors have too."""


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Train one detector in this process; return AP, times and the settings for the others."""
    from retinanet import load_recipe
    from retinanet.data import read_splits
    from retinanet.paper.rival_training import train_rival
    from retinanet.training.trainer import train as train_ours

    name = task["detector"]
    settings = [
        f"train.time={task['seconds']}",
        f"train.seed={task['seed']}",
        *("train.tune_detection=false", "train.val_images=none"),
        *(P2 if name == "paper_p2" else ()),
        *task["settings"],
    ]
    curve: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        started, cpu = time.perf_counter(), time.process_time()

        def note(event: Event) -> None:
            if event.kind == "validation":
                curve.append((round(time.perf_counter() - started, 1), event.data["ap"]))

        out = Path(folder) / "run"
        recipe = load_recipe(OURS.get(name, "paper_quick"), settings)
        data = read_splits(task["data"])
        if name in OURS:
            run = train_ours(recipe, data, out, on_event=note)
        else:
            run = train_rival(name, recipe, data, out, on_event=note)
        used = load_recipe(str(out / "config.toml"))
        return {
            "steps": run.step,
            "ap": run.metrics["ap"],
            "ap50": run.metrics["ap50"],
            "ap_small": run.metrics.get("ap_small"),
            "wall_seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
            "curve": curve,
            "shared": [(key, used.value(key)) for key in SHARED],
        }


def run_apart(task: dict[str, Any]) -> dict[str, Any]:
    """Run :func:`train` in a process of its own."""
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train every detector with every seed, in turn, `quick` first; return a row per run."""
    settings = list(options.set)
    if options.backbone_weights:
        settings.append(f"model.backbone_weights={options.backbone_weights}")
    task = {"data": str(options.data), "seconds": 60 * options.minutes}
    rows: list[dict[str, Any]] = []
    shared: list[tuple[str, Any]] = []
    detectors = dict.fromkeys(["quick", *options.detectors])
    for seed in options.seeds:
        for detector in detectors:
            is_first = detector == "quick"
            own = task | {
                "detector": detector,
                "seed": seed,
                "settings": settings if is_first else [*shared, *settings],
            }
            rows.append(own | run_apart(own))
            if options.out:
                options.out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
            if is_first:
                shared = rows[-1]["shared"]
                chosen = ", ".join(f"{key}={value}" for key, value in shared)
                print(f"settings of quick, for all: {chosen}", flush=True)
            print(
                f"seed {seed}, {detector}: AP {rows[-1]['ap']:.3f}, AP50 {rows[-1]['ap50']:.3f}, "
                f"{rows[-1]['steps']} steps, {rows[-1]['wall_seconds']:.0f} s",
                flush=True,
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Format mean and standard deviation of each detector as Markdown."""
    lines = [
        "| detector | steps | AP | AP50 | wall s | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for detector in dict.fromkeys(row["detector"] for row in rows):
        own = [row for row in rows if row["detector"] == detector]

        def spread(key: str, own: list[dict[str, Any]] = own) -> str:
            values = [100 * row[key] for row in own]
            return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(own) > 1 else "")

        seconds = [
            f"{mean(row[key] for row in own):.0f}" for key in ("wall_seconds", "cpu_seconds")
        ]
        cells = [detector, str(own[0]["steps"]), spread("ap"), spread("ap50"), *seconds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curves(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw AP over time: a line per run, a colour per detector."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    detectors: list[str] = []
    for row in rows:
        points = [(s / 60, 100 * ap) for s, ap in row.get("curve", ()) if ap is not None]
        if not points:
            continue
        is_new = row["detector"] not in detectors
        detectors += [row["detector"]] if is_new else []
        color = f"C{detectors.index(row['detector'])}"
        label = row["detector"] if is_new else None
        axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=3, label=label)
    axes.set(xlabel="minutes since the start", ylabel="AP on val", ylim=(0, None), xlim=(0, None))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Parse the command line, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", nargs="?", type=Path, help="labelled images with a split val")
    parser.add_argument("--minutes", type=float, default=5.0, help="time of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="such as 0 1 2")
    names = [*OURS, *RIVALS]
    parser.add_argument("--detectors", nargs="+", choices=names, default=names)
    parser.add_argument("--backbone-weights", help="ImageNet weights of the backbone")
    parser.add_argument("--set", nargs="*", default=[], help="settings of all, such as KEY=VALUE")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    parser.add_argument("--plot", type=Path, help="draw AP over time as PNG or SVG")
    parser.add_argument("--rows", type=Path, nargs="+", help="show these results; train nothing")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print(json.dumps(train(options.task)))
        return
    if options.rows:
        rows = [row for file in options.rows for row in json.loads(file.read_text("utf-8"))]
    elif options.data is None:
        parser.error("DATA is missing: give a folder of labelled images")
    else:
        rows = compare(options)
    print(table(rows))
    if options.plot:
        draw_curves(rows, options.plot)


if __name__ == "__main__":
    main()
