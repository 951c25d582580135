"""The explorer as people use it: in Chromium, by mouse, by keyboard, and on a phone."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import pytest
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: see `make test-explore`")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("there is no Chromium: install Debian's package chromium, or set CHROMIUM", allow_module_level=True)

OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PANELS = ("dense", "plain", "debiased")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield started
        started.close()


@pytest.fixture
def tab(browser: Any, page: Any) -> Iterator[Any]:
    """A page that has shown its first answers, and asked nobody but this machine."""
    context = browser.new_context(viewport={"width": 1400, "height": 1150})
    tab, elsewhere, errors = context.new_page(), [], []
    tab.on("request", lambda r: elsewhere.append(r.url) if re.match(r"https?://(?!127\.0\.0\.1)", r.url) else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(page.local_url)
    tab.wait_for_selector("#debiased .eg-answer", timeout=60_000)
    tab.wait_for_selector("#charts svg")
    yield tab
    assert not elsewhere and not errors
    context.close()


def shown(tab: Any) -> dict[str, str]:
    return {name: tab.inner_html(f"#{name}") for name in (*PANELS, "maps", "charts")}


def wait_for(tab: Any, text: str, where: str = "#plain", seconds: float = 20) -> float:
    """Seconds until something is said."""
    start = monotonic()
    tab.wait_for_function(
        "([where, text]) => document.querySelector(where).innerText.includes(text)",
        arg=[where, text],
        timeout=1000 * seconds,
    )
    return monotonic() - start


def keep_screenshot(tab: Any, name: str) -> None:
    """Where SCREENSHOTS names a folder, pictures for the documentation are written there."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        tab.wait_for_timeout(500)
        tab.screenshot(path=str(Path(folder) / name), full_page=True)


def test_a_sample_then_the_budget_changes_all_panels(tab: Any) -> None:
    before = shown(tab)
    keep_screenshot(tab, "explore.png")
    tab.get_by_label("picture 4").check()
    wait_for(tab, "picture 4", "#status")
    sample = shown(tab)
    assert all(sample[name] != before[name] for name in before)
    tab.locator("#keep input[type=number]").fill("10")
    tab.keyboard.press("Tab")
    wait_for(tab, "20 of 196 kept")
    wait_for(tab, "20 of 196 kept", "#debiased")
    budget = shown(tab)
    assert all(budget[name] != sample[name] for name in ("plain", "debiased", "charts"))
    for name in PANELS:
        assert tab.locator(f"#{name} .eg-answer").inner_text() and tab.locator(f"#{name} img").count() >= 1


def test_method_layer_and_debias(tab: Any) -> None:
    tab.locator("#steps").get_by_label("padding only").check()
    wait_for(tab, "padding only", "#debiased")
    assert "No trend is divided out" in tab.inner_text("#charts")
    tab.locator("#layer input[type=number]").fill("6")
    tab.keyboard.press("Tab")
    wait_for(tab, "before layer 6")
    tab.locator("#method input").click()
    tab.get_by_role("option", name="pyramiddrop").click()
    wait_for(tab, "pyramiddrop, plain")
    assert tab.locator("#plain figure").count() == 3  # a picture for each stage
    sync_api.expect(tab.locator("#layer input[type=number]")).to_be_disabled()
    tab.locator("#method input").click()
    tab.get_by_role("option", name="random").click()
    wait_for(tab, "nothing to debias", "#debiased")


def test_one_s_own_picture_and_question(tab: Any, tmp_path: Path) -> None:
    path = tmp_path / "own.jpg"
    Image.linear_gradient("L").resize((640, 320)).save(path)
    tab.set_input_files("#upload input[type=file]", str(path))
    wait_for(tab, "your picture", "#status")
    question = tab.locator("#question input")
    question.fill("what is on the left?")
    question.press("Enter")
    wait_for(tab, "what is on the left?", "#status")


