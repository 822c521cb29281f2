"""An OpenAI-compatible server over one loaded model, with a chat page."""

from __future__ import annotations
