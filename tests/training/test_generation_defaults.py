"""A language model's own defaults of generation change neither captions nor what can be saved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from common.recipes import recipe
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from composer_prior import StreamingCaptionDataset, load
from composer_prior.inference.caption import caption_images
from composer_prior.inference.evaluate import evaluate
from composer_prior.models.llava import export_llava
from composer_prior.training.run import train

WORDS = 12  # of a caption
CHANGES_TEXT = {
    "repetition_penalty": 1.8,
    "no_repeat_ngram_size": 2,
    "num_beams": 3,
    "length_penalty": 2.0,
    "suppress_tokens": [*range(260, 300)],
    "bad_words_ids": [[300]],
    "forced_bos_token_id": 301,
    "min_length": 40,
}
IS_NOT_WRITTEN = {"temperature": 0.9, "top_p": 0.6, "pad_token_id": -1, "early_stopping": True}
CAPTIONING = [
    *("benchmarks.scene_foils=null", "benchmarks.hallucination=null"),
    *("benchmarks.captioning.limit=6", f"benchmarks.captioning.max_new_tokens={WORDS}"),
]


def with_defaults(source, name, **configs):
    """Copy a model to a folder whose files say how it generates."""
    shutil.copytree(source, name)
    for file, values in configs.items():
        path = Path(name, f"{file}.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run with images from a base model with defaults; the base model has them in one of two files."""
    folder = tmp_path_factory.mktemp("defaults")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(recipe("reference", "max_duration=60ba", "save_interval=60ba", "scheduler.t_warmup=2ba"))
        with_defaults("runs/reference/model", "hub", generation_config=CHANGES_TEXT | IS_NOT_WRITTEN)
        with_defaults("runs/reference/model", "old", config=CHANGES_TEXT | IS_NOT_WRITTEN)
        Path("old/generation_config.json").unlink()
        images = ["reference=null", "model.language.pretrained=hub", "save_interval=2ba"]
        train(recipe("ntp_vit", *images, *CAPTIONING))
    return folder


@pytest.fixture
def here(run_folder, monkeypatch):
    monkeypatch.chdir(run_folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hub", "old"])
def test_a_text_only_model_is_saved_at_its_end_and_on_the_way(here, name):
    reference = f"runs/text_{name}"
    language = [f"model.language.pretrained={name}", "model.language.config=null"]
    train(recipe("reference", f"run_name=text_{name}", *language, "callbacks.hf_checkpointer={interval: 2ba}"))
    final = AutoModelForCausalLM.from_pretrained(f"{reference}/model")
    last = AutoModelForCausalLM.from_pretrained(f"{reference}/huggingface/ba4")
    earlier = AutoModelForCausalLM.from_pretrained(f"{reference}/huggingface/ba2")
    same = [torch.equal(a, b) for a, b in zip(final.parameters(), last.parameters(), strict=True)]
    assert all(same)
    assert not all(torch.equal(a, b) for a, b in zip(final.parameters(), earlier.parameters(), strict=True))
    saved = json.loads(Path(reference, "model/generation_config.json").read_text())
    assert not {*CHANGES_TEXT, "temperature", "top_p"} & {name for name, value in saved.items() if value is not None}
    assert Path(reference, "huggingface/ba2/reference.json").exists()


def pictures(model):
    data = StreamingCaptionDataset(local="data/emoji_scenes/validation", tokenizer=model.tokenizer, batch_size=1)
    return [data.image_and_caption(number)[0] for number in range(6)]


def by_hand(model, image):
    """The most likely token, again and again, without a cache."""
    batch = model.inputs([image])
    del batch["attention_mask"]
    embeddings = model.model.model.embed(**batch)
    ids: list[int] = []
    while len(ids) < WORDS and model.tokenizer.eos_token_id not in ids:
        token = model.model.causal_lm(inputs_embeds=embeddings).logits[:, -1].argmax(-1)
        ids += token.tolist()
        embeddings = torch.cat([embeddings, model.model.get_input_embeddings()(token)[:, None]], 1)
    return model.tokenizer.decode(ids, skip_special_tokens=True)


@torch.no_grad()
def test_greedy_is_greedy_everywhere(here, tmp_path):
    model = load("runs/ntp_vit")
    images = pictures(model)
    expected = [by_hand(model, image) for image in images]
    assert all(expected)
    assert model.generate_captions(images, max_new_tokens=WORDS) == expected
    assert load("runs/ntp_vit/checkpoints").generate_captions(images, max_new_tokens=WORDS) == expected
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    out = tmp_path / "captions.jsonl"
    caption_images("runs/ntp_vit", [str(tmp_path)], out=str(out), max_new_tokens=WORDS, num_workers=0, progress=False)
    assert [json.loads(line)["caption"] for line in out.read_text().splitlines()] == expected
    export_llava(model, tmp_path / "llava")
    for folder in ("runs/ntp_vit/model", tmp_path / "llava"):
        form, processor = (auto.from_pretrained(folder) for auto in (AutoModelForImageTextToText, AutoProcessor))
        inputs = processor(images=images, text=["<image>"] * 6, padding=True, return_tensors="pt")
        ids = form.generate(**inputs, max_new_tokens=WORDS)[:, inputs["input_ids"].shape[1] :]
        assert processor.batch_decode(ids, skip_special_tokens=True) == expected, folder


def test_the_run_and_evaluate_give_the_same_figures(here, tmp_path):
    lines = [json.loads(line) for line in Path("runs/ntp_vit/metrics.jsonl").read_text().splitlines()]
    logged = {name: value for line in lines for name, value in line.items() if name.startswith("eval/captioning/")}
    arguments = {"data": "data/emoji_scenes/validation", "max_new_tokens": WORDS}
    found = evaluate("runs/ntp_vit", benchmark="captioning", arguments=arguments, limit=6, out=str(tmp_path / "out"))
    assert logged["eval/captioning/rouge_l"] > 0
    for name, value in logged.items():
        figure = found["figures"][name.removeprefix("eval/captioning/")]["value"]
        assert figure == pytest.approx(value, abs=1e-9), name


def test_another_model_of_transformers_is_judged_greedily_too(here, tmp_path):
    model = load("runs/ntp_vit")
    export_llava(model, tmp_path / "llava")
    path = tmp_path / "llava/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | CHANGES_TEXT))
    arguments = {"data": "data/emoji_scenes/validation", "max_new_tokens": WORDS}
    for folder, out in (("runs/ntp_vit", "ours"), (tmp_path / "llava", "theirs")):
        evaluate(str(folder), benchmark="captioning", arguments=arguments, limit=6, out=str(tmp_path / out))
    ours, theirs = ((tmp_path / out / "predictions.jsonl").read_text() for out in ("ours", "theirs"))
    assert theirs == ours
