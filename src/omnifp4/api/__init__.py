"""The verbs as functions. Everything heavy is imported when it is used."""

from omnifp4.api.calibrating import calibrate, dataset
from omnifp4.api.judging import bench, compare, evaluate, sensitivity, speech_recipe
from omnifp4.api.making import convert, plan, quantize, repair, verify

__all__ = [
    "bench",
    "calibrate",
    "compare",
    "convert",
    "dataset",
    "evaluate",
    "plan",
    "quantize",
    "repair",
    "sensitivity",
    "speech_recipe",
    "verify",
]
