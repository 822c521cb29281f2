"""The page in a real browser: light, dark, and as wide as a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_receipts

import omnifp4

SYSTEM_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
VIEWS = {"light": (1100, "light"), "dark": (1100, "dark"), "phone": (390, "light"), "small phone": (320, "dark")}

OVERLAPS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll('svg')) {
    const frame = svg.getBoundingClientRect();
    if (!frame.width) continue;
    const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    for (const [text, box] of texts) {
      if (box.left < frame.left - 6 || box.right > frame.right + 6 || box.top < frame.top - 2 || box.bottom > frame.bottom + 2)
        found.push(`${svg.querySelector('title').textContent}: "${text}" leaves the picture`);
    }
    for (let i = 0; i < texts.length; i++) for (let j = i + 1; j < texts.length; j++) {
      const [a, b] = [texts[i][1], texts[j][1]];
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const tall = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 2 && tall > 5) found.push(`${svg.querySelector('title').textContent}: "${texts[i][0]}" over "${texts[j][0]}"`);
    }
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Playwright's own Chromium, or else the system's."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        own = running.chromium.executable_path
        system = next((found for name in SYSTEM_BROWSERS if (found := shutil.which(name))), None)
        executable = own if Path(own).exists() else system
        if executable is None:
            pytest.skip("no Chromium: python -m playwright install chromium, or apt install chromium")
        opened = running.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(receipts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of one artifact, and the page of several that are compared."""
    folder = tmp_path_factory.mktemp("page")
    found = {"one": folder / "report.html", "several": folder / "several.html"}
    omnifp4.write_report(receipts.values(), found["one"])
    names = ("sweep", "four-over-six", "a-recipe-with-quite-a-long-name-that-must-be-cut")
    omnifp4.write_report([report_receipts.evaluation(f"/home/somebody/{name}") for name in names], found["several"])
    return found


@pytest.fixture(scope="module")
def page_file(pages: dict[str, Path]) -> Path:
    return pages["one"]


@pytest.mark.parametrize("artifacts", ["one", "several"])
@pytest.mark.parametrize("view", VIEWS)
def test_it_is_readable(browser: Any, pages: dict[str, Path], view: str, artifacts: str) -> None:
    width, scheme = VIEWS[view]
    page_file = pages[artifacts]
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: told.append(request.url) if request.url != page_file.as_uri() else None)
    page.goto(page_file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(item => { item.open = true; })")
    assert told == []
    # Nothing is wider than the screen but what scrolls by itself.
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(OVERLAPS) == []
    drawn = page.evaluate(
        "[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width > 0).length"
    )
    assert drawn == page.evaluate("document.querySelectorAll('svg').length") / 2
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('p, td, th, li, dd, text')].filter(e => e.getClientRects().length)"
        ".map(e => parseFloat(getComputedStyle(e).fontSize) * (e.ownerSVGElement ? "
        "e.ownerSVGElement.getBoundingClientRect().width / e.ownerSVGElement.viewBox.baseVal.width : 1)))"
    )
    assert smallest >= 10.5
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground.strip("rgb()").split(","))) > 600) is (scheme == "light")
    picture = page.screenshot(full_page=True)
    assert len(picture) > 50_000
    page.close()


def test_headings_and_pictures_have_names(browser: Any, page_file: Path) -> None:
    page = browser.new_page()
    page.goto(page_file.as_uri())
    for role in ("heading", "img", "table", "region"):
        for element in page.get_by_role(role).all():
            name = element.evaluate(
                "e => (e.getAttribute('aria-label') || (e.getAttribute('aria-labelledby') || '').split(' ')"
                ".map(i => document.getElementById(i)?.textContent || '').join(' ').trim() || e.innerText || '').trim()"
            )
            assert name, role
    assert page.get_by_role("img").count() >= 7
    page.close()
