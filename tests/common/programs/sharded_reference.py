"""Scores of a sharded reference on two ranks, of which one has more captions and so more passes."""

import sys
from copy import deepcopy

import torch
from composer.utils import dist
from transformers import LlamaConfig, LlamaForCausalLM

from composer_prior import ReferenceLM


def main(out):
    dist.initialize_dist("cpu", timeout=60)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.2, **sizes))
    captions = 3 if dist.get_global_rank() == 0 else 9
    ids = torch.randint(1, 64, (captions, 7))
    mask = (torch.arange(7) < torch.arange(captions)[:, None] % 6 + 2).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(7) == 0), -100)
    expected = ReferenceLM(deepcopy(model)).logprobs(ids, mask, labels)
    sharded = ReferenceLM(model, batch_size=4).shard("cpu")
    for _ in range(2):
        torch.testing.assert_close(sharded.logprobs(ids, mask, labels), expected, rtol=1e-5, atol=1e-5)
    found = dist.all_gather_object(int((expected < 0).sum()))
    if dist.get_global_rank() == 0:
        torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
