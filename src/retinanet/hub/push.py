"""A run, as the files that go to the Hugging Face hub, and their way there in one commit."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from retinanet.config import to_toml
from retinanet.data import Dataset, digest, read_splits, usable
from retinanet.errors import DataError, MissingExtraError, WeightsError
from retinanet.files import write_atomic
from retinanet.hub.card import CardOptions, Counts, Example, write_card
from retinanet.hub.facts import RunFacts, public_recipe, read_run, without_places
from retinanet.inference import Detector, ImageDetections
from retinanet.inference.detections import DRAWN_SCORE
from retinanet.model.checkpoint import WEIGHTS_FILE, write_checkpoint
from retinanet.model.hub import HubName, parse_hub_name, refuse_hub

IMAGES = 4
"""Example images in a card."""

_LONGEST = 1024  # pixels of an example's longer side


@dataclass(frozen=True, slots=True)
class Pushed:
    """What went to the hub.

    Attributes:
        name: ``hf://OWNER/NAME@COMMIT``, to load it by.
        url: its page.
        commit: of the upload.
        files: paths in the repository.
    """

    name: str
    url: str
    commit: str
    files: tuple[str, ...]


def push(
    run: str | Path,
    repository: str,
    *,
    private: bool = False,
    message: str | None = None,
    token: str | None = None,
    data: str | Path | None = None,
    license: str | None = None,
    dataset: str | None = None,
    device: str = "auto",
    tell: Callable[[str], None] = lambda text: None,
) -> Pushed:
    """Put a run on the hub: the repository is made where there is none, all goes in one commit.

    Args:
        run: a run or checkpoint folder.
        repository: ``OWNER/NAME``.
        private: the repository is made so that only its owner sees it; one that is there and public
            is refused.
        message: of the commit.
        token: None: the one that huggingface_hub knows (``hf auth login``, ``HF_TOKEN``).
        data, license, dataset, device: as in :func:`prepare`.
        tell: is told what happens.

    Raises:
        WeightsError: the run cannot be read, or the hub refuses it or cannot be reached.
        DataError: as :func:`prepare`.
        MissingExtraError: huggingface_hub is not installed.
    """
    where = _repository(repository)
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise MissingExtraError("huggingface_hub", "hub") from None
    with tempfile.TemporaryDirectory() as draft:
        files = prepare(
            run, where, draft, data=data, license=license, dataset=dataset, device=device
        )
        tell(f"{len(files)} files are ready")
        api = HfApi(token=token, library_name="retinanet")
        try:
            api.create_repo(where, private=private or None, exist_ok=True)
            if private and not api.repo_info(where).private:
                raise WeightsError(
                    f"hf://{where} is there and public; make it private on its page first, or push "
                    f"to a new name"
                )
            done = api.upload_folder(
                repo_id=where, folder_path=draft, commit_message=message or "A trained RetinaNet"
            )
        except WeightsError:
            raise
        except Exception as error:  # of the hub, the network or the disk
            refuse_hub(error, f"hf://{where}", pushing=True, secret=token)
    return Pushed(
        f"hf://{where}@{done.oid}", f"{api.endpoint}/{where}", str(done.oid), tuple(files)
    )


def prepare(
    run: str | Path,
    repository: str,
    folder: str | Path,
    *,
    data: str | Path | None = None,
    license: str | None = None,
    dataset: str | None = None,
    images: int = IMAGES,
    device: str = "auto",
) -> list[str]:
    """Write what :func:`push` would upload into `folder`, and nothing else.

    ``model.safetensors``, ``model.json``, ``config.toml``, ``metrics.json`` and ``README.md``, the
    model card. Paths of this machine are cut down to their last part in all of them.

    Args:
        run: a run or checkpoint folder.
        repository: ``OWNER/NAME``.
        folder: a new or empty folder.
        data: what the run was trained on, for the counts and for example images of ``val``, which
            are then public with the card. None: neither.
        license: of the weights, by its name on the hub.
        dataset: id of the data on the hub.
        images: how many examples.
        device: on which they are searched.

    Returns:
        The files' names, sorted.

    Raises:
        WeightsError: `run` holds no checkpoint, `repository` is no name, or `folder` holds
            something.
        DataError: `data` cannot be read, or is not what the run was trained on.
        MissingExtraError: huggingface_hub is not installed.
    """
    try:
        import huggingface_hub  # noqa: F401  # the card's classes are its
    except ImportError:
        raise MissingExtraError("huggingface_hub", "hub") from None
    where = _repository(repository)
    facts = read_run(run)
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WeightsError(f"{folder} is there already and not an empty folder; name a new one")
    splits = None if data is None else _read_data(data, facts)
    target.mkdir(parents=True, exist_ok=True)
    info = without_places(facts.checkpoint.info)
    write_checkpoint(target, replace(facts.checkpoint, info=info))
    if facts.recipe is not None:
        write_atomic(target / "config.toml", to_toml(public_recipe(facts.recipe)))
    metrics = without_places(facts.metrics, facts.checkpoint.classes)
    if metrics:
        text = json.dumps(metrics, indent=1, allow_nan=False)
        write_atomic(target / "metrics.json", text + "\n")
    score = facts.metrics.get("best_score")
    drawn_score = float(score) if isinstance(score, float) and 0 < score < 1 else DRAWN_SCORE
    examples: list[Example] = []
    if splits is not None and "val" in splits:
        examples = _draw(facts, splits["val"], target, images, drawn_score, device)
    options = CardOptions(
        where,
        license=license,
        dataset=dataset,
        counts={} if splits is None else _counts(splits),
        examples=examples,
        drawn_score=drawn_score,
        megabytes=(target / WEIGHTS_FILE).stat().st_size / 1e6,
    )
    public = replace(facts, run=without_places(facts.run), metrics=metrics)
    if facts.recipe is not None:
        public = replace(public, recipe=public_recipe(facts.recipe))
    write_atomic(target / "README.md", write_card(public, options))
    return sorted(one.relative_to(target).as_posix() for one in target.rglob("*") if one.is_file())


def _repository(given: str) -> str:
    """``OWNER/NAME``, which may stand as ``hf://OWNER/NAME`` too."""
    try:
        name: HubName = parse_hub_name(given if given.startswith("hf:") else f"hf://{given}")
    except WeightsError:
        raise WeightsError(f"{given!r} is no name of a repository: give OWNER/NAME") from None
    if name.revision is not None:
        raise WeightsError(f"{given}: a push makes a revision of its own; leave out @")
    return name.repository


