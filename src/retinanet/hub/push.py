"""Push a run to the Hugging Face hub in one commit."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TypedDict, Unpack

from retinanet.config import to_toml
from retinanet.data import Dataset, digest, read_splits, usable
from retinanet.data.selection import select_as_trained
from retinanet.errors import DataError, MissingExtraError, WeightsError
from retinanet.files import write_atomic
from retinanet.hub.card import write_card
from retinanet.hub.facts import RunFacts, read_run
from retinanet.inference import Detector, ImageDetections
from retinanet.inference.backends import DETECTION_SCORE
from retinanet.model.checkpoint import WEIGHTS_FILE, Checkpoint, write_checkpoint
from retinanet.model.hub import parse_hub_name, raise_hub_error

_NUM_EXAMPLES = 4
_MAX_EXAMPLE_SIDE = 1024  # pixels


class CardOptions(TypedDict, total=False):
    """Options of the model card.

    Attributes:
        data: the data that the run was trained on, for example images of ``val``, which are then
            public with the card.
        license: of the weights, by its name on the hub.
        dataset: id of the data on the hub.
        device: for detection in the examples.
    """

    data: str | Path | None
    license: str | None
    dataset: str | None
    device: str


class Pushed(NamedTuple):
    """Result of :func:`push`.

    Attributes:
        name: ``hf://OWNER/NAME@COMMIT``, to load the model by.
        url: page of the repository.
        commit: hash of the commit.
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
    progress: Callable[[str], None] = lambda message: None,
    **card: Unpack[CardOptions],
) -> Pushed:
    """Push a run to the hub in one commit; the repository is created if it does not exist.

    Args:
        run, repository, card: as in :func:`prepare`.
        private: create a private repository; an existing public one is an error.
        message: commit message.
        token: None: that of huggingface_hub (``hf auth login``, ``HF_TOKEN``).
        progress: called with messages.

    Raises:
        WeightsError: the run cannot be read, the hub rejects it or cannot be reached.
        DataError: as :func:`prepare`.
        MissingExtraError: huggingface_hub is not installed.
    """
    repository = _repository_name(repository)
    with tempfile.TemporaryDirectory() as draft:
        files = prepare(run, repository, draft, **card)
        progress(f"{len(files)} files are ready")
        from huggingface_hub import HfApi

        api = HfApi(token=token, library_name="retinanet")
        try:
            api.create_repo(repository, private=private or None, exist_ok=True)
            if private and not api.repo_info(repository).private:
                raise WeightsError(
                    f"hf://{repository} exists and is public; make it private on its page first, "
                    "or push to a new name"
                )
            done = api.upload_folder(
                repo_id=repository,
                folder_path=draft,
                commit_message=message or "A trained RetinaNet",
            )
        except WeightsError:
            raise
        except Exception as error:  # of the hub, the network or the disk
            raise_hub_error(error, f"hf://{repository}", pushing=True, secret=token)
    url = f"{api.endpoint}/{repository}"
    return Pushed(f"hf://{repository}@{done.oid}", url, str(done.oid), tuple(files))


def prepare(
    run: str | Path, repository: str, folder: str | Path, **card: Unpack[CardOptions]
) -> list[str]:
    """Write the files that :func:`push` uploads into `folder`.

    ``model.safetensors``, ``model.json``, ``config.toml``, ``metrics.json`` and ``README.md`` (the
    model card). Paths of this machine are cut to their last part in all of them.

    Args:
        run: a run or checkpoint folder.
        repository: ``OWNER/NAME``.
        folder: a new or empty folder.
        card: options of the model card.

    Returns:
        The files' names, sorted.

    Raises:
        WeightsError: `run` has no checkpoint, `repository` is no valid name, or `folder` is not
            empty.
        DataError: `data` cannot be read, or is not what the run was trained on.
        MissingExtraError: huggingface_hub is not installed.
    """
    if find_spec("huggingface_hub") is None:
        raise MissingExtraError("huggingface_hub", "hub")
    repository = _repository_name(repository)
    facts = read_run(run)
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WeightsError(f"{folder} exists and is not an empty folder; give a new one")
    data = card.get("data")
    splits = {} if data is None else _read_data(data, facts)
    target.mkdir(parents=True, exist_ok=True)
    facts = facts.public()
    write_checkpoint(target, facts.checkpoint)
    if facts.recipe is not None:
        write_atomic(target / "config.toml", to_toml(facts.recipe))
    if facts.metrics:
        text = json.dumps(facts.metrics, indent=1, allow_nan=False)
        write_atomic(target / "metrics.json", text + "\n")
    score = facts.metrics.get("best_score")
    drawn_score = float(score) if isinstance(score, float) and 0 < score < 1 else DETECTION_SCORE
    examples = []
    if "val" in splits:
        device = card.get("device", "auto")
        examples = _draw(facts.checkpoint, splits["val"], target, drawn_score, device)
    text = write_card(
        facts,
        repository,
        license=card.get("license"),
        dataset=card.get("dataset"),
        examples=examples,
        drawn_score=drawn_score,
        megabytes=(target / WEIGHTS_FILE).stat().st_size / 1e6,
    )
    write_atomic(target / "README.md", text)
    return sorted(f.relative_to(target).as_posix() for f in target.rglob("*") if f.is_file())


def _repository_name(given: str) -> str:
    """Return ``OWNER/NAME``, also of ``hf://OWNER/NAME``."""
    try:
        name = parse_hub_name(given if given.startswith("hf:") else f"hf://{given}")
    except WeightsError:
        raise WeightsError(f"invalid repository name {given!r}; give OWNER/NAME") from None
    if name.revision is not None:
        raise WeightsError(f"{given}: a push makes a new revision; leave out @")
    return name.repository


def _read_data(data: str | Path, facts: RunFacts) -> dict[str, Dataset]:
    """Read the run's splits and check that they are what it was trained on."""
    split = facts.checkpoint.info.get("split", {})
    seed, val_fraction = split.get("seed") or 0, split.get("val_fraction") or 0.2
    splits = {
        name: select_as_trained(dataset, facts.checkpoint.info)
        for name, dataset in read_splits(
            data, seed=seed, val_fraction=val_fraction, extras=False
        ).items()
    }
    if set(splits["train"].classes if "train" in splits else ()) != set(facts.checkpoint.classes):
        raise DataError(f"{data}: its classes are not the model's; give the training data")
    if known := facts.run.get("data_digest"):
        # As in training, which leaves out what is wrong in "train".
        found = digest(usable(splits["train"])[0])
        found += digest(splits["val"]) if "val" in splits else ""
        if found != known:
            raise DataError(
                f"{data} is not the training data of the run, or has changed since; leave it out, "
                "or give the right data"
            )
    return splits


def _draw(
    checkpoint: Checkpoint, dataset: Dataset, folder: Path, score: float, device: str
) -> list[tuple[str, int]]:
    """Draw the detections of random images; files are numbered, as names may be private."""
    images = random.Random(0).sample(dataset.images, min(_NUM_EXAMPLES, len(dataset)))
    detector = Detector(checkpoint, device=device, score_threshold=score)
    examples = []
    for number, image in enumerate(images, start=1):
        detections = detector.detect(image.path)
        assert isinstance(detections, ImageDetections)
        drawn = detections.draw(score_threshold=score)
        drawn.thumbnail((_MAX_EXAMPLE_SIDE, _MAX_EXAMPLE_SIDE))
        name = f"example_{number}.jpg"
        drawn.save(folder / name, quality=88)
        examples.append((name, int((detections.scores >= score).sum())))
    return examples
