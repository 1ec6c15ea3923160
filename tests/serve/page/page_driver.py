"""The page in a browser tab, and the actions of a user."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
DIM_RED = (110, 0, 0)
"""Colour of an object with score .12, below the page's default threshold."""

KEY = "open sesame"
"""API key of the guarded service."""


class PageDriver:
    """One tab."""

    def __init__(self, page: Any, address: str) -> None:
        self.page = page
        self.address = address
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.failures_expected = False
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on(
            "console",
            lambda said: (
                self.errors.append(said.text) if said.type in ("error", "warning") else None
            ),
        )

    def open(self) -> PageDriver:
        self.page.goto(self.address)
        self.page.wait_for_selector("#model-facts dl")
        return self

    def upload(self, *files: Path) -> PageDriver:
        self.page.set_input_files("#files", [str(file) for file in files])
        return self.wait()

    def wait(self) -> PageDriver:
        """Wait until every image is done or failed, and drawn."""
        self.page.wait_for_function(
            """() => {
                const thumbs = [...document.querySelectorAll(".thumb")];
                const states = thumbs.map((t) => t.dataset.status);
                return states.length > 0 && states.every((s) => s === "done" || s === "failed")
                    && !document.querySelector("#view[aria-busy]");
            }"""
        )
        self.settle()
        return self

    def settle(self) -> None:
        """Wait two frames, after which every change is drawn."""
        self.page.evaluate(
            "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )

    def set_score(self, score: float) -> None:
        self.page.fill("#score", str(score))
        self.settle()

    def transfer(self, event: str, *files: Path) -> None:
        """A drop or a paste of files."""
        given = [
            {"name": file.name, "data": base64.b64encode(file.read_bytes()).decode()}
            for file in files
        ]
        self.page.evaluate(
            """([event, files]) => {
                const carried = new DataTransfer();
                for (const { name, data } of files) {
                    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
                    const type = name.endsWith(".png") ? "image/png" : "";
                    carried.items.add(new File([bytes], name, { type }));
                }
                const init = { bubbles: true, cancelable: true };
                document.body.dispatchEvent(event === "paste"
                    ? new ClipboardEvent("paste", { ...init, clipboardData: carried })
                    : new DragEvent(event, { ...init, dataTransfer: carried }));
            }""",
            [event, given],
        )

    def boxes(self, pane: int = 0) -> list[list[float]]:
        """(x1, y1, x2, y2) on the image of the boxes that are shown, best first."""
        return self.page.evaluate(
            """(pane) => {
                const boxes = document.querySelectorAll(".pane")[pane].querySelectorAll(".box");
                const shown = [...boxes].filter((box) => !box.classList.contains("off"));
                shown.sort((a, b) => a.dataset.i - b.dataset.i);
                return shown.map((box) => {
                    const [x, y, w, h] = ["x", "y", "width", "height"].map(
                        (name) => Number(box.querySelector(".line").getAttribute(name)));
                    return [x, y, x + w, y + h];
                });
            }""",
            pane,
        )

    def pixel(self, x: float, y: float) -> list[int]:
        """Red, green and blue of the canvas where the overlay has the point (x, y)."""
        return self.page.evaluate(
            """([x, y]) => {
                const matrix = document.querySelector(".boxes").getScreenCTM();
                const at = new DOMPoint(x, y).matrixTransform(matrix);
                const canvas = document.querySelector(".stage canvas");
                const corner = canvas.getBoundingClientRect();
                const ratio = canvas.width / corner.width;
                // By a copy: reading from the canvas itself would change how it is drawn.
                const options = { willReadFrequently: true };
                const copy = new OffscreenCanvas(1, 1).getContext("2d", options);
                copy.drawImage(canvas, -Math.floor((at.x - corner.left) * ratio),
                    -Math.floor((at.y - corner.top) * ratio));
                return [...copy.getImageData(0, 0, 1, 1).data].slice(0, 3);
            }""",
            [x, y],
        )

    def screen(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the image is in the window."""
        at = self.page.evaluate(
            """([x, y]) => {
                const at = new DOMPoint(x, y).matrixTransform(
                    document.querySelector(".boxes").getScreenCTM());
                return [at.x, at.y];
            }""",
            [x, y],
        )
        return at[0], at[1]

    def num_requests(self) -> int:
        """Number of detection requests."""
        return sum("/v1/detect" in one for one in self.requests)

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def states(self) -> list[str]:
        return self.page.eval_on_selector_all(
            ".thumb", "(all) => all.map((one) => one.querySelector('.label').textContent)"
        )

    def wait_for_announcement(self, words: str) -> None:
        """Waits until screen readers are told so."""
        self.page.wait_for_function(
            "(words) => document.getElementById('status').textContent.includes(words)", arg=words
        )

    def save(self, button: str) -> tuple[str, bytes]:
        """The name and the content of what a button gives to keep."""
        with self.page.expect_download() as waited:
            self.page.click(button)
        return waited.value.suggested_filename, Path(waited.value.path()).read_bytes()