def _read_data(data: str | Path, facts: RunFacts) -> dict[str, Dataset]:
    """The run's splits, as it was trained on them."""
    made = facts.checkpoint.info.get("split", {})
    splits = read_splits(
        data, seed=made.get("seed") or 0, val_fraction=made.get("val_fraction") or 0.2, extras=False
    )
    if set(splits["train"].classes if "train" in splits else ()) != set(facts.checkpoint.classes):
        raise DataError(f"{data}: its classes are not the model's; give what it was trained on")
    known = facts.run.get("data_digest")
    if known:
        # As training does: faults of "train" are left out before.
        now = digest(usable(splits["train"])[0]) + (
            digest(splits["val"]) if "val" in splits else ""
        )
        if now != known:
            raise DataError(
                f"{data} is not what the run was trained on, or has changed since: the card would "
                f"say what is not true; leave out the data, or give the right ones"
            )
    return splits


def _counts(splits: Mapping[str, Dataset]) -> dict[str, Counts]:
    counts = {}
    for name, dataset in splits.items():
        objects = dict.fromkeys(dataset.classes, 0)
        for image in dataset.images:
            for one in image.annotations:
                objects[dataset.classes[one.label]] += not one.ignored
        counts[name] = Counts(len(dataset), objects)
    return counts


def _draw(
    facts: RunFacts, dataset: Dataset, folder: Path, count: int, score: float, device: str
) -> list[Example]:
    """Images drawn by lot, not chosen; named by number, for their own names may tell much."""
    images = random.Random(0).sample(dataset.images, min(count, len(dataset)))
    detector = Detector(facts.checkpoint, device=device)
    examples = []
    for number, image in enumerate(images, start=1):
        found = detector.detect(image.path)
        assert isinstance(found, ImageDetections)
        drawn = found.draw(score_threshold=score)
        drawn.thumbnail((_LONGEST, _LONGEST))
        name = f"example_{number}.jpg"
        drawn.save(folder / name, quality=88)
        examples.append(Example(name, int((found.scores >= score).sum())))
    return examples
