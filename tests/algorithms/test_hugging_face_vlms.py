"""PRIOR on vision-language models of transformers in ComposerLVLM, which take the path of the LVLM."""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from common.models import small_lm
from common.vlms import (
    BOS,
    EOS,
    KINDS,
    LM,
    NEWLINE,
    PAD,
    SPECIAL,
    VOCABULARY,
    WORDS,
    make_processor,
    make_tokenizer,
    make_vlm,
)
from composer import Trainer
from composer.algorithms import SeqLengthWarmup
from composer.core import Callback, DataSpec, Event
from composer.models import HuggingFaceModel
from composer.utils import reproducibility
from PIL import Image
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from composer_prior import PRIOR, ComposerLVLM, ReferenceLM
from composer_prior.algorithms.cal.cal import CAL
from composer_prior.algorithms.token_weighting.image_tokens import image_positions, image_token_ids
from composer_prior.data.batch import IGNORE_INDEX, count_tokens, split_packed_images

TOLERANCE = 1e-5


def make_model(kind):
    """A model of random weights."""
    return ComposerLVLM(make_vlm(kind), make_processor(kind))


def make_sample(kind, index):
    """Tokens, labels, and the tensors of one image, laid out as the model's own processor does."""
    generator = torch.Generator().manual_seed(index)
    ids = make_tokenizer(kind).convert_tokens_to_ids
    pixels = partial(torch.randn, generator=generator)
    if kind == "llava":
        image, tensors = ["<image>"] * 4, {"pixel_values": pixels(1, 3, 16, 16)}
    elif kind == "qwen2_vl":  # two sizes, so that the patches of images differ in number
        height, width = (4, 4) if index % 2 else (2, 6)
        tensors = {"pixel_values": pixels(height * width, 96), "image_grid_thw": torch.tensor([[1, height, width]])}
        image = ["<|vision_start|>", *["<|image_pad|>"] * (height * width // 4), "<|vision_end|>"]
    else:  # a row of tiles and the whole image, or only that; line breaks between
        tile, whole = ["<fake_token_around_image>", "<row_1_col_1>", *["<image>"] * 4], ["<image>"] * 4
        split = index % 2
        image = [*(tile if split else []), *(["\n", "\n"] if split else [])]
        image += ["<fake_token_around_image>", "<global-img>", *whole, "<fake_token_around_image>"]
        images = pixels(1, 2, 3, 16, 16)
        images[:, 1 + split :] = 0.0
        tensors = {"pixel_values": images, "pixel_attention_mask": torch.ones(1, 2, 16, 16, dtype=torch.bool)}
    length = [20, 1, 9][index % 3]
    caption = [*torch.randint(WORDS.start, WORDS.stop, (length,), generator=generator).tolist(), NEWLINE, EOS]
    prefix = [BOS, *ids(image), NEWLINE, 7]  # a prompt that starts with a line break
    return prefix, caption, tensors


def collate(kind, samples):
    longest = max(len(prefix) + len(caption) for prefix, caption, _ in samples)
    rows = {"input_ids": [], "labels": [], "attention_mask": []}
    for prefix, caption, _ in samples:
        length = len(prefix) + len(caption)
        rows["input_ids"].append([*prefix, *caption, *[PAD] * (longest - length)])
        rows["labels"].append([*[IGNORE_INDEX] * len(prefix), *caption, *[IGNORE_INDEX] * (longest - length)])
        rows["attention_mask"].append([1] * length + [0] * (longest - length))
    text = {key: torch.tensor(value) for key, value in rows.items()}
    if kind == "qwen2_vl":  # transformers 5 asks for it, and ComposerLVLM leaves out what 4 does not know
        image = make_tokenizer(kind).convert_tokens_to_ids("<|image_pad|>")
        text["mm_token_type_ids"] = (text["input_ids"] == image).long()
    return {**text, **{key: torch.cat([tensors[key] for *_, tensors in samples]) for key in samples[0][2]}}


def make_spec(kind, size=6, **changes):
    samples = [make_sample(kind, i) for i in range(size)]
    return DataSpec(
        DataLoader(samples, batch_size=size, collate_fn=partial(collate, kind)),
        split_batch=split_packed_images if kind == "qwen2_vl" else None,
        get_num_samples_in_batch=lambda batch: len(batch["labels"]),
        get_num_tokens_in_batch=count_tokens,
        **changes,
    )


def make_reference():
    """Its vocabulary is text alone: an image token in its input would be out of range."""
    reproducibility.seed_all(4)
    lm = small_lm(make_tokenizer("llava"), **{**LM, "vocab_size": max(WORDS) + 1})
    with torch.no_grad():
        lm.lm_head.weight.mul_(5)  # so that some tokens are likely, and weights far from equal
    return ReferenceLM(lm, text_tokenizer())


@cache
def text_tokenizer():
    tokenizer = make_tokenizer("llava")
    vocab = {token: i for token, i in tokenizer.get_vocab().items() if i <= max(WORDS)}
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<pad>")))


class Spy(Callback):
    """Losses and the gradients that the optimizer is about to use."""

    def __init__(self):
        self.losses, self.gradients = [], None

    def before_backward(self, state, logger):
        self.losses.append(float(state.loss))

    def after_train_batch(self, state, logger):
        grads = [p.grad for p in state.model.parameters() if p.grad is not None]
        self.gradients = torch.cat([grad.flatten().double() for grad in grads])


def fit(model, spec, algorithms, microbatch=None):
    spy = Spy()
    trainer = Trainer(
        model=model,
        train_dataloader=spec,
        max_duration="1ba",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        algorithms=algorithms,
        callbacks=[spy],
        device_train_microbatch_size=microbatch,
        accumulate_train_batch_on_tokens=isinstance(spec, DataSpec),
        progress_bar=False,
        device="cpu",
        seed=0,
    )
    trainer.fit()
    return spy


def weights_by_hand(kind, reference, index):
    """``[k]``: the caption with ``bos`` and the prompt before it, and nothing of the image."""
    _, caption, _ = make_sample(kind, index)
    text = torch.tensor([BOS, NEWLINE, 7, *caption])
    with torch.no_grad():
        logp = reference.model(text[None]).logits[0].double().log_softmax(-1)
    weights = 1 - logp[2:-1].gather(1, text[3:, None])[:, 0].exp()
    return weights * len(caption) / weights.sum()


def loss_by_hand(kind, model, reference, indices):
    """One sample at a time, without padding, microbatches or Composer."""
    total, count = 0.0, 0
    for index in indices:
        batch = collate(kind, [make_sample(kind, index)])
        labels = batch.pop("labels")[0]
        places = (labels != IGNORE_INDEX).nonzero()[:, 0]
        logp = model.model(**batch).logits[0].double().log_softmax(-1)
        nll = -logp[places - 1, labels[places]]
        total, count = total + (weights_by_hand(kind, reference, index) * nll).sum(), count + len(places)
    return total / count


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_tokens_are_those_of_the_familys_own_logits(kind):
    """Of batches padded at their end, one after the other: Qwen2-VL keeps what it knows of positions."""
    model = make_model(kind)
    for indices in (range(6), range(3, 5), range(6)):
        batch = collate(kind, [make_sample(kind, i) for i in indices])
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        mask = batch["labels"] != IGNORE_INDEX
        with torch.no_grad():
            found = model(batch)
            logits = make_vlm(kind)(**inputs).logits[:, :-1]
            own = make_vlm(kind)(**batch).loss
        nll = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        torch.testing.assert_close(found["nll"][:, 1:], nll, rtol=0, atol=TOLERANCE)
        assert not found["nll"][:, 0].any()
        assert torch.equal(found["correct"][:, 1:], mask[:, 1:] & (logits.argmax(-1) == batch["labels"][:, 1:]))
        assert float(model.loss(found, batch)) == pytest.approx(float(own), abs=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_padded_on_the_left(kind):
    model, batch = make_model(kind), collate(kind, [make_sample(kind, i) for i in range(6)])
    lengths = batch["attention_mask"].sum(1).tolist()
    padded = {
        key: torch.stack([row.roll(-n) for row, n in zip(batch[key], lengths, strict=True)])
        for key in ("input_ids", "labels", "attention_mask", "mm_token_type_ids")
        if key in batch
    }
    assert not padded["attention_mask"][:, 0].all()
    with torch.no_grad():
        expected, found = model(batch)["nll"], model({**batch, **padded})["nll"]
    for there, here, n in zip(expected, found, lengths, strict=True):
        torch.testing.assert_close(here.roll(n), there, rtol=0, atol=TOLERANCE)


def test_a_model_without_masks_refuses_padding_on_the_left():
    tokenizer = make_tokenizer("llava")
    ids = torch.tensor([[PAD, BOS, 7, 8, EOS], [BOS, 9, 7, 8, EOS]])
    for options in ({}, {"pack": True}):
        model = ComposerLVLM(small_lm(tokenizer, **LM), tokenizer, **options)
        with pytest.raises(ValueError, match=r"padded on the left, but .*padding_side = 'right'\.$"):
            model({"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": ids})


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_logits_are_made_than_labels(kind):
    model = make_model(kind)
    rows = []
    model.model.lm_head.register_forward_hook(lambda _, inputs, logits: rows.append(logits[..., 0].numel()))
    batch = collate(kind, [make_sample(kind, i) for i in range(6)])
    model(batch)
    assert sum(rows) <= int((batch["labels"] != IGNORE_INDEX).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_composers_own_wrapper_is_refused(kind):
    bare = HuggingFaceModel(make_vlm(kind), use_logits=True)
    with pytest.raises(ValueError, match="PRIOR needs a model that applies token_weights in its loss") as error:
        fit(bare, make_spec(kind), [PRIOR(make_reference())])
    advice = "HuggingFaceModel does not: wrap the model of transformers in ComposerLVLM(model, processor)."
    assert str(error.value).endswith(advice)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("microbatch", [None, 1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_the_formulas(kind, microbatch):
    reference = make_reference()
    model = make_model(kind)
    expected = loss_by_hand(kind, model, reference, range(6))
    expected.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    gradients = torch.cat([grad.flatten().double() for grad in grads])
    spy = fit(make_model(kind), make_spec(kind), [PRIOR(reference)], microbatch)
    assert len(spy.losses) == {None: 1, 1: 6, 4: 2}[microbatch]
    if microbatch is None:
        assert spy.losses[0] == pytest.approx(float(expected), rel=TOLERANCE)
    assert float((spy.gradients - gradients).norm() / gradients.norm()) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_cal_takes_the_image_out(kind):
    model = make_model(kind)
    total, count, differences = 0.0, 0, []
    for index in range(6):
        batch = collate(kind, [make_sample(kind, index)])
        labels = batch.pop("labels")[0]
        places = (labels != IGNORE_INDEX).nonzero()[:, 0]
        tokens = labels[places]
        with torch.no_grad():
            logits = model.model(**batch).logits[0, places - 1].double()
            text = torch.tensor([[BOS, NEWLINE, 7, *tokens]])
            alone = model.model(input_ids=text, attention_mask=torch.ones_like(text)).logits[0, 2:-1].double()
        difference = (logits - alone).gather(1, tokens[:, None])[:, 0]
        clamped = difference.clamp(0.001, 0.01).tolist()
        near = [clamped[max(0, i - 1) : i + 2] for i in range(len(clamped))]
        weights = torch.tensor([sum(part) / len(part) for part in near], dtype=torch.float64)
        nll = -logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        total, count = total + float((weights * len(places) / weights.sum() * nll).sum()), count + len(places)
        differences += difference.tolist()
    assert any(x < 0.001 for x in differences)
    assert any(x > 0.01 for x in differences)
    spy = fit(make_model(kind), make_spec(kind), [CAL(low=0.001, high=0.01)])
    assert spy.losses == [pytest.approx(total / count, rel=TOLERANCE)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_sees_the_text_and_nothing_else(kind):
    batch = collate(kind, [make_sample(kind, i) for i in range(4)])
    image = image_positions(batch["input_ids"], batch["labels"], make_model(kind))
    for index in range(4):
        _, caption, _ = make_sample(kind, index)
        text = batch["input_ids"][index][~image[index] & batch["attention_mask"][index].bool()]
        assert text.tolist() == [BOS, NEWLINE, 7, *caption]
    expected = make_tokenizer(kind).convert_tokens_to_ids(SPECIAL[kind])
    assert set(image_token_ids(make_model(kind))) == set(expected)


def test_line_breaks_of_captions_are_text():
    model = make_model("idefics3")
    image, row = make_tokenizer("idefics3").convert_tokens_to_ids(["<image>", "<row_1_col_1>"])
    ids = torch.tensor([[BOS, NEWLINE, row, image, NEWLINE, NEWLINE, image, NEWLINE, 9, NEWLINE, image, NEWLINE]])
    labels = torch.full_like(ids, IGNORE_INDEX)
    expected = [[False, False, True, True, True, True, True, False, False, False, True, False]]
    assert image_positions(ids, labels, model).tolist() == expected
    labels[0, 4] = NEWLINE
    expected[0][4:6] = [False, False]
    assert image_positions(ids, labels, model).tolist() == expected


def test_stored_scores_equal_a_live_reference():
    reference = make_reference()
    batch = collate("qwen2_vl", [make_sample("qwen2_vl", i) for i in range(6)])
    text = ~image_positions(batch["input_ids"], batch["labels"], make_model("qwen2_vl"))
    scores = reference.logprobs(batch["input_ids"], text & batch["attention_mask"].bool(), batch["labels"])
    spec = make_spec("qwen2_vl")
    spec.dataloader.collate_fn = lambda samples: {**collate("qwen2_vl", samples), "ref_logprobs": scores}
    stored = fit(make_model("qwen2_vl"), spec, [PRIOR()], 4)
    live = fit(make_model("qwen2_vl"), make_spec("qwen2_vl"), [PRIOR(reference)], 4)
    assert stored.losses == live.losses


def test_captions_are_greedy_whatever_the_configuration_says():
    captions = []
    for penalty in (1.0, 9.0):
        model = make_vlm("llava")
        model.generation_config.repetition_penalty = penalty
        processor = make_processor("llava")
        processor.tokenizer.model_input_names = ["input_ids", "attention_mask"]
        trained = ComposerLVLM(model, processor).image_text_model
        captions += trained.generate_captions([Image.new("RGB", (16, 16), "red")], max_new_tokens=12)
    assert captions[0] == captions[1]


def test_composers_own_split_cuts_images_of_qwen_apart():
    batch = collate("qwen2_vl", [make_sample("qwen2_vl", i) for i in range(6)])
    parts = split_packed_images(batch, 4)
    assert [len(part["input_ids"]) for part in parts] == [4, 2]
    for key, value in batch.items():
        assert torch.equal(torch.cat([part[key] for part in parts]), value)
    assert [len(part["pixel_values"]) for part in parts] == [56, 28]
    with pytest.raises(ValueError, match="image_grid_thw has 5 rows for 6 samples"):
        split_packed_images({**batch, "image_grid_thw": batch["image_grid_thw"][1:]}, 4)
    with pytest.raises(ValueError, match="stands for 84 patches, but there are 83"):
        split_packed_images({**batch, "pixel_values": batch["pixel_values"][1:]}, 4)


class Warmup(SeqLengthWarmup):
    """On any model: Composer's own refuses all but its HuggingFaceModel."""

    def apply(self, event, state, logger):
        if event == Event.INIT:
            self._original_model = state.model
        else:
            super().apply(event, state, logger)


def test_sequence_length_warmup():
    """It cuts every tensor at its second dimension; the weights are those of what is left of the caption."""
    reference = make_reference()

    class Check(Callback):
        lengths = ()

        def before_forward(self, state, logger):
            self.batch = {key: value.clone() for key, value in state.batch.items()}

        def before_backward(self, state, logger):
            self.lengths += (self.batch["labels"].shape[1],)
            total, count = 0.0, 0
            for row in range(len(self.batch["labels"])):
                one = {key: value[row : row + 1] for key, value in self.batch.items() if key != "ref_logprobs"}
                labels = one.pop("labels")[0]
                places = (labels != IGNORE_INDEX).nonzero()[:, 0]
                with torch.no_grad():
                    logp = state.model.model(**one).logits[0].double().log_softmax(-1)
                nll = -logp[places - 1, labels[places]]
                text = torch.tensor([BOS, NEWLINE, 7, *labels[places]])
                with torch.no_grad():
                    scores = reference.model(text[None]).logits[0].double().log_softmax(-1)
                weights = 1 - scores[2:-1].gather(1, text[3:, None])[:, 0].exp()
                total += float((weights * len(places) / weights.sum() * nll).sum())
                count += len(places)
            assert float(state.loss) == pytest.approx(total / count, rel=TOLERANCE)

    for before in (True, False):
        check = Check()
        warmup = [Warmup(duration=1.0, min_seq_length=10, max_seq_length=26, step_size=8)]
        prior = [PRIOR(reference)]
        trainer = Trainer(
            model=make_model("llava"),
            train_dataloader=make_spec("llava"),
            max_duration="6ba",
            optimizers=torch.optim.SGD(make_model("llava").parameters(), lr=0.1),
            algorithms=warmup + prior if before else prior + warmup,
            callbacks=[check],
            accumulate_train_batch_on_tokens=True,
            progress_bar=False,
            device="cpu",
        )
        trainer.fit()
        assert check.lengths == (10, 10, 10, 18, 18, 18)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (
            lambda batch: {key: value for key, value in batch.items() if key != "labels"},
            "input_ids, attention_mask, pix",
        ),
        (lambda batch: tuple(batch.values()), "tuple"),
    ],
)
def test_a_batch_without_labels_is_refused(change, got):
    samples = [make_sample("llava", i) for i in range(6)]
    loader = DataLoader(samples, batch_size=6, collate_fn=lambda samples: change(collate("llava", samples)))
    with pytest.raises(ValueError, match=rf"needs a batch that is a dict with `labels` .* got {got}") as error:
        fit(make_model("llava"), loader, [PRIOR(make_reference())])
    assert "\n" not in str(error.value)


def test_a_model_without_its_tokenizer_is_refused():
    model = make_model("idefics3")
    model.tokenizer = None
    reference = make_reference()
    reference.model.resize_token_embeddings(VOCABULARY)
    with pytest.raises(ValueError, match="image's tokens cannot be told from text without the model's tokenizer"):
        fit(model, make_spec("idefics3"), [PRIOR(reference)])
