"""What a call leaves in its folder: tables, figures, and the page with all of them.

Tables of earlier calls in the same folder stay, and stand on the page too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from retinanet.bench.machine import describe_machine
from retinanet.data import usable
from retinanet.data.dataset import Dataset
from retinanet.data.images import padding_colour
from retinanet.data.loading import eval_loader
from retinanet.errors import DataError
from retinanet.evaluation.loss_distribution import loss_distribution
from retinanet.evaluation.run import evaluate
from retinanet.evaluation.speed_accuracy import search_call, time_in_turns
from retinanet.files import write_atomic
from retinanet.inference.detector import Detector
from retinanet.model.checkpoint import load_checkpoint
from retinanet.model.precision import choose_device
from retinanet.model.retinanet import RetinaNet
from retinanet.paper import figures
from retinanet.paper.experiments import Experiment, Row
from retinanet.paper.page import index_markdown, write_page
from retinanet.paper.plan import Plan, Terms, Training, common_differences, size_changes
from retinanet.paper.results import Outcome, TableResult, gather, judge_distribution
from retinanet.paper.rivals import load_rival
from retinanet.paper.run import Workplace
from retinanet.paper.tables import EXPERIMENTS
from retinanet.paper.work import Result
from retinanet.report import paper_plots
from retinanet.report.paper_plots import SpeedMark, TableRow

_TIMED_IMAGES = 8
_ROUNDS = 7
_COCO_CLASSES, _COCO_IMAGES = 80, 100_000  # less is not COCO's training set
_FOREIGN = "results:"  # before the name of another detector: no row of ours has such a key
_EFFECTIVE = 0.5  # Figure 7: AP over 33.5, where FL has 34.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Trained:
    """The trainings of a call and what came of them.

    Attributes:
        planned: which there were.
        done: by (name, seed) the result, or why it failed.
        terms, splits, place: what and where.
        foreign: figures of other detectors by their names, for table2 (:func:`read_foreign`).
        command: what was asked for.
    """

    planned: Plan
    done: Mapping[tuple[str, int], Result | str]
    terms: Terms
    splits: Mapping[str, Dataset]
    place: Workplace
    foreign: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    command: str = ""

    def result(self, training: Training) -> Result | str | None:
        """What a training came to; where it failed here another call may have finished it."""
        result = self.done.get((training.name, training.seed))
        if isinstance(result, str):
            return self.place.finished([training]).get((training.name, training.seed), result)
        return result

    @property
    def failures(self) -> dict[str, str]:
        """The trainings that failed, and why."""
        return {
            f"{one.name}, seed {one.seed}": why
            for one in self.planned.trainings
            if isinstance(why := self.result(one), str)
        }

    def first(self, experiment: str, key: str) -> Training | None:
        """The training of a row with the lowest seed that ended well."""
        for one in self.planned.rows.get((experiment, key), ()):
            result = self.result(one)
            if isinstance(result, Result) and result.metrics is not None:
                return one
        return None


@dataclass(frozen=True, slots=True)
class Made:
    """What :func:`finish` wrote: the results, images of figures and tables, and the page."""

    tables: tuple[TableResult, ...]
    figures: tuple[Path, ...]
    report: Path


def finish(
    experiments: Sequence[Experiment],
    out: Path,
    trained: Trained | None = None,
    *,
    progress: Progress | None = None,
) -> Made:
    """Write ``NAME.json``, ``.md`` and ``.csv`` of each experiment, its plots, and ``report.html``.

    Args:
        experiments: in their order.
        out: the folder.
        trained: what their rows came to; None: figures that need no training.
        progress: told how many experiments are done.
    """
    results: list[TableResult] = []
    drawn: list[Path] = []
    for place, experiment in enumerate(experiments):
        one = experiment
        if trained is not None and experiment.name == "table2":
            foreign = tuple(Row(_FOREIGN + one, f"{one} (its results)") for one in trained.foreign)
            one = replace(experiment, rows=(*experiment.rows, *foreign))
        result, files = _make(one, out, trained)
        for old in {*(out / "plots").glob(f"{one.name}.*")} - {*files}:
            old.unlink()  # of an earlier call, and no longer true
        write_atomic(out / f"{one.name}.json", result.to_json())
        write_atomic(out / f"{one.name}.md", result.to_markdown())
        if result.lines:
            write_atomic(out / f"{one.name}.csv", result.to_csv())
        results.append(result)
        drawn += files
        if progress is not None:
            progress(place + 1, len(experiments))
    every = read_results(out)
    plots = {
        one.name: found for one in every if (found := sorted((out / "plots").glob(f"{one.name}.*")))
    }
    write_atomic(out / "claims.md", index_markdown(every))
    return Made(tuple(results), tuple(drawn), write_page(out, every, plots))


def read_foreign(
    results: Mapping[str, Path], splits: Mapping[str, Dataset]
) -> dict[str, dict[str, Any]]:
    """The figures of other detectors from their results files, by their names.

    Args:
        results: COCO results on the ``val`` split, by name.
        splits: the data.

    Raises:
        DataError: a file cannot be read, or does not fit the data.
    """
    return {name: evaluate(file, splits["val"]).to_dict() for name, file in results.items()}


def read_results(out: Path) -> list[TableResult]:
    """The tables and figures that lie in a folder, in the paper's order.

    Raises:
        DataError: a file is not what :func:`finish` writes.
    """
    found = []
    for name in EXPERIMENTS:
        file = out / f"{name}.json"
        if not file.is_file():
            continue
        try:
            found.append(TableResult.from_json(file.read_text("utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file} is not a result of this version ({type(error).__name__}: {error}); "
                f"delete it and run {name} again: finished trainings are kept"
            ) from None
    return found


def _make(
    experiment: Experiment, out: Path, trained: Trained | None
) -> tuple[TableResult, list[Path]]:
    """The result of an experiment, and its plots."""
    name, stem = experiment.name, out / "plots" / experiment.name
    about: dict[str, Any] = {} if trained is None or not experiment.rows else _about(trained)
    if name == "table2":  # "surpasses two-stage detectors at one-stage speed" (Abstract)
        experiment = replace(experiment, columns=(*experiment.columns, "ms"))
    times = {} if trained is None or "ms" not in experiment.columns else _time(experiment, trained)
    if name == "fig4" and trained is not None:
        return _figure4(experiment, out, trained, about, stem)
    outcomes = {} if trained is None else _outcomes(experiment, out, trained)
    result = gather(experiment, outcomes, about, milliseconds=times)
    files: tuple[Path, ...]
    if name == "fig1":
        files = paper_plots.plot_focal_loss(figures.focal_curves(), stem)
    elif name == "fig2":
        files = _figure2(experiment, result, stem)
    elif name == "fig3":
        network = figures.read_architecture(_network(out, trained))
        files = paper_plots.plot_architecture(network, stem)
    elif name == "fig5":
        files = paper_plots.plot_loss_variants(figures.variant_curves(), stem)
    elif name == "fig6":
        files = paper_plots.plot_loss_slopes(figures.variant_slopes(), stem)
    elif name == "fig7":
        files = _figure7(result, stem)
    else:
        files = _plot_rows(result, stem)
    return result, [*files]


def _about(trained: Trained) -> dict[str, Any]:
    terms, splits = trained.terms, trained.splits
    counts = {name: len(usable(one)[0]) for name, one in splits.items()}
    first = trained.planned.trainings[0].recipe if trained.planned.trainings else None
    coco = len(splits["train"].classes) == _COCO_CLASSES and counts["train"] > _COCO_IMAGES
    machine = describe_machine(choose_device(trained.place.device))
    about: dict[str, Any] = {
        "command": trained.command,
        "data": f"{terms.data.resolve().name}: {counts['train']:,} images to train on, "
        f"{counts['val']:,} to judge by",
        "steps": None if first is None else first.train.steps,
        "seeds": terms.seeds,
        "machine": "; ".join(machine.lines()[: 2 if machine.gpu else 1]),
        "coco": coco
        and terms.full
        and not (terms.settings or terms.steps or terms.backbones or terms.backbone_weights),
    }
    if first is not None and not terms.full:
        about["in small"] = "; ".join(size_changes(trained.planned, terms))
    if first is not None:
        about["settings"] = common_differences(trained.planned)
    return about


def _outcomes(experiment: Experiment, out: Path, trained: Trained) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for row in experiment.rows:
        place = (experiment.name, row.key)
        if place in trained.planned.refused:
            found[row.key] = [Outcome(0, "failed", note=trained.planned.refused[place])]
        elif row.key.startswith(_FOREIGN):
            metrics = trained.foreign[row.key.removeprefix(_FOREIGN)]
            found[row.key] = [Outcome(0, "done", metrics)]
        elif row.trained:
            results = [(one, trained.result(one)) for one in trained.planned.rows[place]]
            # A row that was not asked for has none.
            found[row.key] = [
                _outcome(one, result, out) for one, result in results if result is not None
            ]
    return found


def _outcome(training: Training, result: Result | str, out: Path) -> Outcome:
    folder = training.folder(out).relative_to(out)
    if isinstance(result, str):
        return Outcome(training.seed, "failed", folder=folder, note=result)
    if result.metrics is None:
        return Outcome(training.seed, "diverged", folder=folder, note=result.note)
    return Outcome(training.seed, "done", result.metrics, folder)


def _time(experiment: Experiment, trained: Trained) -> dict[str, float]:
    """Milliseconds an image by row: network and post-processing, one image at a time, float32.

    All rows take turns, on the same images; rows that are one training share its figure.
    """
    val = usable(trained.splits["val"])[0]
    count = min(_TIMED_IMAGES, len(val))
    chosen = tuple(val.images[i * len(val) // count] for i in range(count))
    images = replace(val, images=chosen)
    of_row = {
        row.key: one
        for row in experiment.rows
        if (one := trained.first(experiment.name, row.key)) is not None
    }
    calls = {}
    for one in of_row.values():
        if one.name not in calls:
            calls[one.name] = _call(one, trained, images)
    if not calls:
        return {}
    timed = time_in_turns(calls, _ROUNDS)
    return {key: 1000 * timed[one.name].median / count for key, one in of_row.items()}


def _call(training: Training, trained: Trained, images: Dataset) -> Callable[[], object]:
    folder, device = training.folder(trained.place.out), trained.place.device
    if not training.rival:
        detector = Detector(load_checkpoint(folder), device=device, precision="float32")
        return search_call(detector, images)
    rival = load_rival(folder, choose_device(device))
    recipe = training.recipe
    batches = [
        batch.to(choose_device(device))
        for batch in eval_loader(
            images,
            batch_size=1,
            image_size=recipe.data.image_size,
            max_size=recipe.data.max_size,
            fill=padding_colour(rival.network.pixel_mean),
        )
    ]

    def call() -> None:
        with torch.inference_mode():
            for batch in batches:
                for one in rival.network.detect(batch):
                    one.scores.cpu()

    return call


def _plot_rows(result: TableResult, stem: Path) -> tuple[Path, ...]:
    rows = [
        TableRow(
            line.label,
            line.figures["AP"].mean if "AP" in line.figures else None,
            line.figures["AP"].deviation if "AP" in line.figures else None,
            None if line.published is None else line.published.ap,
        )
        for line in result.lines
    ]
    return paper_plots.plot_table(
        rows, stem, title=result.heading, measured_on=str(result.about.get("data", ""))
    )


def _figure2(experiment: Experiment, result: TableResult, stem: Path) -> tuple[Path, ...]:
    published, measured = [], []
    seen: set[tuple[str, ...]] = set()
    for row, line in zip(experiment.rows, result.lines, strict=True):
        series, _, scale = row.key.partition("-")
        series = f"RetinaNet-{row.depth}" if row.trained else row.label
        if row.published is not None and row.published.milliseconds is not None:
            published.append(
                SpeedMark(
                    series,
                    row.published.milliseconds,
                    row.published.ap,
                    scale if row.trained else "",
                )
            )
        # With one backbone in the place of two, two rows are one training.
        if "AP" in line.figures and line.milliseconds is not None and line.folders not in seen:
            seen.add(line.folders)
            measured.append(SpeedMark(series, line.milliseconds, line.figures["AP"].mean, scale))
    return paper_plots.plot_speed_accuracy(
        measured,
        stem,
        published=published,
        where=str(result.about.get("data", "")).partition(":")[0],
        machine=str(result.about.get("machine", "")),
    )


def _figure4(
    experiment: Experiment, out: Path, trained: Trained, about: dict[str, Any], stem: Path
) -> tuple[TableResult, list[Path]]:
    row = experiment.rows[0]
    training = trained.first(experiment.name, row.key)
    outcomes = _outcomes(experiment, out, trained)
    if training is None:
        return gather(experiment, outcomes, about), []
    found = loss_distribution(
        training.folder(out), usable(trained.splits["val"])[0], device=trained.place.device
    )
    write_atomic(out / "fig4-distribution.json", json.dumps(found.to_dict(), indent=1) + "\n")
    hardest = {
        kind: {one.gamma: one.hardest[0.2] for one in curves}
        for kind, curves in (("positives", found.positives), ("negatives", found.negatives))
    }
    for kind, shares in hardest.items():
        about[f"share of the loss in the hardest 20% of {kind}"] = ", ".join(
            f"gamma {gamma:g}: {100 * share:.0f}%" for gamma, share in shares.items()
        )
    files = paper_plots.plot_loss_distribution(
        found, stem, title=training.name.rpartition("-")[0], published=[(0.8, 0.5)]
    )
    result = gather(experiment, outcomes, about)
    return replace(result, claims=judge_distribution(hardest)), [*files]


def _figure7(result: TableResult, stem: Path) -> tuple[Path, ...]:
    """The grid, with the settings that train as well as the focal loss, less half a point."""
    by_key = {line.key: line.figures["AP"].mean for line in result.lines if "AP" in line.figures}
    if "focal" not in by_key:
        return paper_plots.plot_star_grid(figures.star_curves(), stem, "AP over 33.5, COCO")
    limit = by_key["focal"] - _EFFECTIVE
    effective = {}
    for key, ap in by_key.items():
        kind, *numbers = key.split("-")
        if kind == "star":
            effective[float(numbers[0]), float(numbers[1])] = ap > limit
    return paper_plots.plot_star_grid(figures.star_curves(effective), stem, f"AP over {limit:.1f}")


def _network(out: Path, trained: Trained | None) -> RetinaNet:
    """The network of Figure 3: the first that was trained in this call, else the paper's."""
    for one in () if trained is None else trained.planned.trainings:
        result = trained.result(one) if trained is not None else None
        if not one.rival and isinstance(result, Result) and result.metrics is not None:
            return load_checkpoint(one.folder(out)).model
    return RetinaNet(backbone="resnet50", num_classes=80)
