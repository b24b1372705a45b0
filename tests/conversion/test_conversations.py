"""Conversations, interleaved documents and text alone, in the forms that people have them, to MDS."""

import base64
import csv
import json

import pytest
from common.chats import png
from streaming.base.local import LocalDataset

from composer_prior.conversion.convert import convert_captions
from composer_prior.conversion.options import ConversionError
from composer_prior.conversion.sources import SourceError
from composer_prior.data.conversations import unpack_images

IMAGE, TEXT = {"type": "image"}, lambda text: {"type": "text", "text": text}
PICTURES = {f"{n}.png": png(n) for n in range(4)}
LLAVA = [
    {
        "id": "a",
        "image": "0.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A tile."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    },
    {"id": "b", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello!"}]},
    {
        "id": "a",
        "image": "0.png",
        "conversations": [{"from": "human", "value": "Again?\n<image>"}, {"from": "gpt", "value": "Yes"}],
    },
]
OPENAI = [
    {
        "images": ["0.png", "1.png"],
        "messages": [
            {"role": "system", "content": "You help."},
            {"role": "user", "content": [TEXT("Compare"), IMAGE, TEXT("and"), IMAGE]},
            {"role": "assistant", "content": "One is lighter.", "weight": 0},
            {"role": "user", "content": "Which?"},
            {"role": "assistant", "content": [TEXT("The second.")]},
        ],
    },
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {
                        "type": "image_url",
                        "image_url": {"url": "data:image/png;base64," + base64.b64encode(PICTURES["2.png"]).decode()},
                    },
                    TEXT("What?"),
                ],
            },
            {"role": "assistant", "content": "A tile."},
        ]
    },
]


def lines(folder, entries, name="data.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in PICTURES.items():
        (folder / file).write_bytes(data)
    text = json.dumps(entries) if name.endswith("json") else "".join(json.dumps(one) + "\n" for one in entries)
    (folder / name).write_text(text)
    return folder / name


def written(folder, entries, form):
    """A list or table of entries in a folder beside the pictures."""
    source = lines(folder, entries, f"data.{form}")
    if form == "hf":
        source.unlink()
        pytest.importorskip("datasets").Dataset.from_list(entries).save_to_disk(folder)
        return folder
    if form == "parquet":
        parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        parquet.write_table(arrow.Table.from_pylist(entries), source)
    if form in ("csv", "tsv"):
        with source.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*entries[0]], delimiter={"csv": ",", "tsv": "\t"}[form])
            writer.writeheader()
            for entry in entries:
                writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in entry.items()})
    return source


def converted(source, out, **options):
    summary = convert_captions(source, out, **{"learn": "answers", "processes": 1, **options})
    data = LocalDataset(str(out)) if summary.samples else ()
    return summary, [(one["messages"], unpack_images(one["images"])) for one in (data[i] for i in range(len(data)))]


def test_captions_of_conversations_with_further_answers_are_counted(tmp_path):
    summary = convert_captions(lines(tmp_path / "in", LLAVA, "mix665k.json"), tmp_path / "out", max_rejected=1)
    assert (summary.captions, summary.further) == (1, 1)
    assert "1 captions are the first of several answers; learn=answers keeps them all" in str(summary)


@pytest.mark.parametrize("name", ["mix665k.json", "mix.jsonl"])
def test_conversations_of_llava(name, tmp_path):
    summary, samples = converted(lines(tmp_path / "in", LLAVA, name), tmp_path / "out")
    assert (summary.samples, summary.rejected) == (3, 0)
    assert samples[0] == (
        [
            {"role": "user", "content": [IMAGE, TEXT("What is it?")]},
            {"role": "assistant", "content": [TEXT("A tile.")]},
            {"role": "user", "content": [TEXT("Sure?")]},
            {"role": "assistant", "content": [TEXT("Yes.")]},
        ],
        [PICTURES["0.png"]],
    )
    assert samples[1][1] == []
    assert samples[2][0][0]["content"] == [TEXT("Again?"), IMAGE]


