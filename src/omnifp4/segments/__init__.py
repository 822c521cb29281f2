"""Runs a thinker part by part from disk: every sample through one decoder layer, then through the next.

Only one layer's weights are in memory, so a 66 GB checkpoint runs on a machine with a few gigabytes. Modules and arithmetic are the stock ones: the numbers are those of the whole model.
"""

from omnifp4.segments.inputs import Inputs
from omnifp4.segments.run import SegmentedRun, run_segments
from omnifp4.segments.visit import LayerVisit, Routing, SampleError

__all__ = ["Inputs", "LayerVisit", "Routing", "SampleError", "SegmentedRun", "run_segments"]
