"""Inputs and outputs of a collection, without Ray."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_storage_options
from small_collection import save_images

from retinanet.batch.inputs import iter_images, list_inputs
from retinanet.batch.store import Store
from retinanet.data.archives import open_files
from retinanet.errors import DataError, MissingExtraError
from retinanet.inference import Failure, find_sources
from retinanet.inference.sources import Source


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


def test_folder_is_listed_with_subfolders(tree: Path) -> None:
    expected = ["a.png", "b.png", "left/a.png", "left/deep/c.JPG", "left/one.tar"]
    assert list_inputs([str(tree)]) == [f"{tree}/{name}" for name in expected]
    assert list_inputs(["images/"]) == [f"images/{name}" for name in expected]
    (tree / "left" / "loop").unlink()  # fsspec follows links
    assert list_inputs([f"file://{tree}"]) == [f"file://{tree}/{name}" for name in expected]
    # The same images as those of the local engine.
    local = [str(source.image) for source in find_sources(tree)]
    assert local == [name for name in list_inputs([str(tree)]) if not name.endswith(".tar")]


def test_globs_are_matched(tree: Path) -> None:
    assert list_inputs(["images/*.png"]) == ["images/a.png", "images/b.png"]
    assert list_inputs([f"{tree}/*/a.png"]) == [f"{tree}/left/a.png"]
    assert list_inputs(["im*/**/*.JPG"]) == ["images/left/deep/c.JPG"]
    assert list_inputs([f"file://{tree}/b.*"]) == [f"file://{tree}/b.png"]
    (tree / "[a].png").write_bytes(b"")  # an existing file is no glob
    assert list_inputs(["images/[a].png"]) == ["images/[a].png"]


def test_braces_are_expanded(tree: Path) -> None:
    given = ["images/{b,a}.png", "images/left/{one..one}.tar"]
    (tree / "left" / "{one..one}.tar").write_bytes(b"")
    assert list_inputs(given) == ["images/b.png", "images/a.png", "images/left/{one..one}.tar"]
    for i in range(9, 12):
        (tree / f"s{i:02d}.tar").write_bytes(b"")
    expected = [f"images/s{i:02d}.tar" for i in range(9, 12)]
    assert list_inputs(["images/s{09..11}.tar"]) == expected


def test_lines_of_a_list_file_are_not_checked(tree: Path) -> None:
    (tree / "list.txt").write_text("a.png\r\n\n  s3://bucket/b c.jpg \nnowhere.tar\n")
    expected = ["a.png", "s3://bucket/b c.jpg", "nowhere.tar"]
    assert list_inputs([str(tree / "list.txt")]) == expected


@pytest.mark.parametrize(
    ("given", "message"),
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
def test_source_without_images_is_an_error(tree: Path, given: str, message: str) -> None:
    Path("empty").mkdir()
    Path("empty.txt").write_text("\n")
    with pytest.raises(DataError) as caught:
        list_inputs([given])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_folder_that_cannot_be_listed_is_an_error(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.scandir

    def refused(path: str) -> object:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return before(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"left/deep: cannot be listed: Permission denied"):
        list_inputs(["images"])


class Hosted(LocalFileSystem):
    """Files of a disk under addresses with a host, which fsspec's paths lack, as of SFTP."""

    protocol = "hosted"

    def __init__(self, **_: Any) -> None:
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(infer_storage_options(path)["path"])

    def ls(self, path: str, *args: Any, **options: Any) -> Any:
        if path.endswith("/deep"):
            raise PermissionError(13, "Permission denied", path)
        return super().ls(path, *args, **options)


def test_addresses_keep_their_host_and_lose_no_folder(tree: Path) -> None:
    fsspec.register_implementation("hosted", Hosted, clobber=True)
    (tree / "left" / "loop").unlink()
    top = f"hosted://user@box{tree}"
    for given in (top, f"{top}/**/*.png"):
        with pytest.raises(DataError, match=r"cannot be accessed: .*Permission denied"):
            list_inputs([given])
    assert list_inputs([f"{top}/left/*.tar"]) == [f"{top}/left/one.tar"]
    (tree / "left" / "deep").rename(tree / ".deep")
    expected = [f"{top}/{name}" for name in ("a.png", "b.png", "left/a.png")]
    assert list_inputs([f"{top}/**/*.png"]) == expected
    assert list_inputs([f"{top}/"]) == [*expected, f"{top}/left/one.tar"]


