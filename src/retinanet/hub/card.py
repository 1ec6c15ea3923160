"""The model card: what the model finds, how well, how it came about, and where it ends."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retinanet import __version__
from retinanet.config import LossConfig, Recipe
from retinanet.hub.facts import RunFacts

FEW_IMAGES = 1000
"""Training images under which the card warns of what the model has not seen."""

FEW_OBJECTS = 100
"""Objects of a class that was judged, under which its AP is called uncertain."""

WEAK = 0.2
"""AP under which the card calls the model weak."""

_SHOWN_CLASSES = 100
_SUMMARY = (
    ("ap", "AP", "mean over IoU .50 to .95 and classes"),
    ("ap50", "AP50", "at IoU .50"),
    ("ap75", "AP75", "at IoU .75"),
    ("ap_small", "APs", "objects under 32² square pixels"),
    ("ap_medium", "APm", "from 32² to 96²"),
    ("ap_large", "APl", "over 96²"),
    ("ar100", "AR100", "recall with 100 boxes a class and image"),
)
_METRICS = (("ap", "map"), ("ap50", "map_50"), ("ap75", "map_75"))
_SPLIT = "val"  # training judges by it


@dataclass(frozen=True, slots=True)
class Counts:
    """What a split holds.

    Attributes:
        images: in all.
        objects: by class name; those that are ignored are not counted.
    """

    images: int
    objects: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Example:
    """An image with what the model found in it.

    Attributes:
        file: its name beside the card.
        objects: how many are drawn.
    """

    file: str
    objects: int


@dataclass(frozen=True, slots=True)
class CardOptions:
    """What a run does not know of itself.

    Attributes:
        repository: ``OWNER/NAME``.
        license: of the weights, by its name on the hub, such as ``apache-2.0``.
        dataset: id of the data on the hub.
        counts: by split, from the data.
        examples: images.
        drawn_score: score from which their boxes are drawn.
        megabytes: of the file of weights.
    """

    repository: str
    license: str | None = None
    dataset: str | None = None
    counts: Mapping[str, Counts] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    drawn_score: float = 0.3
    megabytes: float = 0.0


def write_card(facts: RunFacts, options: CardOptions) -> str:
    """The text of README.md: YAML for the hub, then Markdown for people.

    Needs huggingface_hub, whose classes know the YAML's schema.
    """
    head = _head(facts, options)
    sections = (
        _what(facts, options),
        _use(facts, options),
        _results(facts),
        _images(options),
        _data(facts, options),
        _training(facts),
        _limits(facts, options),
    )
    text = "\n\n".join("\n".join(section) for section in sections if section)
    return f"---\n{head}\n---\n\n{text}\n"


def _head(facts: RunFacts, options: CardOptions) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    name = _data_name(facts)
    results = [
        EvalResult(
            task_type="object-detection",
            task_name="Object detection",
            dataset_type=options.dataset or _slug(name),
            dataset_name=name,
            dataset_split=_SPLIT,
            metric_type=kind,
            metric_name=next(short for field, short, _ in _SUMMARY if field == key),
            metric_value=round(value, 4),
            verified=False,
        )
        for key, kind in _METRICS
        if (value := _number(facts.metrics.get(key))) is not None
    ]
    data = ModelCardData(
        library_name="retinanet",
        pipeline_tag="object-detection",
        tags=["object-detection", "retinanet", "focal-loss", _slug(_backbone(facts))],
        license=options.license,
        datasets=[options.dataset] if options.dataset else None,
        model_name=options.repository.rpartition("/")[2],
        eval_results=results or None,
    )
    return data.to_yaml().strip()


def _what(facts: RunFacts, options: CardOptions) -> list[str]:
    classes = facts.checkpoint.classes
    shown = ", ".join(map(_plain, classes[:20])) + (", ..." if len(classes) > 20 else "")
    many = "one class" if len(classes) == 1 else f"{len(classes)} classes"
    parameters = sum(one.numel() for one in facts.checkpoint.model.parameters())
    size = f", {options.megabytes:.0f} MB" if options.megabytes else ""
    return [
        f"# {_plain(options.repository.rpartition('/')[2])}",
        "",
        f"A RetinaNet with the backbone {_backbone(facts)} that finds {many} of object in "
        f"images: {shown}.",
        "",
        f"{parameters / 1e6:.1f} million parameters{size}; images are searched at "
        f"{facts.checkpoint.image_size} pixels of the shorter side (at most "
        f"{facts.checkpoint.max_size} of the longer). Focal loss and network are those of Lin et "
        f"al. 2017, [Focal Loss for Dense Object Detection](https://arxiv.org/abs/1708.02002).",
    ]


def _use(facts: RunFacts, options: CardOptions) -> list[str]:
    address = f"hf://{options.repository}"
    versions = facts.run.get("versions")
    made = versions.get("retinanet") if isinstance(versions, dict) else None
    made_by = f"{_plain(made)} made this model" if made else f"{__version__} wrote this card"
    score = _number(facts.metrics.get("best_score"))
    advice = (
        []
        if score is None
        else [
            "",
            f"Scores are no probabilities of being right. On the images held back the threshold "
            f"of the best F1 was {score:.2f} (`--score-threshold`, or `score_threshold=` in "
            f"Python); without it every box over the model's own threshold comes out.",
        ]
    )
    return [
        "## How to use it",
        "",
        f"With the `retinanet` package ({made_by}) and its extra `hub`:",
        "",
        "```python",
        "import retinanet as rn",
        "",
        f'detector = rn.load("{address}")',
        'found = detector.detect("image.jpg")',
        "for box, score, label in found:",
        '    print(detector.classes[label], f"{score:.2f}", box.tolist())',
        'found.draw().save("drawn.jpg")',
        "```",
        "",
        "```",
        f"retinanet detect {address} images/ --out found",
        f"retinanet train data/ --init {address} --out my_run",
        "```",
        *advice,
    ]


def _results(facts: RunFacts) -> list[str]:
    metrics = facts.metrics
    if _number(metrics.get("ap")) is None:
        return ["## Results", "", "This model was not judged on labelled images."]
    lines = [
        "## Results",
        "",
        f"COCO's figures on {metrics.get('images', '?')} images ({_SPLIT}) with "
        f"{metrics.get('objects', '?')} objects:",
        "",
        *_table(
            ["", "what", "value"],
            [
                [short, words, _share(metrics.get(key))]
                for key, short, words in _SUMMARY
                if key in metrics
            ],
        ),
    ]
    classes = [one for one in metrics.get("per_class", []) if one.get("objects")]
    if classes:
        rows = [
            [
                _cell(one.get("name")),
                str(one.get("objects")),
                *(_share(one.get(key)) for key in ("ap", "ap50", "ap75", "ar")),
            ]
            for one in classes[:_SHOWN_CLASSES]
        ]
        lines += ["", *_table(["class", "objects", "AP", "AP50", "AP75", "AR"], rows)]
        if len(classes) > _SHOWN_CLASSES:
            lines += ["", f"and {len(classes) - _SHOWN_CLASSES} more classes in metrics.json."]
    speed = _number(metrics.get("images_per_second"))
    if speed:
        lines += [
            "",
            f"Speed: {speed:.1f} images a second while these were judged, reading and resizing "
            f"them included, on {_machine(facts.run)}; a measure of that machine, with other work "
            f"on it or not.",
        ]
    return lines


def _images(options: CardOptions) -> list[str]:
    if not options.examples:
        return []
    lines = [
        "## Images",
        "",
        f"Drawn at random from those held back, none left out; boxes of a score of at least "
        f"{options.drawn_score:.2f}.",
    ]
    for number, example in enumerate(options.examples, start=1):
        many = "1 object" if example.objects == 1 else f"{example.objects} objects"
        lines += ["", f"![Example {number}: {many} found]({example.file})"]
    return lines


def _data(facts: RunFacts, options: CardOptions) -> list[str]:
    run = facts.run
    if not run and not options.counts:
        return ["## Data", "", "Not recorded with this checkpoint."]
    name = options.dataset or _data_name(facts)
    lines = ["## Data", "", f"{_plain(name)}: trained on `train`, judged on `{_SPLIT}`."]
    origin = run.get("split_origin")
    if origin:
        lines += ["", f"Splits: {_plain(origin)}."]
    if options.counts:
        names = list(facts.checkpoint.classes)
        rows = [["images", *(str(one.images) for one in options.counts.values())]]
        rows += [
            [
                f"objects: {_cell(one)}",
                *(str(c.objects.get(one, 0)) for c in options.counts.values()),
            ]
            for one in names[:_SHOWN_CLASSES]
        ]
        lines += ["", *_table(["", *map(_cell, options.counts)], rows)]
        if len(names) > _SHOWN_CLASSES:
            lines += ["", f"and {len(names) - _SHOWN_CLASSES} more classes."]
    elif isinstance(run.get("images"), dict):
        rows = [[_cell(split), str(count)] for split, count in run["images"].items()]
        lines += ["", *_table(["split", "images"], rows)]
    return lines


def _training(facts: RunFacts) -> list[str]:
    recipe = facts.recipe
    if recipe is None:
        return ["## Training", "", "Not recorded with this checkpoint."]
    step = facts.checkpoint.info.get("step")
    train = recipe.train
    length = f"{facts.run.get('steps', train.steps)} steps of {train.batch_size} images"
    if isinstance(step, int) and step != facts.run.get("steps"):
        length += f" (these weights are those after step {step}, the best on `{_SPLIT}`)"
    decay = f", weight decay {train.weight_decay:g}"
    optimizer = {"sgd": f"SGD with momentum {train.momentum:g}", "adamw": "AdamW"}[train.optimizer]
    schedule = {"steps": "falling in steps", "cosine": "falling along a cosine"}[train.schedule]
    warmup = f" after {train.warmup_steps} steps of warm-up" if train.warmup_steps else ""
    lines = [
        "## Training",
        "",
        f"- {length}; {optimizer}{decay}; learning rate {train.lr:g} for {train.reference_batch} "
        f"images a step, {schedule}{warmup}.",
        f"- Loss: {_loss(recipe.loss)}.",
        f"- Network: {_network(recipe)}.",
        f"- Images: {_augmentation(recipe)}.",
    ]
    more = []
    if train.ema:
        more.append(f"weights averaged with decay {train.ema:g}")
    if train.clip_norm:
        more.append(f"gradients clipped at a norm of {train.clip_norm:g}")
    more.append(f"precision {train.precision}, seed {train.seed}")
    lines.append(f"- {_upper(', '.join(more))}.")
    versions = facts.run.get("versions")
    if isinstance(versions, dict):
        told = ", ".join(f"{_plain(name)} {_plain(one)}" for name, one in versions.items())
        lines.append(f"- Made with {told}, on {_machine(facts.run)}.")
    lines += ["", "`config.toml` is the whole recipe."]
    return lines


def _loss(loss: LossConfig) -> str:
    names = {
        "focal": f"focal, alpha {_alpha(loss.alpha)}, gamma {loss.gamma:g}",
        "cross_entropy": f"cross entropy, alpha {_alpha(loss.alpha)}",
        "focal_star": f"focal*, gamma {loss.gamma:g}, beta {loss.beta:g}",
        "hinge": f"hinge, margin {loss.margin:g}",
    }
    mined = "" if loss.mining == "none" else f" with online hard example mining ({loss.mining})"
    boxes = loss.box.replace("_", " ")
    return f"{names[loss.classification]}{mined} for classes; {boxes} for boxes"


def _alpha(alpha: float | tuple[float, ...] | None) -> str:
    if alpha is None:
        return "none"
    return f"{alpha:g}" if isinstance(alpha, float | int) else "of each class its own"


def _network(recipe: Recipe) -> str:
    model = recipe.model
    start = {"none": "from random weights", "default": "from ImageNet weights"}.get(
        str(model.backbone_weights), f"from the weights {_plain(model.backbone_weights)}"
    )
    levels = "P2 to P7" if model.p2 else "P3 to P7"
    return (
        f"{_plain(model.backbone)} {start}, {levels} of {model.channels} channels, heads of "
        f"{model.head_depth} layers"
    )


def _augmentation(recipe: Recipe) -> str:
    data = recipe.data
    parts = [f"{data.image_size} pixels of the shorter side, at most {data.max_size} of the longer"]
    if data.multi_scale:
        parts.append(f"or one of {', '.join(map(str, data.multi_scale))} drawn a step")
    if data.horizontal_flip:
        parts.append(f"mirrored with a chance of {data.horizontal_flip:g}")
    if data.vertical_flip:
        parts.append(f"upside down with a chance of {data.vertical_flip:g}")
    if data.scale_jitter != (1.0, 1.0):
        low, high = data.scale_jitter
        parts.append(f"scaled by {low:g} to {high:g}")
    if data.crop:
        parts.append("cropped")
    if data.colour:
        parts.append(f"colours changed with a strength of {data.colour:g}")
    return "; ".join(parts)


def _limits(facts: RunFacts, options: CardOptions) -> list[str]:
    """What a reader should know before relying on it, each from a number of the run."""
    told: list[str] = []
    metrics, run = facts.metrics, facts.run
    trained = _trained_on(facts, options)
    if trained is not None and trained < FEW_IMAGES:
        told.append(
            f"It was trained on {trained} images, which is few: expect it to fail on images "
            f"from another camera, place or day than those."
        )
    else:
        told.append("On other kinds of images than it was trained on it was not tried.")
    ap = _number(metrics.get("ap"))
    if ap is None:
        told.append("Nothing is known of how often it is right.")
    else:
        told.append(
            f"The figures are of `{_SPLIT}`, by which the best step was chosen, so they flatter it "
            f"a little; they are not those of a test set."
        )
        if ap < WEAK:
            told.append(f"An AP of {ap:.3f} is weak: most of what it says needs a person's look.")
    origin = str(run.get("split_origin") or "")
    if "for validation" in origin:
        told.append(
            "The images held back were drawn at random: where several show one scene, some may "
            "lie on either side, and the figures are then too good."
        )
    uncertain = [
        f"{_plain(one.get('name'))} ({one.get('objects')})"
        for one in metrics.get("per_class", [])
        if isinstance(one.get("objects"), int) and one["objects"] < FEW_OBJECTS
    ]
    if uncertain:
        more = f" and {len(uncertain) - 10} more" if len(uncertain) > 10 else ""
        told.append(
            f"Too few objects were judged for a sure figure of: {', '.join(uncertain[:10])}{more}."
        )
    small = _number(metrics.get("ap_small"))
    if small is not None and ap is not None and small < ap / 2:
        told.append(f"It is weak on small objects: APs is {small:.3f}.")
    calibration = metrics.get("calibration")
    off = _number(calibration.get("expected_error")) if isinstance(calibration, dict) else None
    if off is not None:
        told.append(f"Scores differ from the share that is right by {off:.2f} on average.")
    return ["## Limits", "", *(f"- {one}" for one in told)]


def _trained_on(facts: RunFacts, options: CardOptions) -> int | None:
    if "train" in options.counts:
        return options.counts["train"].images
    images = facts.run.get("images")
    count = images.get("train") if isinstance(images, dict) else None
    return count if isinstance(count, int) else None


def _backbone(facts: RunFacts) -> str:
    return str(facts.checkpoint.model.spec["backbone"])


def _data_name(facts: RunFacts) -> str:
    """The last part of where the data lay, whatever the system."""
    path = str(facts.run.get("data") or "").replace("\\", "/").rstrip("/")
    return path.rpartition("/")[2] or "the author's images"


def _machine(run: Mapping[str, Any]) -> str:
    """The processor, and no name by which the machine could be found."""
    device = str(run.get("device") or "an unknown device")
    if device.startswith("cpu"):
        name, threads = run.get("device_name"), run.get("threads")
        many = f" with {threads} threads" if isinstance(threads, int) else ""
        return f"{_plain(name) if name else 'a CPU'}{many}"
    return _plain(run.get("device_name") or device)


def _number(value: Any) -> float | None:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if real else None


def _share(value: Any) -> str:
    number = _number(value)
    return "-" if number is None else f"{number:.3f}"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "data"


_MARKS = re.compile(r"([\\`*_{}\[\]<>#|!])")


def _plain(value: Any) -> str:
    """A text of the data's on one line, that Markdown shows as it stands."""
    return _MARKS.sub(r"\\\1", " ".join(str(value).split()))


_cell = _plain


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; the first column is text, the others figures, but for words."""
    sides = ["---", *("---" if head == "what" else "---:" for head in header[1:])]
    lines = [header, sides, *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
