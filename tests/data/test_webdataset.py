"""Tar shards: written, read in place, by other programs and from them, and what can be wrong."""

from __future__ import annotations

import gc
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from labelled_folders import MakeImage, coco_image, coco_json, coco_object, write
from PIL import Image

from retinanet.data import archives, check_datasets, convert, read_dataset, read_splits
from retinanet.data.formats import digest, find_data
from retinanet.data.formats.webdataset import parse_shard_size
from retinanet.data.image_files import image_size
from retinanet.data.images import read_image, read_reduced
from retinanet.errors import ConfigError, DataError, ImageError
from retinanet.inference.sources import find_sources, is_single


@pytest.fixture
def source(tmp_path: Path, make_image: MakeImage) -> Path:
    """Eleven images in two splits, with all that a label can say."""
    root = tmp_path / "source"
    names = [f"{number:02d}.{'png' if number % 3 else 'jpg'}" for number in range(8)]
    for split, listed in (("train", names), ("val", ["v.one.png", "v_one.png", "V.jpg"])):
        for seed, name in enumerate(listed):
            make_image(root / split / name, (40 + seed, 30), seed=seed + len(listed))
    objects = [
        coco_object(11, 1, [1.25, 2, 10.5, 5.75], 90, area=33.5, truncated=1, pose="Left"),
        coco_object(12, 1, [0.1, 0.2, 30.7, 20.3], 7),
        coco_object(20, 3, [4, 4, 20, 20], 7, iscrowd=1, segmentation={"counts": [1], "size": [2]}),
        coco_object(21, 3, [5, 5, 9, 9], 7, difficult=1),
    ]
    images = [coco_image(i, name, (40 + i, 30)) for i, name in enumerate(names)]
    images[1]["license"] = 3
    categories = [{"id": 7, "name": "traffic light", "supercategory": "street"},
                  {"id": 30, "name": "ünused"}, {"id": 90, "name": "cat"}]  # fmt: skip

    def content(images: Any, annotations: Any) -> str:
        whole = json.loads(coco_json(images, annotations))
        return json.dumps(whole | {"categories": categories, "info": {"year": 2024}})

    write(root / "train.json", content(images, objects))
    of_val = [coco_image(50, "v.one.png"), coco_image(51, "v_one.png"), coco_image(52, "V.jpg")]
    for seed, image in enumerate(of_val):
        image["width"] += seed
    write(root / "val.json", content(of_val, [coco_object(1, 51, [1, 1, 5, 5], 90)]))
    return root


@pytest.fixture
def shards(tmp_path: Path, source: Path) -> Path:
    """The same in shards of three."""
    convert(source, tmp_path / "shards", "webdataset", shard_size="3")
    return tmp_path / "shards"


def make_tar(path: Path, files: list[tuple[str, bytes]], **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **more) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def jpeg(size: tuple[int, int] = (40, 30), colour: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (colour, 0, 0)).save(stream, "JPEG")
    return stream.getvalue()


def label(*objects: Any, **more: Any) -> bytes:
    return json.dumps({"objects": list(objects), **more}).encode()


CAT = {"class": "cat", "box": [1, 2, 11, 22]}


# ---- writing, and there and back


def test_what_lies_in_the_shards(shards: Path, source: Path) -> None:
    assert sorted(file.name for file in shards.iterdir()) == [
        "retinanet.json",
        *(f"train-00000{i}.tar" for i in range(3)),
        "val-000000.tar",
    ]
    with tarfile.open(shards / "train-000001.tar") as tar:
        assert tar.getnames() == [
            "03.jpg", "03.json", "04.png", "04.json", "05.png", "05.json"
        ]  # fmt: skip
        held = tar.extractfile("04.png")
        assert held is not None
        assert held.read() == (source / "train" / "04.png").read_bytes()
    with tarfile.open(shards / "train-000000.tar") as tar:
        held = tar.extractfile("01.json")
        assert held is not None
        assert json.load(held) == {
            "id": 1,
            "file_name": "01.png",
            "width": 41,
            "height": 30,
            "objects": [
                {"class": "cat", "category_id": 90, "box": [1.25, 2, 11.75, 7.75], "id": 11,
                 "area": 33.5, "extra": {"truncated": 1, "pose": "Left"}},
                {"class": "traffic light", "category_id": 7, "id": 12,
                 "box": [0.1, 0.2, 0.1 + 30.7, 0.2 + 20.3]},
            ],
            "extra": {"license": 3},
        }  # fmt: skip
    catalogue = json.loads((shards / "retinanet.json").read_text("utf-8"))
    assert catalogue["classes"] == ["traffic light", "ünused", "cat"]
    assert catalogue["category_ids"] == [7, 30, 90]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", (1000, None)),
        ("256MB", (None, 256_000_000)),
        ("1.5gb", (None, 1_500_000_000)),
        ("20 KB", (None, 20_000)),
        *((text, None) for text in ("0", "0MB", "many", "1.5", "-3", "10TB")),
    ],
)
def test_parse_shard_size(text: str, size: Any) -> None:
    if size is not None:
        assert parse_shard_size(text) == size
        return
    with pytest.raises(ConfigError, match="is neither a number of samples"):
        parse_shard_size(text)


