"""Data sets, models and the training loop of the command `train`."""

from benchmarks.learning.tasks.attention import ATTENTIONS
from benchmarks.learning.tasks.config import Config, RunError
from benchmarks.learning.tasks.files import read_metrics
from benchmarks.learning.tasks.ranks import LostRank
from benchmarks.learning.tasks.registry import TASKS, check_used, default_config
from benchmarks.learning.tasks.training import Interrupted, Result, load_model, saved_config, train

__all__ = [
    "ATTENTIONS",
    "TASKS",
    "Config",
    "Interrupted",
    "LostRank",
    "Result",
    "RunError",
    "check_used",
    "default_config",
    "load_model",
    "read_metrics",
    "saved_config",
    "train",
]
