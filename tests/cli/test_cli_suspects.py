"""``retinanet data suspects``."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

from retinanet.data import read_dataset

from .conftest import Cli


def test_data_suspects_and_next(
    cli: Cli, tiny_sets: dict[str, Path], tiny_run: Path, tmp_path: Path
) -> None:
    model, out = tmp_path / "best", tmp_path / "out"
    shutil.copytree(tiny_run / "best", model)
    stored = json.loads((model / "model.json").read_text())
    stored["info"]["detect"] |= {"score_threshold": 0.001, "score_thresholds": {"circle": 0.001}}
    (model / "model.json").write_text(json.dumps(stored))
    ended = cli("data", "suspects", model, tiny_sets["coco"], "--out", out, "--limit=5", "--json")
    assert ended.code == 0, ended.err
    rows = list(csv.DictReader((out / "suspects.csv").read_text().splitlines()))
    assert len(rows) == len(ended.json["suspects"]) == sum(ended.json["counts"].values()) > 0
    assert (out / "suspects.html").read_text().count("<img") == min(5, len(rows))
    # The tasks are read as labelled data again.
    tasks = json.loads((out / "label_studio_tasks.json").read_text())
    assert 0 < len(tasks) <= 5
    shutil.copytree(tiny_sets["coco"], tmp_path / "labels")
    shutil.copyfile(out / "cvat_annotations.xml", tmp_path / "labels" / "annotations.xml")
    for file in (tmp_path / "labels").rglob("*.json"):
        file.unlink()
    reviewed = read_dataset(tmp_path / "labels", "all", format="cvat")
    assert sum(bool(image.annotations) for image in reviewed.images) == len(tasks)

    images = read_dataset(tiny_sets["coco"], "train").images[0].path.parent
    ended = cli("data", "suspects", model, images, "--next=2", "--out", out)
    assert ended.code == 0, ended.err
    assert "Images to label next" in ended.out
    assert [row["rank"] for row in csv.DictReader((out / "next.csv").read_text().splitlines())] == [
        "1",
        "2",
    ]
    assert (out / "next.html").read_text().count("<img") == 2
    ended = cli("data", "suspects", model, tmp_path / "none", "--out", out)
    assert (ended.code, "none" in ended.err) == (1, True)
