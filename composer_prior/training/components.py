"""The components that a recipe can name without further code: ours, Composer's and torch's."""

import inspect
import re
from types import ModuleType
from typing import Any

import composer.algorithms
import composer.callbacks
import composer.loggers
import composer.optim
import torch.optim
from composer.core import Algorithm, Callback
from composer.loggers import LoggerDestination
from streaming import StreamingDataLoader

from composer_prior.algorithms.cal.cal import CAL
from composer_prior.algorithms.focal.focal import Focal
from composer_prior.algorithms.oracle.oracle import Oracle
from composer_prior.algorithms.permuted_prior.permuted_prior import PermutedPRIOR
from composer_prior.algorithms.prior.prior import PRIOR
from composer_prior.algorithms.random_prior.random_prior import RandomPRIOR
from composer_prior.algorithms.rho1.rho1 import Rho1
from composer_prior.algorithms.token_weighting.token_weighting import TokenWeighting
from composer_prior.data.captions import StreamingCaptionDataset
from composer_prior.data.streams import CheckedStream
from composer_prior.emoji_scenes.writing import make_emoji_scenes
from composer_prior.registry import register
from composer_prior.scoring.job import ScoreJob
from composer_prior.training import builders  # noqa: F401  registers the model
from composer_prior.training.compute import ComputeMonitor
from composer_prior.training.data_wait import DataWaitMonitor
from composer_prior.training.optimizer import GroupLRMonitor
from composer_prior.training.saving import HuggingFaceCheckpointer
from composer_prior.training.trackers import MLFlow, TensorBoard, WandB


def snake_case(name: str) -> str:
    """``SpeedMonitor`` -> ``speed_monitor``, ``LRMonitor`` -> ``lr_monitor``, ``SAM`` -> ``sam``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _register_classes(kind: str, module: ModuleType, base: type) -> None:
    for name, value in vars(module).items():
        if inspect.isclass(value) and issubclass(value, base) and value is not base:
            register(kind, snake_case(name))(value)


_register_classes("algorithm", composer.algorithms, Algorithm)
_register_classes("callback", composer.callbacks, Callback)
_register_classes("logger", composer.loggers, LoggerDestination)
_LOGGERS: dict[str, Any] = {
    **dict.fromkeys(("tensorboard", "tensorboard_logger"), TensorBoard),
    **dict.fromkeys(("wandb", "wand_b_logger"), WandB),
    **dict.fromkeys(("mlflow", "ml_flow_logger"), MLFlow),
}
_OPTIMIZERS: dict[str, Any] = {
    "decoupled_adamw": composer.optim.DecoupledAdamW,
    "decoupled_sgdw": composer.optim.DecoupledSGDW,
    "adamw": torch.optim.AdamW,
}
_SCHEDULERS: dict[str, Any] = {
    "constant_with_warmup": composer.optim.ConstantWithWarmupScheduler,
    "cosine_with_warmup": composer.optim.CosineAnnealingWithWarmupScheduler,
    "linear_decay_with_warmup": composer.optim.LinearWithWarmupScheduler,
    "multistep_with_warmup": composer.optim.MultiStepWithWarmupScheduler,
    "polynomial_with_warmup": composer.optim.PolynomialWithWarmupScheduler,
}
for _kind, _components in (("logger", _LOGGERS), ("optimizer", _OPTIMIZERS), ("scheduler", _SCHEDULERS)):
    for _name, _component in _components.items():
        register(_kind, _name)(_component)

_WEIGHTINGS: tuple[type[TokenWeighting], ...] = (PRIOR, PermutedPRIOR, RandomPRIOR, Oracle, Rho1, CAL, Focal)
for _weighting in _WEIGHTINGS:
    register("algorithm", _weighting.name)(_weighting)
register("callback", "compute_monitor")(ComputeMonitor)
register("callback", "data_wait_monitor")(DataWaitMonitor)
register("callback", "hf_checkpointer")(HuggingFaceCheckpointer)
register("callback", "lr_monitor")(GroupLRMonitor)
register("callback", "nan_monitor")(composer.callbacks.NaNMonitor)  # which snake_case makes na_n_monitor
register("data", "emoji_scenes")(make_emoji_scenes)
register("dataset", "captions")(StreamingCaptionDataset)
register("scoring", "captions")(ScoreJob)
register("stream", "stream")(CheckedStream)
register("loader", "captions")(StreamingDataLoader)