def test_sftp_gets_no_option_that_paramiko_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    paramiko = MagicMock()
    paramiko.SSHClient.return_value.connect = lambda host, **options: given.append(options)
    monkeypatch.setitem(sys.modules, "paramiko", paramiko)
    open_files("sftp://me@box:22/a")
    assert given == [{"username": "me", "port": 22}]


def test_missing_packages_are_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    with pytest.raises(MissingExtraError, match=r"retinanet\[ray\]"):
        list_inputs(["a{0..3}.tar"])
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"retinanet\[hub\]"):
        open_files("hf://datasets/owner/name/a.jpg")


def write_tar(file: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(file, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file


def test_images_of_files_addresses_and_tar_files_are_read(tmp_path: Path) -> None:
    folder = save_images(tmp_path / "images", 3)
    first, second, third = sorted(folder.iterdir())
    data = second.read_bytes()
    shard = write_tar(
        tmp_path / "shard.tar", {"x.png": data, "x.json": b"{}", "./d/y.v2.PNG": data}
    )
    packed = write_tar(tmp_path / "shard.tar.gz", {"z.png": data}, "w:gz")
    gone = [f"file://{tmp_path}/gone.png", str(tmp_path / "gone.tar")]
    found = list(
        iter_images(
            [str(first), f"file://{second}", str(shard), f"file://{packed}", *gone, str(third)]
        )
    )
    sources = [source for source in found if isinstance(source, Source)]
    names = [str(first), f"file://{second}", f"{shard}/x.png", f"{shard}/d/y.v2.PNG"]
    names += [f"file://{packed}/z.png", gone[0], str(third)]
    assert [source.name for source in sources] == names
    assert sources[0].image == str(first)  # read by the detector's threads
    assert [source.load() for source in sources[1:5]] == [data] * 4
    with pytest.raises(DataError, match=r"^file://.*/gone\.png: there is no such file$"):
        sources[5].read()
    (failure,) = (failure for failure in found if isinstance(failure, Failure))
    assert failure.to_dict() == {"file": gone[1], "reason": f"{gone[1]}: there is no such file"}


def test_damaged_tar_file_gives_its_first_images(tmp_path: Path) -> None:
    data = save_images(tmp_path, 1).joinpath("000.png").read_bytes()
    shard = write_tar(tmp_path / "shard.tar", {f"{i}.png": data for i in range(3)})
    whole = shard.read_bytes()
    shard.write_bytes(whole[: 2 * 512 + len(data) + len(data) // 2])
    source, failure = iter_images([str(shard)])
    assert isinstance(source, Source)
    assert source.name == f"{shard}/0.png"
    assert isinstance(failure, Failure)
    assert failure.reason.startswith(f"{shard}: cannot be read: unexpected end of data")
    shard.write_text("no tar file")
    (failure,) = iter_images([str(shard)])
    assert "cannot be read" in failure.reason  # type: ignore[union-attr]


@pytest.mark.parametrize("scheme", ["", "file://", "memory://"])
def test_store_files_are_complete_or_missing(tmp_path: Path, scheme: str) -> None:
    # file:// is an address whose files are renamed when complete.
    store = Store(f"{scheme}{tmp_path}/out")
    assert store.names() == set()
    for content in ("0123456789", b"again"):
        store.write("parquet/1", content)
        store.write("parquet/2", "")
        with store.open("parquet/1") as file:
            assert file.read() in (content, str(content).encode())
        assert store.names("parquet") == {"1", "2"}
    assert (tmp_path / "out" / "parquet" / "1").exists() == (scheme != "memory://")
    with pytest.raises(FileNotFoundError):
        store.open("nothing")
    assert Store(Path("s3://bucket/out")).address == "s3://bucket/out"  # pathlib drops a slash


def test_store_that_lists_the_folder_itself_has_no_such_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = fsspec.filesystem("memory")
    listed = ["/bucket/found/", "/bucket/found/plan.json", "/bucket/found/parquet/"]
    monkeypatch.setattr(type(files), "ls", lambda *_, **__: listed)
    assert Store("memory://bucket/found").names() == {"plan.json", "parquet"}
