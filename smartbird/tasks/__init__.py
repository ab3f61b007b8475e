"""Data sets, models and the training loop behind `smartbird train`."""

from smartbird.tasks.attention import ATTENTIONS
from smartbird.tasks.config import Config, RunError
from smartbird.tasks.files import read_metrics
from smartbird.tasks.registry import TASKS, default_config
from smartbird.tasks.training import Interrupted, Result, load_model, saved_config, train

__all__ = [
    "ATTENTIONS",
    "TASKS",
    "Config",
    "Interrupted",
    "Result",
    "RunError",
    "default_config",
    "load_model",
    "read_metrics",
    "saved_config",
    "train",
]
