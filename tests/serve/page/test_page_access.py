"""The page for everybody: both themes, a phone, the keyboard alone, and screen readers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from page_driver import BLUE, DIM_RED, GREEN, RED, PageDriver

Draw = Callable[..., Path]
OpenPage = Callable[..., PageDriver]

CONTRAST = """() => {
    // Of each visible text, and of the edge of each control, against what lies behind it.
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
    const controls = `button:not(.quiet), select, ${fields}`;
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
        // A quiet button is told by its words; slider and boxes are the browser's own.
        if (element.matches(controls)) {
            const about = behind(element.parentElement);
            const edge = over(parse(style.borderTopColor), about);
            const value = Math.max(ratio(edge, about), ratio(behind(element), about));
            if (value < 3) poor.push(`edge ${value.toFixed(2)} ${name}`);
        }
    }
    return poor;
}"""

SCENES = ["empty", "found", "compared", "failed", "key"]


def scene(driver: PageDriver, draw: Draw, name: str) -> None:
    """Brings the page from one state that is worth looking at to the next, in the order above."""
    page = driver.page
    if name == "found":
        driver.upload(draw("a.png", (8, 8, RED), (24, 8, GREEN)), draw("b.png", (8, 8, BLUE)))
        page.focus(".detections")
    elif name == "compared":
        page.select_option("#second-model", "strict")
        driver.wait()
    elif name == "failed":
        page.route("**/v1/detect*", lambda one: one.fulfill(status=413, json={"detail": "no"}))
        driver.upload(draw("c.png"))
        driver.transfer("paste")
    elif name == "key":
        page.evaluate("() => document.getElementById('key-dialog').showModal()")
    driver.settle()


def test_contrast_is_wcag_aa(open_page: OpenPage, draw: Draw) -> None:
    """WCAG 2.2 AA: 4.5 of text, 3 of the edges of controls."""
    driver = open_page(failures=True)
    for name in SCENES:
        scene(driver, draw, name)
        for theme in ("light", "dark"):
            driver.page.emulate_media(color_scheme=theme)
            assert driver.page.evaluate(CONTRAST) == [], (name, theme)


def test_themes_follow_system_or_choice(open_page: OpenPage) -> None:
    driver = open_page(color_scheme="dark")
    page = driver.page
    paper = "() => getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(paper)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(paper)
    assert dark != light
    button = page.get_by_role("button", name="Colours: Auto")
    button.click()  # light
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(paper) == light
    page.get_by_role("button", name="Colours: Light").click()
    assert page.evaluate(paper) == dark
    page.emulate_media(color_scheme="light")
    assert page.evaluate(paper) == dark
    # Kept, and there from the first moment on.
    page.reload(wait_until="commit")
    page.wait_for_selector("body")
    assert page.evaluate(paper) == dark
    page.get_by_role("button", name="Colours: Dark").click()
    assert page.evaluate(paper) == light
    assert page.evaluate("() => localStorage.getItem('retinanet.theme')") == "auto"


def test_phone_has_no_horizontal_scrolling(open_page: OpenPage, draw: Draw) -> None:
    driver = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = driver.page
    wide = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) == 0
    driver.upload(draw("a.png", (8, 8, RED)), draw("a" * 60 + ".png", (8, 8, BLUE)))
    assert page.evaluate(wide) == 0
    page.select_option("#second-model", "strict")
    driver.wait()
    assert page.evaluate(wide) == 0
    # One above the other, each wide enough.
    places = [page.locator(".stage").nth(n).bounding_box() for n in (0, 1)]
    assert places[0]["x"] == places[1]["x"]
    assert places[0]["width"] > 340
    # What is touched is large enough (WCAG 2.5.8 asks for 24, fingers for 44).
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, select, .classes label, .detections li")]
            .filter((e) => e.checkVisibility() && e.getBoundingClientRect().height < 43.5)
            .map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert small == []


ROLES = {
    "button",
    "checkbox",
    "combobox",
    "dialog",
    "group",
    "image",
    "img",
    "link",
    "listbox",
    "option",
    "progressbar",
    "region",
    "searchbox",
    "slider",
    "spinbutton",
    "textbox",
    "toolbar",
}


def test_controls_have_accessible_names(open_page: OpenPage, draw: Draw) -> None:
    """By Chromium's own accessibility tree."""
    driver = open_page(failures=True)
    session = driver.page.context.new_cdp_session(driver.page)
    for name in SCENES:
        scene(driver, draw, name)
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        shown = [node for node in nodes if not node["ignored"]]
        nameless = [
            node["role"]["value"]
            for node in shown
            if node["role"]["value"] in ROLES and not node.get("name", {}).get("value")
        ]
        assert nameless == [], name
        roles = [node["role"]["value"] for node in shown]
        # One heading of the first level, and the landmarks by which one leaps.
        if name != "key":
            assert {"banner", "main", "complementary"} <= set(roles), name
            levels = driver.page.eval_on_selector_all("h1", "(all) => all.length")
            assert levels == 1
        assert driver.page.get_attribute("html", "lang") == "en"


