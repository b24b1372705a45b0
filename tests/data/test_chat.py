"""Conversations as text: chat templates of usual families, the learned tokens, and what is refused."""

import re

import pytest
from common.chats import ENDS, MARKED, TEMPLATES, TOKENIZERS, turns
from common.tokenizers import plain_tokenizer
from tokenizers import processors

from composer_prior.data.chat import ChatFormat, characters, use_template, within, write_prompt
from composer_prior.data.conversations import ChatError, checked, pack_images, unpack_images
from composer_prior.data.tokenizer import IMAGE_TOKEN, add_image_tokens

TALK = turns("<image>What is it?", "  A red cat. ", "And\n\nbelow it?", "\nNothing at all,\nreally \u2603")
WORDS = ["what is it a red cat and below it nothing at all really"] * 20


def chat_tokenizer(name):
    tokenizer = plain_tokenizer(TOKENIZERS[name], WORDS)
    if name == "llama3":
        tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>"], special_tokens=True)
    add_image_tokens(tokenizer)
    return tokenizer


def learned_texts(tokenizer, written):
    """Decode each run of learned tokens of the whole text."""
    encoding = tokenizer(written.text, add_special_tokens=False).encodings[0]
    mask = within(characters(encoding, written.text), written.learned)
    runs, before = [], False
    for i, one in zip(encoding.ids, mask, strict=True):
        if one:
            runs = runs if before else [*runs, []]
            runs[-1].append(i)
        before = one
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("text", ["a  cat ", "what is  it", "ASSISTANT: \nred", "a   ", "a\u0120 \u0120"])
def test_characters_include_the_spaces_that_trimmed_offsets_leave_out(text):
    tokenizer = plain_tokenizer("qwen2", WORDS)
    read = []
    for trim in (True, False):
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
        read.append(tokenizer(text, add_special_tokens=False).encodings[0])
    assert characters(read[0], text) == characters(read[1], text) == read[1].offsets


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_end_of_turn_are_learned_and_nothing_else(name):
    tokenizer = chat_tokenizer(name)
    use_template(tokenizer, TEMPLATES[name], IMAGE_TOKEN)
    written = ChatFormat(tokenizer, IMAGE_TOKEN).write(TALK)
    assert len(written.images) == 1
    found = learned_texts(tokenizer, written)
    answers = [one["content"][-1]["text"] for one in TALK[1::2]]
    answers = [text.strip() if name == "llama3" else text for text in answers]  # which trims
    assert [text.lstrip() for text in found] == [answer.lstrip() + ENDS[name] for answer in answers]


@pytest.mark.parametrize(
    "date",
    [
        "strftime_now('%d %b %Y')",
        "(date_string if date_string is defined else strftime_now('%d %b %Y'))",  # Llama 3's
    ],
)
def test_a_template_with_a_date_writes_the_same_one_every_day(date):
    tokenizer = chat_tokenizer("qwen2")
    use_template(tokenizer, "{{ 'Today: ' + " + date + " }}" + TEMPLATES["qwen2"], IMAGE_TOKEN)
    written = ChatFormat(tokenizer, IMAGE_TOKEN).write(TALK)
    assert written.text.startswith("Today: 26 Jul 2024<|im_start|>")
    assert write_prompt(tokenizer, TALK[:1]).startswith("Today: 26 Jul 2024<|im_start|>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers_for_texts_alone(name):
    tokenizer, plain = chat_tokenizer(name), chat_tokenizer(name)
    use_template(tokenizer, TEMPLATES[name], IMAGE_TOKEN)
    plain.chat_template = TEMPLATES[name]
    texts = [
        {"role": one["role"], "content": "\n".join(part.get("text", IMAGE_TOKEN) for part in one["content"])}
        for one in TALK
    ]
    assert ChatFormat(tokenizer, IMAGE_TOKEN).write(TALK).text == plain.apply_chat_template(texts, tokenize=False)
    # The template takes parts now, so that pipelines of transformers can use it too.
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == plain.apply_chat_template(texts, tokenize=False)


def test_marks_of_generation_are_those_of_transformers_and_of_reading_turn_by_turn():
    tokenizer = chat_tokenizer("qwen2")
    use_template(tokenizer, MARKED, IMAGE_TOKEN)
    assert tokenizer.chat_template == MARKED  # it takes parts by itself
    marked = ChatFormat(tokenizer, IMAGE_TOKEN).write(TALK)
    theirs = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    encoding = tokenizer(marked.text, add_special_tokens=False).encodings[0]
    assert encoding.ids == theirs["input_ids"]
    assert [int(one) for one in within(characters(encoding, marked.text), marked.learned)] == theirs["assistant_masks"]
    use_template(tokenizer, re.sub(r"\{% (end)?generation %\}", "", MARKED), IMAGE_TOKEN)
    assert ChatFormat(tokenizer, IMAGE_TOKEN).write(TALK) == marked


@pytest.mark.parametrize(("weight", "other"), [(0, 1), (False, True)])
def test_an_answer_of_weight_0_is_not_learned(weight, other):
    tokenizer = chat_tokenizer("qwen2")
    use_template(tokenizer, TEMPLATES["qwen2"], IMAGE_TOKEN)
    silent = [TALK[0], {**TALK[1], "weight": weight}, TALK[2], {**TALK[3], "weight": other}]
    written = ChatFormat(tokenizer, IMAGE_TOKEN).write(silent)
    assert written.learned == ChatFormat(tokenizer, IMAGE_TOKEN).write(TALK).learned[1:]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        (turns("Only a question"), "no answer is learned"),
        (turns("What?", ""), "an answer is empty"),
        (turns("What?", " \n"), "an answer is empty"),
        (turns("What <|im_end|>?", "it"), r"spells <\|im_end\|>"),
        (turns("What?", "an \ufdd0"), "spells"),
        (turns("What \ud83d?", "it"), "not Unicode"),
        ([{"role": "user<|im_end|>", "content": "a"}, *turns("b", "c")], r"no known role: 'user<\|im_end\|>'"),
        ([*turns("a", "b", "c"), {"role": "asistant", "content": "d"}], "no known role: 'asistant', expected system"),
        ([{**message, "weight": 0.5} for message in turns("a", "b")], "neither 0 nor 1: 0.5"),
        ([{"role": "document", "content": "a \ud83d"}], "not Unicode"),
        ([{"role": "user", "content": [{"type": "video"}]}], "neither .*: of type 'video'"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], "no known role: None"),
        ([{"role": "document", "content": [{"type": "image"}]}], "no text"),
        ([{"role": "document", "content": "a"}, {"role": "user", "content": "a"}], "one message alone"),
        ({}, "not a list"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, error):
    tokenizer = chat_tokenizer("qwen2")
    use_template(tokenizer, TEMPLATES["qwen2"], IMAGE_TOKEN)
    with pytest.raises(ChatError, match=error):
        ChatFormat(tokenizer, IMAGE_TOKEN).write(messages)


