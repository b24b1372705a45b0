"""Conversations and documents with any number of images, from MDS to the loss, for our models and for transformers'."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from common.chats import parts, png, turns, write_chats
from common.models import small_lvlm
from common.vlms import make_processor, make_vlm
from PIL import Image
from streaming import MDSWriter
from tokenizers import processors

from composer_prior import ComposerLVLM, StreamingCaptionDataset
from composer_prior.algorithms.token_weighting.image_tokens import text_positions
from composer_prior.data.batch import IGNORE_INDEX, split_packed_images
from composer_prior.data.captions import BadSampleError, caption_data_spec
from composer_prior.data.chat import NoTemplateError, use_template
from composer_prior.data.tokenizer import placeholder
from composer_prior.models.image_text_model import model_inputs
from composer_prior.training.config import load_recipe

TEMPLATE = (  # in the words of small tokenizers, with parts
    "{% for message in messages %}{{ 'w10' if message['role'] == 'user' else 'w11' }}"
    "{% for part in message['content'] %}{{ 'IMAGE' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w11' }}{% endif %}"
)
OWN_TEMPLATE = TEMPLATE.replace("IMAGE", "<image>")
SAMPLES = [
    (turns("<image>w4<image>w5", "w6w7", "w8", "w9\nw12"), [png(1), png(2, 40, 20)]),
    (turns("w4w5w6", "w7"), []),
    ([{"role": "document", "content": parts("w4<image>w5w6<image><image>w7")}], [png(3), png(4), png(5, 30, 60)]),
    (turns("w8w9<image>", "w13w14w15"), [png(6)]),
    ([{"role": "document", "content": "w20w21w22"}], []),
    (turns("<image>w4", "w5w6", "w7"), [png(7)]),  # which ends with the user
]
FOREIGN = ("llava", "qwen2_vl", "idefics3")


def images_of(sample):
    return [Image.open(io.BytesIO(data)) for data in sample[1]]


def loader(folder, model, samples=SAMPLES, **options):
    data = StreamingCaptionDataset(
        local=write_chats(folder, samples),
        tokenizer=model.tokenizer,
        image_processor=model.image_processor,
        batch_size=len(samples),
        **options,
    )
    return caption_data_spec(data, len(samples)).dataloader


def foreign(kind):
    processor, model = make_processor(kind), make_vlm(kind)
    use_template(
        processor.tokenizer,
        TEMPLATE.replace("IMAGE", placeholder(processor.tokenizer)),
        placeholder(processor.tokenizer),
    )
    return ComposerLVLM(model.eval(), processor)


def own(family, tokenizer, template=OWN_TEMPLATE):
    tokenizer = copy.deepcopy(tokenizer)
    use_template(tokenizer, template, "<image>")
    model = small_lvlm(family, tokenizer).eval()
    model.processor.chat_template = tokenizer.chat_template
    return model


def their_inputs(model, sample):
    """The whole sample by the model's own processor, and labels by reading its prefixes with it."""
    messages, images = sample[0], images_of(sample)
    tokenizer, image = model.tokenizer, placeholder(model.tokenizer)

    def read(text):
        shown = images[: text.count(image)]
        given = {"images": [shown]} if shown else {}
        return dict(model.processor(text=[text], return_tensors="pt", **given))

    borders = []
    if messages[0]["role"] == "document":
        content = messages[0]["content"]
        text = tokenizer.bos_token or tokenizer.eos_token
        for part in parts(content) if isinstance(content, str) else content:
            start, text = text, text + part.get("text", image)
            borders += [(start, text)] if "text" in part else []
        borders.append((text, text + tokenizer.eos_token))
        text += tokenizer.eos_token
    else:
        write = lambda some, **options: tokenizer.apply_chat_template(some, tokenize=False, **options)  # noqa: E731
        text = write(messages)
        borders = [
            (write(messages[:n], add_generation_prompt=True), write(messages[: n + 1]))
            for n in range(1, len(messages), 2)
        ]
    whole = read(text)
    labels = torch.full_like(whole["input_ids"], IGNORE_INDEX)
    for start, end in borders:
        first, last = (read(one)["input_ids"].shape[1] for one in (start, end))
        labels[0, first:last] = whole["input_ids"][0, first:last]
    return whole, labels


