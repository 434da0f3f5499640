"""Training: ``Config`` says what a run is, ``Trainer`` does it; ``python -m cnnmpi.train`` is its command line."""

from cnnmpi.train.config import Config
from cnnmpi.train.entry import Result, fit
from cnnmpi.train.evaluation import Evaluation, evaluate
from cnnmpi.train.hooks import on_all_ranks
from cnnmpi.train.setup import set_up
from cnnmpi.train.state import load_checkpoint
from cnnmpi.train.trainer import Trainer

__all__ = ["Config", "Evaluation", "Result", "Trainer", "evaluate", "fit", "load_checkpoint", "on_all_ranks", "set_up"]