def test_shards_of_bytes(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "one", "webdataset")
    assert len(list((tmp_path / "one").glob("train-*.tar"))) == 1
    convert(source, tmp_path / "small", "webdataset", shard_size="8KB")
    sizes = [
        sum(member.size for member in archives.members_of(str(file)).values())
        for file in (tmp_path / "small").glob("train-*.tar")
    ]
    assert len(sizes) > 2
    assert max(sizes) <= 8000
    assert digest(read_dataset(tmp_path / "small")) == digest(read_dataset(tmp_path / "one"))


# ---- reading in place


def test_images_are_those_of_the_folder(source: Path, shards: Path) -> None:
    for image, other in zip(read_dataset(source).images, read_dataset(shards).images, strict=True):
        assert other.path.parent.name.endswith(".tar")
        assert torch.equal(read_image(other.path), read_image(image.path))
        assert torch.equal(read_image(str(other.path)), read_image(image.path))
        assert image_size(other.path) == image_size(image.path)
        assert torch.equal(read_reduced(other.path, 16, 32)[0], read_reduced(image.path, 16, 32)[0])
    assert digest(read_dataset(shards)) == digest(read_dataset(source))


def test_a_single_shard(shards: Path) -> None:
    dataset = read_dataset(shards / "train-000001.tar", "all")
    assert [image.path.name for image in dataset.images] == ["03.jpg", "04.png", "05.png"]
    assert dataset.classes == ("traffic light", "ünused", "cat")


