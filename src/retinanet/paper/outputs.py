"""Write a command's output folder: tables, figures, and the page with all of them.

Results of earlier commands in the same folder are kept and shown on the page.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from retinanet.bench.machine import describe_machine
from retinanet.data import usable
from retinanet.data.dataset import Dataset
from retinanet.data.images import padding_colour
from retinanet.data.loading import eval_loader
from retinanet.errors import DataError
from retinanet.files import write_atomic
from retinanet.inference.detector import Detector
from retinanet.model.checkpoint import load_checkpoint
from retinanet.model.precision import choose_device
from retinanet.model.retinanet import RetinaNet
from retinanet.paper import figures
from retinanet.paper.claims import collect_results, evaluate_loss_shares
from retinanet.paper.plan import Plan, Settings, Training, common_differences, size_changes
from retinanet.paper.results import (
    CLAIM_COLUMNS,
    Outcome,
    PartKind,
    Table,
    TableResult,
    Verdict,
    markdown,
)
from retinanet.paper.rivals import load_rival
from retinanet.paper.run import Results, Workers
from retinanet.paper.tables import EXPERIMENTS, STAR_BETAS, STAR_GAMMAS, Experiment
from retinanet.report import paper_plots
from retinanet.report.figure import Files
from retinanet.report.html import Page
from retinanet.report.loss_distribution import loss_distribution
from retinanet.report.paper_plots import SpeedMark
from retinanet.report.speed_accuracy import detection_call, spread_evenly, time_in_turns

_TIMED_IMAGES = 8
_ROUNDS = 7
_COCO_CLASSES, _COCO_IMAGES = 80, 100_000  # COCO's training set has 80 classes and 118,287 images
_FIGURE_4_POINT = (0.8, 0.5)  # the hardest 20% of the positives make up about half of the loss
_FIGURE_7_MARGIN = 0.5  # marked: AP over 33.5, where FL has 34.0

_LEGEND = (
    "Points of AP: mean and standard deviation over seeds. The row with the highest mean of each "
    "side is compared. The ± of a difference is the half-width of its 95% confidence interval: "
    "Student's t of the differences seed by seed (Welch's if the rows have other seeds), wider for "
    "the best of several rows, which may be the best by luck (Bonferroni). "
    "Not separated: the verdict changes within that interval. "
    "One seed: the interval is unknown, and the means alone decide. "
    "Nothing found: both sides are under 0.15 points, too little to compare. "
    "One training: both sides have the same settings. "
    "Times are measured once, with 5% of the longer one as ±."
)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Trainings:
    """The trainings of a command and their results.

    Attributes:
        plan: the trainings.
        results: of each.
        settings, splits, workers: how they were run.
        command: as it was entered.
    """

    plan: Plan
    results: Results
    settings: Settings
    splits: Mapping[str, Dataset]
    workers: Workers
    command: str = ""

    @property
    def failures(self) -> dict[str, str]:
        """Failed trainings and their errors."""
        results = {str(t): self.results.get(t.key) for t in self.plan.trainings}
        return {name: r.note for name, r in results.items() if r and r.status == "failed"}

    def done(self, experiment: str, key: str) -> Training | None:
        """Return the first training of a row that is done."""
        return next(filter(self.is_done, self.plan.rows.get((experiment, key), ())), None)

    def is_done(self, training: Training) -> bool:
        """Return True if a training ended and did not diverge."""
        result = self.results.get(training.key)
        return result is not None and result.status == "done"


@dataclass(frozen=True, slots=True)
class Outputs:
    """What :func:`write_outputs` wrote: results, images, and the page."""

    tables: tuple[TableResult, ...]
    figures: tuple[Path, ...]
    report: Path


def write_outputs(
    experiments: Sequence[Experiment],
    out: Path,
    trainings: Trainings | None = None,
    *,
    progress: Progress | None = None,
) -> Outputs:
    """Write ``NAME.json`` and ``.md`` of each experiment, its plots, and ``report.html``.

    Args:
        experiments: in their order.
        out: output folder.
        trainings: of their rows; None: figures that need no training.
        progress: callback with the number of experiments written and their total.
    """
    results: list[TableResult] = []
    images: list[Path] = []
    for count, experiment in enumerate(experiments, 1):
        result, files = _measure(experiment, out, trainings)
        for old in {*(out / "plots").glob(f"{experiment.name}.*")} - {*files}:
            old.unlink()  # of an earlier command
        write_atomic(out / f"{experiment.name}.json", result.to_json())
        write_atomic(out / f"{experiment.name}.md", result.to_markdown())
        results.append(result)
        images += files
        if progress is not None:
            progress(count, len(experiments))
    on_page = read_results(out)
    plots = {result.name: sorted((out / "plots").glob(f"{result.name}.*")) for result in on_page}
    write_atomic(out / "claims.md", claims_markdown(on_page))
    return Outputs(tuple(results), tuple(images), write_page(out, on_page, plots))


def read_results(out: Path) -> list[TableResult]:
    """Read the results in a folder, in the paper's order.

    Raises:
        DataError: a file is not of this version.
    """
    results = []
    for file in (out / f"{name}.json" for name in EXPERIMENTS):
        if not file.is_file():
            continue
        try:
            results.append(TableResult.from_json(file.read_text("utf-8")))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{file} is not a result of this version ({reason}); delete it and run "
                f"{file.stem} again: finished trainings are kept"
            ) from None
    return results


def _measure(
    experiment: Experiment, out: Path, trainings: Trainings | None
) -> tuple[TableResult, Sequence[Path]]:
    """Return the result of an experiment, and its plots."""
    name, stem = experiment.name, out / "plots" / experiment.name
    if trainings is None:
        result = collect_results(experiment, {}, {})
    else:
        times = _time(experiment, trainings) if "ms" in experiment.columns else {}
        about = _about(trainings) if experiment.rows else {}
        outcomes = _outcomes(experiment, out, trainings)
        result = collect_results(experiment, outcomes, about, milliseconds=times)
    match name:
        case "fig1":
            return result, figures.plot_focal_loss(stem)
        case "fig2":
            return result, _plot_figure2(experiment, result, stem)
        case "fig3":
            return result, figures.plot_architecture(_network(out, trainings), stem)
        case "fig4":
            return _measure_figure4(result, out, trainings, stem)
        case "fig5":
            return result, figures.plot_loss_variants(stem)
        case "fig6":
            return result, figures.plot_loss_slopes(stem)
        case "fig7":
            return result, _plot_figure7(result, stem)
        case _:
            return result, figures.plot_table(result, stem)


def _about(trainings: Trainings) -> dict[str, Any]:
    settings, splits, plan = trainings.settings, trainings.splits, trainings.plan
    counts = {name: len(usable(split)[0]) for name, split in splits.items()}
    machine = describe_machine(choose_device(trainings.workers.device))
    is_coco = len(splits["train"].classes) == _COCO_CLASSES and counts["train"] > _COCO_IMAGES
    changed = settings.overrides or settings.steps or settings.backbones
    about: dict[str, Any] = {
        "command": trainings.command,
        "data": f"{settings.data.resolve().name}: {counts['train']:,} training images, "
        f"{counts['val']:,} validation images",
        "steps": plan.trainings[0].recipe.train.steps,
        "seeds": settings.seeds,
        "machine": "; ".join(machine.lines()[: 2 if machine.gpu else 1]),
        "coco": is_coco and settings.full and not (changed or settings.backbone_weights),
    }
    if not settings.full:
        about["smaller than the paper"] = "; ".join(size_changes(plan, settings))
    return about | {"settings": common_differences(plan)}


def _outcomes(experiment: Experiment, out: Path, trainings: Trainings) -> dict[str, list[Outcome]]:
    """Return the results of each row; trainings that were not asked for have none."""
    return {
        row.key: [
            Outcome(t.seed, trainings.results[t.key], str(t.folder(out).relative_to(out)))
            for t in trainings.plan.rows.get((experiment.name, row.key), ())
            if t.key in trainings.results
        ]
        for row in experiment.rows
    }


def _time(experiment: Experiment, trainings: Trainings) -> dict[str, float]:
    """Time each row on the same images in turns: milliseconds per image at batch size 1, float32.

    Network and post-processing; rows that share a training share its time.
    """
    val = usable(trainings.splits["val"])[0]
    images = replace(val, images=tuple(spread_evenly(val.images, _TIMED_IMAGES)))
    by_row = {
        row.key: training
        for row in experiment.rows
        if (training := trainings.done(experiment.name, row.key)) is not None
    }
    unique = {training.name: training for training in by_row.values()}
    calls = {name: _call(training, trainings, images) for name, training in unique.items()}
    times = time_in_turns(calls, _ROUNDS)
    return {
        key: 1000 * times[training.name].median / len(images) for key, training in by_row.items()
    }


def _call(training: Training, trainings: Trainings, images: Dataset) -> Callable[[], object]:
    """Return a function that detects objects in images that are loaded before."""
    folder = training.folder(trainings.workers.out)
    device = choose_device(trainings.workers.device)
    if not training.rival:
        detector = Detector(load_checkpoint(folder), device=device, precision="float32")
        return detection_call(detector, images)
    network = load_rival(folder, device)
    loader = eval_loader(
        images,
        batch_size=1,
        image_size=network.settings.image_size,
        max_size=network.settings.max_size,
        fill=padding_colour(network.pixel_mean),
    )
    batches = [batch.to(device) for batch in loader]

    @torch.inference_mode()
    def call() -> None:
        for batch in batches:
            for detections in network.detect(batch):
                detections.scores.cpu()  # waits for the device

    return call


def _plot_figure2(experiment: Experiment, result: TableResult, stem: Path) -> Files:
    published, measured = [], []
    seen: set[tuple[str, ...]] = set()
    for row, line in zip(experiment.rows, result.rows, strict=True):
        scale = row.key.partition("-")[2] if row.trained else ""
        series = f"RetinaNet-{row.depth}" if row.trained else row.label
        if row.published is not None and row.published.milliseconds is not None:
            mark = SpeedMark(series, row.published.milliseconds, row.published.ap, scale)
            published.append(mark)
        # With a single backbone for both depths, two rows share a training.
        if "AP" in line.scores and line.milliseconds is not None and line.folders not in seen:
            seen.add(line.folders)
            measured.append(SpeedMark(series, line.milliseconds, line.scores["AP"].mean, scale))
    return paper_plots.plot_speed_accuracy(
        measured,
        stem,
        published=published,
        data=str(result.about.get("data", "")).partition(":")[0],
        machine=str(result.about.get("machine", "")),
    )


def _measure_figure4(
    result: TableResult, out: Path, trainings: Trainings | None, stem: Path
) -> tuple[TableResult, Sequence[Path]]:
    training = None if trainings is None else trainings.done(result.name, result.rows[0].key)
    if trainings is None or training is None:
        return result, []
    val, device = usable(trainings.splits["val"])[0], trainings.workers.device
    distribution = loss_distribution(training.folder(out), val, device=device)
    text = json.dumps(distribution.to_dict(), indent=1)
    write_atomic(out / "fig4-distribution.json", text + "\n")
    curves = {"positives": distribution.positives, "negatives": distribution.negatives}
    hardest = {
        kind: {curve.gamma: curve.hardest[0.2] for curve in of_kind}
        for kind, of_kind in curves.items()
    }
    about = dict(result.about)
    for kind, shares in hardest.items():
        about[f"share of the loss in the hardest 20% of {kind}"] = ", ".join(
            f"gamma {gamma:g}: {100 * share:.0f}%" for gamma, share in shares.items()
        )
    title = training.name.rpartition("-")[0]
    files = paper_plots.plot_loss_distribution(
        distribution, stem, title=title, published=_FIGURE_4_POINT
    )
    return replace(result, claims=evaluate_loss_shares(hardest), about=about), files


def _plot_figure7(result: TableResult, stem: Path) -> Files:
    """Plot the grid; settings with an AP of at least FL's less half a point are marked."""
    aps = {row.key: row.scores["AP"].mean for row in result.rows if "AP" in row.scores}
    if "focal" not in aps:
        return figures.plot_star_grid(stem)
    limit = aps["focal"] - _FIGURE_7_MARGIN
    grid = {(g, b): f"star-{g:g}-{b:g}" for g in STAR_GAMMAS for b in STAR_BETAS}
    effective = {setting: aps[key] > limit for setting, key in grid.items() if key in aps}
    return figures.plot_star_grid(stem, effective, f"AP over {limit:.1f}")


