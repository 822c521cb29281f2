"""Marks that the tests of this room use."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist registers it, where it is there.
    config.addinivalue_line("markers", "xdist_group(name): tests that one worker runs")