def test_shards_as_images_to_search(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [source.name for source in find_sources(shards / "train-000001.tar")]
    assert names == ["03.jpg", "04.png", "05.png"]
    assert [item.name for item in find_sources(shards)][:2] == [
        "train-000000.tar/00.jpg", "train-000000.tar/01.png"
    ]  # fmt: skip
    assert len(find_sources(str(shards / "train-*.tar"))) == 8
    (item,) = find_sources(shards / "train-000001.tar" / "04.png")
    assert item.read().shape == (3, 30, 44)
    assert is_single(shards / "train-000001.tar" / "04.png")
    assert not is_single(shards / "train-000001.tar")
    with pytest.raises(DataError, match=r"there is no 'no.png' in this archive"):
        find_sources(shards / "train-000001.tar" / "no.png")[0].read()
    make_tar(shards / "empty" / "x.tar", [("a.txt", b"")])
    with pytest.raises(DataError, match=r"x\.tar: no image in this archive"):
        find_sources(shards / "empty")


def test_a_folder_named_as_a_tar_is_a_folder(tmp_path: Path, make_image: MakeImage) -> None:
    file = make_image(tmp_path / "x.tar" / "a.png")
    assert archives.archive_of(file) is None
    assert read_image(file).shape == (3, 30, 40)
    assert find_sources(tmp_path / "x.tar")[0].name == "a.png"


# ---- other programs


@pytest.mark.filterwarnings("ignore:unclosed file <_io.BufferedReader:ResourceWarning")  # theirs
def test_the_webdataset_library_reads_ours(shards: Path, source: Path) -> None:
    wds = pytest.importorskip("webdataset")
    url = str(shards / "train-{000000..000002}.tar")
    samples = list(wds.WebDataset(url, shardshuffle=False).decode("rgb8"))
    ours = read_dataset(shards).images
    assert [sample["__key__"] for sample in samples] == [image.path.stem for image in ours]
    for sample, image in zip(samples, ours, strict=True):
        pixels = sample[image.path.suffix[1:]]
        assert torch.equal(torch.from_numpy(pixels.copy()).permute(2, 0, 1), read_image(image.path))
        assert [tuple(item["box"]) for item in sample["json"]["objects"]] == [
            item.box for item in image.annotations
        ]
    gc.collect()  # what it left open


def test_shards_of_the_webdataset_library(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    (tmp_path / "train").mkdir()
    pattern = str(tmp_path / "train" / "shard-%03d.tar")
    with wds.ShardWriter(pattern, maxcount=2, verbose=0) as sink:
        for number in range(5):
            objects = [{"class": "dog" if number % 2 else "cat", "box": [1, 2, 3 + number, 9]}]
            sink.write(
                {"__key__": f"n/{number:04d}", "jpg": jpeg(), "json": {"objects": objects},
                 "seg.png": b"a mask", "txt": "a word"}
            )  # fmt: skip
    assert find_data(tmp_path).format == "webdataset"
    dataset = read_dataset(tmp_path, "all")
    assert dataset.classes == ("cat", "dog")
    assert dataset.category_ids == (1, 2)
    assert [image.id for image in dataset.images] == [f"n/{number:04d}" for number in range(5)]
    assert [image.annotations[0].label for image in dataset.images] == [0, 1, 0, 1, 0]
    assert dataset.images[4].annotations[0].box == (1, 2, 7, 9)
    assert str(dataset.images[4].path) == str(
        tmp_path / "train" / "shard-002.tar" / "n" / "0004.jpg"
    )
    assert read_image(dataset.images[4].path).shape == (3, 30, 40)
    assert dataset.problems == ()


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_leading_dots(tmp_path: Path, form: int) -> None:
    long = f"./{'d' * 90}/{'ü' * 80}"
    make_tar(
        tmp_path / "x.tar",
        [
            (f"{long}.jpg", jpeg()),
            (f"{long}.json", label(CAT)),
            ("/top/b.jpg", jpeg()),
            ("/top/b.json", label(CAT)),
            ("__init__.txt", b""),
        ],
        format=form,
    )
    images = read_dataset(tmp_path, "all").images
    assert [image.path for image in images] == [
        tmp_path / "x.tar" / f"{long}.jpg", tmp_path / "x.tar" / "top" / "b.jpg"
    ]  # fmt: skip
    for image in images:
        assert image.annotations[0].box == (1, 2, 11, 22)
        assert read_image(image.path).shape == (3, 30, 40)


def test_ids_make_the_classes_where_they_are_told(tmp_path: Path) -> None:
    things = [CAT | {"category_id": 9}, {"class": "dog", "category_id": 3, "box": [0, 0, 5, 5]}]
    make_tar(tmp_path / "x.tar", [("a.jpg", jpeg()), ("a.json", label(*things))])
    dataset = read_dataset(tmp_path, "all")
    assert (dataset.classes, dataset.category_ids) == (("dog", "cat"), (3, 9))
    assert [a.label for a in dataset.images[0].annotations] == [1, 0]
    other = label(CAT | {"category_id": 8})
    make_tar(tmp_path / "y.tar", [("b.jpg", jpeg()), ("b.json", other)])
    assert read_dataset(tmp_path, "all").problems[0].reason == (
        "object 0: class 'cat' has category_id 8, and 9 elsewhere"
    )


def test_splits_by_names_and_folders(tmp_path: Path) -> None:
    sample = [("a.jpg", jpeg()), ("a.json", label(CAT))]
    for name in ("coco-train-0000.tar", "coco-val-0000.tar", "coco-val-0001.tar"):
        make_tar(tmp_path / "flat" / name, [(f"{name[:-4]}.{n[2:]}", c) for n, c in sample])
    for name in ("training", "valid"):
        make_tar(tmp_path / "deep" / name / "00.tar", sample)
    make_tar(
        tmp_path / "bare" / "shard-000001.tar", [*sample, ("b.jpg", jpeg()), ("b.json", label())]
    )
    flat, deep = read_splits(tmp_path / "flat"), read_splits(tmp_path / "deep")
    assert {name: len(item) for name, item in flat.items()} == {"train": 1, "val": 2}
    assert {name: len(item) for name, item in deep.items()} == {"train": 1, "val": 1}
    assert {k: len(v) for k, v in read_splits(tmp_path / "bare").items()} == {"train": 1, "val": 1}


# ---- what is wrong


def test_a_cut_off_tar(tmp_path: Path, shards: Path) -> None:
    shard = shards / "train-000001.tar"
    whole = shard.read_bytes()
    # Within an image, within a header, between two files, and without the end.
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    for size in (last.offset - 700, last.offset + 100, last.offset, end):
        shard.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"train-000001.tar: is cut off or damaged after 0\d"):
            read_dataset(shards)
    shard.write_bytes(whole[:end] + b"no tar" * 100)
    with pytest.raises(DataError, match=r"train-000001.tar: is cut off or damaged after 05.json"):
        read_dataset(shards)
    shard.write_bytes(b"")
    with pytest.raises(DataError, match=r"train-000001.tar: is no tar that can be read in place"):
        read_dataset(shards)


def test_a_compressed_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(DataError, match="compressed one must be uncompressed"):
        read_dataset(tmp_path / "x.tar", "all")
    with pytest.raises(DataError, match=r"no labelled data found in 0 images, 1 .tar"):
        read_dataset(tmp_path, "all")


def test_a_missing_member(shards: Path) -> None:
    missing = shards / "train-000000.tar" / "99.jpg"
    with pytest.raises(ImageError, match=r"train-000000.tar/99.jpg: there is no '99.jpg' in this"):
        read_image(missing)
    assert not archives.is_image_file(missing)
    dataset = read_dataset(shards)
    lost = replace(dataset, images=(replace(dataset.images[1], path=missing),))
    (problem,) = check_datasets({"train": lost}).problems
    assert (problem.kind, problem.file) == ("image-unreadable", missing)
    assert problem.reason == "there is no '99.jpg' in this archive"


def test_a_missing_or_a_strange_shard(shards: Path) -> None:
    shutil.copy(shards / "val-000000.tar", shards / "val-000001.tar")
    with pytest.raises(DataError, match=r"val-000001.tar: is not listed in .*retinanet.json"):
        read_dataset(shards)
    (shards / "val-000001.tar").unlink()
    (shards / "train-000002.tar").unlink()
    with pytest.raises(
        DataError, match=r"train-000002.tar: is missing, though listed in .*retinanet.json"
    ):
        read_dataset(shards)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"classes": None}, "is broken .TypeError"),
        ({"splits": {"train": {}}}, "is broken .KeyError: 'shards'"),
        ({"category_ids": [1, 1, 2]}, "has 3 classes and category_ids"),
        ({"version": 2}, "has version 2 of the layout, and this retinanet reads 1; update"),
    ],
)
def test_a_broken_catalogue(shards: Path, change: Any, reason: str) -> None:
    file = shards / "retinanet.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | change), "utf-8")
    with pytest.raises(DataError, match=reason):
        read_dataset(shards)


