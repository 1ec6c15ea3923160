"""Accessibility of the page: contrast, themes, a phone, the keyboard, and screen readers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from page_driver import BLUE, GREEN, RED, PageDriver

Draw = Callable[..., Path]
OpenPage = Callable[..., PageDriver]

CONTRAST = """() => {
    // Of each visible text, and of the edge of each control, against its background.
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const parse = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const over = ([r, g, b, a], under) => [r, g, b].map((v, i) => v * a + under[i] * (1 - a));
    const behind = (element) => {
        const layers = [];
        for (let e = element; e; e = e.parentElement) {
            const layer = parse(getComputedStyle(e).backgroundColor);
            layers.push(layer);
            if (layer[3] === 1) break;
        }
        return layers.reduceRight((under, top) => over(top, under), [255, 255, 255]);
    };
    const light = (rgb) => {
        const [r, g, b] = rgb.map((v) => v / 255).map((s) =>
            s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ratio = (a, b) => {
        const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
        return (x + 0.05) / (y + 0.05);
    };
    const poor = [];
    const fields = ["search", "number", "password"].map((type) => `[type=${type}]`);
    const controls = `button, select, ${fields}`;
    const root = document.querySelector("dialog[open]") ?? document.body;
    for (const element of root.querySelectorAll("*")) {
        if (!element.checkVisibility({ visibilityProperty: true })) continue;
        if (element.closest("svg") || element.disabled) continue;
        const style = getComputedStyle(element);
        const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        const name = element.outerHTML.slice(0, 90);
        if (own) {
            const paper = behind(element);
            const value = ratio(over(parse(style.color), paper), paper);
            if (value < 4.5) poor.push(`text ${value.toFixed(2)} ${name}`);
        }
        // The slider and checkboxes are the browser's own.
        if (element.matches(controls)) {
            const about = behind(element.parentElement);
            const edge = over(parse(style.borderTopColor), about);
            const value = Math.max(ratio(edge, about), ratio(behind(element), about));
            if (value < 3) poor.push(`edge ${value.toFixed(2)} ${name}`);
        }
    }
    return poor;
}"""

SCENES = ["empty", "detected", "compared", "failed", "help", "key"]


def show_scene(driver: PageDriver, draw: Draw, name: str) -> None:
    """Bring the page from one state to the next, in the order of `SCENES`."""
    page = driver.page
    if name == "detected":
        driver.upload(draw("a.png", (8, 8, RED), (24, 8, GREEN)), draw("b.png", (8, 8, BLUE)))
        page.focus(".detections input")
    elif name == "compared":
        page.select_option("#second-model", "strict")
        driver.wait()
    elif name == "failed":
        page.route("**/v1/detect*", lambda route: route.fulfill(status=413, json={"detail": "no"}))
        driver.upload(draw("c.png"))
        driver.transfer("paste")
    elif name in ("help", "key"):
        page.keyboard.press("Escape")
        page.evaluate(f"() => document.getElementById('{name}-dialog').showModal()")
    driver.settle()


ROLES = {
    *("button", "checkbox", "combobox", "dialog", "group", "image", "img", "link", "progressbar"),
    *("radio", "radiogroup", "region", "searchbox", "slider", "spinbutton", "textbox", "toolbar"),
}


def test_contrast_names_and_references(open_page: OpenPage, draw: Draw) -> None:
    """WCAG 2.2 AA: contrast of 4.5 for text and 3 for edges of controls; names of all controls."""
    driver = open_page(failures=True)
    page = driver.page
    session = page.context.new_cdp_session(page)
    for name in SCENES:
        show_scene(driver, draw, name)
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)
            assert page.evaluate(CONTRAST) == [], (name, theme)
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        shown = [node for node in nodes if not node["ignored"]]
        roles = [node["role"]["value"] for node in shown]
        nameless = [
            role
            for role, node in zip(roles, shown, strict=True)
            if role in ROLES and not node.get("name", {}).get("value")
        ]
        assert nameless == [], name
        if name not in ("help", "key"):
            assert {"banner", "main", "complementary"} <= set(roles), name
        wrong = page.evaluate(
            """() => {
                const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
                const wrong = ids.filter((id, n) => ids.indexOf(id) !== n);
                for (const name of ["aria-labelledby", "for"]) {
                    for (const e of document.querySelectorAll(`[${name}]`)) {
                        if (!ids.includes(e.getAttribute(name))) wrong.push(e.outerHTML);
                    }
                }
                return wrong;
            }"""
        )
        assert wrong == [], name
    assert page.locator("h1").count() == 1
    assert page.get_attribute("html", "lang") == "en"


def test_theme_follows_the_system_or_the_choice(open_page: OpenPage) -> None:
    page = open_page(color_scheme="dark").page
    paper = "() => getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(paper)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(paper)
    assert dark != light
    for choice, system, colour in (
        ("light", "dark", light),
        ("dark", "light", dark),
        ("auto", "light", light),
        ("dark", "light", dark),
    ):
        page.select_option("#theme", choice)
        page.emulate_media(color_scheme=system)
        assert page.evaluate(paper) == colour
    # The choice is applied before the page is drawn.
    page.reload(wait_until="commit")
    page.wait_for_selector("body")
    assert page.evaluate(paper) == dark
    page.wait_for_selector("#model-facts dl")
    assert page.input_value("#theme") == "dark"


def test_phone_has_no_horizontal_scrolling(open_page: OpenPage, draw: Draw) -> None:
    driver = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = driver.page
    excess = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(excess) == 0
    driver.upload(draw("a.png", (8, 8, RED)), draw("a" * 60 + ".png", (8, 8, BLUE)))
    assert page.evaluate(excess) == 0
    page.select_option("#second-model", "strict")
    driver.wait()
    assert page.evaluate(excess) == 0
    # The panes are stacked.
    stages = [page.locator(".stage").nth(n).bounding_box() for n in (0, 1)]
    assert stages[0]["x"] == stages[1]["x"]
    assert stages[0]["width"] > 340
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, select, .classes label, .detections label")]
            .filter((e) => e.checkVisibility() && e.getBoundingClientRect().height < 43.5)
            .map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert small == []


def test_tab_reaches_every_control(driver: PageDriver, draw: Draw) -> None:
    """Each control shows that it has the focus."""
    driver.upload(draw("a.png", (8, 8, RED)), draw("b.png", (8, 8, BLUE)))
    page = driver.page
    page.evaluate("() => document.activeElement.blur()")
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name, visible = page.evaluate(
            """() => {
                const e = document.activeElement;
                const outlined = e.type === "radio" ? e.parentElement : e;
                const style = getComputedStyle(outlined);
                return [e.id || e.name || e.value || e.tagName,
                    style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
            }"""
        )
        if name == "BODY":
            break
        assert visible, name
        reached.append(name)
    expected = ["first-model", "second-model", "theme", "help", "zoom-out", "zoom-in", "fit"]
    expected += ["full", "remove", "choose", "choose-folder", "camera", "clear", "image"]
    expected += ["score", "all", "none", "red", "green", "<i>blue</i>"]
    expected += ["detection-0", "save-which", "save-visible", "save-json", "save-coco", "save-png"]
    assert reached == expected


def test_question_mark_opens_help(driver: PageDriver) -> None:
    page = driver.page
    page.keyboard.press("?")
    assert page.is_visible("#help-dialog")
    page.keyboard.press("Escape")
    assert not page.is_visible("#help-dialog")
    page.focus("#theme")
    page.keyboard.press("?")
    assert not page.is_visible("#help-dialog")


def test_reduced_motion_stops_animation(open_page: OpenPage, draw: Draw) -> None:
    hold = """window.fetch = ((send) => (address, options) => String(address).includes("detect")
        ? new Promise(() => {}) : send(address, options))(window.fetch);"""
    animation = "() => getComputedStyle(document.querySelector('.thumb'), '::after').animationName"
    for motion, name in (("no-preference", "turn"), ("reduce", "none")):
        driver = open_page(script=hold, reduced_motion=motion)
        driver.add(draw("a.png"))
        driver.page.wait_for_selector(".thumb[data-status=running]")
        assert driver.page.evaluate(animation) == name


def test_model_facts_are_shown(driver: PageDriver, draw: Draw) -> None:
    facts = driver.text("#model-facts")
    for text in ("colours", "0.578 on cells, val", "0.891", "3: red, green, <i>blue</i>"):
        assert text in facts
    assert "torch on cpu" in facts
    driver.upload(draw("a.png", (8, 8, RED)))
    driver.page.wait_for_function(
        "() => / ms per image/.test(document.getElementById('model-facts').textContent)"
    )
