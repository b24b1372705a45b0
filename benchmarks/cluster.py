"""Memory and time by number of nodes, as planned: ``python -m benchmarks.cluster [mfu=0.4] [labels=40] [only=...]``.

Llamas of 1, 8 and 70 billion weights (the shapes of Llama 3) in place of the language model of
``prior_vit_l_14_336.yaml``, on nodes of 8 GPUs, FSDP2 by block with activation checkpointing. Each row is a
``composer-prior plan``; ``only`` selects rows by a part of ``8B, 4 nodes``.
"""

import sys
import tempfile
from collections.abc import Iterator

from omegaconf import OmegaConf

from benchmarks.measure import prepare_process
from benchmarks.setup import build_tokenizer
from composer_prior.training.config import load_recipe
from composer_prior.training.plan import GB, GIB, plan

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
LLAMAS = {"1B": {**LLAMA_8B, **LLAMA_1B}, "8B": LLAMA_8B, "70B": {**LLAMA_8B, **LLAMA_70B}}
NODES, GPUS = (1, 4, 16), 8
CHANGES = (
    "global_train_batch_size=1024",
    "parallelism_config={fsdp2: {activation_checkpointing: true}}",
    "reference=null",
    "algorithms.prior=null",
    "train_loader.dataset.scores=null",
    "model.language.pretrained=null",
)
DEFAULTS = {"gpu": "h100", "mfu": 0.4, "labels": 40, "write": 2.0, "only": ""}
MEMORY = (
    "model",
    "nodes",
    "weights, gradients, moments",
    "gathered",
    "activations, temporary",
    "together",
    "largest microbatch",
)
TIME = ("model", "nodes", "minutes for a million captions", "checkpoint, GB", "s to write it")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield f"| {' | '.join(head)} |"
    yield f"| --- |{' ---: |' * (len(head) - 1)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Print two tables."""
    given = OmegaConf.merge(DEFAULTS, OmegaConf.from_dotlist(sys.argv[1:]))
    prepare_process(1)
    memory, time = [], []
    with tempfile.TemporaryDirectory() as tokenizer:
        build_tokenizer().save_pretrained(tokenizer)
        changes = [*CHANGES, f"tokenizer.name={tokenizer}"]
        for name, llama in LLAMAS.items():
            config = ", ".join(f"{key}: {value}" for key, value in llama.items())
            recipe = load_recipe("prior_vit_l_14_336.yaml", [*changes, f"model.language.config={{{config}}}"])
            for nodes in (count for count in NODES if given.only in f"{name}, {count} nodes"):
                assumed = {"mfu": given.mfu, "labels": given.labels, "write": given.write, "samples": 1_000_000}
                found = plan(recipe, world_size=nodes * GPUS, gpu=given.gpu, **assumed)
                part = found.memory
                states = part["weights"] + part["gradients"] + part["optimizer"]
                sizes = (states, part["gathered"], part["activations"] + part["temporary"], sum(part.values()))
                largest = str(found.largest_microbatch or "none")
                memory.append((name, str(nodes), *(f"{size / GIB:.1f}" for size in sizes), largest))
                minutes = 1e6 / found.samples_per_second / 60
                written = f"{found.checkpoint_seconds:.0f}"
                time.append((name, str(nodes), f"{minutes:.1f}", f"{found.checkpoint / GB:.0f}", written))
    print(*table(MEMORY, memory), "", *table(TIME, time), sep="\n")


if __name__ == "__main__":
    main()