def test_messages_have_no_other_keys_and_a_weight_of_null_is_none():
    messages = [{**one, "tool_calls": ["<|im_end|>"], "name": "\ud83d", "weight": None} for one in TALK]
    messages[0]["content"] = [{"type": "image", "text": 5}, {**TALK[0]["content"][1], "more": "<|im_end|>"}]
    assert checked(messages) == TALK


def test_turns_behind_the_last_answer_are_not_learned():
    tokenizer = chat_tokenizer("qwen2")
    use_template(tokenizer, TEMPLATES["qwen2"], IMAGE_TOKEN)
    chat = ChatFormat(tokenizer, IMAGE_TOKEN)
    assert chat.write([*TALK, *turns("And now?")]).learned == chat.write(TALK).learned


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("own", "has none"),
        ("nowhere.jinja", "no file"),
        ("{{ 1 +", "cannot write"),
        ("{% for message in messages %}{{ message['content'] }}{% endfor %}", "no end of turn"),
        ("{% for message in messages %}{{ message['role'] }}{% endfor %}", "for an image"),
        ("{% for m in messages %}{{ m['content'] }}|{{ loop.length }}</s>{% endfor %}", "generation"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_at_once(template, error):
    with pytest.raises(ValueError, match=f"tokenizer.chat_template.*{error}"):
        use_template(chat_tokenizer("vicuna"), template, IMAGE_TOKEN)


def test_a_template_from_a_file(tmp_path):
    (tmp_path / "chat.jinja").write_text(TEMPLATES["vicuna"])
    one, other = chat_tokenizer("vicuna"), chat_tokenizer("vicuna")
    use_template(one, str(tmp_path / "chat.jinja"), IMAGE_TOKEN)
    use_template(other, TEMPLATES["vicuna"], IMAGE_TOKEN)
    assert one.chat_template == other.chat_template


def test_a_document_is_learned_whole():
    tokenizer = chat_tokenizer("vicuna")
    content = [{"type": "text", "text": "a cat"}, {"type": "image"}, {"type": "text", "text": " below"}]
    written = ChatFormat(tokenizer, IMAGE_TOKEN).write([{"role": "document", "content": content}])
    assert written.text == "<s>a cat<image> below</s>"
    assert [written.text[start:end] for start, end in written.learned] == ["a cat", " below", "</s>"]


@pytest.mark.parametrize("images", [[], [b""], [b"a", b"", b"bcd"]])
def test_images_of_one_value(images):
    packed = pack_images(images)
    assert unpack_images(packed) == images
    for broken in (packed[:-1], packed + b"x", b"", b"\xff\xff\xff\xff"):
        with pytest.raises(ChatError, match="sizes"):
            unpack_images(broken)
