"""Collections past one machine: detections of any number of images, on a Ray cluster.

The inputs are listed once and cut into shards. A shard is done wholly by one detector, an actor of
Ray Data's pool, which reads ahead in threads, writes the shard's files and last its mark. A shard
with a mark is never done again; one without is not done, whatever else is there. So a run that is
killed, with a process or with a machine, goes on where it was.

Ray Data is not asked to carry images from readers to detectors: the blocks of a shard would be
spread over the cluster, and one that died would have to be put together again; and an image would
be copied twice, for a detector that waits for its network, not for its readers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import uuid
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Unpack, get_args

from retinanet import __version__, errors
from retinanet.batch.inputs import is_archive, iter_inputs
from retinanet.batch.store import DRAFTS, Store, is_address
from retinanet.batch.worker import (
    DONE,
    INPUTS,
    TRIES,
    ShardDetector,
    Work,
    marker,
)
from retinanet.config import check_choice
from retinanet.errors import ConfigError, DataError, MissingExtraError, RetinaNetError
from retinanet.inference.backends import Backend, Thresholds
from retinanet.inference.detector import Detector, load
from retinanet.inference.exported import is_exported
from retinanet.model.checkpoint import load_checkpoint, write_checkpoint
from retinanet.model.precision import Precision

PLAN = "plan.json"
SUMMARY = "summary.json"
ERRORS = "errors"
VERSION = 1

# A shard is what a kill loses and what a worker gets at a time.
_LEAST_SHARD, _LARGEST_SHARD, _SHARDS = 16, 256, 64

_CORES = 4  # of a detector without a GPU; more help a network little

_AT_ONCE = 4096  # shards given to Ray Data at once: each takes memory of the driver
_READ_AT_ONCE = 256  # marks

_STORE = 200_000_000  # bytes of the object store beside the model: only rows of numbers go through


@dataclass(frozen=True, slots=True)
class CollectionSummary:
    """What was found in a collection.

    Attributes:
        out: where the files are.
        images: that were searched.
        objects: how many of each class, most frequent first.
        errors: images and tar files that could not be read.
        failures: the first of them, with ``file`` and ``reason``.
        shards: of the collection.
        done_before: those that an earlier call had done.
        network: what ran the network, by the number of shards.
    """

    out: str
    images: int
    objects: dict[str, int]
    errors: int
    failures: tuple[dict[str, str], ...]
    shards: int
    done_before: int
    network: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """What summary.json says, however many calls it took."""
        return {
            "images": self.images,
            "objects": self.objects,
            "errors": self.errors,
            "shards": self.shards,
            "network": self.network,
        }


def search_collection(
    model: str | Path,
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    device: str = "auto",
    workers: int | None = None,
    batch_size: int = 1,
    tile: int | str | None = None,
    overlap: float = 0.2,
    shard_size: int | None = None,
    precision: str = "auto",
    backend: str = "auto",
    image_size: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    **thresholds: Unpack[Thresholds],
) -> CollectionSummary:
    """Search a collection on a Ray cluster, or go on with one that was stopped.

    Runs on the cluster that this process is connected to, else on that of ``RAY_ADDRESS``, else on
    one found on this machine, else on a local one that is started and stopped again. Each machine
    needs this package. The model's files are sent to it.

    Args:
        model: as :func:`retinanet.inference.load` takes it, on this machine.
        sources: images, folders, globs, list files (.txt: a path or an address a line),
            WebDataset shards (.tar), also with braces; on a disk that all machines share or under
            an fsspec address (``s3://``, ``gs://``, ``hf://``).
        out: a folder on such a disk, or an address.
        device: as for :func:`retinanet.inference.load`, on the machine of each detector.
        workers: detectors at once; None: one a GPU of the cluster, or without any one for 4 cores.
            The cores are shared out among them.
        batch_size: images that the network takes at once.
        tile, overlap: as in :meth:`retinanet.inference.Detector.stream`.
        shard_size: inputs of a shard; None: 16 to 256, as many as there are inputs, or as it began.
            A tar file is a shard of its own.
        precision, backend, image_size: as for :func:`retinanet.inference.load`.
        on_progress: called with the shards done and their number.
        on_note: called with what a person may want to know while it runs.
        thresholds: laid over the model's own.

    Returns:
        What was found; the same is in ``summary.json``.

    Raises:
        ConfigError: a setting out of range, or `out` was begun with others, with another model or
            for other images.
        DataError: a source stands for nothing, or a shard could not be done in three tries.
        WeightsError: there is no such model.
        MissingExtraError: Ray, or what a source needs, is not installed.
    """
    ray = _import_ray()
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size} is under 1")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers {workers} is under 1")
    if shard_size is not None and shard_size < 1:
        raise ConfigError(f"shard_size {shard_size} is under 1")
    if precision == "int8" and not _is_exported(Path(model)):
        raise ConfigError(
            "precision int8 is calibrated once, not on each machine: make a file of it with "
            "`retinanet export`, and give that as the model"
        )
    listed = [sources] if isinstance(sources, str | Path) else sources
    given = [os.fspath(one) for one in listed]
    note = on_note or (lambda _: None)
    options = {
        "precision": precision,
        "backend": backend,
        "image_size": image_size,
        **thresholds,
    }
    # Loaded here too: what is wrong with it is said at once, not by a machine far away.
    detector, files, name = _read_model(model, options)
    search = {"batch_size": batch_size, "tile": tile, "overlap": overlap}
    store = Store(out)
    with ExitStack() as stack:
        listing = stack.enter_context(_listing(given))
        plan = _plan(store, listing, shard_size, _identity(detector, files, options, search))
        shards = listing.cut(plan["shard_size"])
        total = len(shards) - 1
        done = _done(store)
        before = len(done)
        if before < total:
            size = sum(map(len, files.values()))
            stack.enter_context(_cluster(ray, size))
            stack.enter_context(_quiet_logs())
            place = _Place.of(ray, device, workers, note)
            work = Work(
                model=files,
                model_name=name,
                options={"device": device, **options},
                search=search,
                out=store,
                base=os.getcwd() if listing.relative else "",
                threads=place.cpus,
                fsspec=_fsspec_settings(),
                call=uuid.uuid4().hex,
            )
            missing = (shard for shard in range(total) if shard not in done)
            _search_all(ray, work, place, shards, missing, before, on_progress)
    for tries_left in reversed(range(TRIES)):
        try:
            summary = _finish(store, total, before)
            break
        except FileNotFoundError:
            # Another call on this folder has come to its end now, and removed all drafts.
            if not tries_left:
                raise
    store.remove_drafts()
    return summary


def _import_ray() -> Any:
    # Read when Ray is imported. It would send how it is used to its makers, and its core writes
    # warnings of its own matters beside the answer.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import pyarrow  # noqa: F401
        import ray
        import ray.data
    except ImportError:
        raise MissingExtraError("ray", "ray") from None
    return ray


def _read_model(
    model: str | Path, options: Mapping[str, Any]
) -> tuple[Detector, dict[str, bytes], str]:
    """The detector, the model's files by name, and which of them is to be loaded."""
    path = Path(model)
    if _is_exported(path):
        detector = load(path, "cpu", **options)
        whole = [path, path.with_suffix(".bin")] if path.suffix.lower() == ".xml" else [path]
        return detector, {one.name: one.read_bytes() for one in whole}, path.name
    checkpoint = load_checkpoint(model)
    with tempfile.TemporaryDirectory(prefix="retinanet-") as folder:
        write_checkpoint(Path(folder), checkpoint)
        files = {one.name: one.read_bytes() for one in sorted(Path(folder).iterdir())}
    # The device and what runs there are the machine's; the rest is checked here.
    checked = {**options, "precision": "float32", "backend": "torch"}
    _check_names(str(options["precision"]), str(options["backend"]))
    return Detector(checkpoint, device="cpu", **checked), files, ""


def _is_exported(path: Path) -> bool:
    return is_exported(path) and not path.is_dir()


def _check_names(precision: str, backend: str) -> None:
    check_choice("precision", precision, (*get_args(Precision), "int8"))
    check_choice("backend", backend, get_args(Backend))


def _identity(
    detector: Detector,
    files: Mapping[str, bytes],
    options: Mapping[str, Any],
    search: Mapping[str, Any],
) -> dict[str, Any]:
    """All that the detections depend on beside the images."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return {
        "model": digest.hexdigest(),
        "classes": list(detector.classes),
        "settings": {
            "precision": options["precision"],
            "backend": options["backend"],
            "image_size": detector.image_size,
            "max_size": detector.max_size,
            "tile": search["tile"],
            "overlap": search["overlap"],
            **detector.thresholds,
        },
    }


@dataclass(frozen=True, slots=True)
class _Listing:
    """The inputs, in a file on this machine.

    Attributes:
        file: a JSON string a line.
        count: lines.
        digest: of their bytes, and of the working folder if a path is relative to it.
        relative: whether one is.
    """

    file: Path
    count: int
    digest: str
    relative: bool

    def cut(self, size: int) -> array[int]:
        """Where each shard begins in the file, and where the last one ends."""
        starts, place, inside = array("Q"), 0, 0
        alone = False
        with self.file.open("rb") as file:
            for line in file:
                archive = is_archive(json.loads(line))
                if not starts or inside == size or archive or alone:
                    starts.append(place)
                    inside = 0
                inside += 1
                alone = archive
                place += len(line)
        starts.append(place)
        return starts


@contextmanager
def _listing(given: Sequence[str]) -> Iterator[_Listing]:
    with tempfile.TemporaryDirectory(prefix="retinanet-") as folder:
        file = Path(folder, INPUTS)
        digest, count, relative = hashlib.sha256(), 0, False
        with file.open("wb") as lines:
            for name in iter_inputs(given):
                if not (relative or is_address(name) or os.path.isabs(name)):
                    relative = True
                    digest.update(os.getcwd().encode("utf-8", "surrogateescape"))
                line = json.dumps(name).encode("ascii") + b"\n"
                digest.update(line)
                lines.write(line)
                count += 1
        if not count:
            raise DataError("no source is given")
        yield _Listing(file, count, digest.hexdigest(), relative)


def _plan(
    store: Store, listing: _Listing, shard_size: int | None, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """That of the folder, if it is for the same; else a new one is written.

    Raises:
        ConfigError: the folder was begun for something else.
        DataError: it cannot be written.
    """
    new = {
        "format": "retinanet collection",
        "version": VERSION,
        "made by": f"retinanet {__version__}",
        "inputs": listing.count,
        "listing": listing.digest,
        "shard_size": shard_size
        or min(_LARGEST_SHARD, max(_LEAST_SHARD, -(-listing.count // _SHARDS))),
        **identity,
    }
    try:
        old = _read_plan(store)
        if old is None:
            with store.draft(INPUTS) as draft:
                shutil.copyfile(listing.file, draft)
            store.write(PLAN, json.dumps(new, indent=2, ensure_ascii=False) + "\n")
            return new
    except RetinaNetError:
        raise
    except Exception as error:  # of a disk, or of any store
        why = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{store.address} cannot be written to: {why}") from None
    if shard_size is None:
        new["shard_size"] = old["shard_size"]
    differs = _difference(old, new)
    if differs:
        raise ConfigError(
            f"{store.address} was begun {differs}; choose another --out, or remove this one"
        )
    return old


def _read_plan(store: Store) -> dict[str, Any] | None:
    if not store.exists(PLAN):
        if store.names() - {INPUTS, DRAFTS}:
            raise ConfigError(
                f"{store.address} holds other files, and no {PLAN}: choose another --out"
            )
        return None
    try:
        plan = json.loads(store.read(PLAN))
        if plan["format"] == "retinanet collection" and plan["version"] <= VERSION:
            return dict(plan)
    except (ValueError, KeyError, TypeError):
        pass
    raise ConfigError(
        f"{store.address}/{PLAN} is not of a collection that this version can go on with: "
        "choose another --out"
    )


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """In words; empty if there is none."""
    if old["model"] != new["model"] or old["classes"] != new["classes"]:
        return "with another model"
    settings = {**old["settings"], "shard_size": old["shard_size"]}
    wanted = {**new["settings"], "shard_size": new["shard_size"]}
    for key in sorted(settings.keys() | wanted.keys()):
        if settings.get(key) != wanted.get(key):
            return f"with {key} {settings.get(key)}, not {wanted.get(key)}"
    if old["listing"] != new["listing"]:
        return f"for other images ({old['inputs']} inputs then, {new['inputs']} now)"
    return ""


def _done(store: Store) -> set[int]:
    return {int(name.removesuffix(".json")) for name in store.names(DONE) if name.endswith(".json")}


@dataclass(frozen=True, slots=True)
class _Place:
    """What each of some detectors gets.

    Attributes:
        workers: how many there are.
        cpus: processors of each.
        gpus: GPUs of each, 0 or 1.
    """

    workers: int
    cpus: int
    gpus: int

    @classmethod
    def of(cls, ray: Any, device: str, workers: int | None, note: Callable[[str], None]) -> _Place:
        nodes = [
            (int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
            for node in ray.nodes()
            if node["Alive"]
        ]
        gpus = device.startswith("cuda") or (device == "auto" and any(gpu for _, gpu in nodes))
        if gpus:
            nodes = [node for node in nodes if node[1]]
            if not nodes:
                raise ConfigError("the cluster has no GPU (yet): give --device cpu, or auto")
        if workers is None:
            cores = sum(cpu for cpu, _ in nodes)
            workers = max(1, sum(gpu for _, gpu in nodes) if gpus else cores // _CORES)

        def room(cpus: int) -> int:
            return sum(min(cpu // cpus, gpu if gpus else cpu) for cpu, gpu in nodes)

        most = max((cpu for cpu, _ in nodes), default=1)
        cpus = next((each for each in range(most, 0, -1) if room(each) >= workers), 1)
        if room(1) < workers:
            kind = "GPUs" if gpus else "cores"
            note(f"the cluster has {kind} for {room(1)} of {workers} workers now; the others wait")
        return cls(workers, cpus, int(gpus))


@contextmanager
def _cluster(ray: Any, model_size: int) -> Iterator[None]:
    """A cluster to work on; one that is started here is stopped at the end.

    Raises:
        DataError: RAY_ADDRESS names none that answers.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    own = {"include_dashboard": False, "object_store_memory": _STORE + 2 * model_size}
    with _silence():
        try:
            ray.init(address=address or "auto", **quiet)
        except (ConnectionError, ValueError) as error:
            if address and address != "local":
                why = next(iter(str(error).splitlines()), "")
                raise DataError(
                    f"no Ray cluster answers at RAY_ADDRESS {address}: {why}; unset it to work "
                    "on this machine alone"
                ) from None
            ray.init(address="local", **own, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _silence() -> Iterator[None]:
    """Standard error away: Ray's core says there that it was told to be silent."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Ray Data tells of each execution, and of each shard of a dead process with a traceback."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _fsspec_settings() -> dict[str, Any]:
    import fsspec

    return {kind: dict(settings) for kind, settings in fsspec.config.conf.items()}


def _search_all(
    ray: Any,
    work: Work,
    place: _Place,
    shards: Sequence[int],
    missing: Iterable[int],
    before: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Do the missing shards.

    Raises:
        RetinaNetError: no detector can be made, or a shard fails again and again.
    """
    total, done = len(shards) - 1, before
    reference = ray.put(work)
    waiting = iter(missing)
    again: list[int] = []
    tries: Counter[int] = Counter()
    problems: dict[int, str] = {}
    if on_progress is not None:
        on_progress(done, total)
    while True:
        # What failed is tried last, when the others are done.
        batch = list(islice(waiting, _AT_ONCE))
        if not batch:
            batch, again = again, []
        if not batch:
            break
        left = set(batch)
        rows = [{"shard": i, "start": shards[i], "end": shards[i + 1]} for i in batch]
        for row in _run(ray, reference, place, rows):
            shard, problem = int(row["shard"]), str(row["problem"])
            if row["fatal"]:
                raise _as_raised(problem)
            if problem:
                problems[shard] = problem
                continue
            left.discard(shard)
            done += 1
            if on_progress is not None:
                on_progress(done, total)
        # A shard whose detector died may be done all the same: its mark was its last act.
        for shard in sorted(left):
            if work.out.exists(marker(shard)):
                done += 1
                continue
            tries[shard] += 1
            if tries[shard] < TRIES:
                again.append(shard)
    failed = [shard for shard, count in tries.items() if count >= TRIES]
    if failed:
        problem = problems.get(failed[0], "its process died; was its memory enough?")
        raise DataError(
            f"{len(failed)} of {total} shards could not be done in {TRIES} tries; shard "
            f"{failed[0]}: {problem}; the same command goes on with them"
        )


def _run(
    ray: Any, work: Any, place: _Place, rows: list[dict[str, int]]
) -> Iterator[Mapping[str, Any]]:
    """What becomes of each shard, as they are done; a shard that was lost does not come."""
    context = ray.data.DataContext.get_current()
    kept = {key: getattr(context, key) for key in _CONTEXT}
    for key, value in _CONTEXT.items():
        setattr(context, key, value)
    try:
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            ShardDetector,
            fn_constructor_kwargs={"work": work},
            compute=ray.data.ActorPoolStrategy(
                size=min(place.workers, len(rows)), max_tasks_in_flight_per_actor=2
            ),
            num_cpus=place.cpus,
            num_gpus=place.gpus,
        )
        yield from results.iter_rows()
    finally:
        for key, value in kept.items():
            setattr(context, key, value)


_CONTEXT = {
    "enable_progress_bars": False,
    "print_on_execution_start": False,
    # A shard that is lost with its machine is done again afterwards; the others go on.
    "max_errored_blocks": -1,
}


def _as_raised(problem: str) -> RetinaNetError:
    """The error of another process, from its name and its text."""
    name, _, text = problem.partition(": ")
    kind = getattr(errors, name, None)
    if (
        isinstance(kind, type)
        and issubclass(kind, RetinaNetError)
        and kind is not MissingExtraError
    ):
        return kind(text)
    return DataError(text if kind is not None else f"no detector can be made there: {problem}")


def _finish(store: Store, total: int, before: int) -> CollectionSummary:
    """Put the marks together: the table of errors and the summary."""
    objects: Counter[str] = Counter()
    network: Counter[str] = Counter()
    images = failed = 0
    first: list[dict[str, str]] = []
    with (
        store.draft(f"{ERRORS}.parquet") as parquet,
        store.draft(f"{ERRORS}.jsonl") as jsonl,
        _ErrorsTable(parquet, jsonl) as write,
    ):
        for one in _marks(store, total):
            images += one["images"]
            objects.update(one["objects"])
            network[one["network"]] += 1
            failed += len(one["errors"])
            first += one["errors"][: max(0, 20 - len(first))]
            write(one["errors"])
    summary = CollectionSummary(
        out=store.address,
        images=images,
        objects=dict(objects.most_common()),
        errors=failed,
        failures=tuple(first),
        shards=total,
        done_before=before,
        network=dict(network),
    )
    store.write(SUMMARY, json.dumps(summary.to_dict(), indent=2, ensure_ascii=False) + "\n")
    return summary


def _marks(store: Store, total: int) -> Iterator[dict[str, Any]]:
    """Of each shard, in order."""
    with ThreadPoolExecutor(16, thread_name_prefix="read-mark") as pool:
        for start in range(0, total, _READ_AT_ONCE):
            names = [marker(i) for i in range(start, min(start + _READ_AT_ONCE, total))]
            yield from map(json.loads, pool.map(store.read, names))


class _ErrorsTable:
    """Both files of the errors, ``file`` and ``reason`` a row."""

    def __init__(self, parquet: Path, jsonl: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._schema = pa.schema([("file", pa.string()), ("reason", pa.string())])
        self._parquet = pq.ParquetWriter(parquet, self._schema, compression="zstd")
        self._jsonl = jsonl.open("w", encoding="utf-8", newline="\n")

    def __enter__(self) -> _ErrorsTable:
        return self

    def __exit__(self, *_: object) -> None:
        self._parquet.close()
        self._jsonl.close()

    def __call__(self, rows: list[dict[str, str]]) -> None:
        import pyarrow as pa

        if rows:
            self._parquet.write_table(pa.Table.from_pylist(rows, self._schema))
            self._jsonl.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
