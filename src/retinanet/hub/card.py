"""The model card: ``model_card.md`` filled in with the facts of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, TypeGuard

from retinanet import __version__
from retinanet.hub.facts import RunFacts

FEW_IMAGES = 1000
"""Training images below which the card warns about unseen conditions."""

FEW_OBJECTS = 100
"""Objects of a class below which the card calls its AP uncertain."""

WEAK_AP = 0.2
"""AP below which the card calls the model weak."""

_MAX_CLASSES = 100
_SUMMARY = (
    ("ap", "AP", "mean over IoU .50 to .95 and classes"),
    ("ap50", "AP50", "at IoU .50"),
    ("ap75", "AP75", "at IoU .75"),
    ("ap_small", "APs", "objects under 32² square pixels"),
    ("ap_medium", "APm", "from 32² to 96²"),
    ("ap_large", "APl", "over 96²"),
    ("ar100", "AR100", "recall with 100 detections per class and image"),
)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|!])")


@dataclass(frozen=True, slots=True)
class Counts:
    """Size of a split.

    Attributes:
        images: number of images.
        objects: objects by class name, ignored ones excluded.
    """

    images: int
    objects: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Example:
    """An image with its detections.

    Attributes:
        file: its name beside the card.
        objects: number of detections drawn.
    """

    file: str
    objects: int


@dataclass(frozen=True, slots=True)
class CardOptions:
    """Facts that the run does not record.

    Attributes:
        repository: ``OWNER/NAME``.
        license: of the weights, by its name on the hub, such as ``apache-2.0``.
        dataset: id of the data on the hub.
        counts: by split, from the data.
        examples: images.
        drawn_score: score threshold of their detections.
        megabytes: size of the weights.
    """

    repository: str
    license: str | None = None
    dataset: str | None = None
    counts: Mapping[str, Counts] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    drawn_score: float = 0.3
    megabytes: float = 0.0


def write_card(facts: RunFacts, options: CardOptions) -> str:
    """Return the text of README.md: the hub's YAML, then Markdown. Needs huggingface_hub."""
    from huggingface_hub import ModelCard

    checkpoint, metrics, run = facts.checkpoint, facts.metrics, facts.run
    versions = run.get("versions")
    made_with = versions.get("retinanet") if isinstance(versions, Mapping) else None
    card = ModelCard.from_template(
        _card_data(facts, options),
        template_str=(files("retinanet.hub") / "model_card.md").read_text("utf-8"),
        name=_name(options),
        address=f"hf://{options.repository}",
        version=f"made with {_plain(made_with or __version__)}",
        options=options,
        checkpoint=checkpoint,
        classes=checkpoint.classes,
        backbone=_backbone(facts),
        parameters=sum(parameter.numel() for parameter in checkpoint.model.parameters()),
        metrics=metrics,
        per_class=[row for row in metrics.get("per_class", []) if row.get("objects")],
        summary=_SUMMARY,
        max_classes=_MAX_CLASSES,
        run=run,
        recipe=facts.recipe,
        step=checkpoint.info.get("step"),
        data_name=_data_name(run),
        machine=_machine(run),
        limits=[*_limits(facts, options)],
        plain=_plain,
        figure=lambda value: f"{value:.3f}" if _is_number(value) else "-",
        is_number=_is_number,
    )
    return str(card.content).rstrip() + "\n"


def _card_data(facts: RunFacts, options: CardOptions) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    data_name = _data_name(facts.run)
    results = [
        EvalResult(
            task_type="object-detection",
            task_name="Object detection",
            dataset_type=options.dataset or _slug(data_name),
            dataset_name=data_name,
            dataset_split="val",
            metric_type=kind,
            metric_name=name,
            metric_value=round(facts.metrics[key], 4),
            verified=False,
        )
        for key, name, kind in (
            ("ap", "AP", "map"),
            ("ap50", "AP50", "map_50"),
            ("ap75", "AP75", "map_75"),
        )
        if _is_number(facts.metrics.get(key))
    ]
    return ModelCardData(
        library_name="retinanet",
        pipeline_tag="object-detection",
        tags=["object-detection", "retinanet", "focal-loss", _slug(_backbone(facts))],
        license=options.license,
        datasets=[options.dataset] if options.dataset else None,
        model_name=_name(options),
        eval_results=results or None,
    )


def _limits(facts: RunFacts, options: CardOptions) -> Iterator[str]:
    """Warnings that follow from the numbers of the run."""
    metrics, run = facts.metrics, facts.run
    images = run.get("images")
    trained = options.counts.get("train") or (images if isinstance(images, Mapping) else {})
    count = trained.images if isinstance(trained, Counts) else trained.get("train")
    if isinstance(count, int) and count < FEW_IMAGES:
        yield (
            f"It was trained on only {count} images: expect failures on images from other cameras, "
            "places or seasons."
        )
    else:
        yield "It was not tested on images of other kinds than those that it was trained on."
    ap = metrics.get("ap")
    if not _is_number(ap):
        yield "Its accuracy is unknown."
        return
    yield (
        "The metrics are those of `val`, which also selected the best step, so they are a little "
        "too high; there was no test set."
    )
    if ap < WEAK_AP:
        yield f"An AP of {ap:.3f} is weak: check most detections by hand."
    if "for validation" in str(run.get("split_origin") or ""):
        yield (
            "The validation split is random: where several images show one scene, some may be in "
            "either split, and the metrics are then too high."
        )
    uncertain = [
        f"{_plain(row.get('name'))} ({row['objects']})"
        for row in metrics.get("per_class", [])
        if isinstance(row.get("objects"), int) and row["objects"] < FEW_OBJECTS
    ]
    if uncertain:
        more = f" and {len(uncertain) - 10} more" if len(uncertain) > 10 else ""
        yield f"Classes with too few objects for a reliable AP: {', '.join(uncertain[:10])}{more}."
    if _is_number(small := metrics.get("ap_small")) and small < ap / 2:
        yield f"It is weak on small objects: APs is {small:.3f}."
    calibration = metrics.get("calibration")
    error = calibration.get("expected_error") if isinstance(calibration, Mapping) else None
    if _is_number(error):
        yield f"Scores differ from the precision by {error:.2f} on average."


def _name(options: CardOptions) -> str:
    return options.repository.rpartition("/")[2]


def _backbone(facts: RunFacts) -> str:
    return str(facts.checkpoint.model.spec.backbone)


def _data_name(run: Mapping[str, Any]) -> str:
    """Last part of the data's path, on any system."""
    path = str(run.get("data") or "").replace("\\", "/").rstrip("/")
    return path.rpartition("/")[2] or "the author's images"


def _machine(run: Mapping[str, Any]) -> str:
    """Return the processor, without the name of the machine."""
    device = str(run.get("device") or "an unknown device")
    if not device.startswith("cpu"):
        return _plain(run.get("device_name") or device)
    threads = run.get("threads")
    return _plain(run.get("device_name") or "a CPU") + (
        f" with {threads} threads" if isinstance(threads, int) else ""
    )


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "data"


def _plain(value: Any) -> str:
    """Escape a text of the data for Markdown, on one line."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(value).split()))
