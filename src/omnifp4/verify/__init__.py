"""Proof of an artifact from its files alone: it shares nothing with `quantize` but formats, checkpoint and models."""

from omnifp4.verify.run import verify

__all__ = ["verify"]
