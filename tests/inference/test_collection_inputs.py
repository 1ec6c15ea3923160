"""What a collection consists of; no Ray here."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from pathlib import Path

import fsspec
import pytest
from small_collection import save_images

from retinanet.batch.inputs import iter_images, iter_inputs
from retinanet.batch.store import Store, is_address, open_files, whole_address
from retinanet.errors import DataError, MissingExtraError
from retinanet.inference.detections import Failure
from retinanet.inference.sources import find_sources


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "images"
    for name in ("b.png", "a.png", "left/a.png", "left/deep/c.JPG", ".hidden/a.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    for name in ("notes.md", "._a.png", "left/._a.tar", "left/one.tar"):
        (root / name).write_bytes(b"")
    os.symlink(root, root / "left" / "loop")
    monkeypatch.chdir(tmp_path)
    return root


def test_a_folder_with_all_below_it(tree: Path) -> None:
    expected = ["a.png", "b.png", "left/a.png", "left/one.tar", "left/deep/c.JPG"]
    assert list(iter_inputs([str(tree)])) == [f"{tree}/{name}" for name in expected]
    assert list(iter_inputs(["images/"])) == [f"images/{name}" for name in expected]
    # The same images as those of the local engine.
    local = {str(one.image) for one in find_sources(tree)}
    assert local == {name for name in iter_inputs([str(tree)]) if not name.endswith(".tar")}


def test_globs(tree: Path) -> None:
    assert list(iter_inputs(["images/*.png"])) == ["images/a.png", "images/b.png"]
    assert list(iter_inputs([f"{tree}/*/a.png"])) == [f"{tree}/left/a.png"]
    assert list(iter_inputs(["im*/**/*.JPG"])) == ["images/left/deep/c.JPG"]
    assert list(iter_inputs([f"file://{tree}/b.*"])) == [f"file://{tree}/b.png"]
    (tree / "[a].png").write_bytes(b"")  # what exists is no glob
    assert list(iter_inputs(["images/[a].png"])) == ["images/[a].png"]


def test_braces(tree: Path) -> None:
    given = ["images/{b,a}.png", "images/left/{one..one}.tar"]
    (tree / "left" / "{one..one}.tar").write_bytes(b"")
    assert list(iter_inputs(given)) == [
        "images/b.png",
        "images/a.png",
        "images/left/{one..one}.tar",
    ]
    for i in range(9, 12):
        (tree / f"s{i:02d}.tar").write_bytes(b"")
    expected = [f"images/s{i:02d}.tar" for i in range(9, 12)]
    assert list(iter_inputs(["images/s{09..11}.tar"])) == expected


def test_a_list_is_not_looked_into(tree: Path) -> None:
    (tree / "list.txt").write_text("a.png\r\n\n  s3://bucket/b c.jpg \nnowhere.tar\n")
    expected = ["a.png", "s3://bucket/b c.jpg", "nowhere.tar"]
    assert list(iter_inputs([str(tree / "list.txt")])) == expected


def test_a_listing_is_lazy(tree: Path) -> None:
    inputs = iter_inputs(["images/a.png", "nowhere.png"])
    assert next(inputs) == "images/a.png"
    with pytest.raises(DataError, match=r"nowhere\.png: there is no such file"):
        next(inputs)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("nowhere", "nowhere: there is no such file or folder"),
        ("images/*.gif", "images/*.gif: no image matches (.avif"),
        ("empty", "empty: no image in this folder"),
        ("empty.txt", "empty.txt: this list is empty"),
        (
            "gs://bucket/a.jpg",
            "gs://bucket/a.jpg: the package for gs:// addresses is not installed: ",
        ),
        ("nonsense://a", "nonsense://a: Protocol not known: nonsense"),
    ],
)
def test_what_stands_for_nothing(tree: Path, given: str, why: str) -> None:
    Path("empty").mkdir()
    Path("empty.txt").write_text("\n")
    with pytest.raises(DataError) as caught:
        list(iter_inputs([given]))
    assert str(caught.value).startswith(why)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_listed_is_no_empty_one(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.scandir

    def refused(path: str) -> object:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return before(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"left/deep: cannot be listed: .*Permission denied"):
        list(iter_inputs(["images"]))


def test_missing_extras(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    with pytest.raises(MissingExtraError, match=r"retinanet\[webdataset\]"):
        list(iter_inputs(["a{0..3}.tar"]))
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingExtraError, match=r"retinanet\[ray\]"):
        open_files("a.png")


def test_hub_addresses_want_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"retinanet\[hub\]"):
        open_files("hf://datasets/owner/name/a.jpg")


def tar(file: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(file, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file


def test_images_of_each_kind_of_input(tmp_path: Path) -> None:
    folder = save_images(tmp_path / "images", 3)
    first, second, third = sorted(folder.iterdir())
    data = second.read_bytes()
    shard = tar(tmp_path / "shard.tar", {"x.png": data, "x.json": b"{}", "./d/y.v2.PNG": data})
    packed = tar(tmp_path / "shard.tar.gz", {"z.png": data}, "w:gz")
    failures: list[Failure] = []
    inputs = [str(first), f"file://{second}", str(shard), f"file://{packed}", str(third)]
    inputs[4:4] = [f"file://{tmp_path}/gone.png", str(tmp_path / "gone.tar")]
    found = list(iter_images(inputs, failures.append))
    assert [one.name for one in found] == [
        str(first),
        f"file://{second}",
        f"{shard}/x.png",
        f"{shard}/d/y.v2.PNG",
        f"file://{packed}/z.png",
        str(third),
    ]
    assert found[0].image == str(first)  # read by the detector's threads
    assert [one.image for one in found[1:5]] == [data] * 4
    assert [one.to_dict() for one in failures] == [
        {"file": name, "reason": f"{name}: there is no such file"} for name in inputs[4:6]
    ]


def test_more_addresses_than_are_fetched_at_once(tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / f"{i:03d}.png").write_text(str(i))
    inputs = list(iter_inputs([f"file://{tmp_path}"]))
    found = list(iter_images(inputs, lambda failure: pytest.fail(str(failure))))
    assert [int(one.image) for one in found] == list(range(100))


def test_a_tar_file_that_is_cut_short(tmp_path: Path) -> None:
    data = save_images(tmp_path, 1).joinpath("000.png").read_bytes()
    shard = tar(tmp_path / "shard.tar", {f"{i}.png": data for i in range(3)})
    whole = shard.read_bytes()
    shard.write_bytes(whole[: 2 * 512 + len(data) + len(data) // 2])
    failures: list[Failure] = []
    found = list(iter_images([str(shard)], failures.append))
    assert [one.name for one in found] == [f"{shard}/0.png"]
    assert len(failures) == 1
    assert failures[0].reason.startswith(f"{shard}: cannot be read: unexpected end of data")
    shard.write_text("no tar file")
    assert list(iter_images([str(shard)], failures.append)) == []
    assert "cannot be read" in failures[1].reason


def test_addresses() -> None:
    assert is_address("s3://bucket")
    assert not is_address("a:b")
    assert not is_address("C:/folder")
    assert not is_address("folder/a://b")
    assert whole_address(Path("s3://bucket/out")) == "s3://bucket/out"
    assert whole_address("s3://bucket/out") == "s3://bucket/out"
    assert whole_address(Path("/a/b")) == "/a/b"
    assert whole_address("C:/a") == "C:/a"


@pytest.mark.parametrize("scheme", ["", "file://", "memory://"])
def test_store(tmp_path: Path, scheme: str) -> None:
    # file:// is treated as an address whose files are renamed when complete.
    store = Store(f"{scheme}{tmp_path}/out")
    assert store.names() == set()
    store.write("parquet/1", "0123456789")
    store.write("parquet/2", "")
    assert store.read("parquet/1") == b"0123456789"
    assert store.names("parquet") == {"1", "2"}
    store.write("parquet/1", "again")
    assert store.read("parquet/1") == b"again"
    assert store.names("parquet") == {"1", "2"}
    with pytest.raises(FileNotFoundError):
        store.put(tmp_path / "nothing", "parquet/3")
    assert store.names("parquet") == {"1", "2"}
    with pytest.raises(FileNotFoundError):
        store.read("nothing")


def test_store_that_lists_the_folder_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    files = fsspec.filesystem("memory")
    listed = ["/bucket/found/", "/bucket/found/plan.json", "/bucket/found/parquet/"]
    monkeypatch.setattr(type(files), "ls", lambda *_, **__: listed)
    assert Store("memory://bucket/found").names() == {"plan.json", "parquet"}
