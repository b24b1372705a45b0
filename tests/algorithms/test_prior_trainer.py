"""PRIOR in transformers' Trainer and TRL's SFTTrainer: the loss and the gradient of the Composer algorithm."""

from functools import cache

import pytest
import torch
from common.hf_trainers import TRAINERS, make_collator, make_data, make_reference, make_trainer, step
from common.vlms import make_tokenizer, make_vlm
from composer import Callback, DataSpec, Trainer
from composer.models import HuggingFaceModel
from torch.utils.data import DataLoader

from composer_prior import PRIOR
from composer_prior.data.batch import count_tokens

TOLERANCE = 1e-6
OPTIONS = {
    "paper": {},
    "batch": {"normalization": "batch", "alpha": 2.0, "floor": 0.1},
    "none": {"normalization": "none"},
}


class Spy(Callback):
    def after_loss(self, state, logger):
        self.loss = float(state.loss)

    def after_train_batch(self, state, logger):
        grads = [p.grad for p in state.model.parameters() if p.grad is not None]
        self.gradient = torch.cat([grad.flatten().double() for grad in grads])


@cache
def in_composer(name):
    """Loss and gradient of all the data under the Composer algorithm."""
    model = HuggingFaceModel(make_vlm("llava"), use_logits=True)
    model.tokenizer = make_tokenizer("llava")
    collator, spy = make_collator(), Spy()
    loader = DataLoader([*make_data()], batch_size=8, collate_fn=lambda rows: dict(collator(rows)))
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(loader, get_num_tokens_in_batch=count_tokens),
        max_duration="1ba",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        algorithms=[PRIOR(make_reference(), **OPTIONS[name])],
        callbacks=[spy],
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
        device="cpu",
    )
    trainer.fit()
    return spy.loss, spy.gradient


def close(got, expected):
    assert got[0] == pytest.approx(expected[0], rel=TOLERANCE)
    assert float((got[1] - expected[1]).norm() / expected[1].norm()) <= TOLERANCE


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batches", [1, 2, 4])
def test_loss_and_gradient_are_the_algorithms(batches, options, name, tmp_path):
    changes = {"per_device_train_batch_size": 8 // batches, "gradient_accumulation_steps": batches}
    trainer = make_trainer(name, tmp_path, changes=changes, reference=make_reference(), **OPTIONS[options])
    close(step(trainer), in_composer(options))