def test_messages_of_openai_and_hugging_face(tmp_path):
    _, samples = converted(lines(tmp_path / "in", OPENAI), tmp_path / "out")
    (first, images), (second, inner) = samples
    assert images == [PICTURES["0.png"], PICTURES["1.png"]]
    assert inner == [PICTURES["2.png"]]
    assert [one["role"] for one in first] == ["system", "user", "assistant", "user", "assistant"]
    assert first[1]["content"] == [TEXT("Compare"), IMAGE, TEXT("and"), IMAGE]
    assert first[2] == {"role": "assistant", "content": [TEXT("One is lighter.")], "weight": 0}
    assert second[0]["content"] == [IMAGE, TEXT("What?")]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_pairs_of_user_and_assistant_with_their_images_in_front(form, tmp_path):
    entry = {
        "images": ["0.png", "1.png"],
        "texts": [{"user": "A?", "assistant": "a"}, {"user": "B?", "assistant": "b"}],
    }
    source = lines(tmp_path / "in", [entry])
    if form == "parquet":
        parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        images = [[{"bytes": PICTURES["0.png"], "path": None}, {"bytes": PICTURES["1.png"], "path": None}]]
        parquet.write_table(arrow.table({"images": images, "texts": [entry["texts"]]}), tmp_path / "in.parquet")
        source = tmp_path / "in.parquet"
    _, ((messages, images),) = converted(source, tmp_path / "out", learn="last")
    assert images == [PICTURES["0.png"], PICTURES["1.png"]]
    assert messages[0]["content"] == [IMAGE, IMAGE, TEXT("A?")]
    assert [one.get("weight", 1) for one in messages] == [1, 0, 1, 1]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_interleaved_documents(form, tmp_path):
    entry = {"images": ["0.png", None, None, "1.png"], "texts": [None, "One.", "Two.", None]}
    source = lines(tmp_path / "in", [entry])
    if form == "parquet":
        parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        parquet.write_table(arrow.table({key: [value] for key, value in entry.items()}), tmp_path / "in" / "0.parquet")
        (tmp_path / "in" / "data.jsonl").unlink()
        source = tmp_path / "in" / "0.parquet"
    _, ((messages, images),) = converted(source, tmp_path / "out")
    assert images == [PICTURES["0.png"], PICTURES["1.png"]]
    assert messages == [{"role": "document", "content": [IMAGE, TEXT("One.\n\nTwo."), IMAGE]}]


def of_mmc4(sentences, *matched):
    """A document as MMC4 publishes it; ``matched`` are names of images and the sentences that they match."""
    info = [
        {"image_name": name, "raw_url": f"https://x.test/{name}", "matched_text_index": index, "matched_sim": 0.3}
        for name, index in matched
    ]
    scores = [[0.3] * len(sentences)] * len(info)
    return {"url": "https://x.test", "text_list": sentences, "image_info": info, "similarity_matrix": scores}


def test_documents_of_mmc4(tmp_path):
    entries = [
        of_mmc4(["One.", "Two.", "Three.", "Four."], ("2.png", 3), ("0.png", 1), ("1.png", 1)),
        of_mmc4(["Zero.", "One."], ("0.png", 0)),
        of_mmc4(["One.", "Two."], ("0.png", 2)),
        of_mmc4(["One.", None], ("0.png", 0)),
        {**of_mmc4(["One."]), "image_info": ["0.png"]},
    ]
    summary, samples = converted(lines(tmp_path / "in", entries), tmp_path / "out", max_rejected=1)
    assert summary.reasons == {"malformed record": 3}
    content = [TEXT("One."), IMAGE, IMAGE, TEXT("Two. Three."), IMAGE, TEXT("Four.")]
    assert samples == [
        ([{"role": "document", "content": content}], [PICTURES[f"{name}.png"] for name in (0, 1, 2)]),
        ([{"role": "document", "content": [IMAGE, TEXT("Zero. One.")]}], [PICTURES["0.png"]]),
    ]


