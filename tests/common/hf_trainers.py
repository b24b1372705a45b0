"""One optimizer step of a small LLaVA with PRIOR in trainers of Hugging Face: its loss and its gradient."""

import torch
from datasets import Dataset
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from common.models import small_lm
from common.vlms import LM, WORDS, make_processor, make_tokenizer, make_vlm
from composer_prior import PRIORMixin, ReferenceLM

LENGTHS = (20, 1, 9, 4, 2, 13, 1, 6)  # of captions: the batches of a step have unlike numbers of labels
OPTIONS = {
    "paper": {},
    "batch": {"normalization": "batch", "alpha": 2.0, "floor": 0.1},
    "none": {"normalization": "none"},
}


class PRIORTrainer(PRIORMixin, Trainer):
    pass


class PRIORSFTTrainer(PRIORMixin, SFTTrainer):
    pass


TRAINERS = {"Trainer": (PRIORTrainer, TrainingArguments), "SFTTrainer": (PRIORSFTTrainer, SFTConfig)}


def make_data():
    """Eight pictures with a prompt and a caption of words drawn at random."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in LENGTHS:
        words = torch.randint(WORDS.start, WORDS.stop, (length,), generator=generator).tolist()
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        rows.append(
            {
                "images": [Image.fromarray(pixels.numpy())],
                "prompt": "<bos><image>\nw7",
                "completion": "".join(f"w{word}" for word in words) + "\n<eos>",
            }
        )
    return Dataset.from_list(rows)


def make_collator(completion_only_loss=True):
    """TRL's for pictures with prompt and completion."""
    return DataCollatorForVisionLanguageModeling(make_processor("llava"), completion_only_loss=completion_only_loss)


def make_reference(**changes):
    lm = small_lm(make_tokenizer("llava"), seed=4, **{**LM, **changes})
    with torch.no_grad():
        lm.lm_head.weight.mul_(5)  # so that some tokens are likely, and weights far from equal
    return ReferenceLM(lm, make_tokenizer("llava"))


def make_trainer(name, folder, changes=None, **options):
    """Make a trainer of one step; ``changes`` are training arguments, ``options`` those of the trainer or PRIOR."""
    trainer, arguments = TRAINERS[name]
    given = {
        "max_steps": 1,
        "per_device_train_batch_size": len(LENGTHS),
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        **({"max_length": None} if name == "SFTTrainer" else {"remove_unused_columns": False}),
        **(changes or {}),
    }
    parts = {
        "model": make_vlm("llava"),
        "data_collator": make_collator(),
        "train_dataset": make_data(),
        "processing_class": make_processor("llava"),
    }
    return trainer(args=arguments(str(folder), **given), **{**parts, **options})


class Gradient(TrainerCallback):
    """What the optimizer is about to use."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self.gradient = torch.cat([grad.flatten().double() for grad in grads])


def step(trainer):
    """Loss and gradient of the first step."""
    losses, watch, training_step = [], Gradient(), trainer.training_step

    def watched(*args, **kwargs):
        losses.append(float(training_step(*args, **kwargs)))
        return torch.tensor(losses[-1])

    trainer.training_step = watched
    trainer.add_callback(watch)
    trainer.train()
    return sum(losses), watch.gradient
