"""Images on the page: every way in, upright, in the strip, and within bounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from colour_finder import image
from page_driver import BLUE, DIM_RED, GREEN, RED, PageDriver
from PIL import Image

Draw = Callable[..., Path]
OpenPage = Callable[..., PageDriver]

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


def test_boxes_match_the_pixels(driver: PageDriver, draw: Draw) -> None:
    driver.upload(draw("two.png", (16, 8, RED), (64, 40, GREEN)))
    assert driver.boxes() == [[16, 8, 24, 16], [64, 40, 72, 48]]
    # Canvas and overlay agree: the middle of a box shows its square, and beside it is black.
    assert driver.pixel(20, 12) == [255, 0, 0]
    assert driver.pixel(68, 44) == [0, 255, 0]
    assert driver.pixel(40, 30) == [0, 0, 0]
    assert driver.states() == ["2"]
    assert "96 × 64 px" in driver.text("#facts")
    driver.wait_for_announcement("two.png: 2 objects: 1 red, 1 green")


def test_canvas_has_the_screen_resolution(open_page: OpenPage, draw: Draw) -> None:
    driver = open_page(device_scale_factor=3)
    driver.upload(draw("one.png", (16, 8, RED)))
    shown = driver.page.evaluate(
        """() => {
            const canvas = document.querySelector(".stage canvas");
            return canvas.width / canvas.clientWidth;
        }"""
    )
    assert shown == pytest.approx(3, abs=0.01)
    lines = driver.page.locator(".box .line").first
    assert lines.evaluate("(e) => getComputedStyle(e).vectorEffect") == "non-scaling-stroke"
    assert driver.pixel(20, 12) == [255, 0, 0]


def test_drop_skips_other_files(driver: PageDriver, draw: Draw, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("no image")
    driver.transfer("dragenter", draw("a.png", (8, 8, RED)))
    assert driver.page.is_visible("#drop-sheet")
    driver.transfer("drop", draw("a.png", (8, 8, RED)), notes, draw("b.png"))
    driver.wait()
    assert not driver.page.is_visible("#drop-sheet")
    assert driver.states() == ["1", "0"]
    assert "1 file skipped (not an image): notes.txt" in driver.text("#message")
    driver.page.click("#message-close")
    assert not driver.page.is_visible("#message")


def test_drop_of_a_folder_is_read_in_order(driver: PageDriver, draw: Draw, tmp_path: Path) -> None:
    """As from a file manager, with an image beside it."""
    draw("shots/10.png", (8, 8, RED))
    draw("shots/9.png")
    draw("shots/more/a.png")
    draw("shots/.hidden.png")
    alone = draw("alone.png")
    session = driver.page.context.new_cdp_session(driver.page)
    data = {"items": [], "files": [str(tmp_path / "shots"), str(alone)], "dragOperationsMask": 1}
    for event in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": event, "x": 300, "y": 300, "data": data})
    driver.wait()
    names = driver.page.eval_on_selector_all(".thumb", "(all) => all.map((one) => one.title)")
    assert names == ["shots/9.png", "shots/10.png", "shots/more/a.png", "alone.png"]
    assert driver.states() == ["0", "1", "0", "0"]


def test_drop_of_a_large_folder_is_read_completely(open_page: OpenPage) -> None:
    """A browser hands out a folder in batches; all of them are read, folders in it as well."""
    driver = open_page(
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
    driver.page.evaluate(
        """() => {
            const carried = new DataTransfer();
            carried.items.add(new File(["x"], "shots"));
            document.body.dispatchEvent(
                new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: carried }));
        }"""
    )
    driver.wait()
    names = driver.page.eval_on_selector_all(".thumb", "(all) => all.map((one) => one.title)")
    assert names == ["shots/9.png", "shots/10.png", "shots/more/a.png"]


def test_chosen_folder_is_sorted_naturally(driver: PageDriver, draw: Draw, tmp_path: Path) -> None:
    draw("shots/10.png", (8, 8, RED))
    draw("shots/2.png")
    draw("shots/.hidden.png")
    driver.page.set_input_files("#folder", str(tmp_path / "shots"))
    driver.wait()
    names = driver.page.eval_on_selector_all(".thumb", "(all) => all.map((one) => one.title)")
    assert names == ["shots/2.png", "shots/10.png"]
    assert driver.states() == ["0", "1"]


def test_paste_adds_an_image(driver: PageDriver, draw: Draw) -> None:
    driver.transfer("paste")
    assert "There is no image in the clipboard" in driver.text("#message")
    driver.transfer("paste", draw("image.png", (8, 8, RED)))
    driver.wait()
    assert driver.text("#name") == "pasted-1.png"
    assert driver.boxes() == [[8, 8, 16, 16]]
    assert not driver.page.is_visible("#message")


def test_paste_button_reads_the_clipboard(open_page: OpenPage) -> None:
    driver = open_page(permissions=["clipboard-read", "clipboard-write"])
    driver.page.evaluate(
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
    driver.page.click("#paste")
    driver.wait()
    assert driver.boxes() == [[16, 24, 24, 32]]


def test_camera_takes_an_image_and_stops(open_page: OpenPage) -> None:
    driver = open_page(permissions=["camera"])
    driver.page.click("#camera")
    driver.page.wait_for_selector(".shutter:enabled")
    driver.page.click(".shutter")
    driver.wait()
    assert driver.text("#name") == "camera-1.jpg"
    assert not driver.page.is_visible("#camera-dialog")
    # The camera is let go: no track runs on.
    assert driver.page.evaluate("() => document.querySelector('video').srcObject") is None


def test_camera_errors_are_explained(driver: PageDriver) -> None:
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
        driver.page.evaluate(script)
        driver.page.click("#camera")
        driver.page.wait_for_function(
            "(words) => document.querySelector('.camera-message').textContent.includes(words)",
            arg=words,
        )
        assert driver.page.is_disabled(".shutter")
        driver.page.keyboard.press("Escape")
        assert not driver.page.is_visible("#camera-dialog")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(driver: PageDriver, tmp_path: Path, kind: str) -> None:
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
    driver.upload(*files)
    for orientation, (x, y) in places.items():
        assert driver.text("#name").startswith(str(orientation))
        assert [x, y, x + 8, y + 8] in driver.boxes()
        red, green, blue = driver.pixel(x + 4, y + 4)
        assert (red > 200, green < 60, blue < 60) == (True, True, True), orientation
        assert driver.page.inner_text(".stage-message") == ""
        driver.page.keyboard.press("ArrowRight")
        driver.wait()


def test_undecodable_image_has_boxes_on_an_empty_canvas(driver: PageDriver, draw: Draw) -> None:
    driver.upload(draw("scan.tiff", (16, 8, RED), (64, 40, GREEN)))
    assert "This browser cannot display TIFF images" in driver.text(".stage-message")
    assert driver.boxes() == [[16, 8, 24, 16], [64, 40, 72, 48]]
    assert driver.pixel(40, 30) == [0xC9, 0xD1, 0xD9]  # the sheet, of the light theme
    assert driver.page.locator(".detections li").count() == 2
    assert driver.text(".thumb .kind") == "TIFF"
    assert driver.page.is_disabled("#save-png")
    assert "cannot display the image and cannot draw on it" in driver.text("#save-hint")


def test_animation_shows_its_first_frame(driver: PageDriver, tmp_path: Path) -> None:
    file = tmp_path / "moving.gif"
    later = [image((64, 40, BLUE))]
    image((16, 8, RED)).save(file, save_all=True, append_images=later, duration=20, loop=0)
    driver.upload(file)
    assert driver.boxes()[0] == [16, 8, 24, 16]
    driver.page.wait_for_timeout(100)
    assert driver.pixel(20, 12)[0] > 200
    assert driver.pixel(68, 44)[2] < 60


def test_transparent_pixels_are_white(driver: PageDriver, tmp_path: Path) -> None:
    file = tmp_path / "clear.png"
    Image.new("RGBA", (96, 64), (0, 0, 0, 0)).save(file)
    driver.upload(file)
    assert driver.pixel(50, 30) == [255, 255, 255]


def test_other_size_than_the_servers_draws_no_boxes(
    driver: PageDriver, draw: Draw, ask: Callable[..., Any]
) -> None:
    """Should a browser turn an image otherwise than the server, boxes would lie anywhere."""
    file = draw("one.png", (16, 8, RED))
    said = ask(file)
    said["images"][0].update(height=96, width=64)
    driver.page.route("**/v1/detect*", lambda route: route.fulfill(json=said))
    driver.upload(file)
    assert driver.boxes() == []
    assert "are not drawn" in driver.text(".stage-message")
    assert driver.page.locator(".detections li").count() == 1


def test_strip_selects_and_removes_images(driver: PageDriver, draw: Draw) -> None:
    files = [draw(f"{n}.png", *[(8 * k, 8, RED) for k in range(n)]) for n in range(4)]
    driver.upload(*files)
    assert driver.states() == ["0", "1", "2", "3"]
    assert "4 images" in driver.text("#progress-text")
    page = driver.page
    assert page.locator(".thumb").first.get_attribute("aria-label") == "0.png, 0 objects"
    assert driver.text("#name") == "0.png"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert driver.text("#name") == "2.png"
    driver.wait_for_announcement("2.png: 2 objects: 2 red")
    page.wait_for_function("() => document.querySelectorAll('.thumb img').length === 4")
    driver.settle()
    assert len(driver.boxes()) == 2
    page.keyboard.press("ArrowLeft")
    assert driver.text("#name") == "1.png"
    page.locator(".thumb").last.click()
    assert driver.text("#name") == "3.png"
    page.keyboard.press("ArrowRight")
    assert driver.text("#name") == "3.png"
    # In the strip itself the focus goes with the image.
    page.locator(".thumb").last.focus()
    page.keyboard.press("Home")
    assert page.evaluate("() => document.activeElement.title") == "0.png"
    page.keyboard.press("Delete")
    assert page.evaluate("() => document.activeElement.title") == "1.png"
    assert driver.states() == ["1", "2", "3"]
    page.click("#remove")
    assert driver.text("#name") == "2.png"


def test_names_are_never_markup(driver: PageDriver, draw: Draw) -> None:
    name = "<img src=x onerror=alert(1)>.png"
    driver.upload(draw(name, (8, 8, BLUE)))
    assert driver.text("#name") == name
    assert driver.page.locator("img[src=x]").count() == 0
    # The class's name is text as well.
    assert driver.text(".detections .class-name") == "<i>blue</i>"
    assert driver.page.locator("i").count() == 0


def test_uploads_are_limited_and_can_be_cancelled(open_page: OpenPage, draw: Draw) -> None:
    driver = open_page(script=HOLD)
    files = [draw(f"{n}.png", (8, 8, RED)) for n in range(8)]
    driver.page.set_input_files("#files", [str(file) for file in files])
    driver.page.wait_for_function("() => window.letGo.length === 3")
    assert driver.states().count("detecting") == 3
    assert driver.states().count("waiting") == 5
    assert driver.page.is_visible("#progress")
    # The image in view goes before those that came earlier.
    driver.page.locator(".thumb").last.click()
    driver.page.evaluate("() => window.letGo[0]()")
    driver.page.wait_for_function("() => window.letGo.length === 4")
    assert driver.states()[0] == "1"
    assert driver.states()[7] == "detecting"
    driver.page.click("#cancel")
    driver.page.wait_for_function("() => window.inFlight === 0")
    assert driver.states() == ["1", *["cancelled"] * 7]
    assert driver.page.evaluate("() => window.mostInFlight") == 3
    assert driver.num_requests() == 1
    driver.page.click(".stage-message button")
    driver.page.wait_for_function("() => window.letGo.length === 5")
    driver.page.evaluate("() => window.letGo[4]()")
    driver.page.wait_for_function(
        "() => document.querySelectorAll('.thumb')[7].dataset.status === 'done'"
    )


def test_removed_images_release_their_memory(open_page: OpenPage, draw: Draw) -> None:
    driver = open_page(
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
    driver.upload(*files)
    for _ in range(5):
        driver.page.keyboard.press("ArrowRight")
    driver.page.wait_for_function("() => window.kept.size === 6")
    # Of all images one is unpacked: that in view.
    driver.page.wait_for_function("() => window.bitmaps === 1")
    driver.page.click("#remove")
    driver.page.wait_for_function("() => window.kept.size === 5")
    driver.page.click("#clear")
    driver.page.wait_for_function("() => window.kept.size === 0 && window.bitmaps === 0")
    assert driver.page.is_visible("#empty")
    assert driver.page.evaluate("() => document.activeElement.id") == "choose"
    driver.upload(draw("again.png", (8, 8, DIM_RED)))
    assert driver.states() == ["0"]