def of_vqa(folder):
    """Questions and annotations as VQA v2 publishes them, and their images."""
    head = {"info": {"version": "2.0"}, "license": {"name": "CC"}, "data_type": "mscoco", "data_subtype": "train2014"}
    asked = [(458752, 0, "What is it?"), (458752, 1, "Is it green?"), (7, 0, "How many?"), (8, 0, "Lost?")]
    questions = [{"image_id": i, "question": text, "question_id": i * 1000 + n} for i, n, text in asked]
    annotations = [
        {
            "question_type": "what is",
            "multiple_choice_answer": most,
            "answers": [{"answer": "other", "answer_confidence": "maybe", "answer_id": 1}],
            "image_id": question["image_id"],
            "answer_type": "other",
            "question_id": question["question_id"],
        }
        for question, most in zip(questions, ["a tile", "yes", "1"], strict=False)
    ]
    (folder / "images").mkdir(parents=True)
    for number, name in ((0, 458752), (1, 7), (2, 8)):
        (folder / f"images/COCO_train2014_{name:012}.jpg").write_bytes(PICTURES[f"{number}.png"])
    source = folder / "v2_OpenEnded_mscoco_train2014_questions.json"
    source.write_text(json.dumps({**head, "task_type": "Open-Ended", "questions": questions}))
    beside = folder / "v2_mscoco_train2014_annotations.json"
    beside.write_text(json.dumps({**head, "annotations": annotations}))
    return source, beside


def asked(question, answer):
    parts = [IMAGE, TEXT(question)]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": [TEXT(answer)]}]


def test_questions_of_vqa(tmp_path):
    source, beside = of_vqa(tmp_path / "in")
    summary, samples = converted(source, tmp_path / "out", max_rejected=1)
    pictures = [[PICTURES[f"{number}.png"]] for number in (0, 0, 1)]
    turns = [asked("What is it?", "a tile"), asked("Is it green?", "yes"), asked("How many?", "1")]
    assert samples == [*zip(turns, pictures, strict=True)]
    assert summary.reasons == {"no answer": 1}  # without an annotation
    with pytest.raises(SourceError, match="questions are no captions of images; convert them with learn=answers"):
        convert_captions(source, tmp_path / "captions")
    beside.unlink()
    with pytest.raises(SourceError, match=r"in v2_mscoco_train2014_annotations\.json, 'annotations' .*FileNotFound"):
        converted(source, tmp_path / "no")


def test_questions_of_textvqa(tmp_path):
    asks = [{"question_id": n, "image_id": f"{n}", "question": "Says?", "answers": ["a", "b", "b"]} for n in (0, 1)]
    source = lines(tmp_path / "in", [], "TextVQA_0.5.1_train.json")
    source.write_text(json.dumps({"dataset_type": "train", "data": [*asks, {**asks[0], "question_id": 2}, 3]}))
    for number in (0, 1):
        (tmp_path / f"in/{number}.jpg").write_bytes(PICTURES[f"{number}.png"])
    summary, samples = converted(source, tmp_path / "out", max_rejected=1)
    pictures = [[PICTURES[f"{n}.png"]] for n in (0, 1, 0)]
    assert samples == [(asked("Says?", "b"), images) for images in pictures]
    assert summary.reasons == {"malformed record": 1}