def _network(out: Path, trainings: Trainings | None) -> RetinaNet:
    """Return the network of Figure 3: the first that this command trained, else the paper's."""
    for training in trainings.plan.trainings if trainings else ():
        if trainings and not training.rival and trainings.is_done(training):
            return load_checkpoint(training.folder(out)).model
    return RetinaNet(backbone="resnet50", num_classes=80)


# --- the page -------------------------------------------------------------------------------------


def write_page(
    out: str | Path,
    results: Sequence[TableResult],
    plots: Mapping[str, Sequence[Path]] | None = None,
) -> Path:
    """Write ``report.html`` of an output folder, to which its links are relative.

    `plots` are by name of the table or figure; PNG files are shown, all are linked.
    """
    out = Path(out)
    page = Page("Focal Loss for Dense Object Detection, measured", _subtitle(results))
    page.section("Overview")
    verdicts = Counter[str](claim.verdict for result in results for claim in result.claims)
    if verdicts:
        names = {"holds": "hold", "does not hold": "do not hold"}
        count = verdicts.total()
        total = {f"claim{'' if count == 1 else 's'} of the paper": count}
        counts = {names.get(v, v): verdicts[v] for v in get_args(Verdict) if verdicts[v]}
        page.facts(total | counts)
    _add_parts(page, _overview(results))
    if verdicts:
        page.text(_LEGEND)
    for result in results:
        page.section(result.number)
        page.heading(result.title)
        files = (plots or {}).get(result.name, ())
        if shown := [(file, "") for file in files if file.suffix == ".png"]:
            page.images(shown)
        if files:
            page.links({"Files": {file.name: _address(file, out) for file in files}})
        _add_parts(page, result.parts())
        folders = {row.label: _run_links(row.folders, out) for row in result.rows if row.folders}
        if folders:
            page.links(folders, folded="Run folders")
    return page.write(out / "report.html")


