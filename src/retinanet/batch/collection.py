"""Detection in collections of any number of images, on a Ray cluster.

The inputs are cut into shards; an actor of Ray Data's pool detects in a shard and writes its files.
A shard whose Parquet file exists is skipped, so a killed run repeats at most the shards in work.

Ray Data distributes the shards' lists of inputs, not their images: blocks of images would be copied
between machines and rebuilt when one dies, for a detector that waits for its network anyway.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from retinanet.batch.inputs import is_archive, list_inputs
from retinanet.batch.store import Store
from retinanet.batch.worker import METADATA, PLAN, ShardDetector, Work, shard_file
from retinanet.config import check_choice
from retinanet.data.archives import is_remote, one_line
from retinanet.errors import ConfigError, DataError, MissingExtraError
from retinanet.inference.backends import Backend
from retinanet.inference.detector import Detector, load
from retinanet.inference.exported import is_exported
from retinanet.inference.tiles import check_tiling
from retinanet.model.checkpoint import load_checkpoint, write_checkpoint
from retinanet.model.precision import Precision

SUMMARY = "summary.json"
VERSION = 4

_MAX_TRIES = 3  # of a shard whose process dies
_MIN_SHARD, _MAX_SHARD, _SHARDS = 16, 256, 64  # a kill loses the shards in work
_CORES = 4  # per detector without a GPU; a network uses more of them poorly
_RAY_DATA = {
    "enable_progress_bars": False,
    "print_on_execution_start": False,
    "max_errored_blocks": -1,  # a shard that is lost with its machine does not end the rest
}
_STREAM: dict[str, Any] = {"batch_size": 1, "tile": None, "overlap": None}

Progress = Callable[[int, int], None]
"""Called with the shards done and their number."""


@dataclass(frozen=True, slots=True)
class CollectionSummary:
    """Result of a collection.

    Attributes:
        out: where the files are.
        images: that detection ran on.
        objects: number per class, most frequent first.
        errors: images and tar files that could not be read.
        failures: the first 20 of them, with ``file`` and ``reason``.
        shards: of the collection.
        done_before: those that an earlier call had written.
        network: shards by the description of the network that ran them.
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
        """Return the content of summary.json, the same however many calls it took."""
        call = ("out", "failures", "done_before")
        return {name: value for name, value in asdict(self).items() if name not in call}


def detect_collection(
    model: str | Path,
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    workers: int | None = None,
    shard_size: int | None = None,
    on_progress: Progress | None = None,
    **options: Any,
) -> CollectionSummary:
    """Detect in a collection on a Ray cluster; shards that an earlier call wrote are skipped.

    Runs on the cluster that this process is connected to, else on that of ``RAY_ADDRESS``, else on
    a cluster of this machine, else on a local one that is started and stopped again.

    Args:
        model: as :func:`retinanet.inference.load` takes it, on this machine.
        sources: images, folders, globs, list files (.txt: a path or an address per line),
            WebDataset shards (.tar), also with braces; on a disk that all machines share or at an
            fsspec address (``s3://``, ``gs://``, ``hf://``).
        out: a folder on such a disk, or an address.
        workers: detectors in parallel; None: one per GPU of the cluster, or without any one per 4
            cores. They share the cores.
        shard_size: inputs per shard; None: 16 to 256 by their number, or as the folder was begun. A
            tar file is a shard of its own.
        on_progress: called as shards are done.
        options: of :func:`retinanet.inference.load`, ``device`` on the machine of each detector;
            and ``batch_size``, ``tile``, ``overlap`` of :meth:`Detector.stream`.

    Returns:
        The summary, which is also written to ``summary.json``.

    Raises:
        ConfigError: a setting out of range, or `out` was begun with other settings, another model
            or other images.
        DataError: a source stands for nothing, or a shard failed.
        WeightsError: the model does not exist or cannot be used.
        MissingExtraError: Ray, or the package of an address, is not installed.
    """
    ray = _import_ray()
    stream = {name: options.pop(name, default) for name, default in _STREAM.items()}
    sizes = {"batch_size": stream["batch_size"], "workers": workers, "shard_size": shard_size}
    for setting, value in sizes.items():
        if value is not None and value < 1:
            raise ConfigError(f"{setting} {value} is under 1")
    check_tiling(stream["tile"], stream["overlap"])
    device = options.pop("device", "auto")
    # Loaded here too: an error in it is raised at once, not by a machine of the cluster.
    detector, files, name = _read_model(model, options)
    listed = [sources] if isinstance(sources, str | Path) else sources
    inputs = list_inputs([os.fspath(source) for source in listed])
    if not inputs:
        raise DataError("no source is given")
    store = Store(out)
    # Base of relative paths; empty: there are none.
    base = "" if all(is_remote(path) or os.path.isabs(path) for path in inputs) else os.getcwd()
    plan = {
        "format": "retinanet collection",
        "version": VERSION,
        "inputs": len(inputs),
        "listing": _digest(base, *inputs),
        "shard_size": shard_size,
        **_identity(detector, files, {**options, **stream}),
    }
    shards = _cut(inputs, _check_plan(store, plan))
    done_before = len(shards) - len(_missing(store, shards))
    if done_before < len(shards):
        work = Work(files, name, {"device": device, **options}, stream, store, base)
        # Ray prints the death of a process to the standard output, until it is shut down.
        with redirect_stdout(sys.stderr), _cluster(ray), _ray_data(ray):
            _run_shards(ray, work, workers, shards, on_progress)
    return _summarize(store, len(shards), done_before)


