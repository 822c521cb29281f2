"""The verbs as functions. Everything heavy is imported when it is used."""

from omnifp4.api.calibrating import calibrate, dataset
from omnifp4.api.judging import bench, evaluate, sensitivity
from omnifp4.api.making import convert, plan, quantize, repair, verify

__all__ = [
    "bench",
    "calibrate",
    "convert",
    "dataset",
    "evaluate",
    "plan",
    "quantize",
    "repair",
    "sensitivity",
    "verify",
]
