"""A detector of a collection: detects in the images of a shard and writes its two files."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retinanet.batch.inputs import iter_images
from retinanet.batch.store import Store
from retinanet.errors import DataError, RetinaNetError
from retinanet.inference.detections import Failure, ImageDetections
from retinanet.inference.detector import load

PLAN = "plan.json"
METADATA = b"retinanet"
"""Key of a shard's Parquet metadata: JSON with images, objects, errors, network, process."""

_ROWS = 256  # images in memory before they are written: a tar file may contain any number


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
    threads: int
    fsspec: Mapping[str, Any]


class ShardDetector:
    """An actor of Ray Data's pool: called with a row for each shard."""

    def __init__(self, work: Any) -> None:
        """Load the model.

        Args:
            work: the :class:`Work`, or Ray's reference to it.
        """
        self._error: Exception | None = None
        try:
            if not isinstance(work, Work):
                import ray

                work = ray.get(work)
            self._set_up(work)
        except (RetinaNetError, OSError, RuntimeError) as error:
            # Ray would restart the actor without end; the driver gets it with the first shard.
            self._error = error

    def _set_up(self, work: Work) -> None:
        import fsspec

        self._work = work
        fsspec.config.conf.update(work.fsspec)
        host = socket.gethostname()
        if work.base:
            try:
                os.chdir(work.base)
            except OSError:
                raise DataError(
                    f"relative paths are of {work.base}, which is not on {host}: give a folder "
                    "on a disk that all machines share, or addresses such as s3://"
                ) from None
        if PLAN not in work.out.names():
            raise DataError(
                f"{work.out.address} cannot be seen from {host}: give a folder on a disk that all "
                "machines share, or an address such as s3://"
            )
        torch.set_num_threads(work.threads)  # detectors share the processors of a machine
        with tempfile.TemporaryDirectory(prefix="retinanet-") as folder:
            for name, content in work.model.items():
                Path(folder, name).write_bytes(content)
            self._detector = load(Path(folder, work.model_name), **work.options)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Detect in a shard and write it.

        Args:
            row: ``shard``, its number, and ``inputs``, a JSON list.

        Returns:
            ``shard``; ``error``: empty, or why it failed; ``fatal``: whether every shard fails.
        """
        shard, error, fatal = int(row["shard"]), "", self._error is not None
        if self._error is not None:
            error = f"{type(self._error).__name__}: {self._error}"
        else:
            try:
                self._write(shard, json.loads(row["inputs"]))
            except Exception as raised:  # a full disk, a network: the driver tries again
                where = traceback.extract_tb(raised.__traceback__)[-1]
                place = f"{Path(where.filename).name}:{where.lineno}"
                error = f"{type(raised).__name__}: {raised} ({place})"
        return {"shard": shard, "error": error, "fatal": fatal}

    def _write(self, shard: int, inputs: Sequence[str]) -> None:
        failures: list[dict[str, str]] = []
        objects: Counter[str] = Counter()
        images = 0
        with tempfile.TemporaryDirectory(prefix="retinanet-") as folder:
            parquet, jsonl = Path(folder, "parquet"), Path(folder, "jsonl")
            with _ShardWriter(parquet, jsonl) as writer:
                for found in self._detect(inputs, failures):
                    images += 1
                    objects.update(found.classes[label] for label in found.labels.tolist())
                    writer.add(_encodable(found.to_dict()))
                writer.metadata = {
                    "images": images,
                    "objects": dict(objects),
                    "errors": failures,
                    "network": self._detector.network.description,
                    "process": f"{socket.gethostname()}:{os.getpid()}",
                }
            # The Parquet file comes last: a shard that has it is complete.
            for file, name in zip((jsonl, parquet), shard_files(shard), strict=True):
                self._work.out.put(file, name)

    def _detect(
        self, inputs: Sequence[str], failures: list[dict[str, str]]
    ) -> Iterator[ImageDetections]:
        def failed(failure: Failure) -> None:
            failures.append(_encodable(failure.to_dict()))

        images = iter_images(inputs, failed)
        workers = max(2, self._work.threads)
        for result in self._detector.stream(images, workers=workers, **self._work.stream):
            if isinstance(result, Failure):
                failed(result)
            else:
                yield result


def shard_files(shard: int) -> tuple[str, str]:
    """Return the files of a shard's detections: JSON lines and Parquet."""
    return f"jsonl/{shard:06d}.jsonl", f"parquet/{shard:06d}.parquet"


def _encodable(row: dict[str, Any]) -> dict[str, Any]:
    """Replace the bytes of a file's name that are no text in any encoding (Linux allows them)."""
    texts = {key: row[key] for key in ("file", "reason") if key in row}
    return row | {
        key: text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        for key, text in texts.items()
    }


class _ShardWriter:
    """Writes the rows of a shard as Parquet and JSON lines as they come."""

    def __init__(self, parquet: Path, jsonl: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        detection = pa.struct(
            {
                "class": pa.string(),
                "category_id": pa.int64(),
                "score": pa.float64(),
                "box": pa.list_(pa.float64()),
            }
        )
        self._schema = pa.schema(
            {
                "file": pa.string(),
                "height": pa.int32(),
                "width": pa.int32(),
                "detections": pa.list_(detection),
            }
        )
        self.metadata: dict[str, Any] = {}
        self._parquet = pq.ParquetWriter(parquet, self._schema, compression="zstd")
        self._jsonl = jsonl.open("w", encoding="utf-8", newline="\n")
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._parquet.add_key_value_metadata({METADATA: json.dumps(self.metadata)})
        self._parquet.close()
        self._jsonl.close()

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == _ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._parquet.write_table(pa.Table.from_pylist(self._rows, self._schema))
            self._jsonl.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows)
            self._rows.clear()