def test_questions_with_several_answers(tmp_path):
    entries = [
        {"image": "0.png", "question": "What?", "answers": [{"answer": text} for text in ("b", "a", "a")]},
        {"image": "1.png", "question": "What?", "answers": ["b", "a"]},
        {"image": "2.png", "question": "What?", "answer": "c"},
        {"image": "2.png", "question": "What?", "answers": [["c"]]},
    ]
    summary, samples = converted(lines(tmp_path / "in", entries, "vizwiz.json"), tmp_path / "out", max_rejected=1)
    assert [messages for messages, _ in samples] == [asked("What?", answer) for answer in "abc"]
    assert summary.reasons == {"malformed record": 1}


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "hf"])
def test_questions_and_mmc4_are_read_from_tables_as_from_json(form, tmp_path):
    asks = [{"id": str(n), "image": f"{n}.png", "question": f"{n}?", "answers": ["b", "a", "a"]} for n in (0, 1)]
    source = written(tmp_path / "in", asks, form)
    _, samples = converted(source, tmp_path / "out")
    assert samples == [(asked(f"{n}?", "a"), [PICTURES[f"{n}.png"]]) for n in (0, 1)]
    _, samples = converted(source, tmp_path / "text", image_column="none")
    assert [(turns[0]["content"], images) for turns, images in samples] == [([TEXT(f"{n}?")], []) for n in (0, 1)]
    document = {**of_mmc4(["One.", "Two."], ("2.png", 1)), "path": "shard_1"}
    _, samples = converted(written(tmp_path / "mmc4", [document], form), tmp_path / "mds")
    content = [TEXT("One."), IMAGE, TEXT("Two.")]
    assert samples == [([{"role": "document", "content": content}], [PICTURES["2.png"]])]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "hf"])
@pytest.mark.parametrize("name", ["image_id", "imageId", "img_url"])
def test_a_question_whose_image_has_another_name_is_not_one_of_text(name, form, tmp_path):
    entries = [{name: "0.png", "question": "What?", "answer": "red"}]
    source = written(tmp_path / "in", entries, form)
    with pytest.raises(ConversionError, match=f"1 missing image.*: '{name}' may name one: .* image_column=none"):
        converted(source, tmp_path / "out")
    _, samples = converted(source, tmp_path / "given", image_column=name)
    assert samples == [(asked("What?", "red"), [PICTURES["0.png"]])]
    _, ((messages, images),) = converted(source, tmp_path / "text", image_column="none")
    assert (messages[0]["content"], images) == ([TEXT("What?")], [])


@pytest.mark.parametrize("form", ["csv", "parquet", "hf"])
def test_a_table_of_texts_and_of_images_by_another_name_is_refused(form, tmp_path):
    source = written(tmp_path / "in", [{"image_id": "0.png", "caption": "A tile."}], form)
    with pytest.raises(SourceError, match="no column of images, but image_id; choose it with image_column=, or"):
        converted(source, tmp_path / "out")
    _, samples = converted(source, tmp_path / "given", image_column="image_id")
    assert [images for _, images in samples] == [[PICTURES["0.png"]]]


@pytest.mark.parametrize("answers", [{"text": ["a"]}, "b"])
def test_a_text_of_the_record_stands_before_its_question(answers, tmp_path):
    turns = [{"role": "user", "content": "<image>Hi"}, {"role": "assistant", "content": "Hello"}]
    entry = {"image": "0.png", "question": "q", "answers": answers}
    for name, given, options in (("messages", turns, {}), ("caption", "A tile.", {}), ("response", "A tile.", {})):
        options = {"caption_column": name} if name == "response" else options
        source = written(tmp_path / name / "in", [{**entry, name: given}], "jsonl")
        _, ((messages, images),) = converted(source, tmp_path / name / "out", **options)
        assert messages[-1]["content"] == [TEXT("Hello" if name == "messages" else given)]
        assert images == [PICTURES["0.png"]]


def test_a_question_id_that_no_answer_can_have_is_told_in_one_line(tmp_path):
    source, _ = of_vqa(tmp_path / "in")
    source.write_text(json.dumps({"questions": [{"question_id": [1], "image_id": 1, "question": "q"}]}))
    with pytest.raises(SourceError, match=r"not questions of VQA.*TypeError unhashable type"):
        converted(source, tmp_path / "out")


