"""The gradient of one optimizer step, under any cut of one fixed batch; also what several ranks run."""

import sys
from collections import defaultdict
from itertools import product

import torch
from composer import Trainer
from composer.core import Callback, DataSpec
from composer.loggers import InMemoryLogger
from composer.utils import dist
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from common.models import FAMILIES, FRONT_ENDS, small_lm, small_lvlm
from composer_prior import PRIOR, ReferenceLM
from composer_prior.algorithms.cal.cal import CAL
from composer_prior.algorithms.dpa.dpa import DPA
from composer_prior.algorithms.focal.focal import Focal
from composer_prior.algorithms.image_gain.image_gain import ImageGain
from composer_prior.algorithms.oracle.oracle import Oracle
from composer_prior.algorithms.permuted_prior.permuted_prior import PermutedPRIOR
from composer_prior.algorithms.random_prior.random_prior import RandomPRIOR
from composer_prior.algorithms.regate.regate import ReGATE
from composer_prior.algorithms.rho1.rho1 import Rho1
from composer_prior.algorithms.vig.vig import VIG
from composer_prior.data.batch import IGNORE_INDEX, CaptionCollator, count_tokens
from composer_prior.data.captions import decode_image
from composer_prior.data.tokenizer import bos_id, image_token_ids
from composer_prior.emoji_scenes.writing import make_sample
from composer_prior.models.sharding import build_parallelism, prepare_sharded
from composer_prior.training.monitors import StreamMonitor

SEED = 5
NAMES = ["captions", "chat", "text"]
STREAMS = {"chat": {"alpha": 0.5, "floor": 0.3}, "text": None}
METHODS = {
    "prior": lambda reference, shard, viewer: PRIOR(reference, 1.5, "sequence", 0.1, shard_reference=shard),
    "prior, batch": lambda reference, shard, viewer: PRIOR(reference, 1.5, "batch", 0.1, shard_reference=shard),
    "prior, none": lambda reference, shard, viewer: PRIOR(reference, 1.5, "none", 0.1, shard_reference=shard),
    "prior by stream": lambda reference, shard, viewer: PRIOR(
        reference, 1.5, "sequence", 0.1, shard_reference=shard, streams=STREAMS
    ),
    "prior by stream, batch": lambda reference, shard, viewer: PRIOR(
        reference, 1.5, "batch", 0.1, shard_reference=shard, streams=STREAMS
    ),
    "random_prior by stream": lambda reference, shard, viewer: RandomPRIOR(
        reference, 1.5, "sequence", 0.1, shard_reference=shard, seed=SEED, streams={"text": None}
    ),
    "image_gain by stream": lambda reference, shard, viewer: ImageGain(
        viewer, reference, floor=0.1, shard_reference=shard, streams=STREAMS
    ),
    "permuted_prior, batch": lambda reference, shard, viewer: PermutedPRIOR(
        reference, 1.5, "batch", 0.1, shard_reference=shard, seed=SEED
    ),
    "random_prior": lambda reference, shard, viewer: RandomPRIOR(
        reference, 1.5, "sequence", 0.1, shard_reference=shard, seed=SEED
    ),
    "oracle, batch": lambda reference, shard, viewer: Oracle(0.1, "batch"),
    "rho1": lambda reference, shard, viewer: Rho1(reference, 0.6, shard_reference=shard),
    "cal": lambda reference, shard, viewer: CAL(low=0.1, high=0.5),
    "dpa": lambda reference, shard, viewer: DPA(),
    "focal": lambda reference, shard, viewer: Focal(1.5),
    "image_gain": lambda reference, shard, viewer: ImageGain(viewer, reference, floor=0.1, shard_reference=shard),
    "image_gain, batch": lambda reference, shard, viewer: ImageGain(
        viewer, reference, normalization="batch", shard_reference=shard
    ),
    "image_gain over the model": lambda reference, shard, viewer: ImageGain(viewer, over="model"),
    "vig": lambda reference, shard, viewer: VIG(viewer, reference, shard_reference=shard),
    "regate": lambda reference, shard, viewer: ReGATE(reference, dense=0, start="0ba", shard_reference=shard),
}
STRATEGIES = {"ddp": None, "fsdp2": {"fsdp2": {}}, "hsdp": {"fsdp2": {"data_parallel_replicate_degree": 2}}}
BATCH = 12
CASES = [*product(FAMILIES, METHODS), *product(FRONT_ENDS, ["prior, batch"])]  # families and front ends, and methods


class Samples(list):
    """Samples of several streams."""

    stream_names = NAMES


