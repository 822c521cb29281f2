"""Arguments of `omnifp4.bench` for tests."""

from __future__ import annotations

from typing import Any

QUICK: dict[str, Any] = {
    "parts": "text",
    "prefill": (8,),
    "batch": (1, 2),
    "context": (12,),
    "new_tokens": 16,
    "cell_seconds": 0.5,
    "device": "cpu",
}
"""What takes a second or two."""