def test_captions_of_coco_are_answers_to_their_image(tmp_path):
    images = [{"id": 9, "file_name": "0.png"}, {"id": 10, "file_name": "1.png"}]
    notes = [{"image_id": 9, "id": n, "caption": text} for n, text in enumerate(["A tile.", "One tile."])]
    source = lines(tmp_path / "in", [])
    source.unlink()
    source = source.with_name("captions_val2017.json")
    source.write_text(json.dumps({"images": images, "annotations": notes, "data": []}))
    summary, samples = converted(source, tmp_path / "out", max_rejected=1)
    assert [messages for messages, _ in samples] == [
        [{"role": "user", "content": [IMAGE]}, {"role": "assistant", "content": [TEXT(note["caption"])]}]
        for note in notes
    ]
    assert summary.rejected == 1


def test_a_text_file_is_a_document_for_each_block(tmp_path):
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbfOne,\r\ntwo.\r\n\r\n  \r\n[3]\n\n\nfour\xff\n\nFive")
    summary, samples = converted(tmp_path / "book.txt", tmp_path / "out", max_rejected=1)
    texts = [messages[0]["content"][0]["text"] for messages, _ in samples]
    assert texts == ["One,\ntwo.", "[3]", "Five"]
    assert all(messages[0]["role"] == "document" and not images for messages, images in samples)
    assert summary.reasons == {"invalid UTF-8": 1}
    (tmp_path / "a.txt").write_text("Zero\n\nFive")
    summary, samples = converted(tmp_path, tmp_path / "all", max_rejected=1)  # the folder of both
    assert [messages[0]["content"][0]["text"] for messages, _ in samples] == ["Zero", "Five", *texts[:2]]
    assert summary.reasons == {"duplicate key": 1, "invalid UTF-8": 1}
    assert str(summary).startswith("6 samples read, 4 written in 1 shards")
    with pytest.raises(SourceError, match="no caption of an image; with learn=all it is converted to documents"):
        convert_captions(tmp_path, tmp_path / "no")


def test_text_alone_and_all_text_of_a_conversation(tmp_path):
    _, samples = converted(lines(tmp_path / "in", [{"text": "Some text."}]), tmp_path / "out")
    assert samples == [([{"role": "document", "content": [TEXT("Some text.")]}], [])]
    caption = [{"image": "0.png", "caption": "A tile."}]
    _, samples = converted(lines(tmp_path / "in", caption), tmp_path / "caption")
    turns = [{"role": "user", "content": [IMAGE]}, {"role": "assistant", "content": [TEXT("A tile.")]}]
    assert samples == [(turns, [PICTURES["0.png"]])]
    _, samples = converted(lines(tmp_path / "in", LLAVA[:1]), tmp_path / "all", learn="all")
    document = [IMAGE, TEXT("What is it?\nA tile.\nSure?\nYes.")]
    assert samples == [([{"role": "document", "content": document}], [PICTURES["0.png"]])]


