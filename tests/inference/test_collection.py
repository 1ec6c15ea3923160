"""Collections on a local Ray cluster: what is found, what is kept, what is said."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from small_collection import (
    SETTINGS,
    assert_same_rows,
    jsonl_rows,
    local_rows,
    parquet_rows,
    save_images,
    save_small_model,
)

from retinanet.batch.collection import CollectionSummary, _Place, search_collection
from retinanet.batch.store import Store
from retinanet.batch.worker import TRIES, ShardDetector, Work
from retinanet.cli import main
from retinanet.errors import (
    ConfigError,
    DataError,
    MissingExtraError,
    RetinaNetError,
    WeightsError,
)

# Of Ray itself, and of what it imports.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CLUSTER: dict[str, Any] = {
    "address": "local",
    "num_cpus": 2,
    "include_dashboard": False,
    "object_store_memory": 100_000_000,
    "log_to_driver": False,
    "logging_level": "ERROR",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    ray.init(**CLUSTER)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("collection") / "images", 20)


def search(
    model: Path, sources: Any, out: Any, *, shard_size: int | None = 4, **more: Any
) -> CollectionSummary:
    return search_collection(
        model, sources, out, **{"workers": 2, "shard_size": shard_size, **SETTINGS, **more}
    )


@pytest.mark.usefixtures("cluster")
def test_finds_what_the_local_engine_finds(model: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown: list[tuple[int, int]] = []
    summary = search(model, images, out, batch_size=2, on_progress=lambda *now: shown.append(now))
    # Two of a batch are padded to one size: shards of four have the same batches as the whole.
    expected = local_rows(model, images, batch_size=2)
    assert_same_rows(jsonl_rows(out), expected)
    assert parquet_rows(out) == jsonl_rows(out)
    assert shown == [(done, 5) for done in range(6)]
    assert (summary.images, summary.errors, summary.shards, summary.done_before) == (20, 0, 5, 0)
    counts = [one["class"] for row in expected for one in row["detections"]]
    assert summary.objects == {name: counts.count(name) for name in summary.objects}
    assert sum(summary.objects.values()) == len(counts)
    assert json.loads((out / "summary.json").read_text()) == summary.to_dict()
    assert (out / "errors.jsonl").read_text() == ""
    assert not (out / ".drafts").exists()
    # The marks say who did what; a detector that starts late may find nothing left to do.
    done = [json.loads(file.read_text()) for file in sorted((out / "done").iterdir())]
    assert [one["shard"] for one in done] == list(range(5))
    assert len({one["process"] for one in done}) in (1, 2)


@pytest.mark.usefixtures("cluster")
def test_broken_images_go_to_the_errors_table(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    broken = save_images(tmp_path / "some", 6)
    (broken / "002.png").write_bytes(b"<html>")
    whole = (broken / "004.png").read_bytes()
    (broken / "004.png").write_bytes(whole[: len(whole) // 2])
    archive = tmp_path / "cut.tar"
    archive.write_bytes(b"no tar file")
    Path("list.txt").write_text(
        "\n".join(f"some/{i:03d}.png" for i in range(6)) + "\nnowhere.png\ncut.tar\n"
    )
    summary = search(model, "list.txt", "out")
    local = local_rows(model, [f"some/{i:03d}.png" for i in (0, 1, 3, 5)])
    # Paths stay as they were given.
    assert_same_rows(jsonl_rows(Path("out")), local)
    assert parquet_rows(Path("out")) == jsonl_rows(Path("out"))
    lines = Path("out/errors.jsonl").read_text("utf-8").splitlines()
    errors = [json.loads(line) for line in lines]
    broken_files = ["some/002.png", "some/004.png", "nowhere.png", "cut.tar"]
    assert [one["file"] for one in errors] == broken_files
    assert all(one["reason"].startswith(one["file"]) for one in errors)
    assert pq.read_table("out/errors.parquet").to_pylist() == errors
    assert (summary.images, summary.errors) == (4, 4)
    assert list(summary.failures) == errors


@pytest.mark.usefixtures("cluster")
def test_webdataset_shards_and_globs(model: Path, images: Path, tmp_path: Path) -> None:
    files = sorted(images.iterdir())
    for i in range(2):
        with tarfile.open(tmp_path / f"shard-{i:03d}.tar", "w") as archive:
            for file in files[7 * i : 7 * (i + 1)]:
                archive.add(file, file.name)
                entry = tarfile.TarInfo(f"{file.stem}.json")
                entry.size = 2
                archive.addfile(entry, io.BytesIO(b"{}"))
    given = [f"{tmp_path}/shard-{{000..001}}.tar", f"{images}/01[4-9].png"]
    summary = search(model, given, tmp_path / "out")
    # A tar file is a shard of its own; six images are two of four at the most.
    assert (summary.images, summary.shards, summary.errors) == (20, 4, 0)
    rows = jsonl_rows(tmp_path / "out")
    assert_same_rows(rows, local_rows(model, images), names=False)
    names = [f"{tmp_path}/shard-{i // 7:03d}.tar/{files[i].name}" for i in range(14)]
    assert [row["file"] for row in rows] == [*names, *map(str, files[14:])]


def test_s3(
    cluster: Any, model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    s3 = {"endpoint_url": f"http://{host}:{port}", "key": "testing", "secret": "testing"}
    # It reaches the workers, which were started before.
    monkeypatch.setitem(fsspec.config.conf, "s3", s3)
    try:
        files = fsspec.filesystem("s3")
        files.mkdir("bucket")
        for i, file in enumerate(sorted(images.iterdir())):
            files.put_file(str(file), f"bucket/images/{'late/' * (i >= 10)}{file.name}")
        files.pipe_file("bucket/images/broken.jpg", b"\xff\xd8\xffbroken")
        out = "s3://bucket/out"
        given = ["s3://bucket/images/", "s3://bucket/images/late/01?.png"]
        summary = search(model, given, out, shard_size=8)
        assert (summary.images, summary.errors, summary.shards) == (30, 1, 4)
        names = files.find("bucket/out")
        assert {name.split("/")[2] for name in names} == {
            *("done", "parquet", "jsonl", "errors.parquet", "errors.jsonl"),
            *("plan.json", "inputs.jsonl", "summary.json"),
        }
        found = tmp_path / "out"
        files.get("bucket/out", str(found), recursive=True)
        rows = jsonl_rows(found)
        whole = sorted(images.iterdir())
        assert_same_rows(rows, local_rows(model, [*whole, *whole[10:]]), names=False)
        assert rows[0]["file"] == "s3://bucket/images/000.png"
        assert parquet_rows(found) == rows
        (error,) = summary.failures
        assert error["file"] == "s3://bucket/images/broken.jpg"
        assert error["reason"].startswith(error["file"])
        # A mark is lost: that shard alone is done again.
        files.rm("bucket/out/done/000002.json")
        before = files.modified("bucket/out/jsonl/000001.jsonl")
        again = search(model, given, out, shard_size=None)
        assert again.done_before == 3
        assert again.to_dict() == summary.to_dict()
        assert files.modified("bucket/out/jsonl/000001.jsonl") == before
        with pytest.raises(DataError, match="there is no such file or folder"):
            search(model, "s3://bucket/nothing", out)
        with pytest.raises(DataError, match="no image in this folder"):
            search(model, "s3://bucket/out/done", out)
        with pytest.raises(DataError, match="s3://nowhere/out cannot be written to: "):
            search(model, str(images), "s3://nowhere/out")
    finally:
        server.stop()


@pytest.mark.usefixtures("cluster")
def test_a_detector_killed_with_9_is_replaced(model: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed: list[int] = []

    def kill(done: int, of: int) -> None:
        if done == 3 and not killed:
            mark = json.loads(next((out / "done").iterdir()).read_text())
            killed.append(int(mark["process"].partition(":")[2]))
            os.kill(killed[0], signal.SIGKILL)

    summary = search(model, images, out, shard_size=1, on_progress=kill)
    assert len(killed) == 1
    assert (summary.images, summary.shards) == (20, 20)
    assert_same_rows(jsonl_rows(out), local_rows(model, images))


def test_a_killed_call_goes_on(model: Path, tmp_path: Path) -> None:
    folder = save_images(tmp_path / "images", 40, seed=1)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "retinanet", "detect", str(model), str(folder)]
    command += ["--engine", "ray", "--workers", "2", "--device", "cpu", "--out", str(out)]
    command += ["--precision", "float32", "--json"]
    # A cluster of its own, which is to go with it.
    environment = {**os.environ, "RAY_ADDRESS": "local", "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    # Shards of one image, so that a kill comes between two.
    start = (
        "import sys; import retinanet.batch.collection as c; c._LEAST_SHARD = 1; c._SHARDS = 99;"
    )
    slow = [sys.executable, "-c", f"{start} from retinanet.cli import main; sys.exit(main())"]
    first = subprocess.Popen(
        [*slow, *command[3:]], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: (out / "done").is_dir() and len(list((out / "done").iterdir())) >= 5)
    finally:
        first.kill()
        first.wait()
    time.sleep(2)  # its detectors go with it
    kept = {file: file.stat().st_mtime_ns for file in (out / "done").iterdir()}
    assert 5 <= len(kept) < 40, "it was to be killed in the middle"
    assert not (out / "summary.json").exists()

    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    said = json.loads(second.stdout)
    assert (said["images"], said["shards"], said["errors"]) == (40, 40, 0)
    # No shard was done twice, and none is missing.
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert_same_rows(jsonl_rows(out), local_rows(model, folder))
    assert parquet_rows(out) == jsonl_rows(out)


def wait_until(true: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


@pytest.mark.usefixtures("cluster")
def test_another_call_on_the_same_folder(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    some = save_images(tmp_path / "some", 4)
    search(model, some, out)
    with monkeypatch.context() as patch:
        # Nothing is left to do: no detector is made.
        patch.setattr("retinanet.batch.collection._search_all", None)
        assert search(model, some, out).done_before == 1
        assert search(model, some, out, shard_size=None).done_before == 1

    def refused(**more: Any) -> str:
        given: dict[str, Any] = {"model": model, "sources": some, "out": out, **more}
        with pytest.raises(ConfigError, match="choose another --out") as caught:
            search(given.pop("model"), given.pop("sources"), given.pop("out"), **given)
        return str(caught.value)

    assert "begun with score_threshold 0.2, not 0.4" in refused(score_threshold=0.4)
    assert "begun with image_size 64, not 96" in refused(image_size=96)
    assert "begun with tile None, not 32" in refused(tile=32)
    assert "begun with shard_size 4, not 3" in refused(shard_size=3)
    other = save_small_model(tmp_path / "other", seed=1)
    assert "begun with another model" in refused(model=other)
    save_images(some, 5)
    assert "begun for other images (4 inputs then, 5 now)" in refused()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    assert "holds other files" in refused(out=tmp_path / "full")
    (out / "plan.json").write_text("{}")
    assert "not of a collection" in refused()


@pytest.mark.parametrize(
    ("more", "kind", "why"),
    [
        ({"model": "nowhere"}, WeightsError, "there is no checkpoint nowhere"),
        ({"sources": "nowhere"}, DataError, "nowhere: there is no such file or folder"),
        ({"sources": []}, DataError, "no source is given"),
        ({"sources": "gs://a/b"}, DataError, "pip install gcsfs"),
        ({"workers": 0}, ConfigError, "workers 0"),
        ({"batch_size": 0}, ConfigError, "batch_size 0"),
        ({"shard_size": 0}, ConfigError, "shard_size 0"),
        ({"precision": "int8"}, ConfigError, "retinanet export"),
        ({"precision": "fp8"}, ConfigError, "fp8"),
        ({"backend": "tensorrt"}, ConfigError, "tensorrt"),
        ({"score_threshold": 2}, ConfigError, "score_threshold"),
    ],
)
def test_what_is_wrong_is_said_before_a_cluster_is_asked(
    model: Path, images: Path, tmp_path: Path, more: dict[str, Any], kind: type, why: str
) -> None:
    given: dict[str, Any] = {"model": model, "sources": images, "out": tmp_path / "out", **more}
    with pytest.raises(kind) as caught:
        search(given.pop("model"), given.pop("sources"), given.pop("out"), **given)
    assert why in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("cluster")
def test_what_only_a_worker_can_say(model: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device 'meta:7'"):
        search(model, images, tmp_path / "b", device="meta:7")


def test_missing_ray(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"ray is not installed.*retinanet\[ray\]"):
        search(model, images, tmp_path / "out")


def test_a_cluster_that_does_not_answer(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def refuse(**given: Any) -> None:
        raise ConnectionError(f"nobody at {given['address']}\nand more")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(DataError, match=r"RAY_ADDRESS 10\.0\.0\.1:6379: nobody at .*; unset it"):
        search(model, images, tmp_path / "out")


class Nodes:
    """Ray, as far as it tells of its machines."""

    def __init__(self, *sizes: tuple[int, int]) -> None:
        self.sizes = sizes

    def nodes(self) -> list[dict[str, Any]]:
        found = [
            {
                "Alive": True,
                "Resources": {"CPU": float(cpu), **({"GPU": float(gpu)} if gpu else {})},
            }
            for cpu, gpu in self.sizes
        ]
        return [*found, {"Alive": False, "Resources": {"CPU": 99.0}}]


@pytest.mark.parametrize(
    ("nodes", "device", "workers", "expected"),
    [
        ([(4, 0)], "auto", None, (1, 4, 0)),
        ([(2, 0)], "auto", None, (1, 2, 0)),
        ([(16, 0), (8, 0)], "auto", None, (6, 4, 0)),
        ([(4, 0)], "auto", 4, (4, 1, 0)),
        ([(4, 0)], "cpu", 3, (3, 1, 0)),
        ([(3, 0), (3, 0)], "auto", 3, (3, 1, 0)),  # of 2 each only two would find a place
        ([(16, 2), (64, 0)], "auto", None, (2, 8, 1)),  # those without a GPU are left alone
        ([(16, 2), (64, 0)], "cpu", None, (20, 4, 0)),
        ([(16, 4)], "cuda", 2, (2, 8, 1)),
    ],
)
def test_cores_are_shared_out(
    nodes: list[tuple[int, int]], device: str, workers: int | None, expected: tuple[int, ...]
) -> None:
    notes: list[str] = []
    place = _Place.of(Nodes(*nodes), device, workers, notes.append)
    assert (place.workers, place.cpus, place.gpus) == expected
    assert notes == []


def test_gpus_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="the cluster has no GPU"):
        _Place.of(Nodes((4, 0)), "cuda", 2, lambda _: None)


def test_more_workers_than_cores_is_said() -> None:
    notes: list[str] = []
    place = _Place.of(Nodes((4, 0)), "cpu", 6, notes.append)
    assert (place.workers, place.cpus) == (6, 1)
    assert notes == ["the cluster has cores for 4 of 6 workers now; the others wait"]


@pytest.fixture
def worker(model: Path, images: Path, tmp_path: Path) -> ShardDetector:
    """A worker in this process, with a shard of two images."""
    import torch

    store = Store(tmp_path / "out")
    store.write("inputs.jsonl", "".join(f'"{file}"\n' for file in sorted(images.iterdir())[:2]))
    work = Work(
        model={one.name: one.read_bytes() for one in model.iterdir()},
        model_name="",
        options=SETTINGS,
        search={"batch_size": 1, "tile": None, "overlap": 0.2},
        out=store,
        base="",
        threads=torch.get_num_threads(),
        fsspec={},
        call="this",
    )
    made = ShardDetector.__new__(ShardDetector)
    made.refused = None
    made._set_up(work)
    return made


def test_a_shard_with_a_mark_is_left_alone(worker: ShardDetector, tmp_path: Path) -> None:
    row = {"shard": 7, "start": 0, "end": (tmp_path / "out" / "inputs.jsonl").stat().st_size}
    done = {"shard": 7, "problem": "", "fatal": False}
    assert worker(row) == done
    files = sorted(file for file in (tmp_path / "out").rglob("*") if file.is_file())
    before = {file: file.stat().st_mtime_ns for file in files}
    assert worker(row) == done
    assert {file: file.stat().st_mtime_ns for file in files} == before
    # Files without the mark are of a shard that was cut off: it is done again.
    (tmp_path / "out" / "done" / "000007.json").unlink()
    (tmp_path / "out" / "jsonl" / "000007.jsonl").write_text("half")
    assert worker(row) == done
    assert len(jsonl_rows(tmp_path / "out")) == 2


def test_a_shard_that_another_has_done_meanwhile(
    worker: ShardDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was taken for dead, and is only slow, comes last: files and mark are of one hand."""
    out = tmp_path / "out"
    search = worker._search

    def slowly(inputs: list[str], failures: list[dict[str, str]]) -> Iterator[Any]:
        yield from search(inputs, failures)
        worker.work.out.write("jsonl/000000.jsonl", "the other's")
        worker.work.out.write("done/000000.json", "the other's")
        (out / ".drafts").rename(tmp_path / "gone")  # its call has ended too

    monkeypatch.setattr(worker, "_search", slowly)
    row = {"shard": 0, "start": 0, "end": (out / "inputs.jsonl").stat().st_size}
    assert worker(row) == {"shard": 0, "problem": "", "fatal": False}
    for file in ("jsonl/000000.jsonl", "done/000000.json"):
        assert (out / file).read_text() == "the other's"
    assert not (out / "parquet" / "000000.parquet").exists()


