"""Reading CVAT for images 1.1."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from labelled_folders import MakeImage, write

from retinanet.data import check_datasets, convert, find_data, read_dataset, read_splits
from retinanet.data.fix import write_fixed
from retinanet.errors import DataError

META = (
    "<version>1.1</version><meta><task><labels>"
    "<label><name>dog</name><attributes/></label><label><name>cat</name></label>"
    "<label><name>ear</name><parent>dog</parent></label>"
    "</labels></task></meta>"
)


def box(label: str = "cat", sides: str = 'xtl="1.25" ytl="2" xbr="11" ybr="7.5"', more: str = "",
        inside: str = "") -> str:  # fmt: skip
    return f'<box label="{label}" {sides} {more}>{inside}</box>'


def image(name: str = "a.jpg", inside: str = "", id_: int = 0, more: str = "") -> str:
    return f'<image id="{id_}" name="{name}" width="40" height="30" {more}>{inside}</image>'


def annotations(*images: str, meta: str = META) -> str:
    return f"<?xml version='1.0'?><annotations>{meta}{''.join(images)}</annotations>"


def test_boxes_labels_and_background(tmp_path: Path, make_image: MakeImage) -> None:
    for seed, name in enumerate(("a.jpg", "b.jpg")):
        make_image(tmp_path / "images" / name, seed=seed)
    outside = box(more='outside="1"')
    text = annotations(image("a.jpg", box() + box("dog") + outside), image("b.jpg", id_=7))
    file = write(tmp_path / "annotations.xml", text)
    for path in (file, tmp_path):
        assert find_data(path).format == "cvat"
        dataset = read_dataset(path, "all")
        assert dataset.problems == ()
        assert dataset.classes == ("dog", "cat")  # the order of <meta>; parts of skeletons left out
        first, second = dataset.images
        assert first.path == tmp_path / "images" / "a.jpg"
        assert [(a.box, a.label) for a in first.annotations] == [
            ((1.25, 2, 11, 7.5), 1),
            ((1.25, 2, 11, 7.5), 0),
        ]
        assert (second.id, second.annotations, second.width, second.height) == (7, (), 40, 30)
    assert check_datasets(read_splits(tmp_path)).problems == ()


def test_subsets_are_splits_and_names_hold_folders(tmp_path: Path, make_image: MakeImage) -> None:
    places = ("Train/day/a.jpg", "Train/night/a.jpg", "Validation/b.jpg", "default/c.jpg")
    for seed, position in enumerate(places):
        make_image(tmp_path / "images" / position, seed=seed)
    text = annotations(
        image("day/a.jpg", box(), more='subset="Train"'),
        image("night/a.jpg", box(), more='subset="Train"'),
        image("b.jpg", box(), more='subset="Validation"'),
        image("c.jpg", box(), more='subset="default"'),
    )
    write(tmp_path / "annotations.xml", text)
    train, val = (read_dataset(tmp_path, split) for split in ("train", "val"))
    found = [item.path.relative_to(tmp_path / "images").as_posix() for item in train.images]
    assert found == list(places[:2])
    assert [item.path.name for item in val.images] == ["b.jpg"]
    every = read_dataset(tmp_path, "all").images
    assert sorted(item.path.name for item in every) == ["a.jpg", "a.jpg", "b.jpg", "c.jpg"]
    assert all(item.path.is_file() for item in every)


def test_extra_comes_along(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "a.jpg")
    inside = '<attribute name="score">0.5</attribute><attribute name="breed">pug</attribute>'
    text = box(more='occluded="1" z_order="0" source="auto"', inside=inside)
    write(tmp_path / "x.xml", annotations(image(inside=text)))
    (item,) = read_dataset(tmp_path, "all").images[0].annotations
    wanted = {"occluded": 1, "source": "auto", "attributes": {"score": 0.5, "breed": "pug"}}
    assert item.extra == wanted
    (bare,) = read_dataset(tmp_path, "all", extras=False).images[0].annotations
    assert bare.extra == {}


def test_faults_are_recorded(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "a.jpg")
    inside = (
        box()
        + box("cow")
        + box(sides='xtl="one" ytl="2" xbr="3" ybr="4"')
        + box(sides='xtl="1" ytl="2" xbr="3"')
        + box(more='rotation="nan"')
        + box(sides='xtl="10" ytl="10" xbr="30" ybr="20"', more='rotation="90"')
        + '<polygon label="cat" points="1,2;3,4;5,6"/><tag label="cat"/>'
    )
    text = annotations(image(inside=inside), image("", id_=4), image("x" * 300, id_=5))
    dataset = read_dataset(write(tmp_path / "x.xml", text), "all")
    found = [(p.kind, p.object, p.reason) for p in dataset.problems]
    assert found[0][2] == (
        "a.jpg: object 2 (cat): xtl 'one', ytl '2', xbr '3', ybr '4', rotation None: not four "
        "numbers"
    )
    assert [problem[:2] for problem in found[:3]] == [("box-not-a-number", n) for n in (2, 3, 4)]
    assert found[3:] == [
        ("box-rotated", 5, "a.jpg: object 5 is rotated by 90 degrees"),
        ("shape-not-box", 6, "a.jpg: 'cat' is drawn as a polygon, not as a box"),
        ("label-unreadable", 4, "image 4: '' is no file name"),
        ("label-unreadable", 5, f"image 5: '{'x' * 76}... is no file name"),
        ("class-unknown", 1, "a.jpg: object 1: class 'cow' is not one of 2 known"),
    ]
    # Turned by a right angle about its centre (20, 15): 10 wide and 20 high.
    kept = dataset.images[0].annotations
    assert [a.id for a in kept] == [0, 5]
    assert kept[1].box == pytest.approx((15, 5, 25, 25))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotations><image", "x.xml: not XML: unclosed token"),
        ("<annotations><track id='0' label='cat'/></annotations>", 'it is "CVAT for video"'),
        ("<?xml version='1.0' encoding='nonsense'?><annotations/>", "not XML|cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_splits(write(tmp_path / "x.xml", text))


def test_it_is_read_alone(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "cvat" / "a.jpg")
    sides = 'xtl="5" ytl="2" xbr="50" ybr="7"'
    write(tmp_path / "cvat" / "x.xml", annotations(image(inside=box(sides=sides))))
    convert(tmp_path / "cvat", tmp_path / "coco", "coco")
    again = read_dataset(tmp_path / "coco", "all")
    assert again.images[0].annotations[0].box == (5, 2, 50, 7)
    with pytest.raises(DataError, match=r"cvat can be read, not written; choose .*coco, voc"):
        convert(tmp_path / "coco", tmp_path / "other", "cvat")
    splits = read_splits(tmp_path / "cvat")
    written = write_fixed(splits, check_datasets(splits), tmp_path / "fixed")
    assert written.format == "coco"
    fixed = read_dataset(tmp_path / "fixed", "all")
    assert fixed.images[0].annotations[0].box == (5, 2, 40, 7)


def test_tasks_of_one_subset_count_from_0_each(tmp_path: Path, make_image: MakeImage) -> None:
    for seed, name in enumerate("abc"):
        make_image(tmp_path / "images" / f"{name}.jpg", seed=seed)
        more = f'subset="test" task_id="{seed}"'
        write(tmp_path / f"{name}.xml", annotations(image(f"{name}.jpg", box(), more=more)))
    dataset = read_dataset(tmp_path, "test")
    assert [(item.id, item.path.name) for item in dataset.images] == [
        (0, "a.jpg"), ("0-2", "b.jpg"), ("0-3", "c.jpg")
    ]  # fmt: skip


@pytest.mark.parametrize("to", ["coco", "webdataset"])
@pytest.mark.parametrize("subset", ["../../out", "..", "a\\b", "x" * 300])
def test_a_subset_that_leads_outside(
    tmp_path: Path, make_image: MakeImage, to: str, subset: str
) -> None:
    make_image(tmp_path / "in" / "images" / "a.jpg")
    text = annotations(image("a.jpg", box(), more=f'subset="{subset}"'))
    write(tmp_path / "in" / "annotations.xml", text)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"a split is named .* which is no file name"):
        convert(tmp_path / "in", tmp_path / "a" / "b", to)
    assert sorted(tmp_path.rglob("*")) == before


def test_entities_do_not_unfold(tmp_path: Path) -> None:
    names = "abcdefghij"
    more = "".join(f'<!ENTITY {name} "{f"&{before};" * 10}">' for before, name in pairwise(names))
    head = f'<!DOCTYPE x [<!ENTITY a "{"a" * 40}">{more}]>'
    write(tmp_path / "a.xml", f'{head}<annotations><image name="&j;"/></annotations>')
    with pytest.raises(DataError, match="not XML: limit on input amplification"):
        read_splits(tmp_path)
    head = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]>'
    write(tmp_path / "a.xml", f"{head}<annotations><meta>&a;</meta></annotations>")
    with pytest.raises(DataError, match="not XML: undefined entity"):  # no file is opened for it
        read_splits(tmp_path)