def test_what_cannot_be_learned_is_rejected_by_reason(tmp_path):
    ask, answer = {"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "a"}
    entries = [
        {"id": 1, "image": "0.png", "messages": [ask, answer]},
        {"id": 2, "messages": [{"role": "user", "content": "?"}]},
        {"id": 3, "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]},
        {"id": 4, "image": "9.png", "messages": [{"role": "user", "content": "<image>?"}, answer]},
        {"id": 5, "messages": [{"role": "user", "content": "?"}, answer]},
        {"id": 5, "messages": [{"role": "user", "content": "?"}, answer]},
        {"id": 6, "messages": [{"role": "user", "content": "?"}, answer, {"role": "user", "content": "And?"}]},
        {"id": 7, "images": ["0.png", "1.png"], "messages": [{"role": "user", "content": "<image>?"}, answer]},
    ]
    summary, samples = converted(lines(tmp_path / "in", entries), tmp_path / "out", max_rejected=1)
    assert summary.reasons == {
        "an answer is empty": 1,
        "duplicate key": 1,
        "images and text differ": 2,
        "missing file": 1,
        "no answer is learned": 1,
    }
    assert [len(messages) for messages, _ in samples] == [2, 3]


ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("entry", "reason", "detail"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "video"}, TEXT("?")]}, ANSWER]}, "a part of", "'video'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "content": "?"}]}, ANSWER]},
            "a part of",
            "content",
        ),
        (
            {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": 7}]},
            "a part of",
            "7 is no text",
        ),
        ({"texts": [{"user": "?", "assistant": 7}, {"user": "?", "assistant": "b"}]}, "a part of", "7 is no text"),
        ({"messages": [{"role": "user"}, ANSWER]}, "a message has no content", "fields are role"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "a message has no content", "role, content"),
        ({"messages": [{"role": "user", "content": "?"}, "a"]}, "a message is no object", "'a'"),
        ({"messages": "notalist"}, "malformed messages", "messages is no list"),
        ({"messages": []}, "malformed messages", "messages is no list"),
        ({"messages": [ANSWER, {"role": "asistant", "content": "b"}]}, "a message has no known role", "'asistant'"),
        (
            {"messages": [{"role": "observation", "content": "b"}, ANSWER]},
            "a message has no known role",
            "'observation'",
        ),
        ({"messages": [{"content": "b"}, ANSWER]}, "a message has no known role", "None"),
        ({"messages": [{**ANSWER, "weight": 0.5}]}, "a weight is neither 0 nor 1", "0.5"),
        ({"images": [None, "0.png"], "texts": ["a", None, "b"]}, "images and text differ", "2 images and 3 texts"),
        ({"images": ["0.png", ""], "texts": ["", "a", "", "b"]}, "images and text differ", "2 images and 4 texts"),
        (
            {"text_list": ["a"], "image_info": [{"matched_text_index": 5}]},
            "malformed record",
            "5 is none of 1 sentences",
        ),
        ({"question": "?", "answers": []}, "no answer", "the question has none"),
        ({"prompt": "?", "completion": "a"}, "no known field", "found prompt, completion; expected messages"),
        ({"f" * 300: "?"}, "no known field", f"found {'f' * 200}… (300 characters); expected messages"),
        (
            {"messages": [{"role": "user", "f" * 300: "?"}, ANSWER]},
            "a message has no content",
            f"its fields are role, {'f' * 194}… (306 characters)",
        ),
    ],
)
def test_what_is_not_understood_is_rejected_by_its_name(entry, reason, detail, tmp_path):
    given = {"image": "0.png", **entry} if "messages" in entry else entry
    _, samples = converted(lines(tmp_path / "in", [given, given, OPENAI[1]]), tmp_path / "out", max_rejected=1)
    found = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert len(samples) == 1
    assert [one["reason"].startswith(reason) and detail in one["detail"] for one in found] == [True, True]