@pytest.mark.parametrize("kind", ["encoder", "patches", "tiles", "naflex", *FOREIGN])
def test_the_loss_is_that_of_transformers_with_the_same_labels(kind, tokenizer, tmp_path):
    model = foreign(kind) if kind in FOREIGN else own(kind, tokenizer)
    batch = next(iter(loader(tmp_path, model)))
    with torch.no_grad():
        nll = model(batch)["nll"]
        for row, sample in enumerate(SAMPLES):
            inputs, labels = their_inputs(model, sample)
            length = labels.shape[1]
            assert batch["input_ids"][row, :length].tolist() == inputs["input_ids"][0].tolist()
            assert batch["labels"][row, :length].tolist() == labels[0].tolist()
            assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
            theirs = model.model(**inputs, labels=labels).loss
            torch.testing.assert_close(nll[row].sum() / (labels != IGNORE_INDEX).sum(), theirs, rtol=1e-5, atol=1e-5)


def test_a_conversation_without_a_template_is_a_bad_sample(tokenizer, tmp_path):
    """The first one of a stream ends the run at its start; documents need no template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    model = small_lvlm("patches", tokenizer)
    for number, samples in enumerate([[SAMPLES[4], SAMPLES[1]], [SAMPLES[1], SAMPLES[4]]]):
        data = loader(tmp_path / str(number), model, samples).dataset
        if number:
            with pytest.raises(NoTemplateError, match=r"tokenizer\.chat_template"):
                data.check_template()
        else:
            data.check_template()
            with pytest.raises(BadSampleError, match=r"tokenizer\.chat_template"):
                data[1]


@pytest.mark.parametrize("name", ["stage2.yaml", "chat_vit.yaml"])
@pytest.mark.parametrize("trim", [True, False])
def test_a_space_belongs_to_the_word_behind_it(name, trim, tokenizer, tmp_path):
    """Byte-level tokenizers may leave spaces out of a token's characters; the token of a lone space then has none."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    model = own("patches", tokenizer, load_recipe(name).tokenizer["chat_template"])
    sample = (turns("<image>Which colour? ", "Red.", " And  <image>", "  a red  owl"), [png(1), png(2)])
    batch = next(iter(loader(tmp_path, model, [sample])))
    inputs, labels = their_inputs(model, sample)
    assert batch["input_ids"].tolist() == inputs["input_ids"].tolist()
    assert batch["labels"].tolist() == labels.tolist()


