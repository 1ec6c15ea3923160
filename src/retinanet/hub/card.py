"""The model card: ``model_card.md`` filled in with the facts of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
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

_SUMMARY = {
    "ap": "mean AP over IoU .50 to .95 and classes",
    "ap50": "AP at IoU .50",
    "ap75": "AP at IoU .75",
    "ap_small": "AP of objects under 32² square pixels",
    "ap_medium": "AP of objects from 32² to 96²",
    "ap_large": "AP of objects over 96²",
}
_METRIC_TYPES = {"ap": "map", "ap50": "map_50", "ap75": "map_75"}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|!])")


def write_card(
    facts: RunFacts,
    repository: str,
    *,
    license: str | None,
    dataset: str | None,
    examples: Sequence[tuple[str, int]],
    drawn_score: float,
    megabytes: float,
) -> str:
    """Return the text of README.md: the hub's YAML, then Markdown. Needs huggingface_hub."""
    from huggingface_hub import ModelCard

    checkpoint, metrics, run = facts.checkpoint, facts.metrics, facts.run
    name = repository.rpartition("/")[2]
    version = (run.get("versions") or {}).get("retinanet", __version__)
    card = ModelCard.from_template(
        _card_data(facts, name, license, dataset),
        template_str=(files("retinanet.hub") / "model_card.md").read_text("utf-8"),
        name=name,
        address=f"hf://{repository}",
        version=version,
        dataset=dataset or _data_name(run),
        examples=examples,
        drawn_score=drawn_score,
        megabytes=megabytes,
        checkpoint=checkpoint,
        backbone=str(checkpoint.model.spec.backbone),
        parameters=sum(parameter.numel() for parameter in checkpoint.model.parameters()),
        metrics=metrics,
        per_class=[row for row in metrics.get("per_class", []) if row.get("objects")],
        summary=_SUMMARY,
        run=run,
        recipe=facts.recipe,
        step=checkpoint.info.get("step"),
        limits=[*_limits(facts)],
        plain=_plain,
        figure=lambda value: f"{value:.3f}" if _is_number(value) else "-",
        is_number=_is_number,
    )
    return str(card.content).rstrip() + "\n"


def _card_data(facts: RunFacts, name: str, license: str | None, dataset: str | None) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    data_name = _data_name(facts.run)
    results = [
        EvalResult(
            task_type="object-detection",
            task_name="Object detection",
            dataset_type=dataset or _slug(data_name),
            dataset_name=data_name,
            dataset_split="val",
            metric_type=kind,
            metric_name=key.upper(),
            metric_value=round(facts.metrics[key], 4),
            verified=False,
        )
        for key, kind in _METRIC_TYPES.items()
        if _is_number(facts.metrics.get(key))
    ]
    backbone = _slug(str(facts.checkpoint.model.spec.backbone))
    return ModelCardData(
        library_name="retinanet",
        pipeline_tag="object-detection",
        tags=["object-detection", "retinanet", "focal-loss", backbone],
        license=license,
        datasets=[dataset] if dataset else None,
        model_name=name,
        eval_results=results or None,
    )


def _limits(facts: RunFacts) -> Iterator[str]:
    """Yield warnings that follow from the numbers of the run."""
    metrics, run = facts.metrics, facts.run
    count = (run.get("images") or {}).get("train")
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


def _data_name(run: Mapping[str, Any]) -> str:
    """Return the last part of the data's path, on any system."""
    path = str(run.get("data") or "").replace("\\", "/").rstrip("/")
    return path.rpartition("/")[2] or "the author's images"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "data"


def _plain(value: Any) -> str:
    """Escape a text of the data for Markdown, on one line."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(value).split()))
