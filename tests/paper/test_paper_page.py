"""benchmarks/paper_page.py: measured folders into the pages of docs/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from results_setup import done

from retinanet.errors import DataError
from retinanet.files import write_atomic
from retinanet.paper.claims import collect_results
from retinanet.paper.tables import EXPERIMENTS
from scripts import BENCHMARKS, load_script

TEXT = "# The paper\n\nBefore.\n\n<!-- claims -->\nold\n<!-- /claims -->\n\nAfter.\n"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program over a made-up project in `tmp_path`."""
    module = load_script("paper_page")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "benchmarks" / "results" / "paper")
    monkeypatch.setattr(module, "PAGE", tmp_path / "docs" / "paper.md")
    monkeypatch.setattr(module, "IMAGES", tmp_path / "docs" / "images" / "paper")
    write_atomic(tmp_path / "docs" / "paper.md", TEXT)
    return module


def measured(out: Path, **tables: dict[str, float]) -> str:
    """Write an output folder with AP by row key, and an image of Table 3."""
    for name, aps in tables.items():
        outcomes = {key.replace("_", "-"): done(ap, name=key) for key, ap in aps.items()}
        result = collect_results(EXPERIMENTS[name], outcomes, {"data": out.name})
        write_atomic(out / f"{name}.json", result.to_json())
    (out / "plots").mkdir()
    Image.new("RGB", (4, 3)).save(out / "plots" / "table3.png")
    return str(out)


@pytest.fixture
def cells(tmp_path: Path) -> str:
    table3 = {"ce": 0.2, "focal": 0.3, "star_2_1": 0.29, "star_4_0": 0.28}
    return measured(tmp_path / "out" / "cells", table3=table3, table2={"R101": 0.3})


def files(root: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def test_results_are_kept_and_claims_of_two_data_sets_are_written(
    program: Any, tmp_path: Path, cells: str
) -> None:
    table3 = {"ce": 0.2, "focal": 0.1, "star_2_1": 0.15, "star_4_0": 0.19}
    streets = measured(tmp_path / "out" / "streets", table3=table3)
    program.main([cells])
    program.main([streets])  # earlier results stay
    text = (tmp_path / "docs" / "paper.md").read_text("utf-8")
    before, _, rest = text.partition("<!-- claims -->\n\n")
    lines, _, after = rest.partition("\n<!-- /claims -->")
    assert (before, after) == ("# The paper\n\nBefore.\n\n", "\n\nAfter.\n")
    head, rule, *rows = lines.splitlines()
    assert head == "|  | claim | paper | cells | streets |"
    assert rule == "| :-- | :-- | :-- | :-- | :-- |"
    assert rows[0] == (
        "| Table 2 | RetinaNet over Faster R-CNN with FPN | 39.1 vs 36.2: +2.9 | not measured | - |"
    )
    assert rows[-1] == (
        "| Table 3 | FL\\* over CE | 33.9 (best of 2) vs 31.1: +2.8 "
        "| holds (one seed): 29.0 (best of 2) vs 20.0: +9.0 "
        "| does not hold (one seed): 19.0 (best of 2) vs 20.0: -1.0 |"
    )
    kept = tmp_path / "benchmarks" / "results" / "paper" / "cells"
    assert files(kept) == {
        name: (Path(cells) / name).read_bytes() for name in ("table2.json", "table3.json")
    }
    page = (tmp_path / "docs" / "paper-cells.md").read_text("utf-8")
    assert page.startswith("# The paper's tables on cells\n")
    assert page.index("## Table 2: ") < page.index("## Table 3: ")
    image = "images/paper/cells/table3.png"
    assert f"![Table 3: FL* against focal loss]({image})" in page
    assert page.count("![") == 1  # table 2 has none
    assert (tmp_path / "docs" / image).is_file()
    written = files(tmp_path)
    program.main([])
    assert files(tmp_path) == written


@pytest.mark.parametrize(
    ("page", "arguments", "error", "why"),
    [
        (TEXT, [], SystemExit, r"no results in .*paper; give the --out folder"),
        (TEXT, ["gone"], SystemExit, r"no results of `retinanet paper run` in .*gone; give"),
        (TEXT, ["old"], DataError, r"table3\.json is not a result of this version"),
        ("# The paper\n", [], SystemExit, r"paper\.md must contain <!-- claims --> once"),
        ("<!-- /claims -->\n<!-- claims -->\n", [], SystemExit, "must contain"),
        (TEXT + TEXT, [], SystemExit, "must contain"),
    ],
)
def test_nothing_is_written_on_an_error(
    program: Any, tmp_path: Path, page: str, arguments: list[str], error: type, why: str
) -> None:
    write_atomic(tmp_path / "docs" / "paper.md", page)
    write_atomic(tmp_path / "old" / "table3.json", "{}")
    before = files(tmp_path)
    with pytest.raises(error, match=why):
        program.main([str(tmp_path / argument) for argument in arguments])
    assert files(tmp_path) == before


def test_docs_page_has_the_markers() -> None:
    text = (BENCHMARKS.parent / "docs" / "paper.md").read_text("utf-8")
    assert text.count("<!-- claims -->") == text.count("<!-- /claims -->") == 1
