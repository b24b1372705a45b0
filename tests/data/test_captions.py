"""From MDS samples to batches: alignment, spans, bad samples, token counts."""

import io
import logging

import pytest
import torch
from common.models import patch_inputs, small_lvlm
from PIL import Image
from streaming import MDSWriter

from composer_prior import StreamingCaptionDataset
from composer_prior.data.batch import IGNORE_INDEX, count_tokens
from composer_prior.data.captions import BadSampleError, caption_data_spec, decode_image, draw, overlaps
from composer_prior.data.scores import ScoresError


def png(width=20, height=10, colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write(out, samples, **columns):
    with MDSWriter(out=str(out), columns={"image": "bytes", "caption": "str", **columns}) as writer:
        for sample in samples:
            writer.write(sample)
    return str(out)


def processor(image):
    return patch_inputs(image, 8, 32)


def open_data(folder, tokenizer, **arguments):
    return StreamingCaptionDataset(
        local=folder, tokenizer=tokenizer, image_processor=processor, batch_size=2, **arguments
    )


def test_a_sample_is_bos_image_prompt_caption_eos(tmp_path, tokenizer):
    folder = write(tmp_path / "data", [{"image": png(16, 8), "caption": "A small red fox"}])
    data = open_data(folder, tokenizer, prompt="Say: ")
    item = data[0]
    image, row = data.placeholder_ids
    prompt = tokenizer("Say: ", add_special_tokens=False)["input_ids"]
    caption = tokenizer("A small red fox", add_special_tokens=False)["input_ids"]
    prefix = [tokenizer.bos_token_id, image, image, row, *prompt]
    assert item["input_ids"].tolist() == [*prefix, *caption, tokenizer.eos_token_id]
    assert item["labels"].tolist() == [IGNORE_INDEX] * len(prefix) + [*caption, tokenizer.eos_token_id]
    assert item["pixel_patches"].shape == (2, 3 * 8 * 8)
    assert "image_related" not in item


def test_image_related_tokens_are_those_of_the_spans(scenes, tokenizer, make_spec):
    data = make_spec(small_lvlm("patches", tokenizer)).dataloader.dataset
    raw = super(StreamingCaptionDataset, data)
    for index in range(20):
        item, sample = data[index], raw.get_item(index)
        kept = item["labels"][item["image_related"]].tolist()
        words = "".join(sample["caption"][start:end] for start, end in sample["image_related_spans"])
        assert tokenizer.decode(kept).replace(" ", "") == words.replace(" ", "")
        assert not item["image_related"][item["labels"] == IGNORE_INDEX].any()
        assert not item["image_related"][-1]  # the image does not determine where the caption ends


def test_overlaps():
    assert overlaps([(0, 3), (3, 5), (5, 9)], [(4, 6)]) == [False, True, True]
    assert overlaps([(0, 3)], []) == [False]


def test_a_local_folder_may_begin_with_a_tilde(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "data", [{"image": png(8, 8), "caption": "a fox"}])
    write(tmp_path / "other", [{"image": png(8, 8), "caption": "a fox"}])
    assert len(open_data("~/data", tokenizer)) == 1
    streams = {"a": {"local": "~/data"}, "b": {"local": "~/other"}}
    mixed = StreamingCaptionDataset(
        streams=streams, tokenizer=tokenizer, image_processor=None, batch_size=1, shuffle=False
    )
    assert mixed.num_samples == 2
    with pytest.raises(ScoresError, match=f"{tmp_path}/scores holds no whole scores"):
        open_data("~/data", tokenizer, scores="~/scores")


def test_a_caption_cannot_spell_an_image_token(tmp_path, tokenizer):
    folder = write(tmp_path / "data", [{"image": png(8, 8), "caption": "<image> of <row> <bos><eos><pad>"}])
    item = open_data(folder, tokenizer)[0]
    caption = item["labels"][item["labels"] != IGNORE_INDEX].tolist()
    assert not set(caption[:-1]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(caption[:-1]) == "<image> of <row> <bos><eos><pad>"


def test_how_the_tokenizer_is_used_elsewhere_changes_no_sample(tmp_path, tokenizer):
    data = open_data(write(tmp_path / "data", [{"image": png(), "caption": "a <bos> fox on a hill"}]), tokenizer)
    before = data[0]["labels"]
    tokenizer("a fox", padding="max_length", truncation=True, max_length=2)
    assert torch.equal(data[0]["labels"], before)
    ids = tokenizer("a <bos> fox on a hill", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert before[before != IGNORE_INDEX].tolist() == [*ids, tokenizer.eos_token_id]


def test_a_long_caption_is_cut_without_an_end(tmp_path, tokenizer):
    folder = write(
        tmp_path / "data", [{"image": png(), "caption": "snail " * 50}, {"image": png(), "caption": "a fox"}]
    )
    data = open_data(folder, tokenizer, max_caption_tokens=10)
    long, short = (item["labels"][item["labels"] != IGNORE_INDEX] for item in (data[0], data[1]))
    assert len(long) == 10
    assert tokenizer.eos_token_id not in long
    assert short[-1] == tokenizer.eos_token_id


def test_a_batch_that_is_smaller_than_a_microbatch_stays_whole_without_a_warning(tmp_path, tokenizer, recwarn):
    samples = [{"image": png(), "caption": "a fox"}] * 5
    spec = caption_data_spec(open_data(write(tmp_path / "data", samples), tokenizer), 5)
    batch = next(iter(spec.dataloader))
    for size, expected in ((64, [5]), (5, [5]), (2, [2, 2, 1])):
        parts = spec.split_batch(batch, size)
        assert [len(part["input_ids"]) for part in parts] == expected
        assert all(torch.equal(torch.cat([part[key] for part in parts]), value) for key, value in batch.items())
    assert not [one for one in recwarn if "Cannot split" in str(one.message)]


def test_batches_are_padded_at_the_end(tmp_path, tokenizer):
    samples = [{"image": png(8, 8), "caption": "a fox"}, {"image": png(32, 16), "caption": "two small foxes on a hill"}]
    data = open_data(write(tmp_path / "data", samples), tokenizer)
    batch = next(iter(caption_data_spec(data, 2).dataloader))
    lengths = [len(data[int(i)]["input_ids"]) for i in batch["sample_id"]]
    for row, length in enumerate(lengths):
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (max(lengths) - length)
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
        assert (batch["input_ids"][row, length:] == tokenizer.pad_token_id).all()
    assert batch["patch_mask"].sum(1).tolist() == [1 if int(i) == 0 else 8 for i in batch["sample_id"]]
    assert {key: value.dtype for key, value in batch.items()} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "attention_mask": torch.int64,
        "pixel_patches": torch.float32,
        "patch_mask": torch.bool,
        "sample_id": torch.int64,
    }
    assert count_tokens(batch) == {
        "total": sum(lengths),
        "loss_generating": int((batch["labels"] != IGNORE_INDEX).sum()),
    }


def related(data, item):
    return data.tokenizer.decode(item["labels"][item["image_related"]].tolist())


def test_a_sample_may_have_no_spans(tmp_path, tokenizer):
    spans = [[[2, 5]], None, []]
    samples = [{"image": png(), "caption": "a fox", "image_related_spans": known} for known in spans]
    data = open_data(write(tmp_path / "data", samples, image_related_spans="json"), tokenizer)
    assert [related(data, data[index]).strip() for index in range(3)] == ["fox", "", ""]
    bad = [{"image": png(), "caption": "a fox", "image_related_spans": known} for known in ("2-5", [[1]], [["a", "b"]])]
    data = open_data(write(tmp_path / "bad", bad, image_related_spans="json"), tokenizer)
    for index in range(3):
        with pytest.raises(BadSampleError, match="image_related_spans is not a list of"):
            data[index]


@pytest.fixture
def several(tmp_path):
    """24 images with three captions each, of which the last words are image-related."""
    folder = tmp_path / "several"
    names = [[f"photo {index} of a {animal}" for animal in ("fox", "snail", "hedgehog")] for index in range(24)]
    with MDSWriter(out=str(folder), columns={"image": "bytes", "captions": "json", "image_related_spans": "json"}) as w:
        for captions in names:
            spans = [[[text.rindex(" ") + 1, len(text)]] if "snail" not in text else None for text in captions]
            w.write({"image": png(), "captions": captions, "image_related_spans": spans})
    return str(folder), names


def drawn(data, batches):
    """Captions by sample of the epochs' batches, and their image-related words."""
    found = {}
    for batch in batches:
        for row, sample in enumerate(batch["sample_id"].tolist()):
            labels = batch["labels"][row]
            text = data.tokenizer.decode(labels[labels >= 0][:-1].tolist())
            found[sample] = (text, related(data, {key: batch[key][row] for key in ("labels", "image_related")}).strip())
    return found


def test_of_several_captions_each_epoch_draws_one(several, tokenizer):
    folder, names = several

    def epochs(count, workers, state=None, **arguments):
        data = open_data(folder, tokenizer, shuffle=True, shuffle_seed=3, **arguments)
        loader = caption_data_spec(data, 2, num_workers=workers, persistent_workers=workers > 0).dataloader
        if state is not None:
            loader.load_state_dict(state)
        return [drawn(data, list(loader)) for _ in range(count)], loader

    first, _ = epochs(3, 0)
    for epoch in first:
        for sample, (text, words) in epoch.items():
            assert text in names[sample]
            assert words == ("" if "snail" in text else text.rpartition(" ")[2])
    assert first[0] != first[1] != first[2]
    assert {text for epoch in first for text, _ in epoch.values()} > set()
    assert epochs(3, 2)[0] == first, "the same in workers"
    # Resumed in the middle of the second epoch.
    data = open_data(folder, tokenizer, shuffle=True, shuffle_seed=3)
    loader = caption_data_spec(data, 2, num_workers=2).dataloader
    list(loader)
    iterator = iter(loader)
    begun = drawn(data, [next(iterator) for _ in range(5)])
    state = loader.state_dict()
    del iterator, loader, data
    (rest, third), _ = epochs(2, 2, state)
    assert begun | rest == first[1]
    assert third == first[2]


def test_validation_always_draws_the_same_caption(several, tokenizer):
    data = open_data(several[0], tokenizer)
    loader = caption_data_spec(data, 2).dataloader
    assert drawn(data, list(loader)) == drawn(data, list(loader))


def test_several_captions_have_no_stored_scores(several, tokenizer):
    with pytest.raises(
        ValueError, match=r"^dataset.scores='there': there are no stored scores of samples with several"
    ):
        open_data(several[0], tokenizer, scores="there")


def test_the_draw_is_fair_and_a_function_of_its_key():
    counts = torch.bincount(torch.tensor([draw(5, 17, epoch, sample) for epoch in range(20) for sample in range(500)]))
    assert (counts.float() / 10_000 - 0.2).abs().max() < 0.02  # five standard deviations
    assert [draw(5, 17, 0, sample) for sample in range(8)] == [4, 3, 1, 1, 1, 0, 1, 2]


def test_data_without_captions_are_refused(tmp_path, tokenizer):
    with MDSWriter(out=str(tmp_path / "data"), columns={"image": "bytes", "text": "str"}) as writer:
        writer.write({"image": png(), "text": "a fox"})
    with pytest.raises(
        ValueError, match=r"data/shard.00000.mds has the columns image, text; expected image and caption"
    ):
        open_data(str(tmp_path / "data"), tokenizer)


BAD = [
    ({"image": b"not an image", "caption": "a fox"}, "the image cannot be decoded"),
    ({"image": png()[:40], "caption": "a fox"}, "the image cannot be decoded"),
    ({"image": b"", "caption": "a fox"}, "the image cannot be decoded"),
    ({"image": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "caption": "a fox"}, "the image cannot be decoded"),
    ({"image": png(), "caption": " \n"}, "the caption is empty"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_a_bad_sample_is_named_with_its_shard(tmp_path, tokenizer, bad, message):
    folder = write(tmp_path / "data", [{"image": png(), "caption": "a fox"}, bad])
    data = open_data(folder, tokenizer)
    assert len(data[0]["input_ids"]) > 2
    with pytest.raises(BadSampleError, match=rf"^sample 1 \(number 1 of \./shard.00000.mds\): {message}"):
        data[1]


def test_bad_samples_are_skipped_on_request(tmp_path, tokenizer, caplog):
    good = {"image": png(), "caption": "a fox"}
    folder = write(tmp_path / "data", [good, *(bad for bad, _ in BAD), good])
    data = open_data(folder, tokenizer, on_bad_sample="skip")
    with caplog.at_level(logging.WARNING):
        batches = list(caption_data_spec(data, 7).dataloader)
    labelled = (batches[0]["labels"] != IGNORE_INDEX).any(1)
    assert labelled[batches[0]["sample_id"].argsort()].tolist() == [True] + [False] * len(BAD) + [True]
    assert sum("Skipped sample" in record.message for record in caplog.records) == len(BAD)


def test_an_image_over_the_pixel_limit_is_bad(monkeypatch):
    monkeypatch.setattr("composer_prior.data.images.MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadSampleError, match="20 x 10 pixels, at most 100"):
        decode_image(png())


def test_images_of_other_modes_become_rgb():
    for mode in ("L", "P", "RGBA", "CMYK", "1", "I;16"):
        buffer = io.BytesIO()
        Image.new(mode, (4, 4)).save(buffer, "TIFF")
        assert decode_image(buffer.getvalue()).mode == "RGB"


def test_an_unknown_policy_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="on_bad_sample='ignore'"):
        open_data(write(tmp_path / "data", [{"image": png(), "caption": "a"}]), tokenizer, on_bad_sample="ignore")


def test_the_order_is_a_function_of_the_seed(make_spec, tokenizer):
    def order(seed):
        spec = make_spec(small_lvlm("patches", tokenizer), shuffle=True, shuffle_seed=seed)
        return torch.cat([batch["sample_id"] for batch in spec.dataloader]).tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(1)) == list(range(96))


def test_the_fingerprint_tells_data_apart(tmp_path, tokenizer):
    sample = {"image": png(), "caption": "a fox"}
    one = open_data(write(tmp_path / "one", [sample]), tokenizer)
    two = open_data(write(tmp_path / "two", [sample, sample]), tokenizer)
    again = open_data(write(tmp_path / "again", [sample]), tokenizer)
    assert one.fingerprint == again.fingerprint
    assert one.fingerprint != two.fingerprint


def test_text_alone_decodes_no_image(tmp_path, tokenizer):
    folder = write(tmp_path / "data", [{"image": b"not an image", "caption": "a fox"}])
    data = StreamingCaptionDataset(local=folder, tokenizer=tokenizer, batch_size=1)
    assert data[0]["input_ids"][0] == tokenizer.bos_token_id
    assert set(data[0]) == {"input_ids", "labels", "sample_id"}
