"""The page of an --out folder and the table at a glance, read back."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image
from results_setup import trainings

from retinanet.errors import DataError
from retinanet.paper.claims import Outcome, collect_results
from retinanet.paper.page import claims_markdown, write_page
from retinanet.paper.results import TableResult
from retinanet.paper.tables import EXPERIMENTS

COMMAND = "retinanet paper run table3 --data 'my <nuclei>'"
ABOUT = {
    "command": COMMAND,
    "data": "my <nuclei>",
    "steps": 1200,
    "machine": "4 cores",
    "settings": [("data.image_size", 600, 256)],
}


class Read(HTMLParser):
    """Tables as cells, links, embedded images, and all text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.links: dict[str, str] = {}
        self.images: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._address = ""
        self.feed(html)
        self.close()
        assert self._open == [], "tags left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            self.images.append(str(values["src"])[:22])
        if tag in ("img", "meta"):
            return
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "a":
            self._address = str(values["href"])

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        data = data.replace("\u00a0", " ")
        self.text += data
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data
        if "a" in self._open:
            self.links[self._address] = data


def table3() -> TableResult:
    measured = trainings(ce=(0.20, 0.22), focal=(0.30, 0.32))
    measured["star-2-1"] = [Outcome(0, "diverged", None, "runs/star-2-1/seed-0")]
    measured["star-4-0"] = [Outcome(0, "failed", None, "runs/star-4-0/seed-0", "<disk full>")]
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
    page = Read(file.read_text("utf-8"))

    overview, scores, claims, facts, settings, runs = page.tables
    assert overview[0] == ["", "the paper says", "paper", "here", "verdict"]
    best = "33.9 (best of 2)"
    no = "✗ does not hold (one seed, rows missing)"
    assert overview[1:] == [
        ["Table 3", "FL* about FL", f"{best} vs 34.0: -0.1", "0.0 vs 31.0 ± 1.4: -31.0", no],
        ["Table 3", "FL* over CE", f"{best} vs 31.1: +2.8", "0.0 vs 21.0 ± 1.4: -21.0", no],
    ]
    paper = ["paper AP", "paper AP50", "paper AP75"]
    assert scores[0] == ["", "AP", "AP50", "AP75", "seeds", *paper]
    measured = ["21.0 ± 1.4", "42.0 ± 2.8", "10.5 ± 0.7"]
    assert scores[1] == ["CE, alpha .75", *measured, "2", "31.1", "49.4", "33.0"]
    assert scores[3][:5] == ["FL*, gamma 2, beta 1", "0.0†", "0.0†", "0.0†", "1"]
    assert scores[4][:5] == ["FL*, gamma 4, beta 0", "-", "-", "-", "-"]
    assert claims[1][2].endswith("; without FL*, gamma 4, beta 0: not measured")
    assert facts[1:] == [["data", "my <nuclei>"], ["steps", "1,200"], ["machine", "4 cores"]]
    assert settings[1] == ["data.image_size", "600", "256"]
    assert runs[0] == ["CE, alpha .75", "seed-0, seed-1"]

    # Links start at the page; a run's report is opened where there is one.
    assert page.links["runs/ce/seed-1/report.html"] == "seed-1"
    assert page.links["runs/ce/seed-0"] == "seed-0"
    assert page.links["plots/fig1.svg"] == "fig1.svg"
    assert page.links["plots/fig1.png"] == "fig1.png"
    assert page.images == ["data:image/png;base64,"]

    line = "Not a COCO result: measured on my <nuclei>, 1,200 steps per row."
    assert page.text.count(line) == 2  # at the top, and with the table
    assert "† FL*, gamma 2, beta 1: 1 of 1 training diverged and counts as 0" in page.text
    assert "FL*, gamma 4, beta 0: seed 0 failed: <disk full>" in page.text
    assert COMMAND in page.text
    assert "1 setting other than the paper's" in page.text
    assert "Focal loss against p_t" in page.text


def test_verdicts_are_counted(tmp_path: Path) -> None:
    measured = trainings(ce=(0.20, 0.22), focal=(0.30, 0.32))
    measured |= {"star-2-1": trainings(x=(0.30, 0.31))["x"]}
    result = collect_results(EXPERIMENTS["table3"], measured, ABOUT)
    page = Read(write_page(tmp_path, [result]).read_text("utf-8"))
    assert "2claims of the paper" in page.text
    assert "1hold" in page.text
    assert "1not separated" in page.text
    assert "do not hold" not in page.text
    assert "✓ holds (rows missing)" in page.text


def test_links_quote_special_characters(tmp_path: Path) -> None:
    plot = tmp_path / "a plot #1.svg"
    plot.write_text("<svg/>", "utf-8")
    measured = {"ce": [Outcome(0, "diverged", None, tmp_path / "runs" / "100% & more")]}
    result = collect_results(EXPERIMENTS["table3"], measured, {})
    html = write_page(tmp_path, [result], {"table3": [plot]}).read_text("utf-8")
    page = Read(html)
    assert str(tmp_path) not in html
    assert page.links["a%20plot%20%231.svg"] == "a plot #1.svg"
    address = next(link for link in page.links if link.startswith("runs"))
    assert unquote(address) == "runs/100% & more"


def test_page_without_claims_says_so(tmp_path: Path) -> None:
    page = Read(write_page(tmp_path, [figure1()]).read_text("utf-8"))
    assert "No claim was tested." in page.text
    assert "Not a COCO result" not in page.text
    assert page.tables == []


def test_unreadable_plot_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png"):
        write_page(tmp_path, [figure1()], {"fig1": [tmp_path / "gone.png"]})
    assert not (tmp_path / "report.html").exists()


def test_claims_markdown() -> None:
    lines = claims_markdown([table3(), figure1()]).splitlines()
    assert lines[0].startswith("**Not a COCO result: measured on my")
    table = [line for line in lines if line.startswith("|")]
    assert table[0] == "|  | the paper says | paper | here | verdict |"
    assert table[2] == (
        "| Table 3 | FL\\* about FL | 33.9 (best of 2) vs 34.0: -0.1 | 0.0 vs 31.0 ± 1.4: -31.0 "
        "| does not hold (one seed, rows missing) |"
    )
    assert len(table) == 4
    assert claims_markdown([figure1()]) == "No claim was tested.\n"