def _import_ray() -> Any:
    # Read when Ray is imported: no usage statistics, and no warnings of its core in the output.
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
    """Return the detector, the model's files by name, and the name of the file to load."""
    path = Path(model)
    exported = is_exported(path) and not path.is_dir()
    precision, backend = options.get("precision", "auto"), options.get("backend", "auto")
    if precision == "int8" and not exported:
        raise ConfigError(
            "precision int8 is calibrated once, not on each machine: make a file of it with "
            "`retinanet export`, and give that as the model"
        )
    if exported:
        detector = load(path, "cpu", **options)
        whole = [path, path.with_suffix(".bin")] if path.suffix.lower() == ".xml" else [path]
        return detector, {file.name: file.read_bytes() for file in whole}, path.name
    checkpoint = load_checkpoint(model)
    with tempfile.TemporaryDirectory(prefix="retinanet-") as folder:
        write_checkpoint(Path(folder), checkpoint)
        files = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
    # Device, precision and backend are the machine's; here only their names are checked.
    check_choice("precision", precision, (*get_args(Precision), "int8"))
    check_choice("backend", backend, get_args(Backend))
    checked = {**options, "precision": "float32", "backend": "torch"}
    return Detector(checkpoint, device="cpu", **checked), files, ""


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else os.fsencode(part)
        digest.update(b"%d\n" % len(content) + content)
    return digest.hexdigest()


