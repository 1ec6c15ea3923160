"""One detector of a collection's many: it takes a shard, searches it, and writes what it found."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retinanet.batch.inputs import iter_images
from retinanet.batch.store import DRAFTS, Store
from retinanet.errors import DataError, RetinaNetError
from retinanet.inference.detections import Failure, ImageDetections
from retinanet.inference.detector import load

INPUTS = "inputs.jsonl"
"""The listing, a JSON string a line; a shard is some of its lines."""

DONE, PARQUET, JSONL = "done", "parquet", "jsonl"
"""The folders of a collection's output."""

TRIES = 3
"""How often a shard is tried in one call."""

_ROWS = 256  # images held before they are written: a tar file may hold any number


@dataclass(frozen=True, slots=True)
class Work:
    """What is the same for every shard of a collection.

    Attributes:
        model: files of the model by name, sent through Ray's object store.
        model_name: of the file or folder to be loaded; empty: the folder of them all.
        options: of :func:`retinanet.inference.load`.
        search: of :meth:`Detector.stream`: batch_size, tile, overlap.
        out: where shards are written.
        base: the folder that relative paths are relative to; empty: there are none.
        threads: processors of one detector.
        fsspec: settings by kind of address, such as an endpoint.
        call: a name that no other call has.
    """

    model: Mapping[str, bytes]
    model_name: str
    options: Mapping[str, Any]
    search: Mapping[str, Any]
    out: Store
    base: str
    threads: int
    fsspec: Mapping[str, Any]
    call: str


