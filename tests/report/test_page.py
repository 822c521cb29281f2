"""The page as a text: whole, accessible, offline, and safe with any receipt."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import report_receipts

from omnifp4.receipt.gathered import GatheredReceipt
from omnifp4.report.contents import key_figures, sections
from omnifp4.report.gathering import gather
from omnifp4.report.page import html_page, plot_style
from omnifp4.report.plots.heatmap import HOT

VOID = {"meta", "line", "rect", "circle", "path", "br"}


class Page(HTMLParser):
    """Elements with their attributes and text; asserts that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def whole(receipts: dict[str, Path]) -> GatheredReceipt:
    return gather(receipts.values())


def test_everything_that_was_measured_is_there(whole: GatheredReceipt) -> None:
    page = Page(html_page(whole))
    text = " ".join(" ".join(part) for part in page.texts.values())
    assert not any(section.missing for section in sections(whole))
    for told in (
        "8.17 MB", "1.34x smaller", "0.0310 (0.0279 to 0.0341)", "2.00e-5", "96.20 %", "spoken digit",
        "98.00 %", "-1.00 (-2.00 to +0.40)", "81.00 %", "thinker.experts, layer 4, expert 7", "a device", "64.5%",
        "optimal: about 16 GiB", "0.1.0", "2026-01-02 03:04 UTC", "--max-kl",
    ):  # fmt: skip
        assert told in text.replace("\u00a0", " "), told
    assert next(figure.state for figure in key_figures(whole)) == "pass"
    assert "/home/somebody" not in text


def test_what_was_not_measured_says_so_and_invents_nothing(receipts: dict[str, Path]) -> None:
    page = html_page(gather([receipts["plan"]]))
    text = " ".join(Page(page).texts["p"] + Page(page).texts["code"])
    for command in (
        "verify OUT",
        "evaluate OUT --against MODEL --receipt",
        "evaluate OUT --against MODEL --sensitivity",
        "bench OUT",
        "doctor OUT",
    ):
        assert f"omnifp4 {command}" in text
    assert page.count("Not measured.") == 6
    figures = key_figures(gather([receipts["plan"]]))
    assert [figure.value for figure in figures].count("not measured") == 4
    assert "would take the place of" in page
    only = html_page(gather([receipts["evaluation"]]))
    assert only.count("Not measured.") == 6
    assert "8.17" not in only


