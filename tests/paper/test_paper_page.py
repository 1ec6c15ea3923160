"""benchmarks/paper_page.py: measured folders into the pages of docs/."""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from results_setup import done

from retinanet.errors import DataError
from retinanet.files import write_atomic
from retinanet.paper.claims import collect_results
from retinanet.paper.results import TableResult
from retinanet.paper.tables import EXPERIMENTS

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "paper_page.py"
TEXT = "# The paper\n\nBefore.\n\n<!-- claims -->\nold\n<!-- /claims -->\n\nAfter.\n"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program over a made-up project in `tmp_path`."""
    spec = util.spec_from_file_location("benchmarks_paper_page", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "benchmarks" / "results" / "paper")
    monkeypatch.setattr(module, "PAGE", tmp_path / "docs" / "paper.md")
    monkeypatch.setattr(module, "IMAGES", tmp_path / "docs" / "images" / "paper")
    write_atomic(tmp_path / "docs" / "paper.md", TEXT)
    return module


def table(name: str, data: str, **aps: float) -> TableResult:
    outcomes = {key.replace("_", "-"): done(ap, name=key) for key, ap in aps.items()}
    return collect_results(EXPERIMENTS[name], outcomes, {"data": data})


def measured(out: Path, *results: TableResult) -> Path:
    """An ``--out`` folder with those results and an image of the first."""
    for one in results:
        write_atomic(out / f"{one.name}.json", one.to_json())
    (out / "plots").mkdir()
    Image.new("RGB", (4, 3)).save(out / "plots" / f"{results[0].name}.png")
    return out


def files(root: Path) -> dict[str, bytes]:
    return {
        one.relative_to(root).as_posix(): one.read_bytes()
        for one in sorted(root.rglob("*"))
        if one.is_file()
    }


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    three = table("table3", "cells", ce=0.2, focal=0.3, star_2_1=0.29, star_4_0=0.28)
    return measured(tmp_path / "out" / "cells", three, table("table2", "cells", R101=0.3))


@pytest.fixture
def streets(tmp_path: Path) -> Path:
    three = table("table3", "streets", ce=0.2, focal=0.1, star_2_1=0.15, star_4_0=0.19)
    return measured(tmp_path / "out" / "streets", three)


def test_claims_of_two_data_sets_are_written_between_the_markers(
    program: Any, tmp_path: Path, cells: Path, streets: Path
) -> None:
    program.main([str(cells), str(streets)])
    text = (tmp_path / "docs" / "paper.md").read_text("utf-8")
    before, _, rest = text.partition("<!-- claims -->\n\n")
    lines, _, after = rest.partition("\n<!-- /claims -->")
    assert (before, after) == ("# The paper\n\nBefore.\n\n", "\n\nAfter.\n")
    head, rule, *rows = lines.splitlines()
    assert head == "|  | the paper says | paper | cells | streets |"
    assert rule == "| :-- | :-- | :-- | :-- | :-- |"
    assert rows[0] == (
        "| Table 2 | RetinaNet over Faster R-CNN with FPN | 39.1 vs 36.2: +2.9 | not measured | - |"
    )
    assert rows[-2:] == [
        "| Table 3 | FL\\* about FL | 33.9 (best of 2) vs 34.0: -0.1 "
        "| holds (one seed): 29.0 (best of 2) vs 30.0: -1.0 "
        "| does not hold (one seed): 19.0 (best of 2) vs 10.0: +9.0 |",
        "| Table 3 | FL\\* over CE | 33.9 (best of 2) vs 31.1: +2.8 "
        "| holds (one seed): 29.0 (best of 2) vs 20.0: +9.0 "
        "| does not hold (one seed): 19.0 (best of 2) vs 20.0: -1.0 |",
    ]


def test_tables_and_images_are_kept(program: Any, tmp_path: Path, cells: Path) -> None:
    program.main([str(cells)])
    kept = tmp_path / "benchmarks" / "results" / "paper" / "cells"
    assert sorted(one.name for one in kept.iterdir()) == ["table2.json", "table3.json"]
    assert (kept / "table3.json").read_bytes() == (cells / "table3.json").read_bytes()
    page = (tmp_path / "docs" / "paper-cells.md").read_text("utf-8")
    assert page.startswith("# The paper's tables on cells\n")
    assert page.index("## Table 2: ") < page.index("## Table 3: ")
    image = "images/paper/cells/table3.png"
    assert f"![Table 3: FL* against focal loss]({image})" in page
    assert page.count("![") == 1  # table 2 has none
    assert (tmp_path / "docs" / image).read_bytes() == (cells / "plots" / "table3.png").read_bytes()


def test_main_without_folders_writes_the_same_pages(
    program: Any, tmp_path: Path, cells: Path, streets: Path
) -> None:
    program.main([str(cells)])
    program.main([str(streets)])  # what was kept before stays
    made = files(tmp_path)
    assert b"| cells | streets |" in made["docs/paper.md"]
    program.main([])
    assert files(tmp_path) == made


def test_main_without_results_is_an_error(program: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no results in .*paper; give the --out folder"):
        program.main([])
    # A folder that holds no result is none either.
    (tmp_path / "benchmarks" / "results" / "paper" / "cells").mkdir(parents=True)
    with pytest.raises(SystemExit, match="no results in"):
        program.main([])
    assert files(tmp_path) == {"docs/paper.md": TEXT.encode()}


def test_folder_without_results_is_an_error(program: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"no results of `retinanet paper run` in .*empty; give"):
        program.main([str(tmp_path / "empty")])
    with pytest.raises(SystemExit, match=r"no results of .* in .*gone"):
        program.main([str(tmp_path / "gone")])
    assert files(tmp_path) == {"docs/paper.md": TEXT.encode()}


@pytest.mark.parametrize(
    "text",
    [
        "# The paper\n",
        "<!-- claims -->\n",
        "<!-- /claims -->\n",
        "<!-- /claims -->\n<!-- claims -->\n",
        TEXT + TEXT,
    ],
)
def test_page_without_markers_is_an_error(
    program: Any, tmp_path: Path, cells: Path, text: str
) -> None:
    write_atomic(tmp_path / "docs" / "paper.md", text)
    before = files(tmp_path)
    with pytest.raises(SystemExit, match=r"paper\.md must contain <!-- claims --> once"):
        program.main([str(cells)])
    assert files(tmp_path) == before


def test_result_of_another_version_is_an_error(program: Any, tmp_path: Path) -> None:
    write_atomic(tmp_path / "out" / "table3.json", "{}")
    with pytest.raises(DataError, match=r"table3\.json is not a result of this version"):
        program.main([str(tmp_path / "out")])


def test_docs_page_has_the_markers() -> None:
    text = (PROGRAM.parents[1] / "docs" / "paper.md").read_text("utf-8")
    assert text.count("<!-- claims -->") == text.count("<!-- /claims -->") == 1
