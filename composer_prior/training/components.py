"""The components that a recipe can name without further code: ours, Composer's and torch's."""

import inspect
from types import ModuleType

import composer.algorithms
import composer.callbacks
import composer.loggers
from composer.core import Algorithm, Callback
from composer.loggers import LoggerDestination
from composer.optim import (
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
    DecoupledAdamW,
    DecoupledSGDW,
    LinearWithWarmupScheduler,
    MultiStepWithWarmupScheduler,
    PolynomialWithWarmupScheduler,
)
from torch.optim import AdamW

from composer_prior.algorithms.cal.cal import CAL
from composer_prior.algorithms.focal.focal import Focal
from composer_prior.algorithms.oracle.oracle import Oracle
from composer_prior.algorithms.permuted_prior.permuted_prior import PermutedPRIOR
from composer_prior.algorithms.prior.prior import PRIOR
from composer_prior.algorithms.random_prior.random_prior import RandomPRIOR
from composer_prior.algorithms.rho1.rho1 import Rho1
from composer_prior.emoji_scenes.writing import make_emoji_scenes
from composer_prior.registry import register, snake_case
from composer_prior.training import builders  # noqa: F401  registers the model
from composer_prior.training.compute import ComputeMonitor
from composer_prior.training.data_wait import DataWaitMonitor
from composer_prior.training.optimizer import GroupLRMonitor
from composer_prior.training.saving import HuggingFaceCheckpointer
from composer_prior.training.trackers import MLFlow, TensorBoard, WandB


def _register_classes(kind: str, module: ModuleType, base: type) -> None:
    for name, value in vars(module).items():
        if inspect.isclass(value) and issubclass(value, base) and value is not base:
            register(kind, snake_case(name))(value)


_register_classes("algorithm", composer.algorithms, Algorithm)
_register_classes("callback", composer.callbacks, Callback)
_register_classes("logger", composer.loggers, LoggerDestination)
register("logger", "tensorboard")(TensorBoard)
register("logger", "tensorboard_logger")(TensorBoard)
register("logger", "wandb")(WandB)
register("logger", "wand_b_logger")(WandB)
register("logger", "mlflow")(MLFlow)
register("logger", "ml_flow_logger")(MLFlow)
register("optimizer", "decoupled_adamw")(DecoupledAdamW)
register("optimizer", "decoupled_sgdw")(DecoupledSGDW)
register("optimizer", "adamw")(AdamW)
register("scheduler", "constant_with_warmup")(ConstantWithWarmupScheduler)
register("scheduler", "cosine_with_warmup")(CosineAnnealingWithWarmupScheduler)
register("scheduler", "linear_decay_with_warmup")(LinearWithWarmupScheduler)
register("scheduler", "multistep_with_warmup")(MultiStepWithWarmupScheduler)
register("scheduler", "polynomial_with_warmup")(PolynomialWithWarmupScheduler)
register("algorithm", "prior")(PRIOR)
register("algorithm", "permuted_prior")(PermutedPRIOR)
register("algorithm", "random_prior")(RandomPRIOR)
register("algorithm", "oracle")(Oracle)
register("algorithm", "rho1")(Rho1)
register("algorithm", "cal")(CAL)
register("algorithm", "focal")(Focal)
register("callback", "compute_monitor")(ComputeMonitor)
register("callback", "data_wait_monitor")(DataWaitMonitor)
register("callback", "hf_checkpointer")(HuggingFaceCheckpointer)
register("callback", "lr_monitor")(GroupLRMonitor)
register("callback", "nan_monitor")(composer.callbacks.NaNMonitor)  # which snake_case makes na_n_monitor
register("data", "emoji_scenes")(make_emoji_scenes)