def _identity(
    detector: Detector, files: Mapping[str, bytes], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return everything that the detections depend on, except the images."""
    return {
        "model": _digest(*(part for file in sorted(files.items()) for part in file)),
        "classes": list(detector.classes),
        "selected_classes": detector.selected and [detector.classes[k] for k in detector.selected],
        "precision": options.get("precision", "auto"),
        "backend": options.get("backend", "auto"),
        "image_size": detector.image_size,
        "max_size": detector.max_size,
        "tile": options["tile"],
        "overlap": options["overlap"],
        **detector.thresholds,
    }


def _check_plan(store: Store, plan: dict[str, Any]) -> int:
    """Compare with the folder's plan, or write it; returns the size of the folder's shards."""
    try:
        if not store.names():
            size = min(_MAX_SHARD, max(_MIN_SHARD, -(-plan["inputs"] // _SHARDS)))
            plan = {**plan, "shard_size": plan["shard_size"] or size}
            store.write(PLAN, json.dumps(plan, indent=2, ensure_ascii=False) + "\n")
            return int(plan["shard_size"])
    except OSError as error:
        raise DataError(f"{store.address} cannot be written to: {one_line(error)}") from None
    try:
        with store.open(PLAN) as file:
            old = dict(json.load(file))
    except (FileNotFoundError, ValueError, TypeError):
        old = {}
    if (old.get("format"), old.get("version")) != (plan["format"], plan["version"]):
        raise ConfigError(
            f"{store.address} contains other files, and no {PLAN} of this version: choose another "
            "--out"
        )
    for key, value in plan.items():
        if old.get(key) != value and (key, value) != ("shard_size", None):
            differs = f"{key} {old.get(key)}, not {value}"
            if key in ("model", "listing"):
                differs = f"another {key}"
            raise ConfigError(
                f"{store.address} was begun with {differs}; choose another --out, or remove this "
                "one"
            )
    return int(old["shard_size"])


def _cut(inputs: Sequence[str], size: int) -> list[list[str]]:
    """Cut the inputs into shards of `size`; a tar file is a shard of its own."""
    shards: list[list[str]] = []
    is_full = True
    for name in inputs:
        archive = is_archive(name)
        if is_full or archive:
            shards.append([])
        shards[-1].append(name)
        is_full = archive or len(shards[-1]) == size
    return shards


def _missing(store: Store, shards: Sequence[object]) -> list[int]:
    """Return the shards whose Parquet file does not exist."""
    done = {f"parquet/{name}" for name in store.names("parquet")}
    return [shard for shard in range(len(shards)) if shard_file(shard) not in done]


def share_resources(ray: Any, device: str, workers: int | None) -> tuple[int, int, int]:
    """Return the number of detectors on a cluster, and processors and GPUs (0 or 1) of each."""
    nodes = [
        (int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
    ]
    with_gpu = [node for node in nodes if node[1]]
    if device.startswith("cuda") and not with_gpu:
        raise ConfigError("the cluster has no GPU (yet): give --device cpu, or auto")
    use_gpus = bool(with_gpu) and device != "cpu"
    if use_gpus:
        nodes = with_gpu
    cores = sum(cpu for cpu, _ in nodes)
    if workers is None:
        workers = sum(gpu for _, gpu in nodes) if use_gpus else cores // _CORES
    workers = max(1, workers)
    # No more than the smallest machine has, so that every machine takes part.
    cpus = min([cores // workers, *(cpu for cpu, _ in nodes)])
    return workers, max(1, cpus), int(use_gpus)


@contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """Connect to a cluster, or start a local one, and disconnect or stop it at the end."""
    if ray.is_initialized():
        yield
        return
    try:
        # The cluster of RAY_ADDRESS, else one of this machine, else a new one.
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise DataError(
            f"no Ray cluster answers at RAY_ADDRESS {os.environ.get('RAY_ADDRESS')}: "
            f"{str(error).partition(chr(10))[0]}; unset it to work on this machine alone"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _ray_data(ray: Any) -> Iterator[None]:
    """Set Ray Data to continue after lost shards, without output, and restore it at the end."""
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before, level = {name: getattr(context, name) for name in _RAY_DATA}, logger.level
    try:
        for name, value in _RAY_DATA.items():
            setattr(context, name, value)
        logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        logger.setLevel(level)


def _run_shards(
    ray: Any,
    work: Work,
    workers: int | None,
    shards: Sequence[Sequence[str]],
    on_progress: Progress | None,
) -> None:
    """Run the missing shards."""
    import fsspec

    settings = {kind: dict(values) for kind, values in fsspec.config.conf.items()}
    workers, cpus, gpus = share_resources(ray, work.options["device"], workers)
    work = replace(work, threads=cpus, fsspec=settings)
    missing = _missing(work.out, shards)
    done = len(shards) - len(missing)
    report = on_progress or (lambda done, total: None)
    report(done, len(shards))
    if not missing:  # another call has done them by now
        return
    rows = [{"shard": shard, "inputs": json.dumps(shards[shard])} for shard in missing]
    with warnings.catch_warnings():
        # Ray 2.60 deprecates max_task_retries, and has no replacement.
        warnings.simplefilter("ignore", DeprecationWarning)
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            ShardDetector,
            fn_constructor_kwargs={"work": ray.put(work)},
            compute=ray.data.ActorPoolStrategy(
                size=min(workers, len(rows)), max_tasks_in_flight_per_actor=2
            ),
            num_cpus=cpus,
            num_gpus=gpus,
            max_task_retries=_MAX_TRIES - 1,  # of a shard whose process dies; else without end
        )
        problem = "its process died; was its memory enough?"
        for row in results.iter_rows():
            if row["fatal"]:
                raise DataError(f"no detector can be loaded: {row['error']}")
            if row["error"]:
                problem = str(row["error"])
            else:
                done += 1
                report(done, len(shards))
    if missing := _missing(work.out, shards):
        raise DataError(
            f"{len(missing)} of {len(shards)} shards failed, the last: {problem}; rerun the "
            "command to resume"
        )


def _summarize(store: Store, shards: int, done_before: int) -> CollectionSummary:
    """Write the list of errors and the summary, from the metadata of all shards."""
    import pyarrow.parquet as pq

    def read(shard: int) -> dict[str, Any]:
        with store.open(shard_file(shard)) as file:
            return dict(json.loads(pq.read_metadata(file).metadata[METADATA]))

    with ThreadPoolExecutor(16, thread_name_prefix="read-shard") as pool:
        of_shards = list(pool.map(read, range(shards)))
    objects: Counter[str] = Counter()
    for shard in of_shards:
        objects.update(shard["objects"])
    failures = [failure for shard in of_shards for failure in shard["errors"]]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in failures]
    store.write("errors.jsonl", "".join(lines))
    summary = CollectionSummary(
        out=store.address,
        images=sum(shard["images"] for shard in of_shards),
        objects=dict(objects.most_common()),
        errors=len(failures),
        failures=tuple(failures[:20]),
        shards=shards,
        done_before=done_before,
        network=dict(Counter(shard["network"] for shard in of_shards)),
    )
    store.write(SUMMARY, json.dumps(summary.to_dict(), indent=2, ensure_ascii=False) + "\n")
    return summary
