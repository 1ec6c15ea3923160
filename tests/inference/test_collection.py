"""Collections: detections, resuming, errors. Ray runs in this process, or in one of its own."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from small_collection import (
    SETTINGS,
    assert_same_rows,
    local_rows,
    rows_of,
    save_images,
    save_small_model,
)

from retinanet.batch.collection import CollectionSummary, detect_collection, share_resources
from retinanet.batch.store import Store
from retinanet.cli import main
from retinanet.errors import ConfigError, DataError, MissingExtraError, WeightsError


class InProcessRay(ModuleType):
    """The part of Ray that collections use, run in this process.

    Attributes:
        rounds: the shards of each run.
        lost: shards whose process dies, by the number of times.
    """

    def __init__(self) -> None:
        super().__init__("ray")
        self.rounds: list[list[int]] = []
        self.lost: dict[int, int] = {}
        self.data: Any = ModuleType("ray.data")
        context = SimpleNamespace(
            enable_progress_bars=True, print_on_execution_start=True, max_errored_blocks=0
        )
        self.data.DataContext = SimpleNamespace(get_current=lambda: context)
        self.data.ActorPoolStrategy = SimpleNamespace
        self.data.from_items = self._from_items
        self.put = lambda value: value
        self.is_initialized = lambda: True
        self.nodes = lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}]

    def _from_items(self, rows: list[dict[str, Any]], **_: Any) -> Any:
        self.rounds.append([row["shard"] for row in rows])

        def run(kind: type, fn_constructor_kwargs: Mapping[str, Any], **_: Any) -> Any:
            detector = kind(**fn_constructor_kwargs)

            def iter_rows() -> Iterator[Any]:
                for row in rows:
                    if self.lost.get(row["shard"], 0):
                        self.lost[row["shard"]] -= 1
                    else:
                        yield detector(row)

            return SimpleNamespace(iter_rows=iter_rows)

        return SimpleNamespace(map=run)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> InProcessRay:
    ray = InProcessRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", ray.data)
    return ray


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("collection") / "images", 10)


def detect(
    model: Path, sources: Any, out: Any, *, shard_size: int | None = 2, **more: Any
) -> CollectionSummary:
    options = {"workers": 1, "shard_size": shard_size, **SETTINGS, **more}
    return detect_collection(model, sources, out, **options)


def test_collection_broken_images_are_in_the_errors_table(
    ray: InProcessRay, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    broken = save_images(tmp_path / "some", 6)
    (broken / "002.png").write_bytes(b"<html>")
    whole = (broken / "004.png").read_bytes()
    (broken / "004.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.tar").write_bytes(b"no tar file")
    Path("list.txt").write_text(
        "\n".join(f"some/{i:03d}.png" for i in range(6)) + "\nnowhere.png\ncut.tar\n"
    )
    summary = detect(model, "list.txt", "out", shard_size=4)
    local = local_rows(model, [f"some/{i:03d}.png" for i in (0, 1, 3, 5)])
    # Paths stay as they were given.
    assert_same_rows(rows_of(Path("out")), local)
    lines = Path("out/errors.jsonl").read_text("utf-8").splitlines()
    errors = [json.loads(line) for line in lines]
    broken_files = ["some/002.png", "some/004.png", "nowhere.png", "cut.tar"]
    assert [error["file"] for error in errors] == broken_files
    assert all(error["reason"].startswith(error["file"]) for error in errors)
    assert (summary.images, summary.errors) == (4, 4)
    assert list(summary.failures) == errors
    assert json.loads(Path("out/summary.json").read_text()) == summary.to_dict()


def test_collection_output_that_cannot_be_written_is_named(
    ray: InProcessRay, model: Path, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/out cannot be written to: "):
        detect(model, str(images), tmp_path / "file/out")


def test_collection_of_tar_files_and_globs_matches_the_local_engine(
    ray: InProcessRay, model: Path, images: Path, tmp_path: Path
) -> None:
    files = sorted(images.iterdir())
    for i in range(2):
        with tarfile.open(tmp_path / f"shard-{i:03d}.tar", "w") as archive:
            for file in files[3 * i : 3 * (i + 1)]:
                archive.add(file, file.name)
                entry = tarfile.TarInfo(f"{file.stem}.json")
                entry.size = 2
                archive.addfile(entry, io.BytesIO(b"{}"))
    given = [f"{tmp_path}/shard-{{000..001}}.tar", f"{images}/00[6-9].png"]
    summary = detect(model, given, tmp_path / "out")
    # A tar file is a shard of its own; four images are two shards.
    assert (summary.images, summary.shards, summary.errors) == (10, 4, 0)
    rows = rows_of(tmp_path / "out")
    expected = local_rows(model, images)
    assert_same_rows(rows, expected, names=False)
    counts = [found["class"] for row in expected for found in row["detections"]]
    assert summary.objects == {name: counts.count(name) for name in set(counts)}
    names = [f"{tmp_path}/shard-{i // 3:03d}.tar/{files[i].name}" for i in range(6)]
    assert [row["file"] for row in rows] == [*names, *map(str, files[6:])]


def test_collection_leaves_out_outputs_of_a_local_detection(
    ray: InProcessRay, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(save_images(tmp_path / "images", 3))
    assert main(["detect", str(model), ".", "--device=cpu", "--precision=float32"]) == 0
    assert len(list(Path("found/images").iterdir())) == 3
    for sources in (".", "**/*.png"):
        out = tmp_path / ("glob" if "*" in sources else "folder")
        assert detect(model, sources, out).images == 3
    with pytest.raises(DataError, match="is an output of an earlier detection"):
        detect(model, "found/images/000.png", tmp_path / "other")


def test_collection_rerun_repeats_only_missing_shards(
    ray: InProcessRay, model: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = detect(model, images, out)
    rows = rows_of(out)
    kept = {file: file.stat().st_mtime_ns for file in (out / "parquet").iterdir()}
    # A run that was killed before a shard's Parquet file, its last, and another while writing it.
    for name in ("000001.parquet", "000003.parquet"):
        (out / "parquet" / name).unlink()
        del kept[out / "parquet" / name]
    (out / "parquet" / ".000003.parquet.17.tmp").write_text("half")
    shown: list[tuple[int, int]] = []
    again = detect(model, images, out, shard_size=None, on_progress=lambda *now: shown.append(now))
    assert ray.rounds == [[0, 1, 2, 3, 4], [1, 3]]
    assert shown == [(3, 5), (4, 5), (5, 5)]
    assert (again.done_before, again.to_dict()) == (3, first.to_dict())
    assert rows_of(out) == rows
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert detect(model, images, out).done_before == 5
    assert len(ray.rounds) == 2  # no detector is loaded


def test_collection_lost_and_failed_shards_are_an_error_and_repeated_by_the_next_call(
    ray: InProcessRay, model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Store, name: str, content: Any) -> None:
        if "/000002." in name:
            raise OSError(28, "No space left on device")
        write(self, name, content)

    write = Store.write
    monkeypatch.setattr(Store, "write", full)
    with pytest.raises(DataError, match=r"1 of 5 .* failed, the last: OSError: .*No space left"):
        detect(model, images, tmp_path / "out")
    ray.lost = {2: 1}
    with pytest.raises(DataError, match=r"failed, the last: its process died; .*rerun the command"):
        detect(model, images, tmp_path / "out")
    monkeypatch.setattr(Store, "write", write)
    assert detect(model, images, tmp_path / "out").images == 10
    assert ray.rounds == [[0, 1, 2, 3, 4], [2], [2]]
    # The caller's own work with Ray Data must not lose blocks silently.
    assert ray.data.DataContext.get_current().max_errored_blocks == 0
    assert logging.getLogger("ray.data").level != logging.CRITICAL


def test_collection_that_another_call_has_done_by_now(
    ray: InProcessRay, model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = ray.nodes

    def wait() -> Any:
        monkeypatch.setattr(ray, "nodes", nodes)
        detect(model, images, tmp_path / "out")
        return nodes()

    monkeypatch.setattr(ray, "nodes", wait)
    assert detect(model, images, tmp_path / "out").images == 10
    assert len(ray.rounds) == 1


def test_collection_folder_begun_for_something_else_is_an_error(
    ray: InProcessRay, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    some = save_images(tmp_path / "some", 4)
    detect(model, some, out)

    def error(**more: Any) -> str:
        given: dict[str, Any] = {"model": model, "sources": some, "out": out, **more}
        with pytest.raises(ConfigError, match="choose another --out") as caught:
            detect(given.pop("model"), given.pop("sources"), given.pop("out"), **given)
        return str(caught.value)

    assert "begun with score_threshold 0.3, not 0.4" in error(score_threshold=0.4)
    assert "begun with selected_classes None, not ['bright']" in error(classes=["bright"])
    assert "begun with shard_size 2, not 3" in error(shard_size=3)
    other = save_small_model(tmp_path / "other", seed=1)
    assert "begun with another model" in error(model=other)
    save_images(some, 5)
    assert "begun with inputs 4, not 5" in error()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    assert "contains other files" in error(out=tmp_path / "full")
    (out / "plan.json").write_text("{}")
    assert "contains other files, and no plan.json of this version" in error()


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        ({"model": "nowhere"}, WeightsError, "nowhere"),
        ({"sources": "nowhere"}, DataError, "nowhere: there is no such file or folder"),
        ({"sources": []}, DataError, "no source is given"),
        ({"sources": "gs://a/b"}, DataError, "pip install gcsfs"),
        ({"workers": 0}, ConfigError, "workers 0"),
        ({"batch_size": 0}, ConfigError, "batch_size 0"),
        ({"shard_size": 0}, ConfigError, "shard_size 0"),
        ({"tile": 3}, ConfigError, "tile 3"),
        ({"precision": "int8"}, ConfigError, "retinanet export"),
        ({"precision": "fp8"}, ConfigError, "fp8"),
        ({"backend": "tensorrt"}, ConfigError, "tensorrt"),
        ({"score_threshold": 2}, ConfigError, "score_threshold"),
    ],
)
def test_collection_settings_are_checked_before_the_cluster_is_used(
    ray: InProcessRay,
    model: Path,
    images: Path,
    tmp_path: Path,
    more: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    given: dict[str, Any] = {"model": model, "sources": images, "out": tmp_path / "out", **more}
    with pytest.raises(kind) as caught:
        detect(given.pop("model"), given.pop("sources"), given.pop("out"), **given)
    assert message in str(caught.value)
    assert ray.rounds == []
    assert not (tmp_path / "out").exists()


def test_collection_without_ray_names_the_extra(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"ray is not installed.*retinanet\[ray\]"):
        detect(model, images, tmp_path / "out")


def test_collection_cluster_that_does_not_answer_is_an_error(
    ray: InProcessRay,
    model: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init(**_: Any) -> None:
        raise ConnectionError("nobody there\nand more")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(DataError, match=r"RAY_ADDRESS 10\.0\.0\.1:6379: nobody there; unset it"):
        detect(model, images, tmp_path / "out")


def test_collection_error_of_a_worker_ends_the_call(
    ray: InProcessRay, model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise MissingExtraError("openvino", "openvino")

    monkeypatch.setattr("retinanet.batch.worker.load", load)
    with pytest.raises(DataError, match=r"no detector can be loaded: .*openvino is not installed"):
        detect(model, images, tmp_path / "out")


def test_collection_machine_that_sees_other_disks_is_an_error(
    ray: InProcessRay, model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "names", lambda self, folder="": set())
    with pytest.raises(DataError, match="out cannot be seen from"):
        detect(model, images, tmp_path / "out")


def test_collection_command_reports_objects_and_failures(
    ray: InProcessRay,
    model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_images(Path("images"), 3)
    Path("images", "002.png").write_text("x")
    command = ["detect", str(model), "images", "--engine", "ray", "--out", "out"]
    command += ["--precision", "float32", "--device", "cpu"]
    assert main(command) == 1
    printed = capfd.readouterr()
    assert f"objects in 2 images, in {tmp_path}/out" in printed.out
    assert "then starting Ray" in printed.err
    assert "1 file could not be read:\n  images/002.png: not an image" in printed.err
    assert main([*command, "--json"]) == 1
    summary = json.loads(capfd.readouterr().out)
    assert (summary["out"], summary["images"], summary["errors"]) == (f"{tmp_path}/out", 2, 1)
    assert [failure["file"] for failure in summary["failures"]] == ["images/002.png"]
    assert main([*command, "--score-threshold", ".9"]) == 2
    assert "was begun with score_threshold 0.3, not 0.9" in capfd.readouterr().err


# Of moto and what it imports.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_collection_on_s3_matches_the_local_engine(
    ray: InProcessRay, model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    s3 = {"endpoint_url": f"http://{host}:{port}", "key": "testing", "secret": "testing"}
    monkeypatch.setitem(fsspec.config.conf, "s3", s3)
    try:
        files = fsspec.filesystem("s3")
        files.mkdir("bucket")
        whole = sorted(images.iterdir())
        for i, file in enumerate(whole):
            files.put_file(str(file), f"bucket/images/{'late/' * (i >= 5)}{file.name}")
        files.pipe_file("bucket/images/broken.jpg", b"\xff\xd8\xffbroken")
        out = "s3://bucket/out"
        given = ["s3://bucket/images/", "s3://bucket/images/late/00?.png"]
        summary = detect(model, given, out, shard_size=4)
        assert (summary.images, summary.errors, summary.shards) == (15, 1, 4)
        names = files.find("bucket/out")
        assert {name.split("/")[2] for name in names} == {
            *("parquet", "errors.jsonl", "plan.json", "summary.json")
        }
        found = tmp_path / "out"
        files.get("bucket/out", str(found), recursive=True)
        rows = rows_of(found)
        assert_same_rows(rows, local_rows(model, [*whole, *whole[5:]]), names=False)
        assert rows[0]["file"] == "s3://bucket/images/000.png"
        (error,) = summary.failures
        assert error["file"] == "s3://bucket/images/broken.jpg"
        assert error["reason"].startswith(error["file"])
        files.rm("bucket/out/parquet/000002.parquet")
        again = detect(model, given, out, shard_size=None)
        assert (again.done_before, again.to_dict()) == (3, summary.to_dict())
        assert ray.rounds[1] == [2]
        with pytest.raises(DataError, match="there is no such file or folder"):
            detect(model, "s3://bucket/nothing", out)
        with pytest.raises(DataError, match="no image in this folder"):
            detect(model, "s3://bucket/out/parquet", out)
        with pytest.raises(DataError, match="s3://nowhere/out: cannot be accessed: "):
            detect(model, str(images), "s3://nowhere/out")
    finally:
        server.stop()


def cluster_of(*sizes: tuple[int, int]) -> Any:
    """Ray with machines of so many cores and GPUs, and a dead machine."""
    nodes = [{"Alive": True, "Resources": {"CPU": float(c), "GPU": float(g)}} for c, g in sizes]
    return SimpleNamespace(nodes=lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 99.0}}])


@pytest.mark.parametrize(
    ("nodes", "device", "workers", "expected"),
    [
        ([(2, 0)], "auto", None, (1, 2, 0)),
        ([(16, 0), (8, 0), (0, 0)], "auto", None, (6, 4, 0)),
        ([(4, 0)], "auto", 4, (4, 1, 0)),
        ([(4, 0)], "cpu", 6, (6, 1, 0)),
        ([(8, 0), (2, 0)], "auto", 3, (3, 2, 0)),  # on both machines
        ([(16, 2), (64, 0)], "auto", None, (2, 8, 1)),  # not on machines without a GPU
        ([(16, 2), (64, 0)], "cpu", None, (20, 4, 0)),
        ([(16, 4)], "cuda", 2, (2, 8, 1)),
        ([(4, 0)], "cuda", 2, None),
    ],
)
def test_resources_share_the_cores(
    nodes: list[tuple[int, int]],
    device: str,
    workers: int | None,
    expected: tuple[int, ...] | None,
) -> None:
    if expected is None:
        with pytest.raises(ConfigError, match="the cluster has no GPU"):
            share_resources(cluster_of(*nodes), device, workers)
    else:
        assert share_resources(cluster_of(*nodes), device, workers) == expected


@pytest.mark.slow
def test_collection_on_a_real_cluster_survives_a_killed_worker(
    images: Path, tmp_path: Path
) -> None:
    """In a process of its own: a client of Ray ends its process with the cluster."""
    pytest.importorskip("ray")
    import pyarrow.parquet as pq

    model = save_small_model(tmp_path / "model", backbone="mobilenet_v2")  # known to all processes
    out, listed = tmp_path / "out", tmp_path / "images.txt"
    listed.write_text("".join(f"{file}\n" for file in sorted(images.iterdir()) * 8))
    command = [sys.executable, "-m", "retinanet", "detect", str(model), str(listed), "--json"]
    command += [f"--out={out}", "--engine=ray", "--workers=1"]
    command += ["--device=cpu", "--precision=float32"]
    environment = {**os.environ, "RAY_ADDRESS": "local", "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"RAY_prestart_worker_first_driver": "0", "RAY_enable_metrics_collection": "0"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        written: list[Path] = []
        while not written and process.poll() is None:
            written = sorted((out / "parquet").glob("*.parquet"))
            time.sleep(0.02)
        if written:
            metadata = json.loads(pq.read_metadata(written[0]).metadata[b"retinanet"])
            os.kill(int(metadata["process"].partition(":")[2]), signal.SIGKILL)
        printed, errors = process.communicate(timeout=200)
    assert written, errors
    assert process.returncode == 0, errors
    summary = json.loads(printed)
    assert (summary["images"], summary["errors"], summary["shards"]) == (80, 0, 5)
    expected = local_rows(model, images) * 8
    assert_same_rows(rows_of(out), expected)
