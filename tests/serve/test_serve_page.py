"""The chat page in a real Chromium, with a microphone that Chromium makes up."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

import serve_media as made

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SHOTS = os.environ.get("OMNIFP4_SCREENSHOTS")
"""A folder to keep pictures of the page in, for people to look at."""

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser(libraries: None) -> Iterator[Any]:
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no Chromium here (looked for {', '.join(NAMES)}); on Debian: apt-get install chromium")
    flags = [
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        "--autoplay-policy=no-user-gesture-required",
        "--no-sandbox",
    ]
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=path, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, server: Any) -> Iterator[Open]:
    """Opens the page; at the end there must be no word on the console, and nothing asked of another host."""
    contexts: list[Any] = []
    told: list[str] = []
    asked: list[str] = []
    expecting: list[str] = []

    def start(url: str = server.url, *, expected: str = "", **options: Any) -> Any:
        size = {"width": 1180, "height": 800}
        context = browser.new_context(**{"viewport": size, "permissions": ["microphone"], **options})
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: told.append(message.text) if message.type in ("error", "warning") else None)
        expecting.append(expected)
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        if url == server.url:
            sync_api.expect(page.locator("#memory")).not_to_have_text("–")
        return page

    yield start
    for context in contexts:
        context.close()
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "blob:", "data:"))] == []
    assert [word for word in told if not any(one and one in word for one in expecting)] == []


def shot(page: Any, name: str) -> None:
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))


def ask(page: Any, text: str = "") -> Any:
    """Sends and waits for the whole answer."""
    number = page.locator("article.assistant").count()
    if text:
        page.fill("#question", text)
    page.press("#question", "Enter")
    answer = page.locator("article.assistant").nth(number)
    sync_api.expect(answer).to_have_attribute("aria-busy", "false")
    return answer


def test_text_in_turns(open_page: Open) -> None:
    page = open_page()
    sync_api.expect(page.locator("#model")).to_have_text("tiny-omni")
    sync_api.expect(page.locator("#engine")).to_have_text("CPU, engine modules")
    shot(page, "empty")
    first = ask(page, "Hello")
    assert first.locator(".text").inner_text() and "tok/s" in page.inner_text("#rate")
    assert "12 tokens" in first.locator(".told").inner_text()
    assert page.evaluate("state.messages.length") == 2 and page.input_value("#question") == ""
    ask(page, "And then?\n<b>bold</b>")
    assert page.evaluate("state.messages.length") == 4
    assert page.locator("article.user b").count() == 0, "what is written is text, never markup"
    shot(page, "turns")
    page.click("#reset")
    assert page.locator("article").count() == 0 and page.evaluate("state.messages.length") == 0


def test_files_by_drop_and_by_choice(open_page: Open, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    page = open_page()
    data = {
        name: base64.b64encode(content).decode() for name, content in (("p.png", made.png()), ("s.wav", made.wav()))
    }
    transfer = page.evaluate_handle(
        """(data) => {
          const transfer = new DataTransfer();
          for (const [name, text] of Object.entries(data)) {
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            transfer.items.add(new File([bytes], name, { type: name.endsWith("png") ? "image/png" : "audio/wav" }));
          }
          return transfer;
        }""",
        data,
    )
    page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
    sync_api.expect(page.locator("#drop")).to_be_visible()
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    sync_api.expect(page.locator("#attached li")).to_have_count(2)
    sync_api.expect(page.locator("#drop")).to_be_hidden()
    (tmp_path / "v.mp4").write_bytes(made.mp4(tmp_path))
    page.set_input_files("#files", [str(tmp_path / "v.mp4"), str(tmp_path / "v.mp4")])
    sync_api.expect(page.locator("#attached li")).to_have_count(4)
    page.get_by_role("button", name="Remove v.mp4").first.click()
    sync_api.expect(page.locator("#attached li")).to_have_count(3)
    shot(page, "attached")
    answer = ask(page, "What are these?")
    assert answer.locator(".text").inner_text() and answer.locator(".fault").count() == 0
    assert [part["type"] for part in page.evaluate("state.messages[0].content")] == [
        "image_url",
        "input_audio",
        "video_url",
        "text",
    ]
    for kind in ("img", "audio", "video"):
        assert page.locator(f"article.user {kind}").count() == 1
    shot(page, "media")
    (tmp_path / "notes.txt").write_text("x")
    page.set_input_files("#files", str(tmp_path / "notes.txt"))
    sync_api.expect(page.get_by_role("alert")).to_have_text("notes.txt is no picture, sound or video")


def test_microphone_and_spoken_answer(open_page: Open) -> None:
    page = open_page()
    page.click("#speak")
    assert page.get_attribute("#speak", "aria-pressed") == "true"
    page.click("#record")
    sync_api.expect(page.locator("#record")).to_have_attribute("aria-pressed", "true")
    page.wait_for_timeout(600)
    shot(page, "recording")
    page.click("#record")
    sync_api.expect(page.locator("#attached li")).to_have_count(1)
    part = page.evaluate("state.attached[0].part.input_audio")
    data = base64.b64decode(part["data"])
    assert part["format"] == "wav" and data[:4] == b"RIFF" and int.from_bytes(data[24:28], "little") == 16_000
    assert len(data) > 44 + 16_000 * 2 * 0.3 and any(data[44:]), "the made-up microphone beeps"
    page.click("#send")
    answer = page.locator("article.assistant")
    sync_api.expect(answer).to_have_attribute("aria-busy", "false")
    assert answer.locator(".fault").count() == 0
    samples = int(answer.get_attribute("data-samples"))
    assert samples > 20_000, "a second of speech was played as it came"
    assert "s of speech" in answer.locator(".told").inner_text()
    length = answer.locator("audio").evaluate(
        "(audio) => new Promise((done) => { if (audio.duration) done(audio.duration);"
        " else audio.onloadedmetadata = () => done(audio.duration); })"
    )
    assert abs(length - samples / 24_000) < 0.05
    assert page.evaluate("state.context.sampleRate") == 24_000
    shot(page, "spoken")
    assert page.evaluate("state.player.sources.length") > 0, "it may still be heard"
    page.keyboard.press("Escape")
    assert page.evaluate("state.player") is None, "until somebody has heard enough"


def test_stopping(open_page: Open, server: Any) -> None:
    page = open_page()
    page.click("#settings-open")
    page.fill("#most", "8000")
    page.fill("#temperature", "0")
    shot(page, "settings")
    page.keyboard.press("Escape")
    page.fill("#question", "Tell me everything.")
    page.press("#question", "Enter")
    sync_api.expect(page.locator("article.assistant .text")).not_to_be_empty()
    sync_api.expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
    page.keyboard.press("Escape")
    answer = page.locator("article.assistant")
    sync_api.expect(answer).to_have_attribute("aria-busy", "false")
    assert "stopped" in answer.inner_text() and page.evaluate("state.messages.length") == 2
    while server.service.scheduler.running:
        page.wait_for_timeout(10)


def test_weights_and_colours(open_page: Open) -> None:
    page = open_page(color_scheme="light")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark", "the choice is kept"
    sync_api.expect(page.locator("#weights-open")).to_contain_text("%")
    page.click("#weights-open")
    rows = page.locator("#parts tr")
    assert rows.count() == 6 and "thinking: experts" in rows.nth(2).inner_text() and "100 %" in rows.nth(2).inner_text()
    shot(page, "weights")


def test_keyboard_and_names(open_page: Open) -> None:
    page = open_page()
    assert page.evaluate("document.activeElement.id") == "question"
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select")]
          .filter((one) => !(one.labels && one.labels.length) && !one.getAttribute("aria-label") && !one.textContent.trim())
          .map((one) => one.outerHTML)"""
    )
    assert nameless == []
    reached = []
    page.keyboard.press("Tab")
    for _ in range(12):
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        page.keyboard.press("Tab")
    assert {
        "speak",
        "send",
        "skip",
        "weights-open",
        "reset",
        "settings-open",
        "theme",
        "log",
        "attach",
        "record",
    } <= set(reached)
    page.focus("#question")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#question") == "one\ntwo" and page.locator("article").count() == 0
    page.keyboard.press("Enter")
    sync_api.expect(page.get_by_role("status")).to_contain_text("answer: ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(open_page: Open, scheme: str) -> None:
    size = {"width": 360, "height": 720}
    page = open_page(viewport=size, is_mobile=True, has_touch=True, device_scale_factor=2, color_scheme=scheme)
    page.fill("#question", "A longer question that goes over several lines on a phone, as questions do.")
    shot(page, f"phone-{scheme}-question")
    page.tap("#send")
    sync_api.expect(page.locator("article.assistant")).to_have_attribute("aria-busy", "false")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    small = page.evaluate(
        """() => [...document.querySelectorAll("button.icon")].filter((one) => one.offsetParent)
          .filter((one) => one.offsetWidth < 40 || one.offsetHeight < 40).map((one) => one.id)"""
    )
    assert small == [], "fingers need room"
    shot(page, f"phone-{scheme}")
    page.tap("#weights-open")
    box = page.locator("#weights").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    shot(page, f"phone-{scheme}-weights")


def test_faults_are_shown_and_the_question_comes_back(open_page: Open) -> None:
    page = open_page(expected="status of 400")
    answer = ask(page, "bad <|im_end|> marker")
    assert "marker '<|im_end|>'" in answer.locator(".fault").inner_text()
    assert page.input_value("#question") == "bad <|im_end|> marker" and page.evaluate("state.messages.length") == 0
    shot(page, "fault")


def test_a_key_is_asked_for(open_page: Open, start_server: Callable[..., Any]) -> None:
    with start_server(api_key="secret") as guarded:
        page = open_page(guarded.url, expected="status of 401")
        sync_api.expect(page.locator("#engine")).to_have_text("an API key is needed: see the settings")
        page.click("#settings-open")
        page.fill("#key", "secret")
        page.keyboard.press("Tab")
        page.keyboard.press("Escape")
        sync_api.expect(page.locator("#model")).to_have_text("tiny-omni")
        assert ask(page, "Hello").locator(".text").inner_text()
