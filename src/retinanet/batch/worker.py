"""A detector of a collection: detects in the images of a shard and writes its file."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from retinanet.batch.inputs import iter_images
from retinanet.batch.store import Store
from retinanet.data.archives import is_remote
from retinanet.errors import DataError
from retinanet.inference.detections import Failure, ImageDetections
from retinanet.inference.detector import load

PLAN = "plan.json"
METADATA = b"retinanet"
"""Key of a shard's Parquet metadata: JSON with images, objects, errors, network, process."""

_ROWS = 256  # images in memory before they are written: a tar file may contain any number
_FETCHES = 16  # simultaneous reads from addresses, where latency counts, not the processor


@dataclass(frozen=True, slots=True)
class Work:
    """Settings of all shards of a collection.

    Attributes:
        model: the model's files by name, sent through Ray's object store.
        model_name: the file or folder to load; empty: the folder of them all.
        options: of :func:`retinanet.inference.load`.
        stream: of :meth:`Detector.stream`: batch_size, tile, overlap.
        out: where shards are written.
        base: the folder that relative paths are relative to; empty: there are none.
        threads: processors per detector.
        fsspec: settings by kind of address, such as an endpoint.
    """

    model: Mapping[str, bytes]
    model_name: str
    options: Mapping[str, Any]
    stream: Mapping[str, Any]
    out: Store
    base: str
    threads: int = 1
    fsspec: Mapping[str, Any] = field(default_factory=dict)


class ShardDetector:
    """An actor of Ray Data's pool: called with a row for each shard."""

    def __init__(self, work: Any) -> None:
        """Load the model; `work` is the :class:`Work`, or Ray's reference to it."""
        self._error = ""
        try:
            if not isinstance(work, Work):
                import ray

                work = ray.get(work)
            self._set_up(work)
        except Exception as error:
            # Ray would restart the actor without end; the driver gets it with the first shard.
            self._error = _describe(error)

    def _set_up(self, work: Work) -> None:
        import fsspec

        self._work = work
        fsspec.config.conf.update(work.fsspec)
        if work.base:
            os.chdir(work.base)
        if PLAN not in work.out.names():
            raise DataError(
                f"{work.out.address} cannot be seen from {socket.gethostname()}: give a folder on "
                "a disk that all machines share, or an address such as s3://"
            )
        torch.set_num_threads(work.threads)  # detectors share the processors of a machine
        with tempfile.TemporaryDirectory(prefix="retinanet-") as folder:
            for name, content in work.model.items():
                Path(folder, name).write_bytes(content)
            self._detector = load(Path(folder, work.model_name), **work.options)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Detect in a shard and write it.

        The row has the number of the ``shard`` and its ``inputs``, a JSON list. Returns ``shard``,
        ``error`` (empty, or why it failed) and ``fatal`` (whether every shard fails).
        """
        shard, error = int(row["shard"]), self._error
        if not error:
            try:
                self._write(shard, json.loads(row["inputs"]))
            except Exception as raised:  # a full disk, a network: another call tries again
                frame = traceback.extract_tb(raised.__traceback__)[-1]
                error = f"{_describe(raised)} ({Path(frame.filename).name}:{frame.lineno})"
        return {"shard": shard, "error": error, "fatal": bool(self._error)}

    def _write(self, shard: int, inputs: Sequence[str]) -> None:
        workers = max(2, self._work.threads, _FETCHES if any(map(is_remote, inputs)) else 0)
        results = self._detector.stream(iter_images(inputs), workers=workers, **self._work.stream)
        with tempfile.TemporaryDirectory(prefix="retinanet-") as folder:
            file = Path(folder, "parquet")
            write_shard(results, file, network=self._detector.network.description)
            self._work.out.write(shard_file(shard), file.read_bytes())


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def shard_file(shard: int) -> str:
    """Return the file of a shard's detections."""
    return f"parquet/{shard:06d}.parquet"


def write_shard(results: Iterator[ImageDetections | Failure], file: Path, *, network: str) -> None:
    """Write detections as Parquet, as they come; failures into the metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = {"class": pa.string(), "category_id": pa.int64(), "score": pa.float64()}
    detection = pa.struct({**fields, "box": pa.list_(pa.float64())})
    columns = {"file": pa.string(), "height": pa.int32(), "width": pa.int32()}
    schema = pa.schema({**columns, "detections": pa.list_(detection)})
    images = 0
    errors: list[dict[str, Any]] = []
    objects: Counter[str] = Counter()
    with pq.ParquetWriter(file, schema, compression="zstd") as table:
        while chunk := list(islice(results, _ROWS)):
            rows: list[dict[str, Any]] = []
            for item in chunk:
                (errors if isinstance(item, Failure) else rows).append(_encodable(item.to_dict()))
            images += len(rows)
            objects.update(found["class"] for row in rows for found in row["detections"])
            if rows:
                table.write_table(pa.Table.from_pylist(rows, schema))
        metadata = {
            "images": images,
            "objects": dict(objects),
            "errors": errors,
            "network": network,
            "process": f"{socket.gethostname()}:{os.getpid()}",
        }
        table.add_key_value_metadata({METADATA: json.dumps(metadata)})


def _encodable(row: dict[str, Any]) -> dict[str, Any]:
    """Replace the bytes of a file's name that are no text in any encoding (Linux allows them)."""
    texts = {key: row[key] for key in ("file", "reason") if key in row}
    return row | {
        key: text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        for key, text in texts.items()
    }
