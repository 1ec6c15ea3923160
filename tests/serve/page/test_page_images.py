"""Images on the page: all inputs, orientation, the strip, and limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_driver import BLUE, DIM_RED, GREEN, RED, PageDriver
from PIL import Image

Draw = Callable[..., Path]
OpenPage = Callable[..., PageDriver]

VERMILION = [213, 94, 0]
"""Colour of the boxes of the first class."""

HOLD = """
// Uploads wait until the test releases them.
window.inFlight = window.maxInFlight = 0;
window.releases = [];
const send = window.fetch;
window.fetch = async (address, options) => {
    if (!String(address).includes("/v1/detect")) return send(address, options);
    window.inFlight += 1;
    window.maxInFlight = Math.max(window.maxInFlight, window.inFlight);
    try {
        await new Promise((resolve, reject) => {
            window.releases.push(resolve);
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
    assert driver.pixel(20, 12) == [255, 0, 0]
    assert driver.pixel(68, 44) == [0, 255, 0]
    assert driver.pixel(40, 30) == [0, 0, 0]
    # The box is drawn around its square, 2.5 CSS pixels wide.
    assert [driver.pixel(x, 12) for x in (16, 24)] == [VERMILION, VERMILION]
    assert driver.states() == ["2"]
    assert "96 × 64 px" in driver.text("#facts")
    driver.wait_for_announcement("two.png: 2 objects: 1 red, 1 green")


def test_canvas_has_the_screen_resolution(open_page: OpenPage, draw: Draw) -> None:
    driver = open_page(device_scale_factor=3)
    driver.upload(draw("one.png", (16, 8, RED)))
    ratio = driver.evaluate("panes[0].canvas.width / panes[0].canvas.clientWidth")
    assert ratio == pytest.approx(3, abs=0.01)
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
    assert "1 file skipped (not an image): notes.txt" in driver.text("#notice")
    driver.page.click("#notice-close")
    driver.settle()
    assert not driver.page.is_visible("#notice")


def test_drop_of_a_folder_is_read_in_order(driver: PageDriver, draw: Draw, tmp_path: Path) -> None:
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
    assert driver.names() == ["shots/9.png", "shots/10.png", "shots/more/a.png", "alone.png"]
    assert driver.states() == ["0", "1", "0", "0"]


def test_drop_of_a_large_folder_is_read_in_batches(open_page: OpenPage) -> None:
    driver = open_page(
        script="""
        const file = (path) => ({
            isDirectory: false, name: path.split("/").pop(), fullPath: path,
            file: (resolve) => resolve(new File([new Uint8Array([1])], path.split("/").pop())),
        });
        const folder = (path, ...batches) => ({
            isDirectory: true, name: path.split("/").pop(), fullPath: path,
            createReader: () => ({ readEntries: (resolve) => resolve(batches.shift() ?? []) }),
        });
        DataTransferItem.prototype.webkitGetAsEntry = () => folder("/shots",
            [file("/shots/10.png"), file("/shots/.DS_Store")],
            [file("/shots/9.png"), folder("/shots/more", [file("/shots/more/a.png")])]);
        """,
        failures=True,
    )
    driver.transfer("drop", Path(__file__))
    driver.wait()
    assert driver.names() == ["shots/9.png", "shots/10.png", "shots/more/a.png"]


def test_chosen_folder_is_sorted_naturally(driver: PageDriver, draw: Draw, tmp_path: Path) -> None:
    draw("shots/10.png", (8, 8, RED))
    draw("shots/2.png")
    draw("shots/.hidden.png")
    driver.add(tmp_path / "shots", selector="#folder")
    driver.wait()
    assert driver.names() == ["shots/2.png", "shots/10.png"]
    assert driver.states() == ["0", "1"]


def test_paste_adds_an_image(driver: PageDriver, draw: Draw) -> None:
    driver.transfer("paste")
    assert "There is no image in the clipboard" in driver.text("#notice")
    driver.transfer("paste", draw("image.png", (8, 8, RED)))
    driver.wait()
    assert driver.text("#name") == "pasted-1.png"
    assert driver.boxes() == [[8, 8, 16, 16]]
    assert not driver.page.is_visible("#notice")


def test_camera_takes_an_image_and_stops(open_page: OpenPage) -> None:
    driver = open_page(permissions=["camera"])
    driver.page.click("#camera")
    driver.page.wait_for_selector("#shutter:enabled")
    driver.page.click("#shutter")
    driver.wait()
    assert driver.text("#name") == "camera-1.jpg"
    assert not driver.page.is_visible("#camera-dialog")
    assert driver.page.evaluate("() => document.querySelector('video').srcObject") is None


def test_camera_errors_are_explained(driver: PageDriver) -> None:
    failing = """() => {
        navigator.mediaDevices.getUserMedia = async () => {
            throw new DOMException('reason', '%s');
        };
    }"""
    for script, text in (
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
            "(text) => document.querySelector('#camera-message').textContent.includes(text)",
            arg=text,
        )
        assert driver.page.is_disabled("#shutter")
        driver.page.keyboard.press("Escape")
        assert not driver.page.is_visible("#camera-dialog")


def test_exif_orientation_is_applied(driver: PageDriver, draw: Draw) -> None:
    # Position of the red square: of 96 x 64 pixels x becomes 96 - x where it is mirrored.
    positions = {1: (8, 40), 2: (80, 40), 3: (80, 16), 4: (8, 16)}
    positions |= {5: (40, 8), 6: (16, 8), 7: (16, 80), 8: (40, 80)}
    files = []
    for orientation in positions:
        exif = Image.Exif()
        exif[0x0112] = orientation
        name = f"{orientation}.{'png' if orientation % 2 else 'jpg'}"
        options = {"exif": exif.tobytes(), "quality": 100, "subsampling": 0}
        files.append(draw(name, (8, 40, RED), (80, 40, BLUE), **options))
    driver.upload(*files)
    for orientation, (x, y) in positions.items():
        assert driver.text("#name").startswith(str(orientation))
        assert [x, y, x + 8, y + 8] in driver.boxes()
        red, green, blue = driver.pixel(x + 4, y + 4)
        assert (red > 200, green < 60, blue < 60) == (True, True, True), orientation
        assert driver.text(".stage-message") == ""
        driver.page.keyboard.press("ArrowRight")
        driver.wait()


def test_rotated_webp_has_boxes_on_an_empty_canvas(driver: PageDriver, draw: Draw) -> None:
    # Chromium does not rotate WebP: on its bitmap boxes would be misplaced.
    for orientation, byteorder in ((1, "<"), (3, "<"), (3, ">")):
        exif = Image.Exif()
        exif.endian = byteorder
        exif[0x0112] = orientation
        options = {"lossless": True, "exif": exif.tobytes()}
        driver.upload(draw(f"{orientation}.webp", (8, 40, RED), **options))
        message = driver.text(".stage-message")
        assert ("cannot display WEBP images" in message) == (orientation == 3)
        assert len(driver.boxes()) == 1
        driver.page.keyboard.press("Delete")


def test_undecodable_image_has_boxes_on_an_empty_canvas(driver: PageDriver, draw: Draw) -> None:
    driver.upload(draw("scan.tiff", (16, 8, RED), (64, 40, GREEN)))
    assert "This browser cannot display TIFF images" in driver.text(".stage-message")
    assert driver.boxes() == [[16, 8, 24, 16], [64, 40, 72, 48]]
    assert driver.pixel(40, 30) == [0xC9, 0xD1, 0xD9]  # --sheet of the light theme
    assert driver.pixel(16, 12) == VERMILION
    assert len(driver.texts(".detections label")) == 2
    assert driver.text(".thumb .kind") == "TIFF"
    assert driver.page.is_disabled("#save-png")
    assert "cannot draw on them" in driver.text("#save-hint")


def test_animation_shows_its_first_frame(driver: PageDriver, draw: Draw, tmp_path: Path) -> None:
    second = Image.open(draw("second.png", (64, 40, BLUE)))
    animated = {"save_all": True, "append_images": [second], "duration": 20, "loop": 0}
    driver.upload(draw("moving.gif", (16, 8, RED), **animated))
    assert driver.boxes()[0] == [16, 8, 24, 16]
    driver.page.wait_for_timeout(100)
    assert driver.pixel(20, 12)[0] > 200
    assert driver.pixel(68, 44)[2] < 60


def test_transparent_pixels_are_white(driver: PageDriver, tmp_path: Path) -> None:
    file = tmp_path / "clear.png"
    Image.new("RGBA", (96, 64), (0, 0, 0, 0)).save(file)
    driver.upload(file)
    driver.page.click("#none")  # everything is detected in white
    driver.settle()
    assert driver.pixel(50, 28) == [255, 255, 255]


def test_other_size_than_the_servers_draws_no_boxes(
    driver: PageDriver, draw: Draw, detect: Callable[..., Any]
) -> None:
    file = draw("one.png", (16, 8, RED))
    response = detect(file)
    response["images"][0].update(height=96, width=64)
    driver.page.route("**/v1/detect*", lambda route: route.fulfill(json=response))
    driver.upload(file)
    assert driver.boxes() == []
    assert "are not drawn" in driver.text(".stage-message")
    assert len(driver.texts(".detections label")) == 1


def test_strip_selects_and_removes_images(driver: PageDriver, draw: Draw) -> None:
    files = [draw(f"{n}.png", *[(8 * k, 8, RED) for k in range(n)]) for n in range(4)]
    driver.upload(*files)
    assert driver.states() == ["0", "1", "2", "3"]
    assert "4 images" in driver.text("#progress-text")
    page = driver.page
    assert page.get_by_role("radio", name="1.png, 1 object").count() == 1
    assert driver.text("#name") == "0.png"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    driver.wait()
    assert driver.text("#name") == "2.png"
    driver.wait_for_announcement("2.png: 2 objects: 2 red")
    assert len(driver.boxes()) == 2
    page.locator(".thumb").last.click()
    page.keyboard.press("Shift+ArrowRight")  # pans
    driver.wait()
    assert driver.text("#name") == "3.png"
    # In the strip the focus is on the selected image.
    page.keyboard.press("ArrowLeft")
    driver.wait()
    focused = "() => document.activeElement.ariaLabel"
    assert page.evaluate(focused) == "2.png, 2 objects"
    page.keyboard.press("Delete")
    driver.wait()
    assert page.evaluate(focused) == "3.png, 3 objects"
    assert driver.states() == ["0", "1", "3"]
    page.click("#remove")
    driver.wait()
    assert driver.text("#name") == "1.png"


def test_names_are_never_markup(driver: PageDriver, draw: Draw) -> None:
    name = "<img src=x onerror=alert(1)>.png"
    driver.upload(draw(name, (8, 8, BLUE)))
    assert driver.text("#name") == name
    assert driver.page.locator("img[src=x]").count() == 0
    assert driver.text(".detections .class-name") == "<i>blue</i>"
    assert driver.page.locator("i").count() == 0


def test_uploads_are_limited_and_can_be_cancelled(open_page: OpenPage, draw: Draw) -> None:
    driver = open_page(script=HOLD)
    page = driver.page
    driver.add(*[draw(f"{n}.png", (8, 8, RED)) for n in range(8)])
    page.wait_for_function("() => window.releases.length === 3")
    assert driver.states().count("detecting") == 3
    assert driver.states().count("waiting") == 5
    assert page.is_visible("#progress")
    # The image in view is sent before those that were added earlier.
    page.locator(".thumb").last.click()
    page.evaluate("() => window.releases[0]()")
    page.wait_for_function("() => window.releases.length === 4")
    page.wait_for_selector(".thumb[data-status=done]")
    assert driver.states()[0] == "1"
    assert driver.states()[7] == "detecting"
    page.click("#cancel")
    page.wait_for_function("() => window.inFlight === 0")
    assert driver.states() == ["1", *["cancelled"] * 7]
    assert page.evaluate("() => window.maxInFlight") == 3
    assert driver.num_requests() == 1
    page.click(".stage-message button")
    page.wait_for_function("() => window.releases.length === 5")
    page.evaluate("() => window.releases[4]()")
    page.wait_for_selector(".thumb[data-status=done] >> nth=1")


def test_deleted_file_is_explained(open_page: OpenPage, draw: Draw) -> None:
    driver = open_page(script=HOLD, failures=True)
    files = [draw(f"{n}.png", (8, 8, GREEN)) for n in range(4)]
    driver.add(*files)
    driver.page.wait_for_function("() => window.releases.length === 3")
    files[3].unlink()
    driver.page.evaluate("() => window.releases.forEach((release) => release())")
    driver.wait()
    assert driver.states() == ["1", "1", "1", "failed"]
    driver.page.locator(".thumb").last.click()
    driver.wait()
    assert "The file can no longer be read" in driver.text(".stage-message")


def test_removed_images_release_their_memory(open_page: OpenPage, draw: Draw) -> None:
    driver = open_page(
        script="""
        window.urls = new Set();
        window.bitmaps = 0;
        const create = URL.createObjectURL;
        URL.createObjectURL = (blob) => {
            const url = create(blob);
            window.urls.add(url);
            return url;
        };
        const revoke = URL.revokeObjectURL;
        URL.revokeObjectURL = (url) => { window.urls.delete(url); revoke(url); };
        const decode = window.createImageBitmap;
        window.createImageBitmap = async (...options) => {
            const bitmap = await decode(...options);
            window.bitmaps += 1;
            return bitmap;
        };
        const close = ImageBitmap.prototype.close;
        ImageBitmap.prototype.close = function () { window.bitmaps -= 1; close.call(this); };
        """
    )
    page = driver.page
    driver.upload(*[draw(f"{n}.png", (8, 8, RED)) for n in range(6)])
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("() => window.urls.size === 6")
    page.wait_for_function("() => window.bitmaps === 1")  # only the image in view is decoded
    page.click("#remove")
    page.wait_for_function("() => window.urls.size === 5")
    page.click("#clear")
    page.wait_for_function("() => window.urls.size === 0 && window.bitmaps === 0")
    driver.settle()
    assert page.is_visible(".invitation")
    assert page.evaluate("() => document.activeElement.id") == "choose"
    driver.upload(draw("again.png", (8, 8, DIM_RED)))
    assert driver.states() == ["0"]
