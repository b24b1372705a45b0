"""The recipes at real scale on two ranks, which keep a part of the model each."""

import json
from pathlib import Path

import pytest
import torch
from common.chats import png
from common.real_scale import RECIPE, captions_of, check, pretrained, smaller
from common.recipes import ROOT, SMALL_REAL_SCALE, fork_ranks, losses
from PIL import Image
from transformers import AutoModelForCausalLM

from composer_prior import load
from composer_prior.conversion.convert import convert_captions
from composer_prior.models.vision import build_open_clip
from composer_prior.training.checkpoints.loading import read_weights
from composer_prior.training.checkpoints.storage import find_weights

pytestmark = pytest.mark.slow


def test_on_two_ranks_sharded(here):
    pretrained("smollm2", captions_of(here))
    check(fork_ranks(here, str(ROOT / "train.py"), str(RECIPE), *smaller("precision=fp32")))
    checkpoint = Path("runs/prior_vit_l_14_336/checkpoints/ep1-ba2")
    assert {path.name for path in checkpoint.iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}


def test_on_two_ranks_sharded_in_bf16(here):
    """The precision that ships: FSDP2 lowers the weights, and captions at the end are made with them."""
    pretrained("llama2", captions_of(here))
    check(fork_ranks(here, str(ROOT / "tests/common/programs/bf16_train.py"), str(RECIPE), *smaller()))
    weights, _ = read_weights(find_weights("runs/prior_vit_l_14_336"))
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights.values())


def conversations(folder):
    """Convert conversations and text to where the recipes look for them."""
    (folder / "shade.png").write_bytes(png(90))
    for split, count in (("train", 24), ("validation", 8)):
        turns = [("human", "<image>\nWhat is {}?"), ("gpt", "It is {}."), ("human", "Twice?"), ("gpt", "No, {}.")]
        samples = [
            {"image": "shade.png", "conversations": [{"from": who, "value": text.format(n)} for who, text in turns]}
            for n in range(count)
        ]
        (folder / f"{split}.json").write_text(json.dumps(samples))
        convert_captions(folder / f"{split}.json", f"s3://bucket/chat/{split}", learn="answers", processes=1)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in captions_of(folder)))
    convert_captions(folder / "text.jsonl", "s3://bucket/text/train", learn="all", processes=1)


def test_two_stages_and_instruction_tuning(here):
    """The first changes the projector alone; the second begins with its weights, and changes every part at its rate.

    The last goes on from the model folder of the second, with its chat template.
    """
    pretrained("smollm2", captions_of(here))
    tower = {"pretrained": "emoji_scenes", "image_size": 48}
    options = ["precision=fp32", "sample_captions=0", *(f"model.vision.{key}={value}" for key, value in tower.items())]
    said = fork_ranks(here, str(ROOT / "train.py"), str(ROOT / "yamls/stage1.yaml"), *smaller(*options))
    assert "Reference: training" in said
    assert " tokens of 32 samples in s3://bucket/captions/scores" in said
    one, _ = read_weights(find_weights("runs/stage1"))
    lm = AutoModelForCausalLM.from_pretrained("runs/reference_smollm2/model")
    names = {name: name.replace("model.", "model.language_model.", 1) for name in lm.state_dict()}
    loaded = {f"model.{names[name]}": tensor for name, tensor in lm.state_dict().items()}
    vision = build_open_clip("prior-vit-tiny", layer=-2, **tower)
    loaded |= {f"model.model.vision_tower.{name}": tensor for name, tensor in vision.state_dict().items()}
    assert {name for name in one if name not in loaded} == {name for name in one if ".multi_modal_projector." in name}
    assert all(torch.equal(one[name], tensor) for name, tensor in loaded.items())

    options += ["model.vision.freeze=false", "optimizer.groups.vision.lr=2.0e-6", "scheduler.t_warmup=1ba"]
    options += ["max_duration=3ba", "save_interval=1ba", "save_num_checkpoints_to_keep=-1"]
    conversations(here)
    short = [f"{loader}_loader.dataset.max_tokens=200" for loader in ("train", "eval")]
    small = [word for word in SMALL_REAL_SCALE if not word.startswith("reference.")] + short
    caches = [("train", ("chat", "captions", "text")), ("eval", ("chat", "captions"))]
    locals_ = [
        f"{loader}_loader.dataset.streams.{name}.local=cache/{loader}-{name}"
        for loader, names in caches
        for name in names
    ]
    said = fork_ranks(here, str(ROOT / "train.py"), str(ROOT / "yamls/stage2.yaml"), *small, *locals_, *options)
    assert "Weights: language, projector, vision from runs/stage1/checkpoints/ep1-ba2" in said
    begun, _ = read_weights(Path("runs/stage2/checkpoints/ep0-ba1"))
    ended, _ = read_weights(find_weights("runs/stage2"))
    assert begun.keys() == one.keys()
    assert all(torch.equal(begun[name], tensor) for name, tensor in one.items())  # the rate of the first step is 0
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        assert any(not torch.equal(ended[name], tensor) for name, tensor in one.items() if f".{part}." in name)
    steps = [json.loads(line) for line in Path("runs/stage2/metrics.jsonl").read_text().splitlines()]
    rates = [(step["lr-AdamW/group0"], step["lr-AdamW/vision"]) for step in steps if "lr-AdamW/vision" in step]
    assert rates[:2] == [pytest.approx((0.0, 0.0)), pytest.approx((2e-5, 2e-6))]
    assert [batch for batch, _ in losses("runs/stage1")] == [0, 1]
    assert [batch for batch, _ in losses("runs/stage2")] == [0, 1, 2]
    assert steps[0]["prior/captions/effective_sample_size"] < steps[0]["prior/chat/effective_sample_size"] < 1
    assert all(f"metrics/eval/{name}/loss" in steps[-1] for name in ("chat", "captions"))
    assert sum(step["metrics/train/text/share"] > 0 for step in steps if "metrics/train/text/share" in step) > 0

    small = [word for word in small if not word.startswith(("tokenizer.", "model."))]
    small += [f"{loader}_loader.dataset.local=cache/{loader}-chat" for loader in ("train", "eval")]
    small += ["model.pretrained=runs/stage2/model", "precision=fp32", "sample_captions=0", "optimizer.lr=0.01"]
    fork_ranks(here, str(ROOT / "train.py"), str(ROOT / "yamls/sft.yaml"), *small)
    before, after = (load(f"runs/{run}") for run in ("stage2", "sft"))
    moved = {
        name.split(".")[1]
        for name, tensor in after.model.state_dict().items()
        if not torch.equal(tensor, before.model.state_dict()[name])
    }
    assert moved == {"multi_modal_projector", "language_model", "weight"}
    image = Image.new("RGB", (48, 48))
    asked = [
        one.tokenizer.decode(one.inputs([image], "What?")["input_ids"][0]).replace("<image>", "")
        for one in (before, after)
    ]
    assert asked[0] == asked[1]
    assert asked[0].endswith("USER: \nWhat? ASSISTANT:")