@pytest.mark.parametrize("kind", ["patches", "encoder", "qwen2_vl"])
def test_a_document_of_thirty_images_has_the_loss_of_transformers(kind, tokenizer, tmp_path):
    model = foreign(kind) if kind in FOREIGN else own(kind, tokenizer)
    text = "".join(f"w{5 + n}<image>" for n in range(30))
    sample = ([{"role": "document", "content": parts(text)}], [png(8 * n) for n in range(30)])
    batch = next(iter(loader(tmp_path, model, [sample, SAMPLES[1]])))
    inputs, labels = their_inputs(model, sample)
    assert batch["input_ids"][:1].tolist() == inputs["input_ids"].tolist()
    assert batch["labels"][:1].tolist() == labels.tolist()
    with torch.no_grad():
        nll = model(batch)["nll"][0]
        theirs = model.model(**inputs, labels=labels).loss
    torch.testing.assert_close(nll.sum() / (labels != IGNORE_INDEX).sum(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["encoder", "patches", *FOREIGN])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_batch_cut_anywhere_gives_the_same_losses(kind, size, tokenizer, tmp_path):
    model = foreign(kind) if kind in FOREIGN else own(kind, tokenizer)
    batch = next(iter(loader(tmp_path, model)))
    with torch.no_grad():
        whole = model(batch)["nll"]
        for start, part in zip(range(0, len(SAMPLES), size), split_packed_images(batch, size), strict=True):
            torch.testing.assert_close(model(part)["nll"], whole[start : start + size], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["encoder", "patches", *FOREIGN])
def test_every_weight_has_a_gradient_without_an_image_too(kind, tokenizer, tmp_path):
    model = foreign(kind) if kind in FOREIGN else own(kind, tokenizer)
    batch = next(iter(loader(tmp_path, model, [SAMPLES[1], SAMPLES[4]])))
    assert not any("pixel" in key for key in batch)
    model.loss(model(batch), batch).backward()
    lacking = {name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None}
    images = next(iter(loader(tmp_path / "more", model)))
    model.zero_grad()
    model.loss(model(images), images).backward()
    assert lacking == {
        name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None
    }


@pytest.mark.parametrize("kind", ["patches", "qwen2_vl", "llava"])
def test_the_reference_reads_the_same_text_without_images(kind, tokenizer, tmp_path):
    model = foreign(kind) if kind in FOREIGN else own(kind, tokenizer)
    batch = next(iter(loader(tmp_path, model)))
    text = StreamingCaptionDataset(local=str(tmp_path), tokenizer=model.tokenizer, batch_size=1)
    is_text = text_positions(batch, model)
    for row, sample in enumerate(text[i] for i in range(len(SAMPLES))):
        ids, labels = (batch[key][row][is_text[row]].tolist() for key in ("input_ids", "labels"))
        begins = ids[:1] == sample["input_ids"][:1].tolist()  # a processor of transformers may write none
        assert ids == sample["input_ids"].tolist()[not begins :]
        assert labels == sample["labels"].tolist()[not begins :]
        assert sample["images"] == []


@pytest.mark.parametrize(
    ("sample", "error"),
    [
        ((turns("<image><image>w4", "w5"), [png(1)]), "names 2 images and the sample has 1"),
        ((turns("w4", "w5"), [png(1)]), "names 0 images and the sample has 1"),
        ((turns("<image>w4", "w5"), [b"no picture"]), "cannot be decoded"),
        ((turns("w4", ""), []), "an answer is empty"),
        ((turns("w4"), []), "no answer is learned"),
        (([turns("w4")[0], {"role": "assistant", "content": "w5", "weight": 0}], []), "no answer is learned"),
        (
            (turns("<image>" * 30 + "w4", "w5"), [png(n) for n in range(30)]),
            "images end at token .* behind max_tokens=64",
        ),
        ((turns("w4" * 100, "w5"), []), "none of its first 64 tokens is learned"),
        ((turns(*["w4", "w5"] * 33), []), "its 66 messages take more than max_tokens=64"),
        ((turns("<image>" * 64, "w5"), [b""] * 64), "its 64 images end behind max_tokens=64"),
        ((turns("w4\ud83d", "w5"), []), "not Unicode"),
    ],
)
@pytest.mark.parametrize("kind", ["patches", "qwen2_vl"])
def test_bad_samples_are_named_and_count_for_nothing(kind, sample, error, tokenizer, tmp_path):
    model = foreign(kind) if kind in FOREIGN else own(kind, tokenizer)
    with pytest.raises(BadSampleError, match=f"sample 0 .*{error}"):
        loader(tmp_path / "raise", model, [sample], max_tokens=64).dataset[0]
    batch = next(iter(loader(tmp_path / "skip", model, [sample, *SAMPLES[:2]], max_tokens=64, on_bad_sample="skip")))
    good = next(iter(loader(tmp_path / "good", model, SAMPLES[:2], max_tokens=64)))
    assert (batch["labels"][0] == IGNORE_INDEX).all()
    with torch.no_grad():
        torch.testing.assert_close(model.loss(model(batch), batch), model.loss(model(good), good))


def test_text_is_cut_at_the_end(tokenizer, tmp_path):
    model = own("patches", tokenizer)
    whole = loader(tmp_path / "whole", model).dataset[0]
    cut = loader(tmp_path / "cut", model, max_tokens=len(whole["labels"]) - 2).dataset[0]
    for key in ("input_ids", "labels", "text_mask"):
        assert cut[key].tolist() == whole[key].tolist()[:-2]


@pytest.mark.parametrize("kind", ["patches", "encoder", "llava", "qwen2_vl"])
def test_captions_beside_conversations_have_the_loss_that_they_have_alone(kind, tokenizer, tmp_path):
    model = foreign(kind) if kind in FOREIGN else own(kind, tokenizer)
    captions, chats = str(tmp_path / "captions"), write_chats(tmp_path / "chats", SAMPLES)
    with MDSWriter(out=captions, columns={"image": "bytes", "caption": "str"}) as writer:
        for number in range(2):
            writer.write({"image": png(number), "caption": f"w{5 + number}w9"})
    given = {"tokenizer": model.tokenizer, "image_processor": model.image_processor, "prompt": "w4", "shuffle": False}
    alone = caption_data_spec(StreamingCaptionDataset(local=captions, batch_size=2, **given), 2).dataloader
    streams = {"captions": {"local": captions}, "chats": {"local": chats}}
    count = 2 + len(SAMPLES)
    mixed = caption_data_spec(StreamingCaptionDataset(streams=streams, batch_size=count, **given), count).dataloader
    batch, expected = next(iter(mixed)), next(iter(alone))
    order = batch["sample_id"].argsort()
    assert batch["stream"][order].tolist() == [0, 0] + [1] * len(SAMPLES)
    with torch.no_grad():
        found, alone_nll = model(batch)["nll"][order][:2], model(expected)["nll"]
    assert (alone_nll > 0).any()
    length = alone_nll.shape[1]
    torch.testing.assert_close(found[:, :length], alone_nll, rtol=1e-5, atol=1e-5)
    assert (found[:, length:] == 0).all()


@pytest.mark.parametrize("kind", ["patches", "llava"])
def test_captioning_reads_the_date_of_training(kind, tokenizer):
    model = foreign(kind) if kind in FOREIGN else own(kind, tokenizer)
    template = "{{ 'w20' if strftime_now('%Y') == '2024' else 'w21' }}" + model.tokenizer.chat_template
    model.processor.chat_template = template
    inputs = model_inputs(model.processor, images_of(SAMPLES[3]), "w8")
    assert "w20w10" in model.tokenizer.decode(inputs["input_ids"][0]).replace(" ", "")


@pytest.mark.parametrize("kind", ["patches", "llava"])
def test_a_template_that_writes_bos_writes_it_once_in_captioning_and_in_training(kind, tokenizer, tmp_path):
    model = foreign(kind) if kind in FOREIGN else own(kind, tokenizer)
    model.tokenizer.chat_template = model.processor.chat_template = "{{ bos_token }}" + model.tokenizer.chat_template
    begin = model.tokenizer.bos_token_id
    inputs = model_inputs(model.processor, images_of(SAMPLES[3]), "w8")
    assert inputs["input_ids"][0].tolist().count(begin) == 1
    text = model.processor.apply_chat_template(turns("<image>w8"), add_generation_prompt=True)
    sample = loader(tmp_path, model, [(turns("<image>w8", "w9"), SAMPLES[3][1])]).dataset[0]
    ids = sample["input_ids"][: -int((sample["labels"] != IGNORE_INDEX).sum())].tolist()
    assert ids == inputs["input_ids"][0].tolist()
    assert text.startswith(model.tokenizer.bos_token)


def test_paligemma_is_refused_as_it_sees_its_prefix_both_ways(tmp_path):
    model = foreign("llava")
    processor = replace(model.image_processor, caption_type=1)
    local = write_chats(tmp_path, SAMPLES[3:4])
    with pytest.raises(ValueError, match=r"PaliGemma .* learns captions, no conversations"):
        StreamingCaptionDataset(local=local, tokenizer=model.tokenizer, image_processor=processor, batch_size=1)
