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

    def __init__(self, page: Any, address: str, failures: bool = False) -> None:
        self.page = page
        self.address = address
        self.failures_expected = failures
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._on_console)

    def _on_console(self, message: Any) -> None:
        expected = self.failures_expected and "Failed to load resource" in message.text
        if message.type in ("error", "warning") and not expected:
            self.errors.append(message.text)

    def add(self, *files: Path, selector: str = "#files") -> None:
        self.page.set_input_files(selector, [str(file) for file in files])

    def upload(self, *files: Path) -> None:
        self.add(*files)
        self.wait()

    def wait(self) -> None:
        """Wait until every image is done or failed, and drawn."""
        self.page.wait_for_function(
            """() => {
                const thumbs = [...document.querySelectorAll(".thumb")];
                const states = thumbs.map((thumb) => thumb.dataset.status);
                return states.length > 0 && states.every((s) => s === "done" || s === "failed")
                    && !document.querySelector("#work[aria-busy=true]");
            }"""
        )
        self.settle()

    def settle(self) -> None:
        """Wait until every change is rendered, and then drawn."""
        frame = "await new Promise((done) => requestAnimationFrame(done));"
        self.page.evaluate(f"async () => {{ {3 * frame} }}")

    def set_score(self, score: float) -> None:
        self.page.fill("#score", str(score))
        self.settle()

    def transfer(self, event: str, *files: Path) -> None:
        """Drop or paste files."""
        contents = [[file.name, base64.b64encode(file.read_bytes()).decode()] for file in files]
        self.page.evaluate(
            """([event, files]) => {
                const transfer = new DataTransfer();
                for (const [name, data] of files) {
                    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
                    const type = name.endsWith(".png") ? "image/png" : "";
                    transfer.items.add(new File([bytes], name, { type }));
                }
                const init = { bubbles: true, cancelable: true };
                document.body.dispatchEvent(event === "paste"
                    ? new ClipboardEvent("paste", { ...init, clipboardData: transfer })
                    : new DragEvent(event, { ...init, dataTransfer: transfer }));
            }""",
            [event, contents],
        )
        self.settle()

    def evaluate(self, expression: str, *arguments: Any) -> Any:
        """Evaluate an expression of `view`, `panes`, `state` and `args`, the page's own objects."""
        return self.page.evaluate(
            f"""async (args) => {{
                const {{ view, panes }} = await import("/page/view.js");
                const {{ state }} = await import("/page/state.js");
                return {expression};
            }}""",
            list(arguments),
        )

    def boxes(self, pane: int = 0) -> list[list[float]]:
        """Return (x1, y1, x2, y2) on the image of the boxes that are drawn, best first."""
        return self.evaluate("panes[args[0]].detections.map(({ box }) => box)", pane)

    def active(self) -> str | None:
        """Return the class and the score of the highlighted detection."""
        return self.evaluate(
            "state.active && `${state.active.class} ${state.active.score.toFixed(2)}`"
        )

    def position(self) -> list[float]:
        """Return scale, x and y of the image on the stage."""
        self.settle()
        return self.evaluate("[view.scale, view.x, view.y]")

    def pixel(self, x: float, y: float) -> list[int]:
        """Return red, green and blue of the canvas at a point of the image."""
        # From a copy: reading from the canvas itself would change how it is drawn.
        return self.evaluate(
            """(() => {
                const canvas = panes[0].canvas;
                const ratio = canvas.width / canvas.clientWidth;
                const [x, y] = [view.x + view.scale * args[0], view.y + view.scale * args[1]];
                const options = { willReadFrequently: true };
                const copy = new OffscreenCanvas(1, 1).getContext("2d", options);
                copy.drawImage(canvas, -Math.floor(x * ratio), -Math.floor(y * ratio));
                return [...copy.getImageData(0, 0, 1, 1).data].slice(0, 3);
            })()""",
            x,
            y,
        )

    def screen(self, x: float, y: float) -> tuple[float, float]:
        """Return the position in the window of a point of the image."""
        scale, left, top = self.position()
        stage = self.page.locator(".stage").first.bounding_box()
        return stage["x"] + left + scale * x, stage["y"] + top + scale * y

    def num_requests(self) -> int:
        """Return the number of detection requests."""
        return sum("/v1/detect" in url for url in self.requests)

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def states(self) -> list[str]:
        """Return the labels of the thumbnails."""
        self.settle()
        return self.page.locator(".thumb .label").all_text_contents()

    def names(self) -> list[str]:
        """Return the names of the images in the strip."""
        return self.page.eval_on_selector_all(".thumb", "(all) => all.map((e) => e.title)")

    def wait_for_announcement(self, text: str) -> None:
        """Wait until screen readers announce `text`."""
        self.page.wait_for_function(
            "(text) => document.getElementById('status').textContent.includes(text)", arg=text
        )

    def save(self, button: str) -> tuple[str, bytes]:
        """Press a button and return the name and content of the downloaded file."""
        with self.page.expect_download() as download:
            self.page.click(button)
        return download.value.suggested_filename, Path(download.value.path()).read_bytes()
