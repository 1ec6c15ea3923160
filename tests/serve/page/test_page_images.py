"""Images on the page: every way in, upright, in the strip, and within bounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from colour_finder import image
from page_desk import BLUE, DIM_RED, GREEN, RED, Desk
from PIL import Image

Draw = Callable[..., Path]
OpenDesk = Callable[..., Desk]

HOLD = """
// Uploads wait until the test lets them go.
window.inFlight = 0;
window.mostInFlight = 0;
window.letGo = [];
const send = window.fetch;
window.fetch = async (address, options) => {
    if (!String(address).includes("/v1/detect")) return send(address, options);
    window.inFlight += 1;
    window.mostInFlight = Math.max(window.mostInFlight, window.inFlight);
    try {
        await new Promise((resolve, reject) => {
            window.letGo.push(resolve);
            options.signal.addEventListener("abort", () => reject(options.signal.reason));
        });
        return await send(address, options);
    } finally {
        window.inFlight -= 1;
    }
};
"""


def test_boxes_lie_where_the_objects_are(desk: Desk, draw: Draw) -> None:
    desk.choose(draw("two.png", (16, 8, RED), (64, 40, GREEN)))
    assert desk.boxes() == [[16, 8, 24, 16], [64, 40, 72, 48]]
    # Canvas and overlay agree: the middle of a box shows its square, and beside it is black.
    assert desk.pixel(20, 12) == [255, 0, 0]
    assert desk.pixel(68, 44) == [0, 255, 0]
    assert desk.pixel(40, 30) == [0, 0, 0]
    assert desk.states() == ["2"]
    assert "96 × 64 px" in desk.text("#facts")
    desk.said("two.png: 2 objects: 1 red, 1 green")


def test_sharp_on_screens_of_any_density(open_desk: OpenDesk, draw: Draw) -> None:
    desk = open_desk(device_scale_factor=3)
    desk.choose(draw("one.png", (16, 8, RED)))
    shown = desk.page.evaluate(
        """() => {
            const canvas = document.querySelector(".stage canvas");
            return canvas.width / canvas.clientWidth;
        }"""
    )
    assert shown == pytest.approx(3, abs=0.01)
    lines = desk.page.locator(".box .line").first
    assert lines.evaluate("(e) => getComputedStyle(e).vectorEffect") == "non-scaling-stroke"
    assert desk.pixel(20, 12) == [255, 0, 0]


def test_drop(desk: Desk, draw: Draw, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("no image")
    desk.transfer("dragenter", draw("a.png", (8, 8, RED)))
    assert desk.page.is_visible("#drop-sheet")
    desk.transfer("drop", draw("a.png", (8, 8, RED)), notes, draw("b.png"))
    desk.wait()
    assert not desk.page.is_visible("#drop-sheet")
    assert desk.states() == ["1", "0"]
    assert "1 file skipped (not an image): notes.txt" in desk.text("#message")
    desk.page.click("#message-close")
    assert not desk.page.is_visible("#message")


def test_drop_of_a_folder(desk: Desk, draw: Draw, tmp_path: Path) -> None:
    """As from a file manager, with an image beside it."""
    draw("shots/10.png", (8, 8, RED))
    draw("shots/9.png")
    draw("shots/more/a.png")
    draw("shots/.hidden.png")
    alone = draw("alone.png")
    session = desk.page.context.new_cdp_session(desk.page)
    data = {"items": [], "files": [str(tmp_path / "shots"), str(alone)], "dragOperationsMask": 1}
    for event in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": event, "x": 300, "y": 300, "data": data})
    desk.wait()
    names = desk.page.eval_on_selector_all(".thumb", "(all) => all.map((one) => one.title)")
    assert names == ["shots/9.png", "shots/10.png", "shots/more/a.png", "alone.png"]
    assert desk.states() == ["0", "1", "0", "0"]


def test_drop_of_a_large_folder(open_desk: OpenDesk) -> None:
    """A browser hands out a folder in batches; all of them are read, folders in it as well."""
    desk = open_desk(
        script="""
        const one = (path) => ({
            isDirectory: false, name: path.split("/").pop(), fullPath: path,
            file: (give) => give(new File([new Uint8Array([1])], path.split("/").pop(),
                { type: path.endsWith("txt") ? "text/plain" : "image/png" })),
        });
        const many = (path, ...batches) => ({
            isDirectory: true, name: path.split("/").pop(), fullPath: path,
            createReader: () => ({ readEntries: (give) => give(batches.shift() ?? []) }),
        });
        DataTransferItem.prototype.webkitGetAsEntry = () => many("/shots",
            [one("/shots/10.png"), one("/shots/.DS_Store")],
            [one("/shots/9.png"), many("/shots/more", [one("/shots/more/a.png")])]);
        """,
        failures=True,
    )
    desk.page.evaluate(
        """() => {
            const carried = new DataTransfer();
            carried.items.add(new File(["x"], "shots"));
            document.body.dispatchEvent(
                new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: carried }));
        }"""
    )
    desk.wait()
    names = desk.page.eval_on_selector_all(".thumb", "(all) => all.map((one) => one.title)")
    assert names == ["shots/9.png", "shots/10.png", "shots/more/a.png"]


def test_a_folder_chosen(desk: Desk, draw: Draw, tmp_path: Path) -> None:
    draw("shots/10.png", (8, 8, RED))
    draw("shots/2.png")
    draw("shots/.hidden.png")
    desk.page.set_input_files("#folder", str(tmp_path / "shots"))
    desk.wait()
    names = desk.page.eval_on_selector_all(".thumb", "(all) => all.map((one) => one.title)")
    assert names == ["shots/2.png", "shots/10.png"]
    assert desk.states() == ["0", "1"]


def test_paste(desk: Desk, draw: Draw) -> None:
    desk.transfer("paste")
    assert "There is no image in the clipboard" in desk.text("#message")
    desk.transfer("paste", draw("image.png", (8, 8, RED)))
    desk.wait()
    assert desk.text("#name") == "pasted-1.png"
    assert desk.boxes() == [[8, 8, 16, 16]]
    assert not desk.page.is_visible("#message")


def test_paste_by_the_button(open_desk: OpenDesk) -> None:
    desk = open_desk(permissions=["clipboard-read", "clipboard-write"])
    desk.page.evaluate(
        """async () => {
            const canvas = new OffscreenCanvas(96, 64);
            const context = canvas.getContext("2d");
            context.fillRect(0, 0, 96, 64);
            context.fillStyle = "rgb(255 0 0)";
            context.fillRect(16, 24, 8, 8);
            const blob = await canvas.convertToBlob({ type: "image/png" });
            await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }"""
    )
    desk.page.click("#paste")
    desk.wait()
    assert desk.boxes() == [[16, 24, 24, 32]]


def test_camera(open_desk: OpenDesk) -> None:
    desk = open_desk(permissions=["camera"])
    desk.page.click("#camera")
    desk.page.wait_for_selector(".shutter:enabled")
    desk.page.click(".shutter")
    desk.wait()
    assert desk.text("#name") == "camera-1.jpg"
    assert not desk.page.is_visible("#camera-dialog")
    # The camera is let go: no track runs on.
    assert desk.page.evaluate("() => document.querySelector('video').srcObject") is None


def test_no_camera(desk: Desk) -> None:
    failing = """() => {
        navigator.mediaDevices.getUserMedia = async () => {
            throw new DOMException('reason', '%s');
        };
    }"""
    for script, words in (
        ("0", "denied access to the camera"),
        (failing % "NotFoundError", "No camera was found"),
        (failing % "NotReadableError", "another program uses it"),
        (
            "Object.defineProperty(navigator, 'mediaDevices', { value: undefined });",
            "only to pages at https://",
        ),
    ):
        desk.page.evaluate(script)
        desk.page.click("#camera")
        desk.page.wait_for_function(
            "(words) => document.querySelector('.camera-message').textContent.includes(words)",
            arg=words,
        )
        assert desk.page.is_disabled(".shutter")
        desk.page.keyboard.press("Escape")
        assert not desk.page.is_visible("#camera-dialog")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_are_shown_upright(desk: Desk, tmp_path: Path, kind: str) -> None:
    """Browsers turn most formats by themselves; Chromium leaves WebP as it lies."""
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    if kind == "JPEG":
        options = {"quality": 100, "subsampling": 0}
    # Where the squares come to lie: of 96 x 64 pixels x becomes 96 - x where it is mirrored.
    places = {1: (8, 40), 2: (80, 40), 3: (80, 16), 4: (8, 16)}
    places |= {5: (40, 8), 6: (16, 8), 7: (16, 80), 8: (40, 80)}
    files = []
    for orientation in places:
        exif = Image.Exif()
        exif[0x0112] = orientation
        files.append(tmp_path / f"{orientation}.{kind.lower()}")
        whole = image((8, 40, RED), (80, 40, BLUE))
        whole.save(files[-1], kind, exif=exif.tobytes(), **options)
    desk.choose(*files)
    for orientation, (x, y) in places.items():
        assert desk.text("#name").startswith(str(orientation))
        assert [x, y, x + 8, y + 8] in desk.boxes()
        red, green, blue = desk.pixel(x + 4, y + 4)
        assert (red > 200, green < 60, blue < 60) == (True, True, True), orientation
        assert desk.page.inner_text(".stage-message") == ""
        desk.page.keyboard.press("ArrowRight")
        desk.wait()


def test_a_image_that_the_browser_cannot_show(desk: Desk, draw: Draw) -> None:
    desk.choose(draw("scan.tiff", (16, 8, RED), (64, 40, GREEN)))
    assert "This browser cannot display TIFF images" in desk.text(".stage-message")
    assert desk.boxes() == [[16, 8, 24, 16], [64, 40, 72, 48]]
    assert desk.pixel(40, 30) == [0xC9, 0xD1, 0xD9]  # the sheet, of the light theme
    assert desk.page.locator(".detections li").count() == 2
    assert desk.text(".thumb .kind") == "TIFF"
    assert desk.page.is_disabled("#save-png")
    assert "cannot display the image and cannot draw on it" in desk.text("#save-hint")


def test_an_animation_shows_the_image_that_was_searched(desk: Desk, tmp_path: Path) -> None:
    file = tmp_path / "moving.gif"
    later = [image((64, 40, BLUE))]
    image((16, 8, RED)).save(file, save_all=True, append_images=later, duration=20, loop=0)
    desk.choose(file)
    assert desk.boxes()[0] == [16, 8, 24, 16]
    desk.page.wait_for_timeout(100)
    assert desk.pixel(20, 12)[0] > 200
    assert desk.pixel(68, 44)[2] < 60


def test_transparency_lies_on_white(desk: Desk, tmp_path: Path) -> None:
    file = tmp_path / "clear.png"
    Image.new("RGBA", (96, 64), (0, 0, 0, 0)).save(file)
    desk.choose(file)
    assert desk.pixel(50, 30) == [255, 255, 255]


def test_a_wrong_size_draws_no_boxes(desk: Desk, draw: Draw, ask: Callable[..., Any]) -> None:
    """Should a browser turn an image otherwise than the server, boxes would lie anywhere."""
    file = draw("one.png", (16, 8, RED))
    said = ask(file)
    said["images"][0].update(height=96, width=64)
    desk.page.route("**/v1/detect*", lambda route: route.fulfill(json=said))
    desk.choose(file)
    assert desk.boxes() == []
    assert "are not drawn" in desk.text(".stage-message")
    assert desk.page.locator(".detections li").count() == 1


def test_the_strip(desk: Desk, draw: Draw) -> None:
    files = [draw(f"{n}.png", *[(8 * k, 8, RED) for k in range(n)]) for n in range(4)]
    desk.choose(*files)
    assert desk.states() == ["0", "1", "2", "3"]
    assert "4 images" in desk.text("#progress-text")
    page = desk.page
    assert page.locator(".thumb").first.get_attribute("aria-label") == "0.png, 0 objects"
    assert desk.text("#name") == "0.png"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert desk.text("#name") == "2.png"
    desk.said("2.png: 2 objects: 2 red")
    page.wait_for_function("() => document.querySelectorAll('.thumb img').length === 4")
    desk.settle()
    assert len(desk.boxes()) == 2
    page.keyboard.press("ArrowLeft")
    assert desk.text("#name") == "1.png"
    page.locator(".thumb").last.click()
    assert desk.text("#name") == "3.png"
    page.keyboard.press("ArrowRight")
    assert desk.text("#name") == "3.png"
    # In the strip itself the focus goes with the image.
    page.locator(".thumb").last.focus()
    page.keyboard.press("Home")
    assert page.evaluate("() => document.activeElement.title") == "0.png"
    page.keyboard.press("Delete")
    assert page.evaluate("() => document.activeElement.title") == "1.png"
    assert desk.states() == ["1", "2", "3"]
    page.click("#remove")
    assert desk.text("#name") == "2.png"


def test_names_are_text(desk: Desk, draw: Draw) -> None:
    name = "<img src=x onerror=alert(1)>.png"
    desk.choose(draw(name, (8, 8, BLUE)))
    assert desk.text("#name") == name
    assert desk.page.locator("img[src=x]").count() == 0
    # The class's name is text as well.
    assert desk.text(".detections .class-name") == "<i>blue</i>"
    assert desk.page.locator("i").count() == 0


def test_a_few_uploads_at_a_time_which_can_be_cancelled(open_desk: OpenDesk, draw: Draw) -> None:
    desk = open_desk(script=HOLD)
    files = [draw(f"{n}.png", (8, 8, RED)) for n in range(8)]
    desk.page.set_input_files("#files", [str(file) for file in files])
    desk.page.wait_for_function("() => window.letGo.length === 3")
    assert desk.states().count("detecting") == 3
    assert desk.states().count("waiting") == 5
    assert desk.page.is_visible("#progress")
    # The image in view goes before those that came earlier.
    desk.page.locator(".thumb").last.click()
    desk.page.evaluate("() => window.letGo[0]()")
    desk.page.wait_for_function("() => window.letGo.length === 4")
    assert desk.states()[0] == "1"
    assert desk.states()[7] == "detecting"
    desk.page.click("#cancel")
    desk.page.wait_for_function("() => window.inFlight === 0")
    assert desk.states() == ["1", *["cancelled"] * 7]
    assert desk.page.evaluate("() => window.mostInFlight") == 3
    assert desk.asked() == 1
    desk.page.click(".stage-message button")
    desk.page.wait_for_function("() => window.letGo.length === 5")
    desk.page.evaluate("() => window.letGo[4]()")
    desk.page.wait_for_function(
        "() => document.querySelectorAll('.thumb')[7].dataset.status === 'done'"
    )


def test_what_is_removed_is_let_go(open_desk: OpenDesk, draw: Draw) -> None:
    desk = open_desk(
        script="""
        window.kept = new Set();
        window.bitmaps = 0;
        const make = URL.createObjectURL;
        URL.createObjectURL = (blob) => {
            if (blob.size > 20000) throw new Error("too large for a thumbnail");
            const address = make(blob);
            window.kept.add(address);
            return address;
        };
        const revoke = URL.revokeObjectURL;
        URL.revokeObjectURL = (address) => { window.kept.delete(address); revoke(address); };
        const decode = window.createImageBitmap;
        window.createImageBitmap = async (...all) => {
            const bitmap = await decode(...all);
            window.bitmaps += 1;
            return bitmap;
        };
        const close = ImageBitmap.prototype.close;
        ImageBitmap.prototype.close = function () { window.bitmaps -= 1; close.call(this); };
        """
    )
    files = [draw(f"{n}.png", (8, 8, RED)) for n in range(6)]
    desk.choose(*files)
    for _ in range(5):
        desk.page.keyboard.press("ArrowRight")
    desk.page.wait_for_function("() => window.kept.size === 6")
    # Of all images one is unpacked: that in view.
    desk.page.wait_for_function("() => window.bitmaps === 1")
    desk.page.click("#remove")
    desk.page.wait_for_function("() => window.kept.size === 5")
    desk.page.click("#clear")
    desk.page.wait_for_function("() => window.kept.size === 0 && window.bitmaps === 0")
    assert desk.page.is_visible("#empty")
    assert desk.page.evaluate("() => document.activeElement.id") == "choose"
    desk.choose(draw("again.png", (8, 8, DIM_RED)))
    assert desk.states() == ["0"]