def test_two_calls_that_end_together(
    worker: ShardDetector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from retinanet.batch import collection

    images = save_images(tmp_path / "some", 4)
    model = tmp_path / "model"
    model.mkdir()
    for name, content in worker.work.model.items():
        (model / name).write_bytes(content)
    store = Store(tmp_path / "together")

    def searched(ray: Any, work: Any, *_: Any) -> None:
        mark = {"images": 4, "objects": {}, "network": "", "errors": []}
        store.write("done/000000.json", json.dumps(mark))

    ends: list[None] = []

    class Table(collection._ErrorsTable):
        def __exit__(self, *why: object) -> None:
            super().__exit__(*why)
            ends.append(None)
            if len(ends) == 1:
                store.remove_drafts()

    monkeypatch.setattr(collection, "_search_all", searched)
    monkeypatch.setattr(collection, "_cluster", lambda *_: nullcontext())
    monkeypatch.setattr(collection._Place, "of", lambda *_: _Place(1, 1, 0))
    monkeypatch.setattr(collection, "_ErrorsTable", Table)
    assert search(model, images, store.address).images == 4
    assert len(ends) == 2
    assert (tmp_path / "together" / "errors.jsonl").read_text() == ""


def test_a_store_that_lists_the_folder_itself() -> None:
    class Listed:
        def ls(self, path: str, detail: bool) -> list[str]:
            return [f"{path}/", f"{path}/plan.json", f"{path}/done/"]

    store = Store("memory://bucket/found")
    store._open = (Listed(), "bucket/found")
    assert store.names() == {"plan.json", "done"}


def test_a_shard_that_fails_is_a_problem_and_no_crash(
    worker: ShardDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"shard": 0, "start": 0, "end": (tmp_path / "out" / "inputs.jsonl").stat().st_size}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(worker, "_count", lambda shard: None)
    said = worker(row)
    assert not said["fatal"]
    assert "No space left on device" in said["problem"]
    assert not (tmp_path / "out" / "done").exists()


def test_a_shard_that_kills_its_process_is_given_up(
    worker: ShardDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(worker, "_do", kill)
    row = {"shard": 0, "start": 0, "end": 1}
    for _ in range(TRIES):
        with pytest.raises(Killed):
            worker(row)
    assert f"its process died in each of {TRIES} tries" in worker(row)["problem"]


def test_a_machine_that_sees_other_disks(worker: ShardDetector, tmp_path: Path) -> None:
    from dataclasses import replace

    work = worker.work
    for change, why in [
        ({"base": "/nowhere/at/all"}, "relative paths are of /nowhere/at/all, which is not on"),
        ({"out": Store(tmp_path / "unseen")}, "unseen cannot be seen from"),
    ]:
        with pytest.raises(DataError, match=why):
            worker._set_up(replace(work, **change))  # type: ignore[arg-type]


class NoObjectStore:
    """Ray, as far as a call without detectors needs it."""

    put = staticmethod(lambda value: value)


def test_what_becomes_of_shards_that_fail(
    worker: ShardDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retinanet.batch import collection

    work = worker.work
    tried: list[list[int]] = []

    def run(ray: Any, given: Any, place: Any, rows: list[dict[str, int]]) -> Iterator[Any]:
        tried.append([row["shard"] for row in rows])
        assert all((row["start"], row["end"]) == (row["shard"], row["shard"] + 1) for row in rows)
        for row in rows:
            shard = row["shard"]
            if shard == 2 and len(tried) == 2:
                continue  # lost with its process
            if shard == 3:  # done, and lost on its way here
                work.out.write("done/000003.json", "{}")
                continue
            problem = "OSError: full" if shard == 5 or (shard == 2 and len(tried) == 1) else ""
            yield {"shard": shard, "problem": problem, "fatal": False}

    monkeypatch.setattr(collection, "_run", run)
    monkeypatch.setattr(collection, "_AT_ONCE", 4)
    shown: list[int] = []
    with pytest.raises(DataError) as caught:
        collection._search_all(
            NoObjectStore,
            work,
            _Place(1, 1, 0),
            range(8),
            range(1, 7),
            1,
            lambda done, of: shown.append(done),
        )
    assert str(caught.value) == (
        f"1 of 7 shards could not be done in {TRIES} tries; shard 5: OSError: full; "
        "the same command goes on with them"
    )
    # Four at once, what failed after the others.
    assert tried == [[1, 2, 3, 4], [5, 6], [2, 5], [2, 5]] or tried == [
        [1, 2, 3, 4],
        [5, 6],
        [2, 5],
        [5],
    ]
    assert shown[-1] == 6

    def fatal(*_: Any) -> Iterator[Any]:
        yield {"shard": 0, "problem": "WeightsError: no", "fatal": True}

    monkeypatch.setattr(collection, "_run", fatal)
    with pytest.raises(WeightsError, match=r"^no$"):
        collection._search_all(NoObjectStore, work, _Place(1, 1, 0), range(3), range(2), 0, None)


@pytest.mark.usefixtures("cluster")
def test_command_line(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_images(Path("images"), 3)
    Path("images", "002.png").write_text("x")
    command = ["detect", str(model), "images", "--engine", "ray", "--out", "out"]
    command += ["--precision", "float32", "--device", "cpu"]
    assert main(command) == 1
    said = capfd.readouterr()
    assert f"objects in 2 images, in {tmp_path}/out" in said.out
    assert "then starting Ray" in said.err
    assert "1 file could not be read:\n  images/002.png: not an image" in said.err
    assert main([*command, "--json"]) == 1
    said = json.loads(capfd.readouterr().out)
    assert (said["out"], said["images"], said["errors"]) == (f"{tmp_path}/out", 2, 1)
    assert [one["file"] for one in said["failures"]] == ["images/002.png"]
    assert main([*command, "--score-threshold", ".9"]) == 2
    assert "was begun with score_threshold 0.2, not 0.9" in capfd.readouterr().err


def test_an_error_of_a_worker_is_raised_as_what_it_was() -> None:
    from retinanet.batch.collection import _as_raised

    for problem, kind, text in [
        ("ConfigError: no: really", ConfigError, "no: really"),
        ("MissingExtraError: openvino is not", DataError, "openvino is not"),
        ("OSError: disk", DataError, "no detector can be made there: OSError: disk"),
    ]:
        raised: RetinaNetError = _as_raised(problem)
        assert type(raised) is kind
        assert str(raised) == text