def test_a_text_file_is_answered_by_a_sentence(tab: Any, tmp_path: Path) -> None:
    before = shown(tab)
    path = tmp_path / "notes.txt"
    path.write_text("these are words")
    tab.set_input_files("#upload input[type=file]", str(path))
    wait_for(tab, "This is no picture that can be read", "#status")
    assert tab.locator("#status [role=alert]").count() == 1
    assert shown(tab) == before  # and nothing else happened
    keep_screenshot(tab, "explore-error.png")
    tab.get_by_label("picture 2").check()
    wait_for(tab, "picture 2", "#status")  # it goes on


def test_with_the_keyboard_only(tab: Any) -> None:
    def focus(selector: str) -> None:
        for _ in range(60):
            if tab.evaluate("(s) => document.activeElement?.matches(s) ?? false", selector):
                return
            tab.keyboard.press("Tab")
        pytest.fail(f"{selector} cannot be reached with the tab key")

    focus("#sample input[value='picture 2']")
    tab.keyboard.press("Space")
    wait_for(tab, "picture 2", "#status")
    focus("#question input")
    focus("#method input")
    focus("#keep input[type=range]")
    tab.keyboard.press("End")
    wait_for(tab, "196 of 196 kept")
    focus("#layer input[type=range]")
    tab.keyboard.press("ArrowRight")
    wait_for(tab, "before layer 3")
    focus("#steps input[value=padding]")
    tab.keyboard.press("Space")
    wait_for(tab, "padding only", "#debiased")


def test_on_a_phone(tab: Any) -> None:
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.wait_for_function("document.documentElement.scrollWidth <= 390")
    for name in PANELS:
        box = tab.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["width"] > 200
        picture = tab.locator(f"#{name} img").first.bounding_box()
        assert picture["width"] > 180
    keep_screenshot(tab, "explore-phone.png")


def test_every_picture_and_control_has_words(tab: Any) -> None:
    assert all(tab.eval_on_selector_all("img", "all => all.map(i => i.alt.length > 0)"))
    assert all(tab.eval_on_selector_all("svg[role=img]", "all => all.map(i => i.ariaLabel.length > 20)"))
    for label in ("question", "method"):
        assert tab.get_by_label(label, exact=False).count() >= 1


def test_eight_tabs_with_different_settings(browser: Any, page: Any) -> None:
    """All move their sliders before any has its answer; each sees its own settings, and its own picture."""
    tabs = []
    for number in range(8):
        tab = browser.new_context(viewport={"width": 1400, "height": 1150}).new_page()
        tab.goto(page.local_url)
        tabs.append((tab, 10 + 5 * number, number % 6 + 1))
    for tab, _, _ in tabs:
        tab.wait_for_selector("#debiased .eg-answer", timeout=120_000)
    for tab, share, picture in tabs:
        tab.get_by_label(f"picture {picture}").check()
        tab.locator("#keep input[type=number]").fill(str(share))
        tab.keyboard.press("Tab")
    for tab, share, picture in tabs:
        kept = math.ceil(196 * share / 100 - 0.5)
        for panel in ("#plain", "#debiased"):
            wait_for(tab, f"{kept} of 196 kept", panel, seconds=120)
        wait_for(tab, f"picture {picture}", "#status", seconds=120)
        assert "196.0" in tab.inner_text("#dense")
        tab.context.close()


def test_a_slider_answers_within_a_second(tab: Any) -> None:
    """The fastest of some moves: other work on the machine is not the page's. Plain and debiased come in one answer."""
    seconds = []
    for share, kept in ((12, 24), (18, 35), (31, 61), (44, 86), (57, 112), (22, 43), (49, 96)):
        tab.locator("#keep input[type=number]").fill(str(share))
        tab.keyboard.press("Tab")
        seconds.append(wait_for(tab, f"{kept} of 196 kept") + wait_for(tab, f"{kept} of 196 kept", "#debiased"))
    told = " ".join(f"{s:.2f}" for s in sorted(seconds))
    print(f"seconds from a slider's move to all panels: median {median(seconds):.2f} of {told}")
    assert min(seconds) < 1.0
