"""Proof of an artifact from its files alone: it shares nothing with `quantize` but formats, checkpoint and models."""

from omnifp4.verification.run import verify

__all__ = ["verify"]