def test_ids_are_unique_and_references_exist(driver: PageDriver, draw: Draw) -> None:
    for name in SCENES[:3]:
        scene(driver, draw, name)
    wrong = driver.page.evaluate(
        """() => {
            const wrong = [];
            const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
            wrong.push(...ids.filter((id, n) => ids.indexOf(id) !== n));
            for (const name of ["aria-labelledby", "aria-activedescendant", "for"]) {
                for (const e of document.querySelectorAll(`[${name}]`)) {
                    for (const id of e.getAttribute(name).split(" ")) {
                        if (!document.getElementById(id)) wrong.push(`${name} ${id}`);
                    }
                }
            }
            return wrong;
        }"""
    )
    assert wrong == []


def test_tab_reaches_every_control(driver: PageDriver, draw: Draw) -> None:
    """Tab reaches every control, and each shows that it has the focus."""
    driver.upload(draw("a.png", (8, 8, RED), (24, 8, DIM_RED)), draw("b.png", (8, 8, BLUE)))
    page = driver.page
    page.evaluate("() => document.activeElement.blur()")
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        at: dict[str, Any] = page.evaluate(
            """() => {
                const e = document.activeElement;
                const style = getComputedStyle(e);
                const line = e.querySelector?.(".halo");
                const seen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
                const stroke = line && parseFloat(getComputedStyle(line).strokeWidth) > 8;
                return { name: e.id || e.className.baseVal || e.className || e.tagName,
                    seen: Boolean(seen || stroke) };
            }"""
        )
        if at["name"] == "BODY":
            break
        assert at["seen"], at
        reached.append(at["name"])
    wanted = ["first-model", "second-model", "theme", "help", "zoom-in", "zoom-out", "fit", "full"]
    wanted += ["remove", "choose", "choose-folder", "paste", "camera", "clear", "image-1"]
    wanted += ["score", "score-number", "all", "none", "detections", "save-which", "save-visible"]
    wanted += ["save-json", "save-coco", "save-png", "box active"]
    assert [one for one in wanted if one not in reached] == []
    assert len(reached) == len(set(reached)) + reached.count("INPUT") - ("INPUT" in reached)


def test_question_mark_opens_help(driver: PageDriver) -> None:
    driver.page.keyboard.press("?")
    assert driver.page.is_visible("#help-dialog")
    driver.page.keyboard.press("Escape")
    assert not driver.page.is_visible("#help-dialog")
    # In a field a question mark is a question mark.
    driver.page.focus("#score-number")
    driver.page.keyboard.press("?")
    assert not driver.page.is_visible("#help-dialog")


def test_reduced_motion_stops_animation(open_page: OpenPage, draw: Draw) -> None:
    hold = "window.fetch = (send => (a, o) => String(a).includes('detect')"
    hold += " ? new Promise(() => {}) : send(a, o))(window.fetch);"
    turns = "() => getComputedStyle(document.querySelector('.thumb'), '::after').animationName"
    for motion, name in (("no-preference", "turn"), ("reduce", "none")):
        driver = open_page(script=hold, reduced_motion=motion)
        driver.page.set_input_files("#files", str(draw("a.png")))
        driver.page.wait_for_selector(".thumb[data-status=running]")
        assert driver.page.evaluate(turns) == name


def test_model_facts_are_shown(driver: PageDriver, draw: Draw) -> None:
    facts = driver.text("#model-facts")
    for words in ("colours", "0.578 on cells, val", "0.891", "3: red, green, <i>blue</i>"):
        assert words in facts
    assert "torch on cpu" in facts
    driver.upload(draw("a.png", (8, 8, RED)))
    driver.page.wait_for_function(
        "() => / ms per image/.test(document.getElementById('model-facts').textContent)"
    )


def test_page_has_no_inline_code(driver: PageDriver) -> None:
    """The policy that the service sends holds: no script, style or handler inside the markup."""
    response = driver.page.request.get(driver.address)
    assert "default-src 'self'" in response.headers["content-security-policy"]
    markup = response.text()
    assert "<style" not in markup
    assert " style=" not in markup
    assert " onclick=" not in markup
    assert markup.count("<script") == markup.count("<script src=") + markup.count(
        '<script type="module" src='
    )
    assert "http" not in markup