def claims_markdown(results: Sequence[TableResult]) -> str:
    """Format the overview of all claims in Markdown."""
    return markdown(_overview(results))


def _overview(results: Sequence[TableResult]) -> list[tuple[PartKind, Any]]:
    lines = dict.fromkeys(result.not_coco for result in results if result.not_coco)
    rows = [
        [result.number, *claim.cells(labels=False), claim.marked_verdict]
        for result in results
        for claim in result.claims
    ]
    table = Table(("", *CLAIM_COLUMNS), rows, left=5)
    last: tuple[PartKind, Any] = ("table", table) if rows else ("text", "No claim was tested.")
    return [*(("strong", line) for line in lines), last]


def _add_parts(page: Page, parts: Iterable[tuple[PartKind, Any]]) -> None:
    for kind, part in parts:
        if kind == "table":
            page.table(part.columns, part.rows, left=part.left, folded=part.title)
        elif kind == "code":
            page.code(part)
        else:
            for line in part if kind == "list" else [part]:
                page.text(line)


def _subtitle(results: Sequence[TableResult]) -> str:
    """Name the paper, and the data and machines of the results."""
    values = [result.about.get(name) for name in ("data", "machine") for result in results]
    parts = dict.fromkeys(str(value) for value in values if value)
    return " · ".join(["Lin et al. 2017, arXiv:1708.02002", *parts])


def _run_links(folders: Sequence[str], out: Path) -> dict[str, str]:
    """Return the address of each run folder's report, or of the folder, by its name."""
    reports = [out / folder / "report.html" for folder in folders]
    return {
        report.parent.name: _address(report if report.is_file() else report.parent, out)
        for report in reports
    }


def _address(path: Path, out: Path) -> str:
    """Return a path relative to the page, with slashes."""
    return Path(os.path.relpath(path, out)).as_posix()
