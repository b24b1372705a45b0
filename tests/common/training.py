"""A few steps of Composer's Trainer."""

import math

import torch
from composer import Trainer
from composer.loggers import InMemoryLogger


def fit(model, spec, algorithms=(), duration="1ba", callbacks=(), lr=0.1, device="cpu", **changes):
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
        device=device,
        seed=0,
        **changes,
    )
    trainer.fit()
    return trainer, memory.data


def figures_by_stream(batch, outputs, names, weights, ref_logprobs, unweighted="text"):
    """Return the figures of each stream of a step, from a loop over the tokens of the whole batch.

    The stream that stays unweighted has none of the reference.
    """
    found = {}
    for number, name in enumerate(names):
        rows = [row for row, stream in enumerate(batch["stream"].tolist()) if stream == number]
        tokens = [(row, place) for row in rows for place, label in enumerate(batch["labels"][row]) if label != -100]
        nll, w, reference = ([float(of[token]) for token in tokens] for of in (outputs["nll"], weights, ref_logprobs))
        correct = [bool(outputs["correct"][token]) for token in tokens]
        n, heaviest = len(tokens), sorted(w, reverse=True)[: math.ceil(len(tokens) / 10)]
        found |= {
            f"metrics/train/{name}/share": len(rows) / len(batch["stream"]),
            f"metrics/train/{name}/tokens": n,
            f"metrics/train/{name}/accuracy": sum(correct) / n,
            f"loss/train/{name}": sum(nll) / n,
            f"prior/{name}/loss_unweighted": sum(nll) / n,
            f"prior/{name}/loss_weighted": sum(a * b for a, b in zip(w, nll, strict=True)) / n,
            f"prior/{name}/reference_nll": -sum(reference) / n,
            f"prior/{name}/effective_sample_size": sum(w) ** 2 / (n * sum(x * x for x in w)),
            f"prior/{name}/top_decile_share": sum(heaviest) / sum(w),
        }
    found.pop(f"prior/{unweighted}/reference_nll")
    return found
