"""The torch engine with convolutions and matrix products in bfloat16: float32's range, and 8 bits of precision."""

import torch

from cnnmpi.functional_torch import *  # noqa: F403 - the same operations, but for those below
from cnnmpi.functional_torch.reduced import fits as fits
from cnnmpi.functional_torch.reduced import for_loss as for_loss
from cnnmpi.functional_torch.reduced import operations

globals().update(operations(torch.bfloat16))