def test_structure_for_those_who_do_not_see_it(whole: GatheredReceipt) -> None:
    page = Page(html_page(whole))
    assert page.all("html") == [{"lang": "en"}]
    assert [name for name, _ in page.elements].count("h1") == 1
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for key in ("aria-labelledby", "href"):
            for target in (attributes.get(key) or "").split():
                assert target.lstrip("#") in ids
    for picture in page.all("svg"):
        assert picture["role"] == "img"
        assert picture["aria-labelledby"]
    assert len(page.texts["title"]) == len(page.all("svg")) + 1
    assert len(page.texts["desc"]) == len(page.all("svg"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert {attributes.get("scope") for attributes in page.all("th")} == {"col", "row"}


def test_nothing_is_loaded_and_nothing_runs(whole: GatheredReceipt) -> None:
    text = html_page(whole)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & {name for name, _ in page.elements}
    assert not re.search(r"url\(|@import|https?:|javascript:| on\w+=", text)
    assert "default-src 'none'" in text


HOSTILE = "</style><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;\u202e\x00\ud800{{ 7*7 }}"


def test_text_of_receipts_stays_text(whole: GatheredReceipt) -> None:
    assert whole.quantization and whole.verification and whole.plan
    check = whole.verification.checks[0].model_copy(
        update={"name": HOSTILE, "summary": HOSTILE, "findings": (HOSTILE,)}
    )
    row = whole.quantization.components[0].model_copy(update={"name": HOSTILE, "bytes_before": 10**9})
    evaluation = whole.evaluations[0]
    modality = evaluation.modalities[0].model_copy(update={"modality": HOSTILE})
    bench = whole.benches[0]
    hostile = whole.model_copy(
        update={
            "model": HOSTILE,
            "notes": (HOSTILE,),
            "verification": whole.verification.model_copy(update={"checks": (check,), "dialect": HOSTILE}),
            "quantization": whole.quantization.model_copy(
                update={
                    "components": (row,),
                    "left_out": {HOSTILE: HOSTILE},
                    "decisions": {f"a.layers.0.{HOSTILE}": 0.1},
                }
            ),
            "evaluations": (evaluation.model_copy(update={"model": HOSTILE, "modalities": (modality,)}),),
            "benches": (bench.model_copy(update={"model": bench.model.model_copy(update={"weights": HOSTILE})}),),
            "sensitivity": report_receipts.sensitivity().model_copy(
                update={"rows": (report_receipts.sensitivity().rows[0].model_copy(update={"component": HOSTILE}),)}
            ),
        }
    )
    text = html_page(hostile)
    page = Page(text)
    assert not {"script", "img"} & {name for name, _ in page.elements}
    assert len(page.all("style")) == 1
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert "{{ 7*7 }}" in text
    assert "\x00" not in text
    assert "\u202e" not in text
    text.encode("utf-8")


def test_strange_figures_do_not_break_it(whole: GatheredReceipt) -> None:
    assert whole.quantization and whole.plan
    evaluation = whole.evaluations[0]
    modality = evaluation.modalities[0]
    broken = modality.model.model_copy(update={"kl_mean": report_receipts.estimate(math.nan), "kl_p99": math.inf})
    exact = modality.model.model_copy(update={"kl_mean": report_receipts.estimate(0.0)})
    update = {
        "modalities": (
            modality.model_copy(update={"model": broken, "floor": None}), modality.model_copy(update={"model": exact})
        ),
        "tasks": (), "speech": None, "gates": (),
    }  # fmt: skip
    strange = whole.model_copy(
        update={
            "evaluations": (evaluation.model_copy(update=update), evaluation),
            "quantization": whole.quantization.model_copy(
                update={"parameters": 0, "weight_bytes": 0, "components": (), "decisions": {"w": 0.1}, "errors": {}}
            ),
            "benches": (whole.benches[0].model_copy(update={"passed": False}),),
        }
    )
    text = html_page(strange)
    Page(text)
    assert "not finite" in text
    assert not re.search(r"\b(nan|inf|infinity)\b", text, flags=re.I)


def test_without_anything_in_layers_there_is_no_picture_of_them(whole: GatheredReceipt) -> None:
    assert whole.quantization
    flat = whole.quantization.model_copy(update={"decisions": {"lm_head.weight": 0.01}})
    text = html_page(whole.model_copy(update={"quantization": flat}))
    assert "weights-0-wide" not in text
    assert "weights-0-wide" in html_page(whole)


def contrast(one: str, other: str) -> float:
    """Of WCAG 2, between two colours as ``#rrggbb``."""

    def luminance(colour: str) -> float:
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_are_told_apart_by_light_and_by_dark() -> None:
    light, dark = re.findall(r":root \{(.*?)\}", plot_style(), flags=re.S)
    for block in (light, dark):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for ground in ("paper", "raised"):
            for text in ("ink", "soft", "pass", "fail", "unknown", "link"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for mark in ("before", "after", "limit", "floor-edge", "broken"):
            assert contrast(colours[mark], colours["paper"]) >= 3, mark
        steps = [contrast(colours[f"shade{number}"], colours["paper"]) for number in range(9)]
        assert steps == sorted(steps)
        assert steps[0] > 1.1
        # Figures in cells of a heat map.
        for number in range(9):
            text = colours["paper"] if number >= HOT else colours["ink"]
            assert contrast(colours[f"shade{number}"], text) >= 4.5, number
        assert steps[-1] > 10


def test_one_model_of_real_size_stays_a_small_page(whole: GatheredReceipt) -> None:
    assert whole.quantization
    names = {
        f"thinker.model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight": 0.007 + 1e-6 * expert
        for layer in range(48)
        for expert in range(128)
        for part in ("gate", "up", "down")
    }
    large = whole.model_copy(
        update={
            "quantization": whole.quantization.model_copy(update={"decisions": names}),
            "sensitivity": report_receipts.sensitivity(48, 128),
        }
    )
    assert len(html_page(large)) < 1_000_000