@pytest.mark.parametrize(
    ("files", "kind", "file", "reason"),
    [
        ({"b.jpg": jpeg()}, "label-missing", "b.jpg", "key 'b' has no .json"),
        ({"b.json": label()}, "image-missing", "b.json", "key 'b' has labels and no image"),
        ({"b.png": jpeg(), "b.jpg": jpeg()}, "key-duplicate", "b.png", "key 'b' has 2 images"),
    ],
)
def test_faults_of_a_shard(
    tmp_path: Path, files: dict[str, bytes], kind: str, file: str, reason: str
) -> None:
    good = [("a.jpg", jpeg()), ("a.json", label(CAT))]
    shard = make_tar(tmp_path / "x.tar", [*good, *files.items()])
    dataset = read_dataset(shard, "all")
    (problem,) = dataset.problems
    assert (problem.kind, problem.file) == (kind, shard / file)
    assert problem.reason.startswith(reason)
    assert problem in check_datasets({"all": dataset}).problems


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        (b"{", "label-unreadable", "not JSON: Expecting property name"),
        (b'{"boxes": []}', "label-unreadable", "has no list \"objects\" but keys ['boxes']"),
        (b"3", "label-unreadable", 'has no list "objects" but 3'),
        (label(width="40"), "label-unreadable", "\"width\" is not a whole number but '40'"),
        (label(id=[1]), "label-unreadable", '"id" is neither number nor text but [1]'),
        (label(extra=1), "label-unreadable", '"extra" is no object but 1'),
        (label({"class": "cat"}), "box-not-a-number", "object 0 (cat): box None: not four numbers"),
        (label({"box": [1, 2, 3, 4]}), "class-unknown", "object 0: its class is None, not a name"),
        (label(CAT, 7), "label-unreadable", 'object 1: is 7, not {"class": "cat", "box": [x1, y1'),
    ],
)
def test_faults_of_a_sample(tmp_path: Path, text: bytes, kind: str, reason: str) -> None:
    files = [("a.jpg", jpeg()), ("a.json", label(CAT)), ("b.jpg", jpeg()), ("b.json", text)]
    shard = make_tar(tmp_path / "x.tar", files)
    problem, *_ = read_dataset(shard, "all").problems
    assert (problem.kind, problem.file) == (kind, shard / "b.json")
    assert problem.reason.startswith(reason)


