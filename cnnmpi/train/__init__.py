"""Training: ``Config`` says what a run is, ``Trainer`` does it; ``python -m cnnmpi.train`` is its command line."""

from cnnmpi.train.config import Config
from cnnmpi.train.evaluation import Evaluation, evaluate
from cnnmpi.train.state import load_checkpoint
from cnnmpi.train.trainer import Trainer

__all__ = ["Config", "Evaluation", "Trainer", "evaluate", "load_checkpoint"]
