"""A run on conversations, with its reference, tokenizer and scores, and the model that it leaves."""

from pathlib import Path

import pytest
import torch
from common.chats import TEMPLATES, png, turns, write_chats
from common.recipes import ALONE, NO_REPORT, ROOT, SHRUNKEN, fork_ranks, losses
from PIL import Image

import composer_prior
from composer_prior.training.config import load_recipe
from composer_prior.training.run import train

SMALL = [word for word in SHRUNKEN if not word.startswith("data.")]


def write(folder, count):
    samples = [
        (turns("<image>What shade?", f"Shade {n}.", "And twice?", f"It is {2 * n}."), [png(n)]) if n % 3 else
        (turns(f"What is {n} and {n}?", f"It is {2 * n}."), []) if n % 2 else
        (turns("<image><image>Which is lighter?", "The second."), [png(n), png(n + 9)])
        for n in range(count)
    ]  # fmt: skip
    return write_chats(Path(folder), samples)


def test_a_run_with_its_reference_scores_and_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("my/train", 16)
    write("my/validation", 8)
    Path("chat.jinja").write_text(TEMPLATES["vicuna"].replace("eos_token", "'<eos>'"))
    words = ["train=my/train", "validation=my/validation", "tokenizer.chat_template=chat.jinja"]
    words += [f"{key}.dataset.max_tokens=120" for key in ("train_loader", "eval_loader")]
    words += [f"reference.{key}.dataset.max_tokens=120" for key in ("train_loader", "eval_loader")]
    train(load_recipe("prior_patch.yaml", [*words, "run_name=stored", *SMALL]))
    train(load_recipe("prior_patch.yaml", [*words, "run_name=live", "train_loader.dataset.scores=null", *SMALL]))
    stored, live = losses("runs/stored"), losses("runs/live")
    assert len(stored) > 2
    torch.testing.assert_close(torch.tensor(stored), torch.tensor(live), rtol=1e-3, atol=1e-3)
    again = [*words, "run_name=live", "train_loader.dataset.scores=null", "autoresume=true", *SMALL]
    with pytest.raises(ValueError, match=r"is of another run: max_tokens differ \(max_tokens: 120 there, 119 here\)"):
        train(load_recipe("prior_patch.yaml", [*again, "train_loader.dataset.max_tokens=119"]))
    Path("chat.jinja").write_text(Path("chat.jinja").read_text().replace("USER", "HUMAN"))
    with pytest.raises(ValueError, match="is of another run: chat_template differ"):
        train(load_recipe("prior_patch.yaml", again))
    model = composer_prior.load("runs/stored")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    assert (
        model.processor.apply_chat_template([message], add_generation_prompt=True) == "USER: <image>\nWhat? ASSISTANT:"
    )
    inputs = model.inputs([Image.new("RGB", (48, 48))], "What?")
    text = model.tokenizer.decode(inputs["input_ids"][0]).replace("<image>", "").replace("<row>", "")
    assert text == "<bos>USER: \nWhat? ASSISTANT:"


def test_a_template_that_is_missing_is_told_before_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("chat", 8)
    write_chats(Path("pages"), [([{"role": "document", "content": "A page."}], [])] * 8)
    streams = "train_loader.dataset.streams={pages: {local: pages}, chat: {local: chat}}"
    words = [*SMALL, *ALONE, *NO_REPORT, "data=null", "tokenizer.name=tokenizer", "eval_loader=null"]
    words += ["train_loader.dataset.local=null"]
    words += ["train_loader.dataset.max_tokens=120", "train_loader.dataset.on_bad_sample=skip", "max_duration=1ba"]
    with pytest.raises(ValueError, match=r"^A conversation needs tokenizer\.chat_template: own, a file"):
        train(load_recipe("ntp_patch.yaml", [*words, streams]))
    assert not Path("runs").exists()
    train(load_recipe("ntp_patch.yaml", [*words, streams.replace(", chat: {local: chat}", "")]))


@pytest.mark.slow
def test_ranks_without_an_image_reach_the_losses_of_one(tmp_path, monkeypatch):
    """Microbatches of one sample: most steps have a rank without an image, or both, whose samples are not weighted."""
    monkeypatch.chdir(tmp_path)
    write("my/train", 16)
    write("my/validation", 5)
    Path("chat.jinja").write_text(TEMPLATES["vicuna"])
    words = [*SMALL, *NO_REPORT, "train=my/train", "validation=my/validation"]
    words += ["tokenizer.chat_template=chat.jinja", "global_train_batch_size=4", "device_train_microbatch_size=1"]
    loaders = [f"{prefix}{key}" for prefix in ("", "reference.") for key in ("train_loader", "eval_loader")]
    words += [f"{loader}.dataset.max_tokens=120" for loader in loaders]
    words += ["device_eval_batch_size=1", "train_loader.dataset.scores=null", "algorithms.prior.shard_reference=true"]
    train(load_recipe("prior_patch.yaml", [*words, "run_name=one"]))
    for name, sharding in (("ddp", "null"), ("fsdp2", "{fsdp2: {}}")):
        program = [ROOT / "train.py", ROOT / "yamls/prior_patch.yaml", *words, f"run_name={name}"]
        fork_ranks(tmp_path, *program, f"parallelism_config={sharding}")
        found, expected = (torch.tensor(losses(f"runs/{one}")) for one in (name, "one"))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