def test_a_class_that_contradicts_its_id(shards: Path) -> None:
    files = [("a.jpg", jpeg()), ("a.json", label(CAT | {"category_id": 7}, CAT))]
    make_tar(shards / "val-000000.tar", files)
    dataset = read_dataset(shards, "val")
    assert dataset.problems[-1].reason == (
        "object 0: class 'cat' has category_id 7, and 90 elsewhere"
    )
    (only,) = dataset.images[0].annotations
    assert dataset.classes[only.label] == "cat"


def test_shards_of_another_layout(tmp_path: Path) -> None:
    files = [("a.jpg", jpeg()), ("a.json", b'{"label": 3}')]
    make_tar(tmp_path / "json" / "x.tar", files)
    with pytest.raises(
        DataError, match=r"x.tar/a.json: has no list \"objects\" but keys \['label'\].*is read; no"
    ):
        read_dataset(tmp_path / "json", "all")
    make_tar(tmp_path / "cls" / "x.tar", [("a.cls", b"3"), ("a.jpg", jpeg())])
    with pytest.raises(DataError, match=r"x.tar/a.jpg: key 'a' has no .json"):
        read_dataset(tmp_path / "cls", "all")
    make_tar(tmp_path / "plain" / "x.tar", [("a.jpg", jpeg()), ("b.jpg", jpeg())])
    with pytest.raises(DataError, match="no labelled data found"):
        read_dataset(tmp_path / "plain", "all")


# ---- remote


@pytest.fixture
def remote(shards: Path) -> Iterator[str]:
    """The shards in fsspec's memory."""
    store = fsspec.filesystem("memory")
    store.put(str(shards), "/bucket/", recursive=True)
    yield "memory://bucket/shards"
    store.rm("/bucket", recursive=True)


def test_remote_shards(shards: Path, remote: str) -> None:
    here = read_splits(shards)
    for position in (remote, Path(remote)):  # the command line has paths
        there = read_splits(position)
        for name, dataset in here.items():
            assert there[name].problems == ()
            assert digest(there[name]) == digest(dataset)
            for image, other in zip(dataset.images, there[name].images, strict=True):
                assert other.id == image.id
                assert torch.equal(read_image(other.path), read_image(image.path))
    (item, *_) = find_sources(f"{remote}/train-000001.tar")
    assert item.read().shape[0] == 3


