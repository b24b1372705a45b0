"""Rows of constant length: what is in them, in which order, and that a loader goes on with them."""

import json
import logging
import math
import random
from functools import partialmethod

import pytest
import torch
from common.chats import parts, png, write_chats
from common.models import small_lvlm
from streaming import MDSWriter

from composer_prior import StreamingCaptionDataset
from composer_prior.data.batch import IGNORE_INDEX, split_packed_images
from composer_prior.data.captions import caption_data_spec
from composer_prior.data.rows import count_rows, first_fit
from composer_prior.training.validate import check_fit

WORDS = ("a fox", "two snails", "a red car", "the sea", "green hills", "an old boat")


def document(words, images=0):
    """Text of some words, with an image before each of the first ones."""
    text = " ".join("<image>" * (n < images) + WORDS[n % len(WORDS)] for n in range(words))
    return [{"role": "document", "content": parts(text)}], [png(n) for n in range(images)]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """150 documents of up to 14 words, every third with one or two images."""
    numbers = random.Random(3)
    samples = [document(numbers.randint(2, 14), (n % 3 == 0) + (n % 6 == 0)) for n in range(150)]
    return write_chats(tmp_path_factory.mktemp("rows") / "mixture", samples)


def open_rows(folder, model, rows=2, workers=0, **options):
    options = {"max_tokens": 120, "packing_ratio": 3, "shuffle": True, "shuffle_seed": 5, **options}
    read = {"tokenizer": model.tokenizer, "image_processor": model.image_processor}
    data = StreamingCaptionDataset(local=folder, batch_size=rows, **read, **options)
    return caption_data_spec(data, rows, num_workers=workers, persistent_workers=workers > 0)


@pytest.fixture(scope="module")
def model(tokenizer):
    return small_lvlm("patches", tokenizer)


def lengths_of_rows(batch):
    lengths = batch["attention_mask"].sum(1)
    return torch.zeros(count_rows(batch), dtype=torch.long).index_add(0, batch["row"], lengths)


def same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_first_fit_takes_the_oldest_then_the_longest_that_fit():
    assert first_fit([50, 30, 60, 20, 40, 10, 10], 100) == [0, 4, 5]
    assert first_fit([100], 100) == [0]
    assert first_fit([7, 5, 5, 5, 3], 12) == [0, 1]


def test_rows_of_a_mixture_are_full(tokenizer, tmp_path):
    """Uniform lengths are the hard case; with more short samples the rows are fuller."""
    model, numbers = small_lvlm("patches", tokenizer, max_position_embeddings=2048), random.Random(0)
    words = [numbers.randint(2, 500) for _ in range(200)]
    folder = write_chats(tmp_path / "data", [document(count) for count in words])
    batches = [*open_rows(folder, model, 4, max_tokens=2048, packing_ratio="auto").dataloader]
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
    assert lengths.min() <= 20
    assert 1800 <= lengths.max() <= 2048
    rows = torch.cat([lengths_of_rows(batch) for batch in batches])
    assert rows.max() <= 2048
    assert all(count_rows(batch) == 4 for batch in batches)
    assert rows.sum() >= 0.95 * 2048 * len(rows)
    # The length of the epoch, which is measured on other samples, fits the data.
    found = torch.cat([batch["sample_id"] for batch in batches])
    assert 0.8 * 200 <= len(found.unique()) <= len(found) <= 1.1 * 200


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_read_once_before_any_is_read_again(mixture, model, workers):
    loader = open_rows(mixture, model, workers=workers, packing_ratio=1).dataloader  # more batches than the data fill
    assert len(loader) == (74 if workers else 75)
    batches = [batch["sample_id"] for batch in loader]
    for worker, of_worker in enumerate([76, 74] if workers else [150]):  # by the two of a batch
        seen = torch.cat(batches[worker :: max(1, workers)]).tolist()  # they deliver in turn
        assert len(seen) > 2 * of_worker
        assert len({*seen[:of_worker]}) == of_worker
        assert {*seen[:of_worker]} == {*seen[of_worker : 2 * of_worker]}
    assert {*torch.cat(batches).tolist()} == {*range(150)}


def test_rows_are_a_function_of_the_seed(mixture, model):
    same([*open_rows(mixture, model).dataloader], [*open_rows(mixture, model, workers=1).dataloader])
    ours, other = (next(iter(open_rows(mixture, model, shuffle_seed=seed).dataloader)) for seed in (5, 6))
    assert ours["sample_id"].tolist() != other["sample_id"].tolist()