class ShardDetector:
    """Called by Ray Data with a row for each shard; it lives as long as its process."""

    def __init__(self, work: Any) -> None:
        """Load the model.

        Args:
            work: a reference to the :class:`Work` in the object store.
        """
        import ray

        self.refused: Exception | None = None
        try:
            self._set_up(ray.get(work))
        except (RetinaNetError, OSError, RuntimeError) as error:
            # Ray would start it again without end; the driver is told with the first shard.
            self.refused = error

    def _set_up(self, work: Work) -> None:
        import fsspec

        self.work = work
        fsspec.config.conf.update(work.fsspec)
        here = socket.gethostname()
        if work.base:
            try:
                os.chdir(work.base)
            except OSError:
                raise DataError(
                    f"relative paths are of {work.base}, which is not on {here}: give a folder "
                    "on a disk that all machines share, or addresses such as s3://"
                ) from None
        if not work.out.exists(INPUTS):
            raise DataError(
                f"{work.out.address} cannot be seen from {here}: give a folder on a disk that all "
                "machines share, or an address such as s3://"
            )
        # Detectors share the processors of a machine: each has its own number of threads.
        torch.set_num_threads(work.threads)
        with tempfile.TemporaryDirectory(prefix="retinanet-") as folder:
            for name, content in work.model.items():
                Path(folder, name).write_bytes(content)
            self.detector = load(Path(folder, work.model_name), **work.options)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Do a shard, unless it is done.

        Args:
            row: ``shard``, its number, and ``start`` and ``end``, its bytes in the listing.

        Returns:
            ``shard``, and ``problem``: empty, or why it could not be done; ``fatal`` whether no
            shard can be.
        """
        shard = int(row["shard"])
        if self.refused is not None:
            kind = type(self.refused).__name__
            return {"shard": shard, "problem": f"{kind}: {self.refused}", "fatal": True}
        try:
            if not self.work.out.exists(marker(shard)):
                self._count(shard)
                with suppress(_DoneMeanwhile):
                    self._do(shard, int(row["start"]), int(row["end"]))
        except Exception as error:  # a full disk, a network: this shard is tried again
            where = traceback.extract_tb(error.__traceback__)[-1]
            problem = (
                f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            )
            return {"shard": shard, "problem": problem, "fatal": False}
        return {"shard": shard, "problem": "", "fatal": False}

    def _count(self, shard: int) -> None:
        """Note that the shard is begun: Ray repeats one whose process died, and without end.

        Raises:
            DataError: it was begun too often.
        """
        out = self.work.out
        names = [f"{DRAFTS}/{self.work.call}/{shard:06d}.{n}" for n in range(TRIES)]
        fresh = next((name for name in names if not out.exists(name)), None)
        if fresh is None:
            raise DataError(f"its process died in each of {TRIES} tries; was its memory enough?")
        out.write(fresh, "")

    def _do(self, shard: int, start: int, end: int) -> None:
        out, began = self.work.out, time.perf_counter()
        lines = out.read(INPUTS, start, end).decode("utf-8").splitlines()
        inputs = [json.loads(line) for line in lines]
        failures: list[dict[str, str]] = []
        objects: Counter[str] = Counter()
        images = 0
        with ExitStack() as stack:
            drafts = [stack.enter_context(out.draft(name)) for name in outputs(shard)]
            write = stack.enter_context(_Writer(*drafts))
            for one in self._search(inputs, failures):
                images += 1
                objects.update(self.detector.classes[label] for label in one.labels.tolist())
                write(_writable(one.to_dict()))
            if out.exists(marker(shard)):
                # Taken for dead, or of a second call: another has done it meanwhile. Its files and
                # its mark belong together.
                raise _DoneMeanwhile
        # Written last: only with it the shard counts, and its files are whole by then.
        text = {
            "shard": shard,
            "images": images,
            "objects": dict(objects),
            "errors": failures,
            "seconds": round(time.perf_counter() - began, 3),
            "network": self.detector.network.description,
            "process": f"{socket.gethostname()}:{os.getpid()}",
        }
        out.write(marker(shard), json.dumps(text, ensure_ascii=False))

    def _search(
        self, inputs: list[str], failures: list[dict[str, str]]
    ) -> Iterator[ImageDetections]:
        def failed(failure: Failure) -> None:
            failures.append(_writable(failure.to_dict()))

        streamed = self.detector.stream(
            iter_images(inputs, failed), workers=max(2, self.work.threads), **self.work.search
        )
        for one in streamed:
            if isinstance(one, Failure):
                failed(one)
            else:
                yield one


class _DoneMeanwhile(Exception):
    """A shard has got its mark while it was being searched."""


def _writable(row: dict[str, Any]) -> dict[str, Any]:
    """`row`, where a file's name is no text of any encoding (Linux allows it) made into one."""
    texts = {key: row[key] for key in ("file", "reason") if key in row}
    return row | {
        key: text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        for key, text in texts.items()
    }


def marker(shard: int) -> str:
    """The file that says that a shard is done, with its counts and its failures."""
    return f"{DONE}/{shard:06d}.json"


def outputs(shard: int) -> tuple[str, str]:
    """The files of a shard's detections: Parquet and JSON lines."""
    return f"{PARQUET}/{shard:06d}.parquet", f"{JSONL}/{shard:06d}.jsonl"


def detections_schema() -> Any:
    """Columns of the Parquet shards, a row an image: what :meth:`ImageDetections.to_dict` says."""
    import pyarrow as pa

    detection = pa.struct(
        [
            ("class", pa.string()),
            ("category_id", pa.int64()),
            ("score", pa.float64()),
            ("box", pa.list_(pa.float64())),
        ]
    )
    return pa.schema(
        [
            ("file", pa.string()),
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("detections", pa.list_(detection)),
        ]
    )


class _Writer:
    """Both files of a shard, written as images come."""

    def __init__(self, parquet: Path, jsonl: Path) -> None:
        import pyarrow.parquet as pq

        self._schema = detections_schema()
        self._parquet = pq.ParquetWriter(parquet, self._schema, compression="zstd")
        self._jsonl = jsonl.open("w", encoding="utf-8", newline="\n")
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._parquet.close()
        self._jsonl.close()

    def __call__(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == _ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._parquet.write_table(pa.Table.from_pylist(self._rows, self._schema))
            self._jsonl.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows)
            self._rows.clear()
