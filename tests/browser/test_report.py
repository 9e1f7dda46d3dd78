"""The report of a study in a headless Chromium: drawn, whole and usable at any width."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from drtune_ray.results.class_tables import class_tables
from drtune_ray.results.report.page import report_page
from drtune_ray.results.report.predictions import Predictions, Wrong
from drtune_ray.study.report_content import gather
from drtune_ray.study.status import DONE
from tests.browser.chromium import NEEDS_CHROMIUM
from tests.results.made_studies import made_study

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytest.importorskip("selenium", reason="selenium is not installed")

pytestmark = NEEDS_CHROMIUM

WIDTHS, THEMES = (1400, 800, 390), ("light", "dark")
DRAW_SECONDS = 60.0
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
WATCH = """
window.problems = [];
addEventListener('error', e => window.problems.push(String(e.message)));
addEventListener('securitypolicyviolation', e => window.problems.push(e.blockedURI));
"""
FACTS = """
const root = document.documentElement;
const plots = [...document.querySelectorAll('.plot')];
const sized = p => { const s = p.querySelector('svg'); return s && s.getBoundingClientRect(); };
return {
  problems: window.problems,
  loaded: performance.getEntriesByType('resource').map(e => e.name),
  width: root.scrollWidth,
  drawn: Number(root.dataset.drawn),
  plots: plots.length,
  empty: plots.filter(p => !(sized(p) && sized(p).width > 100)).map(p => p.id),
  tooWide: plots.filter(p => sized(p) && sized(p).width > p.clientWidth + 1).map(p => p.id),
  colours: ['color', 'backgroundColor'].map(k => getComputedStyle(document.body)[k]),
  line: getComputedStyle(document.querySelector('#learning-curves .lines path')).stroke,
};
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Reports of studies of 3 and 30 trials, the second with a model's predictions."""
    folder = tmp_path_factory.mktemp("reports")
    found = {}
    for number in (3, 30):
        made = made_study(folder / "studies" / f"flowers-{number}", number)
        content = gather(made.record, state=DONE)
        if number == 30:
            labels = [i % 6 for i in range(60)]
            names = [f"a class with a long name {i}" for i in range(6)]
            shares = [[0.6 if j == (i * 7 // 6) % 6 else 0.08 for j in range(6)] for i in range(60)]
            wrong = Wrong("a/1.png", names[0], names[1], 0.6, PIXEL)
            found_tables = class_tables(labels, shares, names)
            content = replace(content, predictions=Predictions(found_tables, (wrong,) * 9))
        found[number] = folder / f"{number}.html"
        found[number].write_text(report_page(content), "utf-8")
    return found


def shown(browser: Chrome, page: Path, width: int, theme: str) -> dict[str, Any]:
    """Open a page of a width and theme, and return what came of it once all is drawn."""
    command: Callable[..., Any] = browser.execute_cdp_cmd
    features = [{"name": "prefers-color-scheme", "value": theme}]
    command("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    command("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    deadline = time.monotonic() + DRAW_SECONDS
    while not browser.execute_script("return document.documentElement.dataset.drawn"):
        assert time.monotonic() < deadline, "the figures are not drawn"
        time.sleep(0.05)
    facts: dict[str, Any] = browser.execute_script(FACTS)
    return facts


def brightness(colour: str) -> float:
    """Relative luminance of a colour, 0 to 1: WCAG 2.2."""
    parts = [int(text) / 255 for text in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: str, second: str) -> float:
    low, high = sorted((brightness(first), brightness(second)))
    return (high + 0.05) / (low + 0.05)


def test_report__at_three_widths_light_and_dark(browser: Chrome, pages: dict[int, Path]) -> None:
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
    for number, page in pages.items():
        text = page.read_text()
        (data,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', text)
        num_figures = len(json.loads(data))
        for width in WIDTHS:
            for theme in THEMES:
                facts = shown(browser, page, width, theme)
                case = (number, width, theme)
                assert facts["problems"] == facts["loaded"] == [], case
                assert facts["drawn"] == facts["plots"] == num_figures, case
                assert facts["empty"] == facts["tooWide"] == [], case
                assert facts["width"] <= width, case
                ink, surface = facts["colours"]
                assert (brightness(surface) < 0.1) == (theme == "dark"), case
                assert contrast(ink, surface) > 7, case
                assert contrast(facts["line"], surface) > 3, case


def test_report__by_keyboard_and_when_the_theme_changes(
    browser: Chrome, pages: dict[int, Path]
) -> None:
    from selenium.webdriver.common.keys import Keys

    light = shown(browser, pages[30], 800, "light")["line"]
    focused = "return document.activeElement.getAttribute('href')"
    browser.switch_to.active_element.send_keys(Keys.TAB)
    assert browser.execute_script(focused) == "#result"  # the link that skips the navigation
    unfold = browser.find_element("css selector", "details summary")
    unfold.send_keys(Keys.ENTER)
    assert unfold.find_element("xpath", "..").get_attribute("open") is not None
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    deadline = time.monotonic() + DRAW_SECONDS
    while browser.execute_script(FACTS)["line"] == light:
        assert time.monotonic() < deadline, "the figures keep the colours of the light theme"
        time.sleep(0.05)