@pytest.mark.parametrize(("workers", "done", "ratio"), [(0, 4, 3), (0, 11, 1.5), (3, 7, 3)])
def test_a_loader_goes_on_in_the_middle_of_an_epoch(workers, done, ratio, mixture, model):
    """In the second one, twice, and then with the third; also where samples come again."""
    whole = open_rows(mixture, model, workers=workers, packing_ratio=ratio).dataloader
    epochs = [[*whole] for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [int(75 / ratio) - (workers == 3)] * 3  # each worker delivers as many
    assert epochs[0][0]["sample_id"].tolist() != epochs[1][0]["sample_id"].tolist()
    begun = open_rows(mixture, model, workers=workers, packing_ratio=ratio).dataloader
    list(begun)
    state = None
    for start in (0, done):
        if state is not None:
            begun = open_rows(mixture, model, workers=workers, packing_ratio=ratio).dataloader
            begun.dataset.load_state_dict(state)
        iterator = iter(begun)
        same([next(iterator) for _ in range(done)], epochs[1][start : start + done])
        state = json.loads(json.dumps(begun.dataset.state_dict(2 * (start + done), True)))
        del iterator, begun
    resumed = open_rows(mixture, model, workers=workers, packing_ratio=ratio).dataloader
    resumed.dataset.load_state_dict(state)
    assert resumed.dataset.state_dict(2 * 2 * done, True) == state
    same([*resumed], epochs[1][2 * done :])
    after = resumed.dataset.state_dict(0, True)
    same([*resumed], epochs[2])
    del resumed
    third = open_rows(mixture, model, workers=workers, packing_ratio=ratio).dataloader
    third.dataset.load_state_dict(after)
    same([*third], epochs[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_after_the_last_batch_of_an_epoch(workers, mixture, model):
    """Composer writes such a state before it counts the epoch; any number of workers may go on."""
    whole = open_rows(mixture, model, workers=workers).dataloader
    epochs = [[*whole] for _ in range(3)]
    begun = open_rows(mixture, model, workers=workers).dataloader
    same([*begun], epochs[0])
    iterator = iter(begun)
    same([next(iterator) for _ in epochs[1]], epochs[1])
    state = json.loads(json.dumps(begun.dataset.state_dict(2 * len(epochs[1]), True)))
    del iterator, begun
    resumed = open_rows(mixture, model, workers=workers).dataloader
    resumed.dataset.load_state_dict(state)
    assert [*resumed] == []
    same([*resumed], epochs[2])
    other = open_rows(mixture, model, workers=3).dataloader
    other.dataset.load_state_dict(state)
    assert [len([*other]) for _ in range(3)] == [0, 24, 24]


@pytest.mark.parametrize("samples", [40, 60])
def test_workers_deliver_as_many_batches_as_each_other(samples, model, tmp_path):
    """Else some would read samples again, while those of others are left out."""
    folder = write_chats(tmp_path / "data", [document(3) for _ in range(samples)])
    loader = open_rows(folder, model, workers=4, packing_ratio=2).dataloader  # of 10 and 15 batches
    found = torch.cat([batch["sample_id"] for batch in loader])
    assert len(loader) % 4 == 0
    assert len({*found.tolist()}) == samples


def test_a_state_of_other_workers_or_without_rows_is_refused(mixture, model, monkeypatch):
    begun = open_rows(mixture, model, workers=2).dataloader
    iterator = iter(begun)
    next(iterator)
    state = begun.dataset.state_dict(2, True)
    del iterator, begun
    ours = "packed by 1 ranks on 1 nodes with 2 workers and 2 rows each"
    was = f"^The checkpoint is from the middle of an epoch that was {ours}, "
    for options, would in (
        ({"workers": 3}, ours.replace("2 workers", "3 workers")),
        ({"workers": 2, "rows": 4}, ours.replace("2 rows", "4 rows")),
        ({"packing_ratio": None}, "unpacked"),
    ):
        with pytest.raises(ValueError, match=f"{was}and would go on {would}: take the same, or a checkpoint from the"):
            open_rows(mixture, model, **options).dataloader.dataset.load_state_dict(state)
    moved = open_rows(mixture, model, workers=2).dataloader.dataset
    monkeypatch.setattr(moved._parallel_rank_world, "num_nodes", 2)  # which deals samples otherwise
    with pytest.raises(ValueError, match="and would go on packed by 1 ranks on 2 nodes with 2 workers"):
        moved.load_state_dict(state)
    plain = {**state, "sample_in_epoch": 4, "rows": "null"}
    with pytest.raises(ValueError, match="that was unpacked, and would go on packed by 1 ranks"):
        open_rows(mixture, model).dataloader.dataset.load_state_dict(plain)


@pytest.mark.parametrize("family", ["encoder", "patches", "naflex"])
@pytest.mark.parametrize("size", [1, 3])
def test_losses_are_those_of_single_samples(family, size, mixture, tokenizer):
    """Also in microbatches, which are cut between rows, with their images."""
    packed, plain = (small_lvlm(family, tokenizer, options={"pack": pack}).eval() for pack in (True, False))
    spec = open_rows(mixture, packed, rows=3, max_tokens=200)
    *_, batch = spec.dataloader  # the first ones have the longest samples
    microbatches = spec.split_batch(batch, size)
    assert [spec.get_num_samples_in_batch(part) for part in microbatches] == [size] * (3 // size)
    assert spec.get_num_samples_in_batch(batch) == 3
    assert len(batch["row"]) > 6
    images = batch[next(key for key in batch if key.endswith("_rows"))]
    assert images.min() == 0
    assert images.max() >= 1
    singles = split_packed_images({key: value for key, value in batch.items() if key != "row"}, 1)
    with torch.no_grad():
        nll = torch.cat([packed(part)["nll"] for part in microbatches])
        expected = torch.cat([plain(part)["nll"] for part in singles])
    assert (expected > 0).sum() == (batch["labels"] != IGNORE_INDEX).sum()
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)


def test_bad_samples_in_the_buffer_count_for_nothing(tokenizer, tmp_path, caplog):
    model = small_lvlm("encoder", tokenizer, options={"pack": True}).eval()
    samples = [document(6, 1) for _ in range(90)]
    for bad in range(0, 90, 7):
        samples[bad] = (samples[bad][0], [b"not an image"])
    folder = write_chats(tmp_path / "data", samples)
    with pytest.raises(Exception, match=r"sample [0-9]+ .*: the image cannot be decoded"):
        list(open_rows(folder, model).dataloader)
    with caplog.at_level(logging.WARNING):
        loader = open_rows(folder, model, on_bad_sample="skip").dataloader
        whole = [*loader]
    assert any("Skipped sample" in record.message for record in caplog.records)
    seen = 0
    for batch in whole:
        bad = batch["sample_id"] % 7 == 0
        labelled = (batch["labels"] != IGNORE_INDEX).any(1)
        assert labelled.tolist() == (~bad).tolist()
        assert lengths_of_rows(batch).max() <= 120
        seen += int(bad.sum())
        with torch.no_grad():
            nll = model(batch)["nll"]
        assert not nll[bad].any()
        assert torch.isfinite(nll).all()
    assert seen >= 10
    begun = open_rows(folder, model, on_bad_sample="skip").dataloader
    iterator = iter(begun)
    [next(iterator) for _ in range(3)]
    state = begun.dataset.state_dict(6, True)
    del iterator, begun
    resumed = open_rows(folder, model, on_bad_sample="skip").dataloader
    resumed.dataset.load_state_dict(state)
    same([*resumed], whole[3:])


def test_the_ratio_is_measured_by_the_proportions_of_streams(model, tmp_path):
    folders = {
        name: write_chats(tmp_path / name, [document(words) for _ in range(40)])
        for name, words in (("short", 3), ("long", 30))
    }
    options = {"tokenizer": model.tokenizer, "image_processor": model.image_processor, "packing_ratio": "auto"}
    found = []
    for share in (0.5, 0.9):
        streams = {name: {"local": folders[name]} for name in folders}
        streams["short"]["proportion"], streams["long"]["proportion"] = share, 1 - share
        data = StreamingCaptionDataset(streams=streams, batch_size=2, max_tokens=120, **options)
        short, long = (len(data[number]["input_ids"]) for number in (0, 40))
        assert short < long
        mean = share * short + (1 - share) * long
        assert math.isclose(data.samples_per_row, 0.97 * 120 / mean, rel_tol=0.03)
        found.append(data.samples_per_row)
        del data
    assert found[0] < found[1]


def test_rows_of_conversations_alone_may_be_shorter_than_a_caption(mixture, model):
    data = open_rows(mixture, model, max_tokens=100).dataloader.dataset
    assert data.max_caption_tokens > 100
    check_fit(model, data)


def test_the_ratio_is_measured_in_a_few_shards(model, tmp_path, monkeypatch):
    """As those of a bucket must be downloaded first."""
    monkeypatch.setattr(MDSWriter, "__init__", partialmethod(MDSWriter.__init__, size_limit=2000))
    folder = write_chats(tmp_path / "data", [document(2 + n % 13) for n in range(300)])
    data = open_rows(folder, model, packing_ratio="auto").dataloader.dataset
    read, get_item = [], type(data).get_item
    monkeypatch.setattr(type(data), "get_item", lambda self, n, retry=7: read.append(n) or get_item(self, n, retry))
    mean = sum(len(data[n]["input_ids"]) for n in range(300)) / 300
    read.clear()
    assert data.samples_per_row == pytest.approx(0.97 * 120 / mean, rel=0.1)
    shards = {int(data.spanner[n][0]) for n in read}
    assert {0, data.num_shards - 1} <= shards
    assert len(shards) == 8 < data.num_shards


def test_an_impossible_ratio_is_refused(mixture, model):
    with pytest.raises(ValueError, match=r"packing_ratio=0\.5: expected at least 1 sample in a row, or auto"):
        open_rows(mixture, model, packing_ratio=0.5)
