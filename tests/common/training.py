"""A few steps of Composer's Trainer on the CPU."""

import torch
from composer import Trainer
from composer.loggers import InMemoryLogger


def fit(model, spec, algorithms=(), duration="1ba", callbacks=(), lr=0.1, **changes):
    """Train, and return the trainer and its logs, ``{metric: [(time, value), ...]}``."""
    memory = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=spec,
        max_duration=duration,
        optimizers=torch.optim.SGD(model.parameters(), lr=lr),
        algorithms=list(algorithms),
        callbacks=list(callbacks),
        loggers=[memory],
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
        device="cpu",
        seed=0,
        **changes,
    )
    trainer.fit()
    return trainer, memory.data
