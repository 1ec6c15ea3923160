"""``retinanet data``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from retinanet.data import read_splits

from .conftest import Cli


@pytest.fixture
def faulty(tiny_sets: dict[str, Path], tmp_path: Path) -> Path:
    """Return a copy with a box without width (annotation 1) and a truncated image."""
    folder = tmp_path / "faulty"
    shutil.copytree(tiny_sets["coco"], folder)
    labels = json.loads((folder / "train.json").read_text())
    labels["annotations"][0]["bbox"] = [10, 10, 0, 5]
    (folder / "train.json").write_text(json.dumps(labels))
    image = folder / "train" / "000003.png"
    image.write_bytes(image.read_bytes()[:300])
    return folder


def test_check_of_valid_data(cli: Cli, tiny_sets: dict[str, Path]) -> None:
    ended = cli("data", "check", tiny_sets["voc"], "--recipe=paper_quick")
    assert ended.code == 0
    assert ended.out.startswith("no problems found\n")
    for word in ("images", "circle", "anchor recall"):
        assert word in ended.out


def test_check_names_file_object_and_reason(cli: Cli, faulty: Path) -> None:
    ended = cli("data", "check", faulty)
    assert ended.code == 1
    lines = ended.out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("box-empty (1)"))
    assert "train.json: annotation 1 of image 1 (000000.png)" in lines[head + 1]
    assert "has no width" in lines[head + 1]
    assert any("000003.png" in line for line in lines)


def test_check_recommends_tiles_for_small_objects(cli: Cli, tmp_path: Path) -> None:
    Image.new("RGB", (1600, 1200)).save(tmp_path / "a.png")
    rows = "".join(f"a.png,{x},9,{x + 20},29,cell\n" for x in range(0, 200, 40))
    (tmp_path / "train.csv").write_text(f"image,x1,y1,x2,y2,label\n{rows}")
    # At 384 px the objects have 6.4 px: 384 x 20 / 32 = 240 gives them 32.
    found = cli("data", "check", tmp_path, "auto=false").out
    assert "data.tile=256 (docs/tiles.md)" in found


def test_check_json(cli: Cli, faulty: Path) -> None:
    assert cli("data", "check", faulty, "--json").json["anchors"] is None  # not by IoU
    ended = cli("data", "check", faulty, "--json", "--recipe=paper_quick")
    assert ended.code == 1
    assert ended.json["counts"]["box-empty"] == 1
    assert set(ended.json["statistics"]) == {"train", "val", "test"}
    assert 0 <= ended.json["anchors"]["recall"] <= 1
    # At 64 pixels and not enlarged, objects of 16 to 24 are too small for the paper's anchors.
    assert ended.json["recommended_tile"] is None
    small = cli("data", "check", faulty, "--json", "--image-size=64", "--recipe=paper_quick")
    assert small.json["anchors"]["image_size"] == 64
    assert small.json["anchors"]["recall"] < ended.json["anchors"]["recall"]
    assert small.json["choices"] == []


def test_check_prints_the_settings_that_train_would_choose(cli: Cli, faulty: Path) -> None:
    chosen = {c["setting"]: c for c in cli("data", "check", faulty, "--json").json["choices"]}
    # 64 px images are enlarged by 1.5 at most.
    assert chosen["data.image_size"]["value"] == 96
    assert "model.p2" not in chosen
    # Objects of 16 to 24 px are under 22 px, the least for P3.
    text = cli("data", "check", faulty, "--image-size=64").out
    assert "Settings chosen from the data" in text
    assert "model.p2" in text
    assert "data.image_size" not in text


def test_check_prints_ten_of_each_kind_without_all(
    cli: Cli, tiny_sets: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "many"
    shutil.copytree(tiny_sets["coco"], folder)
    labels = json.loads((folder / "train.json").read_text())
    annotation = labels["annotations"][0]
    labels["annotations"] = [{**annotation, "id": i, "bbox": [i, 1, 0, 5]} for i in range(1, 13)]
    (folder / "train.json").write_text(json.dumps(labels))
    few = cli("data", "check", folder).out
    assert few.count("has no width -> dropped") == 10
    assert "and 2 more (--all prints them)" in few
    assert cli("data", "check", folder, "--all").out.count("has no width -> dropped") == 12


def test_check_decodes_many_images_only_when_asked(
    cli: Cli, tiny_sets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    note = "read the headers of 8 images; --decode also checks their pixels"
    assert note not in cli("data", "check", tiny_sets["coco"]).err
    monkeypatch.setattr("retinanet.cli.data.MAX_DECODED", 7)
    assert note in cli("data", "check", tiny_sets["coco"]).err
    assert note not in cli("data", "check", tiny_sets["coco"], "--decode").err


def test_check_uses_the_tiles_of_training(cli: Cli, tiny_sets: dict[str, Path]) -> None:
    arguments = ("data", "check", tiny_sets["coco"], "--recipe=paper_quick", "--image-size=64")
    whole = cli(*arguments, "--json").json["anchors"]
    tiles = cli(*arguments, "data.tile=32", "--json").json["anchors"]
    assert tiles["recall"] > whole["recall"]  # objects are twice as large
    assert "objects in tiles of 32 px" in cli(*arguments, "data.tile=32").out


def test_check_fix_writes_a_valid_copy(cli: Cli, faulty: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in faulty.rglob("*") if file.is_file()}
    fixed = tmp_path / "fixed"
    ended = cli("data", "check", faulty, f"--fix={fixed}")
    assert ended.code == 0
    assert f"wrote a corrected copy to {fixed}" in ended.out
    assert cli("data", "check", fixed).code == 0
    assert {file: file.read_bytes() for file in faulty.rglob("*") if file.is_file()} == before


def test_convert(cli: Cli, tiny_sets: dict[str, Path], tmp_path: Path) -> None:
    new = tmp_path / "new"
    ended = cli("data", "convert", tiny_sets["voc"], new, "--to=csv", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["images"] == {"train": 4, "val": 2, "test": 2}
    splits = read_splits(new)
    assert {name: len(split) for name, split in splits.items()} == ended.json["images"]
    assert splits["train"].format == "csv"
    ended = cli("data", "convert", tiny_sets["coco"], tmp_path / "other", "--to=yolo")
    assert ended.code == 0
    assert "train" in ended.out
    assert "the format's own" in ended.out


@pytest.mark.parametrize("anchors", [(), ("--anchors", "--image-size=128", "--recipe=paper_quick")])
def test_show(
    cli: Cli, tiny_sets: dict[str, Path], tmp_path: Path, anchors: tuple[str, ...]
) -> None:
    ended = cli("data", "show", tiny_sets["coco"], f"--out={tmp_path}", "--count=3", *anchors)
    assert ended.code == 0, ended.err
    drawn = sorted(tmp_path.glob("*.png"))
    assert len(drawn) == 3
    # Small images are enlarged so that captions can be read.
    for file in drawn:
        with Image.open(file) as image:
            assert image.width >= 480
    assert ("anchors are matched to them" in ended.out) == bool(anchors)


def test_show_into_the_data_raises_an_error(cli: Cli, tiny_sets: dict[str, Path]) -> None:
    ended = cli("data", "show", tiny_sets["coco"], f"--out={tiny_sets['coco'] / 'shown'}")
    assert ended.code == 1
    assert "must not be, contain or be inside the source data" in ended.err
    assert not (tiny_sets["coco"] / "shown").exists()


def test_show_counts_objects_without_an_anchor(
    cli: Cli, tiny_sets: dict[str, Path], tmp_path: Path
) -> None:
    arguments = ("data", "show", tiny_sets["coco"], "--anchors", "--json", "--image-size=64",
                 "--count=0", "--recipe=paper_quick")  # fmt: skip
    matched = cli(*arguments, f"--out={tmp_path / '1'}", "anchors.sizes=[16,32,64,128,256]")
    assert matched.json["images"] == 4
    assert matched.json["unmatched"] == 0
    assert matched.json["anchors"] > 0
    missed = cli(*arguments, f"--out={tmp_path / '2'}", "anchors.sizes=[160,200,300,400,500]")
    assert missed.json["unmatched"] == missed.json["objects"] == matched.json["objects"]
    assert missed.json["anchors"] == 0


@pytest.mark.parametrize("command", [("anchors",), ("show", "--anchors")])
def test_anchor_recall_of_other_assignments_is_an_error(
    cli: Cli, tiny_sets: dict[str, Path], tmp_path: Path, command: tuple[str, ...]
) -> None:
    out = () if len(command) == 1 else (f"--out={tmp_path / 'out'}",)
    ended = cli("data", command[0], tiny_sets["coco"], *command[1:], *out)
    assert ended.code == 2
    assert "no meaning with matching.assignment=task_aligned" in ended.err
    assert not (tmp_path / "out").exists()


def test_show_skips_a_broken_image(cli: Cli, faulty: Path, tmp_path: Path) -> None:
    ended = cli("data", "show", faulty, f"--out={tmp_path / 'o'}", "--json")
    assert ended.code == 1
    assert ended.json["images"] == 3
    assert "000003.png" in ended.err


def test_show_augmented_draws_what_training_loads(
    cli: Cli, tiny_sets: dict[str, Path], tmp_path: Path
) -> None:
    arguments = ("data", "show", tiny_sets["coco"], "--augmented", "--count=5", "--image-size=128",
                 "data.scale_jitter=[1,1]", "data.horizontal_flip=0", "--json")  # fmt: skip
    mixed = cli(*arguments, f"--out={tmp_path / 'mixed'}", "data.mosaic=1")
    assert mixed.code == 0, mixed.err
    assert len(list((tmp_path / "mixed").glob("*.png"))) == mixed.json["images"] == 5
    plain = cli(*arguments, f"--out={tmp_path / 'plain'}", "--seed=0")
    assert plain.json["objects"] > 0
    files = [sorted((tmp_path / name).glob("*.png")) for name in ("mixed", "plain")]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(*files, strict=True))
    both = cli(*arguments, "--anchors", f"--out={tmp_path / 'both'}")
    assert both.code != 0
    assert "give one of them" in both.err


def test_anchors_without_any_object_is_an_error(cli: Cli, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    content = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [], "categories": []}
    (tmp_path / "train.json").write_text(json.dumps(content))
    ended = cli("data", "anchors", tmp_path, "--recipe=paper_quick")
    assert ended.code == 1
    assert "no usable object in the 1 images of train" in ended.err


def test_anchors_suggests_settings_of_more_recall(cli: Cli, tiny_sets: dict[str, Path]) -> None:
    arguments = ("data", "anchors", tiny_sets["coco"], "--image-size=64", "--recipe=paper_quick")
    ended = cli(*arguments, "--json")
    assert ended.code == 0, ended.err
    tried = ended.json["tried"]
    assert tried[0]["settings"] == []
    suggested = next(row for row in tried if row["settings"] == ended.json["suggested"])
    assert suggested["recall"] > tried[0]["recall"]
    assert "suggested: " in cli(*arguments).out
    # The suggestion can be given to the command.
    again = cli(*arguments, "--json", *ended.json["suggested"])
    assert again.json["tried"][0]["recall"] == suggested["recall"]


@pytest.mark.data
def test_check_of_real_blood_cells(cli: Cli, real_data: Path) -> None:
    ended = cli("data", "check", real_data / "bccd", "--json")
    assert ended.code == 1
    assert ended.json["counts"] == {"box-empty": 2}
    assert {(Path(row["file"]).name, row["object"]) for row in ended.json["problems"]} == {
        ("BloodImage_00343.xml", 3),
        ("BloodImage_00338.xml", 12),
    }
