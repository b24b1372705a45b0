"""The gradient of one optimizer step, under any cut of one fixed batch; also what the launcher runs on two ranks."""

import sys
from itertools import product

import torch
from composer import Trainer
from composer.core import Callback, DataSpec
from composer.utils import dist
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from common.models import FAMILIES, small_lm, small_lvlm
from composer_prior import PRIOR, ReferenceLM
from composer_prior.data.batch import IGNORE_INDEX, CaptionCollator, count_tokens
from composer_prior.data.captions import decode_image
from composer_prior.data.tokenizer import bos_id
from composer_prior.emoji_scenes.writing import make_sample
from composer_prior.training.builders import average_over_gloo, build_parallelism

NORMALIZATIONS = ("sequence", "batch", "none")
STRATEGIES = {"ddp": None, "fsdp2": {"fsdp2": {}}}
BATCH = 12


def make_samples(model, tokenizer):
    """Twelve samples of very different caption lengths; one has a single label, and one none at all."""
    samples = []
    for index in range(BATCH):
        sample = make_sample("train", index, canvas=48)
        image = model.image_processor(decode_image(sample["image"]))
        caption = (tokenizer(sample["caption"])["input_ids"] * (1 + index % 3))[: [50, 1, 20][index % 3]]
        prefix = [bos_id(tokenizer), *(model.image_token_ids[kind] for kind in image.layout)]
        labels = [IGNORE_INDEX] * (len(caption) if index == 4 else 0)
        samples.append(
            {
                "input_ids": torch.tensor(prefix + caption),
                "labels": torch.tensor([IGNORE_INDEX] * len(prefix) + (labels or caption)),
                "sample_id": index,
                **image.tensors,
            }
        )
    return samples


class Gradients(Callback):
    """Keep the gradients that the optimizer is about to use."""

    def after_train_batch(self, state, logger):
        self.value = {
            name: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone()
            for name, p in state.model.named_parameters()
        }


def step_gradients(family, tokenizer, normalization, microbatch=None, strategy="ddp", floor=0.1, **prior):
    """Gradients by parameter of one step on the twelve samples, which the ranks share."""
    model = small_lvlm(family, tokenizer)
    model.image_related_metrics = False
    reference = ReferenceLM(small_lm(tokenizer, seed=1), tokenizer)
    samples = make_samples(model, tokenizer)
    share = BATCH // dist.get_world_size()
    sampler = dist.get_sampler(samples, shuffle=False)
    collator = CaptionCollator(tokenizer.pad_token_id)
    loader = DataLoader(samples, batch_size=share, sampler=sampler, collate_fn=collator)
    gradients = Gradients()
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(
            loader,
            get_num_samples_in_batch=lambda batch: len(batch["labels"]),
            get_num_tokens_in_batch=count_tokens,
        ),
        max_duration="1ba",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        algorithms=[PRIOR(reference, alpha=1.5, normalization=normalization, floor=floor, **prior)],
        callbacks=[gradients],
        device_train_microbatch_size=microbatch,
        accumulate_train_batch_on_tokens=True,
        parallelism_config=build_parallelism(STRATEGIES[strategy]),
        progress_bar=False,
        device="cpu",
        seed=0,
    )
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    assert sharded == (strategy == "fsdp2" and dist.get_world_size() > 1), "the ranks share another way than asked for"
    average_over_gloo(model)
    trainer.fit()
    assert any(isinstance(p, DTensor) for p in reference.model.parameters()) == prior.get("shard_reference", False)
    return {name.removeprefix("module."): value for name, value in gradients.value.items()}


def main(tokenizer_folder, out):
    """Every strategy, family and normalization, with a microbatch that leaves an uneven last one."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    results = {
        (strategy, family, normalization): step_gradients(
            family, tokenizer, normalization, 4, strategy, shard_reference=strategy == "fsdp2"
        )
        for strategy, family, normalization in product(STRATEGIES, FAMILIES, NORMALIZATIONS)
    }
    if dist.get_global_rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
