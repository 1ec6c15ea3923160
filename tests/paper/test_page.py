"""The page of an output folder, read back."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image
from results_setup import trainings

from retinanet.errors import DataError
from retinanet.paper.claims import collect_results
from retinanet.paper.outputs import claims_markdown, write_page
from retinanet.paper.results import Outcome, Result, TableResult
from retinanet.paper.tables import EXPERIMENTS

COMMAND = "retinanet paper run table3 --data 'my <nuclei>'"
ABOUT = {
    "command": COMMAND,
    "data": "my <nuclei>",
    "steps": 1200,
    "machine": "4 cores",
    "settings": [("data.image_size", 600, 256)],
}


def text_of(html: str) -> str:
    return unescape(re.sub("<[^>]+>", "", html))


def tables_of(html: str) -> list[list[list[str]]]:
    tables = re.findall("<table>(.*?)</table>", html, re.DOTALL)
    rows = [re.findall("<tr>(.*?)</tr>", table, re.DOTALL) for table in tables]
    cell = re.compile("<t[dh][^>]*>(.*?)</t[dh]>", re.DOTALL)
    return [[[text_of(c).strip() for c in cell.findall(row)] for row in of] for of in rows]


def links_of(html: str) -> dict[str, str]:
    return dict(re.findall('<a href="([^"]+)">([^<]+)</a>', html))


def table3() -> TableResult:
    measured = trainings(ce=(0.20, 0.22), focal=(0.30, 0.32))
    measured["star-2-1"] = [Outcome(0, Result("diverged"), "runs/star-2-1/seed-0")]
    measured["star-4-0"] = [
        Outcome(0, Result("failed", note="<disk full>"), "runs/star-4-0/seed-0")
    ]
    return collect_results(EXPERIMENTS["table3"], measured, ABOUT)


def figure1() -> TableResult:
    return collect_results(EXPERIMENTS["fig1"], {}, {})


def test_page_has_tables_links_and_plots(tmp_path: Path) -> None:
    plots = [tmp_path / "plots" / "fig1.png", tmp_path / "plots" / "fig1.svg"]
    plots[0].parent.mkdir()
    Image.new("RGB", (4, 3)).save(plots[0])
    plots[1].write_text("<svg/>", "utf-8")
    report = tmp_path / "runs" / "ce" / "seed-1" / "report.html"
    report.parent.mkdir(parents=True)
    report.write_text("a run", "utf-8")

    file = write_page(tmp_path, [table3(), figure1()], {"fig1": plots})
    assert file == tmp_path / "report.html"
    html = file.read_text("utf-8")
    overview, scores, claims, settings = tables_of(html)
    assert overview[0] == ["", "claim", "paper", "here", "verdict"]
    best = "33.9 (best of 2)"
    no = "does not hold (one seed, rows missing)"
    assert overview[1:] == [
        ["Table 3", "FL* about FL", f"{best} vs 34.0: -0.1", "0.0 vs 31.0 ± 1.4: -31.0", no],
        ["Table 3", "FL* over CE", f"{best} vs 31.1: +2.8", "0.0 vs 21.0 ± 1.4: -21.0", no],
    ]
    measured = ["21.0 ± 1.4", "42.0 ± 2.8", "10.5 ± 0.7"]
    assert scores[1] == ["CE, alpha .75", *measured, "2", "31.1", "49.4", "33.0"]
    assert scores[4][:5] == ["FL*, gamma 4, beta 0", "-", "-", "-", "-"]
    assert claims[1][2].endswith("; without FL*, gamma 4, beta 0: not measured")
    assert settings[1] == ["data.image_size", "600", "256"]

    # Links start at the page; a run's report is opened where it exists.
    links = links_of(html)
    assert links["runs/ce/seed-1/report.html"] == "seed-1"
    assert links["runs/ce/seed-0"] == "seed-0"
    assert links["plots/fig1.svg"] == "fig1.svg"
    assert html.count("data:image/png;base64,") == 1

    text = text_of(html)
    assert "CE, alpha .75: seed-0, seed-1" in text
    line = "Not a COCO result: measured on my <nuclei>, 1,200 steps per row."
    assert text.count(line) == 2  # at the top, and with the table
    assert "FL*, gamma 4, beta 0: seed 0 failed: <disk full>" in text
    for line in (COMMAND, "data: my <nuclei>", "steps: 1,200", "machine: 4 cores"):
        assert line in text
    assert "1 setting other than the paper's" in text
    assert "Focal loss against p_t" in text


def test_verdicts_are_counted(tmp_path: Path) -> None:
    measured = trainings(ce=(0.20, 0.22), focal=(0.30, 0.32))
    measured |= {"star-2-1": trainings(x=(0.30, 0.31))["x"]}
    result = collect_results(EXPERIMENTS["table3"], measured, ABOUT)
    html = write_page(tmp_path, [result]).read_text("utf-8")
    assert re.findall("<b>(.*?)</b><span>(.*?)</span>", html) == [
        ("2", "claims of the paper"),
        ("1", "hold"),
        ("1", "not separated"),
    ]
    assert "holds (rows missing)" in html


def test_links_quote_special_characters(tmp_path: Path) -> None:
    plot = tmp_path / "a plot #1.svg"
    plot.write_text("<svg/>", "utf-8")
    measured = {"ce": [Outcome(0, Result("diverged"), "runs/100% & more")]}
    result = collect_results(EXPERIMENTS["table3"], measured, {})
    html = write_page(tmp_path, [result], {"table3": [plot]}).read_text("utf-8")
    assert str(tmp_path) not in html
    links = links_of(html)
    assert links["a%20plot%20%231.svg"] == "a plot #1.svg"
    assert "runs/100% & more" in map(unquote, links)


def test_page_without_claims_says_so(tmp_path: Path) -> None:
    html = write_page(tmp_path, [figure1()]).read_text("utf-8")
    assert "No claim was tested." in html
    assert "Not a COCO result" not in html


def test_unreadable_plot_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png"):
        write_page(tmp_path, [figure1()], {"fig1": [tmp_path / "gone.png"]})
    assert not (tmp_path / "report.html").exists()


def test_claims_markdown() -> None:
    lines = claims_markdown([table3(), figure1()]).splitlines()
    assert lines[0].startswith("**Not a COCO result: measured on my")
    table = [line for line in lines if line.startswith("|")]
    assert table[0] == "|  | claim | paper | here | verdict |"
    assert table[2] == (
        "| Table 3 | FL\\* about FL | 33.9 (best of 2) vs 34.0: -0.1 | 0.0 vs 31.0 ± 1.4: -31.0 "
        "| does not hold (one seed, rows missing) |"
    )
    assert len(table) == 4
    assert claims_markdown([figure1()]) == "No claim was tested.\n"