def test_remote_shards_are_read_once_however_many(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    content = make_tar(tmp_path / "x.tar", [("a.jpg", b"")]).read_bytes()
    names = [f"memory://many/{number}.tar" for number in range(300)]
    for name in names:
        store.pipe_file(name, content)
        assert [*archives.members_of(name)] == ["a.jpg"]
    store.rm("/many", recursive=True)
    assert [*archives.members_of(names[0])] == ["a.jpg"]


def test_what_can_be_wrong_far_away(remote: str) -> None:
    with pytest.raises(DataError, match="no labelled data found"):
        read_splits(f"{remote}/gone")
    with pytest.raises(DataError, match=r"gone.tar: there is no such file"):
        read_splits(f"{remote}/gone.tar")
    with pytest.raises(DataError, match=r"nostore://a/.*[Pp]rotocol not known"):
        read_splits("nostore://a/b.tar")
    with pytest.raises(ImageError, match=r"memory://.*/train-000001.tar/no.jpg: there is no"):
        read_image(f"{remote}/train-000001.tar/no.jpg")
    members = list(archives.members_of(f"{remote}/train-000001.tar").values())
    store = fsspec.filesystem("memory")
    store.pipe_file("/bucket/shards/train-000001.tar", b"x" * 2000)
    with pytest.raises(ImageError, match=r"train-000001.tar/0\d.\w+: cannot be read: .* cut off"):
        archives.fetch_remote(["a path.jpg", *members])
    store.rm("/bucket/shards/train-000001.tar")
    with pytest.raises(ImageError, match=r"train-000001.tar/03.jpg: cannot be read: FileNotFound"):
        archives.fetch_remote(members)
    with pytest.raises(
        DataError, match=r"train-000001.tar: is missing, though listed in memory://"
    ):
        read_splits(remote)


# ---- what others made


def test_a_member_outside_of_its_archive(tmp_path: Path) -> None:
    make_tar(tmp_path / "train-0.tar", [("../a.jpg", jpeg()), ("../a.json", label(CAT))])
    with pytest.raises(DataError, match=r"'\.\./a\.jpg' would lie outside of it"):
        read_dataset(tmp_path / "train-0.tar", "all")


def test_of_a_repeated_name_the_last_file_is_read(tmp_path: Path) -> None:
    dog = CAT | {"class": "dog"}
    files = [("a.jpg", jpeg()), ("a.json", label(CAT)), ("./a.json", label(dog))]
    make_tar(tmp_path / "x.tar", files)
    assert read_dataset(tmp_path, "all").classes == ("dog",)


@pytest.mark.parametrize(
    "size", [b"\x80" + b"\x7f" * 11, b"\xff" * 10 + b"\xfe\x00"], ids=["huge", "negative"]
)
@pytest.mark.parametrize(
    "kind",
    [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME],
    ids=["file", "pax", "long name"],
)
def test_a_size_that_cannot_be(tmp_path: Path, size: bytes, kind: bytes) -> None:
    files = [("a.jpg", jpeg()), ("a.json", label(CAT)), ("b.jpg", jpeg()), ("b.json", label(CAT))]
    content = bytearray(make_tar(tmp_path / "train-0.tar", files).read_bytes())
    start = archives.members_of(str(tmp_path / "train-0.tar"))["b.jpg"].offset - 512
    head = content[start : start + 512]
    head[124:136], head[156:157], head[148:156] = size, kind, b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    content[start : start + 512] = head
    (tmp_path / "train-0.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"is cut off or damaged after (a\.json|b\.jpg)"):
        read_splits(tmp_path)


def test_keys_that_begin_anew_in_each_shard(tmp_path: Path) -> None:
    for number in range(2):
        files = [("000.jpg", jpeg(colour=number)), ("000.json", label(CAT))]
        make_tar(tmp_path / f"test-{number}.tar", files)
    dataset = read_dataset(tmp_path, "test")
    assert dataset.problems == ()
    assert [image.id for image in dataset.images] == ["000", "000-2"]


def test_images_of_any_name_stay_samples(tmp_path: Path, make_image: MakeImage) -> None:
    names = ["img.dat", "plain", ".hidden.jpg", "x.jpg.", "caf\udce9.jpg", "broken"]
    content = {name: jpeg(colour=10 * position) for position, name in enumerate(names)}
    content["broken"] = b"nothing"
    for name in names:
        write(tmp_path / "source" / "test" / name, "").write_bytes(content[name])
    labels = coco_json([coco_image(i, name) for i, name in enumerate(names)], [])
    write(tmp_path / "source" / "test.json", labels)
    convert(read_splits(tmp_path / "source"), tmp_path / "shards", "webdataset")
    dataset = read_dataset(tmp_path / "shards", "test")
    assert dataset.problems == ()
    assert [archives.read_image_file(image.path) for image in dataset.images] == list(
        content.values()
    )
    stated = archives.members_of(archives.archive_of(dataset.images[4].path) or "")
    assert json.loads(stated["caf\udce9.json"].read())["file_name"] == "caf\udce9.jpg"