def make_samples(model, tokenizer):
    """Twelve samples of unlike shapes and very different caption lengths; one has a single label, one none at all."""
    samples = Samples()
    for index in range(BATCH):
        sample = make_sample("train", index, canvas=48)
        image = model.image_processor(decode_image(sample["image"]).crop((0, 0, 48, [48, 20, 40][index % 3])))
        caption = (tokenizer(sample["caption"])["input_ids"] * (1 + index % 3))[: [50, 1, 20][index % 3]]
        prefix = [bos_id(tokenizer), *(image_token_ids(model.tokenizer)[kind] for kind in image.layout)]
        labels = [IGNORE_INDEX] * (len(caption) if index == 4 else 0)
        samples.append(
            {
                "input_ids": torch.tensor(prefix + caption),
                "labels": torch.tensor([IGNORE_INDEX] * len(prefix) + (labels or caption)),
                "image_related": torch.arange(len(prefix + caption)) % 3 == 0,
                "sample_id": index,
                "stream": [0, 1, 2, 1][index % 4],
                **image.tensors,
            }
        )
    return samples


def make_reference(tokenizer):
    """Build a reference of sharp predictions, so that weights are far from equal."""
    reference = ReferenceLM(small_lm(tokenizer, seed=1), tokenizer)
    with torch.no_grad():
        reference.model.lm_head.weight.mul_(5)
    return reference


def make_viewer(family, tokenizer):
    """Build a viewer of sharp predictions, so that it often knows more than the reference and often less."""
    viewer = small_lvlm(family, tokenizer, seed=2).image_text_model
    with torch.no_grad():
        viewer.model.get_output_embeddings().weight.mul_(5)
    return viewer


class Gradients(Callback):
    """Keep the gradients that the optimizer is about to use."""

    def after_train_batch(self, state, logger):
        self.value = {
            name: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone()
            for name, p in state.model.named_parameters()
        }


def step_gradients(
    family,
    tokenizer,
    method,
    microbatch=None,
    strategy="ddp",
    shard_reference=False,
    logged=None,
    device="cpu",
    **options,
):
    """Gradients by parameter of one step on the twelve samples, which the ranks share; ``logged`` gets its metrics.

    The device is that of the Trainer, None for a GPU where there is one; the options are those of the model.
    """
    model = small_lvlm(family, tokenizer, options=options)
    model.image_related_metrics = False
    reference = make_reference(tokenizer)
    samples = make_samples(model, tokenizer)
    share = BATCH // dist.get_world_size()
    sampler = dist.get_sampler(samples, shuffle=False)
    collator = CaptionCollator(tokenizer.pad_token_id)
    loader = DataLoader(samples, batch_size=share, sampler=sampler, collate_fn=collator)
    gradients, log = Gradients(), InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(
            loader,
            get_num_samples_in_batch=lambda batch: len(batch["labels"]),
            get_num_tokens_in_batch=count_tokens,
        ),
        max_duration="1ba",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        algorithms=[METHODS[method](reference, shard_reference, make_viewer(family, tokenizer))],
        callbacks=[gradients, StreamMonitor()],
        loggers=[log],
        device_train_microbatch_size=microbatch,
        accumulate_train_batch_on_tokens=True,
        parallelism_config=build_parallelism(STRATEGIES[strategy]),
        progress_bar=False,
        device=device,
        seed=0,
    )
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    assert sharded == (strategy != "ddp" and dist.get_world_size() > 1), "the ranks share another way than asked for"
    prepare_sharded(model)
    trainer.fit()
    shards = getattr(trainer.state.algorithms[0], "shard_reference", False)
    assert any(isinstance(p, DTensor) for p in reference.model.parameters()) == shards
    if logged is not None:
        logged |= {name: float(values[0][1]) for name, values in log.data.items()}
    return {name.removeprefix("module."): value for name, value in gradients.value.items()}


def main(tokenizer_folder, out, strategies, methods):
    """Strategies and methods, joined by ``|``, with a microbatch that leaves an uneven last one."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    microbatch = BATCH // dist.get_world_size() * 2 // 3
    logged = defaultdict(dict)
    results = {
        (strategy, family, method): step_gradients(
            family, tokenizer, method, microbatch, strategy, strategy == "fsdp2", logged[strategy, family, method]
        )
        for strategy, (family, method) in product(strategies.split("|"), CASES)
        if method in methods.split("|")
    }
    if dist.get_global_rank() == 0:
        torch.save({**results, "logged": dict(logged)}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
