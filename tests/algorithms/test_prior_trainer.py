"""PRIOR in transformers' Trainer and TRL's SFTTrainer: the loss and the gradient of the Composer algorithm."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from common.hf_trainers import (
    OPTIONS,
    TRAINERS,
    make_collator,
    make_data,
    make_reference,
    make_trainer,
    step,
)
from common.recipes import ROOT, fork_ranks
from common.vlms import WORDS, make_processor, make_vlm
from composer import Callback, DataSpec, Trainer
from composer.loggers import InMemoryLogger
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer as HFTrainer

from composer_prior import PRIOR, ComposerLVLM, PRIORMixin, importance_weights
from composer_prior.algorithms.prior.hugging_face import _check_trainer
from composer_prior.algorithms.token_weighting.image_tokens import image_token_ids
from composer_prior.data.batch import IGNORE_INDEX, ScoresCollator, count_tokens
from composer_prior.models.prior_lvlm.modeling_prior_lvlm import PriorLVLMConfig

TOLERANCE = 1e-6


class Spy(Callback):
    def after_loss(self, state, logger):
        self.loss = float(state.loss)

    def after_train_batch(self, state, logger):
        grads = [p.grad for p in state.model.parameters() if p.grad is not None]
        self.gradient = torch.cat([grad.flatten().double() for grad in grads])


@cache
def in_composer(options, completion_only_loss=True):
    """Loss and gradient of all the data under the Composer algorithm, and what it logs."""
    model = ComposerLVLM(make_vlm("llava"), make_processor("llava"))
    collator, spy, log = make_collator(completion_only_loss), Spy(), InMemoryLogger()
    loader = DataLoader([*make_data()], batch_size=8, collate_fn=lambda rows: dict(collator(rows)))
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(loader, get_num_tokens_in_batch=count_tokens),
        max_duration="1ba",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        algorithms=[PRIOR(make_reference(), **OPTIONS[options])],
        callbacks=[spy],
        loggers=[log],
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
        device="cpu",
    )
    trainer.fit()
    return spy.loss, spy.gradient, {name: values[-1][1] for name, values in log.data.items() if "prior/" in name}


def assert_close(got, expected):
    assert got[0] == pytest.approx(expected[0], rel=TOLERANCE)
    assert float((got[1] - expected[1]).norm() / expected[1].norm()) <= TOLERANCE


def cut(batches):
    return {"per_device_train_batch_size": 8 // batches, "gradient_accumulation_steps": batches}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batches", [1, 2, 4])
def test_loss_and_gradient_are_the_algorithms(batches, options, name, tmp_path):
    trainer = make_trainer(name, tmp_path, cut(batches), reference=make_reference(), **OPTIONS[options])
    expected = in_composer(options)
    assert_close(step(trainer), expected)
    logged = {key: value for key, value in trainer.state.log_history[0].items() if key.startswith("prior/")}
    assert logged == pytest.approx(expected[2], rel=1e-5)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    fork_ranks(folder, ROOT / "tests/common/programs/prior_trainer.py", folder / "results.pt", folder / "out")
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("options", ["paper", "batch"])
@pytest.mark.parametrize("name", TRAINERS)
def test_on_two_ranks(name, options, average, two_ranks):
    expected = in_composer(options)
    assert_close(two_ranks[name, options, average], expected)
    logged = two_ranks["logged", name, options, average]
    for metric in ("reference_nll", "effective_sample_size", "loss_weighted", "loss_unweighted"):
        assert logged[f"prior/{metric}"] == pytest.approx(expected[2][f"prior/{metric}"], rel=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_samples_without_an_image_are_not_weighted(options, tmp_path):
    trainer = make_trainer("Trainer", tmp_path, reference=make_reference(), **OPTIONS[options])
    batch = dict(make_collator()([*make_data()]))
    shown = batch["input_ids"] == trainer.model.config.image_token_id
    batch["input_ids"] = batch["input_ids"].masked_fill(shown & (torch.arange(8) < 2)[:, None], WORDS.start)
    ((got,), count) = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    mask = batch["labels"] != IGNORE_INDEX
    scores = make_reference().logprobs(batch["input_ids"], batch["attention_mask"].bool() & ~shown, batch["labels"])
    expected = importance_weights(scores[2:], mask[2:], **OPTIONS[options])
    assert torch.equal(got["token_weights"][:2], mask[:2].float())
    torch.testing.assert_close(got["token_weights"][2:], expected, rtol=1e-4, atol=1e-5)
    assert count == mask.sum()


@pytest.mark.parametrize("name", TRAINERS)
def test_labels_on_prompt_and_first_token(name, tmp_path):
    collator = make_collator(completion_only_loss=False)
    trainer = make_trainer(name, tmp_path, cut(2), data_collator=collator, reference=make_reference())
    assert_close(step(trainer), in_composer("paper", completion_only_loss=False))


@pytest.mark.parametrize("name", TRAINERS)
def test_models_that_cannot_be_told_the_number_of_tokens(name, tmp_path):
    model = make_vlm("llava")
    model.accepts_loss_kwargs = False  # as Gemma 3 and Qwen2.5-VL say
    assert_close(
        step(make_trainer(name, tmp_path, cut(4), model=model, reference=make_reference())), in_composer("paper")
    )


@pytest.mark.parametrize("name", TRAINERS)
def test_stored_scores_equal_a_live_reference(name, tmp_path):
    data = make_data()
    scores = make_trainer(name, tmp_path, reference=make_reference()).score(data, batch_size=3)
    assert scores.column_names == ["ref_logprobs"]
    scores.save_to_disk(tmp_path / "scores")
    scored = datasets.concatenate_datasets([data, datasets.load_from_disk(tmp_path / "scores")], axis=1)
    trainer = make_trainer(name, tmp_path, cut(2), train_dataset=scored)
    assert_close(step(trainer), in_composer("paper"))


@pytest.mark.parametrize("name", TRAINERS)
def test_evaluation_is_not_weighted(name, tmp_path):
    base = TRAINERS[name][0].__mro__[2]
    data = make_data()
    trainer = make_trainer(name, tmp_path, eval_dataset=data, reference=make_reference())
    scored = datasets.concatenate_datasets([data, trainer.score(data)], axis=1)
    plain = base(
        model=make_vlm("llava"),
        args=trainer.args,
        data_collator=make_collator(),
        train_dataset=data,
        eval_dataset=data,
        processing_class=trainer.processing_class,
    )
    expected = plain.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == expected
    assert trainer.evaluate(scored)["eval_loss"] == expected


class Bare(nn.Module):
    """A model that keeps its logits to itself."""

    def __init__(self):
        super().__init__()
        self.model = make_vlm("llava")
        self.config = self.model.config

    def forward(self, **inputs):
        return {"loss": self.model(**inputs).logits.mean()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "found neither `ref_logprobs` in the data nor a reference model: give PRIORTrainer(reference=...)"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"reference": "shifted"}, "another vocabulary than the model: 61 of its tokens"),
        ({"reference": "own", "processing_class": None}, "needs processing_class=..., the model's processor"),
        ({"reference": "own", "model": "bare"}, "needs the per-token `logits` in the model's outputs"),
        ({"reference": "own", "compute_loss_func": len}, "does not run with compute_loss_func: PRIOR is a loss itself"),
        ({"reference": "own", "changes": {"label_smoothing_factor": 0.1}}, "does not run with label_smoothing_factor"),
        (
            {"reference": "own", "data_collator": "unlabelled"},
            "is a dict with `labels` .* got input_ids, ",
        ),
        ({"reference": "own", "data_collator": "flat"}, "this batch holds several in one"),
    ],
)
def test_bad_use_is_refused_in_one_line(options, message, tmp_path):
    def unlabelled(rows):
        return {key: value for key, value in make_collator()(rows).items() if key != "labels"}

    def flat(rows):
        batch = dict(make_collator()(rows))
        del batch["attention_mask"]
        return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]}

    shifted = make_reference()
    backend = {token: i + 1 for token, i in shifted.tokenizer.get_vocab().items()}
    shifted.tokenizer = SimpleNamespace(get_vocab=lambda: backend)
    given = {"own": make_reference(), "shifted": shifted, "unlabelled": unlabelled, "flat": flat}
    options = {key: given.get(value, value) if isinstance(value, str) else value for key, value in options.items()}
    if options.get("model") == "bare":
        options["model"] = Bare()
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")) as error:
        make_trainer("Trainer", tmp_path, **options).train()
    assert "\n" not in str(error.value)


def test_another_weighting_of_trl_is_refused(tmp_path):
    with pytest.raises(ValueError, match="PRIORSFTTrainer does not run with loss_type='dft': it weights tokens too"):
        make_trainer("SFTTrainer", tmp_path, {"loss_type": "dft"}, reference=make_reference())


@pytest.mark.parametrize(("option", "max_length"), [("packing", 64), ("padding_free", None)])
def test_captions_that_share_a_row_are_refused(option, max_length, tmp_path):
    data = make_data().remove_columns("images")
    texts = data.map(lambda row: {"prompt": "<bos>w7"})
    changes = {option: True, "max_length": max_length}
    with pytest.raises(ValueError, match=f"PRIORSFTTrainer does not run with {option}: its captions share a row"):
        make_trainer("SFTTrainer", tmp_path, changes, train_dataset=texts, data_collator=None)


@pytest.mark.parametrize(
    ("part", "changes", "option"),
    [
        ("args", {"n_gpu": 2}, "nn.DataParallel: start one process for each GPU"),
        ("trainer", {"is_deepspeed_enabled": True}, "DeepSpeed: it makes bfloat16 of the weights"),
        (
            "accelerator",
            {"parallelism_config": SimpleNamespace(non_data_parallel_size=2)},
            "tensor, context or sequence parallelism: a rank must have whole captions",
        ),
    ],
)
def test_what_takes_gpus_is_refused(part, changes, option):
    """Of a stand-in: none of these can be turned on without a GPU."""
    args = SimpleNamespace(label_smoothing_factor=0.0, n_gpu=1)
    accelerator = SimpleNamespace(parallelism_config=None)
    trainer = SimpleNamespace(args=args, accelerator=accelerator, compute_loss_func=None, is_deepspeed_enabled=False)
    _check_trainer(trainer)
    vars({"args": args, "accelerator": accelerator, "trainer": trainer}[part]).update(changes)
    with pytest.raises(ValueError, match=f"SimpleNamespace does not run with {option}"):
        _check_trainer(trainer)


def test_mixed_in_the_wrong_way_round():
    with pytest.raises(TypeError, match=r"Name PRIORMixin before Trainer, .*: class Wrong\(PRIORMixin, Trainer\)"):
        type("Wrong", (HFTrainer, PRIORMixin), {})


def test_scores_of_other_captions_are_refused():
    rows = [{**row, "ref_logprobs": [-1.0] * 22} for row in make_data()]
    with pytest.raises(ValueError, match="Row 1 of a batch has 22 stored ref_logprobs for 3 labels"):
        ScoresCollator(make_collator())(rows)


def test_rows_of_patches_are_no_text():
    form = SimpleNamespace(config=PriorLVLMConfig(image_token_id=7, row_token_id=9))
    assert image_token_ids(SimpleNamespace(model=form, tokenizer=None)) == (7, 9)


@pytest.mark.slow
def test_needs_neither_composer_nor_a_trainer():
    code = "import sys, composer_prior; print('transformers' in sys.modules); composer_prior.PRIORMixin; "
    code += "print({'composer', 'transformers.trainer', 'datasets'} & {*sys.modules})"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "set()"]


def test_the_page_runs(tmp_path, monkeypatch):
    """docs/trainer.md from top to bottom, in a folder that has what it names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for part in (make_vlm("llava"), make_processor("llava")):
        part.save_pretrained("llava")
    for part in (make_reference().model, make_reference().tokenizer):
        part.save_pretrained("runs/reference/model")
    Path("photos").mkdir()
    with open("photos/metadata.jsonl", "w") as metadata:
        for number, row in enumerate(make_data()):
            row["images"][0].save(f"photos/{number}.png")
            caption = {"file_name": f"{number}.png", "text": row["completion"].removesuffix("\n<eos>")}
            metadata.write(json.dumps(caption) + "\n")
    page, namespace, logged = (ROOT / "docs/trainer.md").read_text(), {}, []
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, namespace)
        logged.append([entry for entry in namespace["trainer"].state.log_history if "loss" in entry])
    live, own, _, stored = logged
    assert namespace["trainer"].reference is None
    for step_log in (*live, *own, *stored):
        assert step_log["loss"] == pytest.approx(step_log["prior/loss_weighted"], abs=1e-4)
        assert step_log["prior/loss_weighted"] != step_log["prior/loss_unweighted"]
        assert step_log["prior/reference_nll"] == pytest.approx(live[0]["prior/reference_nll"], rel=TOLERANCE)
