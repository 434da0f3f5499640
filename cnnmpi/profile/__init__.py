"""Where the time, the arithmetic and the memory of a training step go, layer by layer.

    step = Step(model, images, targets, loss, optimizer, shards=8)
    profile = measure(step)

``python -m cnnmpi.profile`` prints it for any network; benchmarks/ uses the same functions.
"""

from cnnmpi.profile.flops import count_flops, matrix_peak
from cnnmpi.profile.measure import LayerCost, Profile, measure, timed
from cnnmpi.profile.step import Calls, Step

__all__ = ["Calls", "LayerCost", "Profile", "Step", "count_flops", "matrix_peak", "measure", "timed"]