def test_wrong_fields_of_captions_are_named(tmp_path):
    entries = [{"prompt": "?", "completion": "a"}, {"image": "0.png", "response": "a"}, {"image": None, "caption": "a"}]
    with pytest.raises(ConversionError, match=r"3 of 3 captions were rejected \(2 missing image, 1 missing caption"):
        convert_captions(lines(tmp_path / "in", entries), tmp_path / "out")
    found = [json.loads(line)["detail"] for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert found[0].startswith("found prompt, completion; expected image, image_path")
    assert found[1].startswith("found image, response; expected conversations, messages, caption")
    assert found[2] == "neither a path nor the bytes of an image"


def test_learn_is_refused_where_no_conversation_is_read(tmp_path):
    lines(tmp_path / "in", [])
    (tmp_path / "in/data.jsonl").unlink()
    (tmp_path / "in/0.txt").write_text("A tile.")
    with pytest.raises(SourceError, match=r"learn=answers reads jsonl, .*, not folder"):
        convert_captions(tmp_path / "in", tmp_path / "out", learn="answers")
    with pytest.raises(SourceError, match="learn='some'"):
        convert_captions(tmp_path / "in", tmp_path / "out", learn="some")
    with pytest.raises(SourceError, match="no caption of an image; with learn=all"):
        convert_captions(tmp_path / "in/0.txt", tmp_path / "out", form="txt")


@pytest.mark.parametrize("options", [{}, {"image_column": "none"}])
@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet"])
def test_text_alone_of_any_list_and_beside_a_column_that_is_no_image(form, options, tmp_path):
    entries = [{"text": "One, here.", **({"path": "src/a.py"} if options else {})}, {"text": "Two."}]
    entries[1] |= {"path": "src/b.py"} if options else {}
    _, samples = converted(written(tmp_path / "in", entries, form), tmp_path / "out", learn="all", **options)
    assert samples == [([{"role": "document", "content": [TEXT(one["text"])]}], []) for one in entries]


def test_empty_texts_and_images_alternate_as_null_does(tmp_path):
    entry = {"images": ["0.png", "", "1.png"], "texts": ["", "One.", ""]}
    _, ((messages, images),) = converted(lines(tmp_path / "in", [entry]), tmp_path / "out")
    assert messages == [{"role": "document", "content": [IMAGE, TEXT("One."), IMAGE]}]
    assert images == [PICTURES["0.png"], PICTURES["1.png"]]


@pytest.mark.parametrize(
    ("entry", "content"),
    [
        ({"images": [], "texts": ["a", "", "b"]}, [TEXT("a\n\nb")]),
        (
            {"images": ["0.png", "1.png"], "texts": ["<image> a", "<image> b", ""]},
            [IMAGE, TEXT(" a"), IMAGE, TEXT(" b")],
        ),
        ({"images": ["0.png"], "captions": ["a", "b", ""]}, [IMAGE, TEXT("a\n\nb")]),
    ],
)
def test_an_empty_text_may_be_none_of_an_image(entry, content, tmp_path):
    source = lines(tmp_path / "in", [entry])
    _, ((messages, images),) = converted(source, tmp_path / "out", learn="all")
    assert messages == [{"role": "document", "content": content}]
    assert images == [PICTURES[name] for name in entry["images"]]


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("system", [{}, {"content": None}, {"content": ""}])
def test_a_system_message_that_says_nothing_is_left_out(system, role, tmp_path):
    turns = [{"role": "user", "content": "?"}, {**ANSWER, "weight": False}, {**ANSWER, "weight": True}]
    source = lines(tmp_path / "in", [{"image": "0.png", "messages": [{"role": role, **system}, *turns]}])
    _, ((messages, _),) = converted(source, tmp_path / "out")
    answers = [{"role": "assistant", "content": [TEXT("a")], "weight": weight} for weight in (0, 1)]
    assert messages == [{"role": "user", "content": [IMAGE, TEXT("?")]}, *answers]


def test_one_caption_in_a_list_answers_its_image_and_several_are_rejected(tmp_path):
    entries = [{"image": "0.png", "captions": ["a cat"]}, {"image": "1.png", "captions": ["a cat", "one cat"]}]
    summary, samples = converted(lines(tmp_path / "in", entries), tmp_path / "out", max_rejected=1)
    turns = [{"role": "user", "content": [IMAGE]}, {"role": "assistant", "content": [TEXT("a cat")]}]
    assert samples == [(turns, [PICTURES["0.png"]])]
    assert summary.reasons == {"several captions": 1}
    _, samples = converted(lines(tmp_path / "in", entries[1:]), tmp_path / "all", learn="all")
    assert samples[0][0] == [{"role": "document", "content": [IMAGE, TEXT("a cat\n\none cat")]}]


def test_images_of_a_record_have_a_largest_size_together(tmp_path):
    entries = [{"images": ["0.png"] * count, "text": "Tiles."} for count in (16, 17)]
    limit = {"max_image_bytes": len(PICTURES["0.png"]), "max_rejected": 1}
    summary, samples = converted(lines(tmp_path / "in", entries), tmp_path / "out", **limit)
    assert [len(images) for _, images in samples] == [16]
    assert summary.reasons == {"images too large": 1}
