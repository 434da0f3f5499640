"""The torch engine with convolutions and matrix products in float16: 11 bits of precision, and numbers to 65,504.

Gradients below 6e-8 are 0 in it, so the loss is scaled up in training (``cnnmpi.train.scaling``).
"""

import torch

from cnnmpi.functional_torch import *  # noqa: F403 - the same operations, but for those below
from cnnmpi.functional_torch.reduced import fits as fits
from cnnmpi.functional_torch.reduced import for_loss as for_loss
from cnnmpi.functional_torch.reduced import operations

globals().update(operations(torch.float16))
