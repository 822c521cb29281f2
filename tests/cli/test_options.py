"""Sizes as people write them, and how progress is told."""

from __future__ import annotations

import pytest

from omnifp4.cli import output
from omnifp4.cli.options import parse_size
from omnifp4.errors import OmniFP4Error


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("4GiB", 4 * 2**30), ("1.5 gb", 15 * 10**8), ("123", 123), (" 7kb ", 7000),
        ("2B", 2), ("0.5KiB", 512),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "0", "0.1B", "5 G B", "5TBB", "1e9", "nan", "inf", "9" * 400, "٣GB"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(OmniFP4Error, match="is not a number with one of B, KB") as refused:
        parse_size(text)
    assert len(str(refused.value)) < 150


def test_progress_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    said: list[str] = []
    update = output._lines(said.append, "quantize")
    for now, done in ((100.5, 10), (101.9, 20), (103.0, 30), (104.0, 40), (112.9, 45), (113.1, 50)):  # noqa: B007
        update(done * 10**6, 10**8, "tensor")
    assert said == [
        "quantize: 30%, 10 MB/s, 7 s to go, tensor",
        "quantize: 50%, 4 MB/s, 13 s to go, tensor",
    ]
