"""The scoring job: what a live reference says, once, however the work was cut, killed and shared."""

import io
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from common.commands import score as main
from common.hub import serving
from common.models import small_lm, small_lvlm
from common.recipes import ROOT, fork_ranks, launch_nodes
from composer import Trainer
from composer.loggers import InMemoryLogger
from PIL import Image
from streaming import MDSWriter, StreamingDataset

from composer_prior import PRIOR, ReferenceLM, StreamingCaptionDataset, importance_weights
from composer_prior.data.batch import IGNORE_INDEX, CaptionCollator
from composer_prior.data.captions import BadSampleError
from composer_prior.data.mds import read_column
from composer_prior.data.scores import Scores, ScoresError, ScoresMetadata
from composer_prior.data.tokenizer import image_token_ids, train_tokenizer
from composer_prior.models.reference import batches_by_length
from composer_prior.scoring import score
from composer_prior.scoring.job import ScoreJob
from composer_prior.scoring.score import blind_viewer, score_captions, score_texts
from composer_prior.scoring.writer import ScoresWriter
from composer_prior.training.config import load_recipe
from composer_prior.training.run import ensure_scores, job_of

CAPTIONS = [
    "a snail",
    "two red foxes beside an umbrella, stock photo",
    "crêpes 🐌 and 傘",
    "a",
    "a  dog\n\nunder a tree",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> tuple[str, str]:
    """A reference and its tokenizer, saved."""
    folder = tmp_path_factory.mktemp("reference")
    small_lm(tokenizer, seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), str(folder)


@pytest.fixture(scope="module")
def data(scenes: Path, tokenizer: Any) -> StreamingCaptionDataset:
    return StreamingCaptionDataset(
        local=str(scenes / "train"), tokenizer=tokenizer, max_caption_tokens=20, batch_size=8
    )


@pytest.fixture
def job(folders: tuple[str, str], scenes: Path, tmp_path: Path) -> Callable[..., ScoreJob]:
    """A function that makes the job of the scenes, in units of 20 samples."""

    def make(out: str = "scores", reference: str = folders[0], **changes: Any) -> ScoreJob:
        dataset = {"local": str(scenes / "train"), "max_caption_tokens": 20, **changes.pop("dataset", {})}
        return ScoreJob(
            **{
                "out": out if out.startswith("~") else str(tmp_path / out),
                "reference": reference,
                "tokenizer": {"name": folders[1]},
                "dataset": dataset,
                "unit_samples": 20,
                "progress_bar": False,
                **changes,
            }
        )

    return make


def exact(data: StreamingCaptionDataset, reference: ReferenceLM) -> list[np.ndarray]:
    """What the reference says, caption by caption."""
    items = [data[i] for i in range(data.num_samples)]
    values = []
    for item in items:
        ids, labels = item["input_ids"][None], item["labels"][None]
        values.append(reference.logprobs(ids, torch.ones_like(ids), labels)[labels != IGNORE_INDEX].numpy())
    return values


def stored(out: str | Path) -> list[np.ndarray]:
    scores = Scores(str(out), Path(out))
    return [scores[i] for i in range(len(scores))]


def assert_all_close(found: list[np.ndarray], expected: list[np.ndarray], atol: float, rtol: float = 0.0) -> None:
    assert [len(values) for values in found] == [len(values) for values in expected]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=atol, rtol=rtol)


# the numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["encoder", "patches"])
def test_stored_scores_are_those_of_a_live_reference(
    family: str, tokenizer: Any, folders: Any, job: Any, scenes: Path
) -> None:
    out = job(dataset={"prompt": "Describe it: "})
    score_captions(out)
    model = small_lvlm(family, tokenizer)
    dataset = StreamingCaptionDataset(
        tokenizer=tokenizer, image_processor=model.image_processor, batch_size=8, scores=out.out, **out.dataset
    )
    batch = CaptionCollator(tokenizer.pad_token_id)([dataset[i] for i in range(24)])
    mask = batch["labels"] != IGNORE_INDEX
    live = ReferenceLM.from_pretrained(folders[0]).logprobs(
        batch["input_ids"], batch["attention_mask"], batch["labels"], image_token_ids(model.tokenizer)
    )
    torch.testing.assert_close(batch["ref_logprobs"], live, rtol=2**-11, atol=1e-5)
    assert torch.equal(batch["ref_logprobs"] != 0, mask)
    weights = (importance_weights(logprobs, mask) for logprobs in (batch["ref_logprobs"], live))
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-6)


def test_stored_scores_train_as_a_live_reference_does(
    tokenizer: Any, folders: Any, job: Any, make_spec: Callable[..., Any]
) -> None:
    stored = job()
    score_captions(stored)
    curves = []
    for prior, scores in ((PRIOR(reference=folders[0]), None), (PRIOR(), stored.out)):
        model, memory = small_lvlm("patches", tokenizer), InMemoryLogger()
        trainer = Trainer(
            model=model,
            train_dataloader=make_spec(model, max_caption_tokens=20, shuffle=True, scores=scores),
            max_duration="12ba",
            optimizers=torch.optim.AdamW(model.parameters(), lr=3e-3),
            algorithms=[prior],
            loggers=[memory],
            accumulate_train_batch_on_tokens=True,
            device_train_microbatch_size=4,
            progress_bar=False,
            seed=0,
            device="cpu",
        )
        trainer.fit()
        curves.append([float(loss) for _, loss in memory.data["loss/train/total"]])
    assert curves[0][-1] < curves[0][0] - 0.5
    np.testing.assert_allclose(curves[1], curves[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 50, 300, 100_000, None])
def test_the_batch_size_makes_no_difference(
    batch_tokens: int | None, data: StreamingCaptionDataset, reference: ReferenceLM
) -> None:
    captions = read_column(data, "caption", range(96))
    expected = exact(data, reference)
    assert_all_close(score_texts(captions, data.format, reference, batch_tokens), expected, atol=1e-5)


def test_the_order_makes_no_difference(data: StreamingCaptionDataset, reference: ReferenceLM) -> None:
    captions = read_column(data, "caption", range(96)) * 2
    order = random.Random(0).sample(range(192), 192)
    shuffled = score_texts([captions[i] for i in order], data.format, reference, 300)
    expected = score_texts(captions, data.format, reference, 300)
    assert_all_close(shuffled, [expected[i] for i in order], atol=1e-5)


def test_texts_of_like_length_share_a_batch() -> None:
    lengths = torch.tensor([3, 9, 4, 100, 4, 3, 10])
    batches = batches_by_length(lengths, 20)
    assert [lengths[rows].tolist() for rows in batches] == [[100], [10, 9], [4, 4, 3, 3]]
    assert sorted(torch.cat(batches).tolist()) == list(range(7))
    assert batches_by_length(torch.zeros(0, dtype=torch.long), 20) == []


def test_a_reference_with_too_few_positions_is_refused(data: StreamingCaptionDataset, tokenizer: Any) -> None:
    short = ReferenceLM(small_lm(tokenizer, max_position_embeddings=8), tokenizer)
    with pytest.raises(ValueError, match="has 8 positions and a text takes 21; lower max_caption_tokens"):
        score_texts(["a red snail beside two dogs " * 9], data.format, short)


# another tokenizer ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stranger() -> ReferenceLM:
    """A reference of another tokenizer, without image tokens of ours at the same ids."""
    tokenizer = train_tokenizer(CAPTIONS * 5, 330)
    return ReferenceLM(small_lm(tokenizer, seed=3), tokenizer)


def own_scores(reference: ReferenceLM, caption: str) -> np.ndarray:
    """With the reference's own tokens: caption, and end of sequence."""
    tokenizer: Any = reference.tokenizer
    ids = [tokenizer.bos_token_id, *tokenizer(caption, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return reference.score_texts([ids], 1)[0].numpy()


def test_another_tokenizer_keeps_the_text_s_log_probability_and_its_end(
    data: StreamingCaptionDataset, stranger: ReferenceLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "max_caption_tokens", 100)
    assert not stranger.reads(data.tokenizer)
    for caption, values in zip(CAPTIONS, score_texts(CAPTIONS, data.format, stranger), strict=True):
        own = own_scores(stranger, caption)
        assert len(values) == len(data.tokenizer(caption, add_special_tokens=False)["input_ids"]) + 1
        assert (values <= 0).all()
        np.testing.assert_allclose(values[:-1].sum(), own[:-1].sum(), rtol=1e-5)
        np.testing.assert_allclose(values[-1], own[-1], atol=1e-5)


@pytest.mark.parametrize("longest", [1, 3, 7])
def test_a_caption_that_is_cut_has_the_scores_of_its_beginning(
    longest: int, data: StreamingCaptionDataset, stranger: ReferenceLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "max_caption_tokens", 100)
    whole = score_texts(CAPTIONS, data.format, stranger)
    monkeypatch.setattr(data, "max_caption_tokens", longest)
    assert_all_close(score_texts(CAPTIONS, data.format, stranger), [values[:longest] for values in whole], atol=1e-5)


def test_the_same_tokenizer_read_by_characters_gives_the_plain_scores(
    data: StreamingCaptionDataset, reference: ReferenceLM
) -> None:
    class Stranger(ReferenceLM):
        def reads(self, tokenizer: Any) -> bool:
            return False

    stranger = Stranger(reference.model, reference.tokenizer)
    captions = [*CAPTIONS, *read_column(data, "caption", range(96))]
    plain = score_texts(captions, data.format, reference, 300)
    aligned = score_texts(captions, data.format, stranger, 300)
    assert_all_close(aligned, plain, atol=1e-5)  # texts that are cut end elsewhere, and so share other batches
    whole = [i for i, values in enumerate(plain) if len(values) < data.max_caption_tokens]
    same = [score_texts([captions[i]], data.format, reference, 300)[0] for i in whole]
    by_characters = [score_texts([captions[i]], data.format, stranger, 300)[0] for i in whole]
    assert all(np.array_equal(a, b) for a, b in zip(same, by_characters, strict=True))


def test_further_image_tokens_do_not_make_another_tokenizer(tokenizer: Any, reference: ReferenceLM) -> None:
    import copy

    further = copy.deepcopy(tokenizer)
    further.add_special_tokens({"additional_special_tokens": ["<video>"]}, False)  # beside those that there are
    assert reference.reads(further)
    further.add_tokens(["snail"])
    assert not reference.reads(further)


def test_a_job_with_another_tokenizer(job: Any, stranger: ReferenceLM, tmp_path: Path) -> None:
    stranger.model.save_pretrained(tmp_path / "stranger")
    stranger.tokenizer.save_pretrained(tmp_path / "stranger")  # type: ignore[union-attr]
    done = score_captions(job(reference=str(tmp_path / "stranger")))
    assert done.samples == 96
    assert done.skipped == 0
    assert done.tokens == sum(map(len, stored(done.out)))


# the work -------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def test_a_job_that_was_killed_goes_on_without_scoring_again(
    job: Any, data: StreamingCaptionDataset, folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = ScoresWriter.write, []

    def dying(self: ScoresWriter, unit: int, values: Any) -> Any:
        if len(written) == 2:
            raise Killed
        written.append(unit)
        return write(self, unit, values)

    monkeypatch.setattr(ScoresWriter, "write", dying)
    with pytest.raises(Killed):
        score_captions(job())
    monkeypatch.setattr(ScoresWriter, "write", write)
    assert not Path(job().out, "index.json").exists()
    before = {file: file.stat().st_mtime_ns for file in Path(job().out).glob("*.mds")}
    assert len(before) == 2
    done = score_captions(job())
    assert (done.samples, done.reused) == (56, False)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert_all_close(stored(done.out), exact(data, ReferenceLM.from_pretrained(folders[0])), atol=1e-5, rtol=2**-11)
    assert sorted(file.suffix for file in Path(done.out).iterdir()) == [".json", ".json", *[".mds"] * 5]
    assert score_captions(job()).reused


@pytest.mark.parametrize(("better", "told"), [(0.1, False), (0.0, True), (-0.1, True)])
def test_a_viewer_that_knows_no_more_than_the_reference_is_told(
    better: float, told: bool, job: Any, data: StreamingCaptionDataset, tmp_path: Path
) -> None:
    reference = score_captions(job()).out
    sees = [np.minimum(values * (1 - better), 0) for values in stored(reference)]
    sees[3] = sees[3][:0]  # a skipped sample
    writer = ScoresWriter(str(tmp_path / "viewer"), ScoresMetadata.of(data, {}, "viewer_logprobs"), 96)
    assert writer.begin() == {}
    assert blind_viewer(str(tmp_path / "viewer"), reference) == ""  # there are none yet
    writer.finish({0: writer.write(0, sees)})
    warning = blind_viewer(str(tmp_path / "viewer"), reference)
    assert bool(warning) == told
    kept = np.concatenate([values for number, values in enumerate(stored(reference)) if number != 3])
    mean = f"{-kept.mean():.3f} nats per token, 95 captions): 100% of the tokens gain nothing"
    assert not told or (warning.startswith("Warning: the viewer predicts captions no better") and mean in warning)


def test_scores_that_are_there_are_not_touched(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done = score_captions(job())
    before = sorted(Path(done.out).rglob("*"))
    monkeypatch.setattr(score, "ScoresWriter", None)
    again = score_captions(job())
    assert again.reused
    assert str(again) == f"Scores: reusing {done.out}"
    assert sorted(Path(done.out).rglob("*")) == before


def test_scores_in_the_home_folder(job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    summary = score_captions(job(out="~/mine"))
    assert summary.out == str(tmp_path / "mine")
    assert (tmp_path / "mine" / "scores.json").exists()
    assert not (tmp_path / "~").exists()
    assert score_captions(job(out="~/mine")).reused


def test_of_two_jobs_at_once_one_scores(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits while the first writes, and then finds its scores."""
    Path(job().out).mkdir()
    first = ThreadPoolExecutor(1)
    started, go_on = Event(), Event()
    write = ScoresWriter.write

    def slow(self: ScoresWriter, unit: int, values: Any) -> Any:
        started.set()
        assert go_on.wait(60)
        return write(self, unit, values)

    monkeypatch.setattr(ScoresWriter, "write", slow)
    monkeypatch.setattr(score, "announce", lambda message: go_on.set())
    running = first.submit(score_captions, job())
    assert started.wait(60)
    second = score_captions(job())
    assert (running.result().samples, second.samples) == (96, 0)
    assert second.reused
    assert not Path(job().out, ".scoring").exists()


def test_a_place_that_cannot_be_written_to_is_an_error_of_one_line(job: Any, tmp_path: Path) -> None:
    (tmp_path / "scores").write_text("")
    with pytest.raises(ScoresError, match="scores: the scores cannot be made: ") as error:
        score_captions(job())
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_two_nodes_under_launchers_share_what_is_missing(job: Any, data: StreamingCaptionDataset, folders: Any) -> None:
    alone = score_captions(job("alone"))
    shared = job("shared")
    writer = ScoresWriter(shared.out, Scores(alone.out, Path(alone.out)).metadata, 20)
    writer.begin()
    values = stored(alone.out)
    writer.write(3, [values[i] for i in writer.units[3]])
    kept = Path(shared.out, "shard.00003.000.mds").stat().st_mtime_ns
    words = [
        f"out={shared.out}",
        f"reference={shared.reference}",
        f"tokenizer.name={shared.tokenizer['name']}",
        "unit_samples=20",
        *(f"dataset.{key}={value}" for key, value in shared.dataset.items()),
    ]
    output = launch_nodes(2, "score", *words)
    assert "tokens of 76 samples" in output
    assert "tokens/s" in output
    assert Path(shared.out, "shard.00003.000.mds").stat().st_mtime_ns == kept
    assert_all_close(stored(shared.out), values, atol=1e-5, rtol=2**-10)


def score_on(*nodes: Path, out: str = "scores", model: str = "reference", **options: Any) -> str:
    """What a job prints on nodes of these folders, which it names everything from."""
    words = [
        *(f"out={out}", f"{model}={model}", "tokenizer.name=reference", "dataset.local=data"),
        *("dataset.max_caption_tokens=20", "unit_samples=20", "progress_bar=false"),
    ]
    program = ROOT / "scripts" / "score_captions.py"
    return fork_ranks(None, program, *words, ranks=len(nodes), nodes=[*nodes], **options)


@pytest.fixture
def node(folders: Any, scenes: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """A function that makes the folder of a node, without one of the things that it needs."""

    def make(name: str, lacking: str = "") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for thing, source in {"reference": folders[0], "data": str(scenes / "train")}.items():
            if thing != lacking:
                (folder / thing).symlink_to(source)
        return folder

    return make


def test_two_nodes_on_one_disk_leave_the_bytes_of_one_process(node: Any) -> None:
    alone, disk = node("alone"), node("disk")
    for output in (score_on(alone), score_on(disk, disk)):
        assert output.count("tokens of 96 samples in scores") == 1
    files = {path.name: path.read_bytes() for path in (alone / "scores").iterdir()}
    assert len(files) == 7, "five units, the metadata and the index"
    assert {path.name: path.read_bytes() for path in (disk / "scores").iterdir()} == files


def test_two_ranks_score_what_an_interrupted_viewer_left_and_leave_the_bytes_of_one(node: Any, tokenizer: Any) -> None:
    alone, disk = node("alone"), node("disk")
    small_lvlm("patches", tokenizer, seed=3).image_text_model.save_pretrained(alone / "viewer")
    (disk / "viewer").symlink_to(alone / "viewer")
    assert score_on(alone, model="viewer").count("tokens of 96 samples in scores") == 1
    files = {path.name: path.read_bytes() for path in (alone / "scores").iterdir()}
    (disk / "scores").mkdir()
    for name in ("scores.json", "shard.00001.000.mds"):  # units are published when they are whole, the index at the end
        (disk / "scores" / name).write_bytes(files[name])
    kept = (disk / "scores/shard.00001.000.mds").stat().st_mtime_ns
    assert score_on(disk, disk, model="viewer").count("tokens of 76 samples in scores") == 1
    assert {path.name: path.read_bytes() for path in (disk / "scores").iterdir()} == files
    assert (disk / "scores/shard.00001.000.mds").stat().st_mtime_ns == kept
    assert Scores(str(disk / "scores"), disk).metadata.column == "viewer_logprobs"


@pytest.mark.parametrize(("key", "lacking"), [("reference", "reference"), ("dataset.local", "data"), ("scores", "")])
def test_what_nodes_do_not_share_is_named_by_all_and_nothing_is_made(
    key: str, lacking: str, node: Any, tmp_path: Path
) -> None:
    places = [node("node0"), node("node1", lacking)]
    out = str(tmp_path / "shared") if lacking else "scores"
    lines = [line for line in score_on(*places, out=out, expect=1).splitlines() if line.startswith("error: ")]
    assert len(lines) == 2
    assert all(line.startswith(f"error: {key}: ") and "not seen by rank 1" in line for line in lines)
    assert {*tmp_path.iterdir()} == {*places}
    assert {path.name for place in places for path in place.iterdir()} == {"reference", "data"}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_only_the_captions_are_read(tmp_path: Path, compression: str | None) -> None:
    columns = {"image": "bytes", "caption": "str", "age": "int32", "more": "json"}
    captions = [f"{number} " + "ü" * (number % 7) for number in range(50)]
    with MDSWriter(out=str(tmp_path), columns=columns, compression=compression, size_limit=1000) as writer:
        for number, caption in enumerate(captions):
            writer.write({"image": b"no image" * number, "caption": caption, "age": np.int32(number), "more": [number]})
    dataset = StreamingDataset(local=str(tmp_path), batch_size=1)
    assert dataset.num_shards > 3
    assert read_column(dataset, "caption", range(50)) == captions
    assert read_column(dataset, "caption", range(13, 44)) == captions[13:44]
    assert read_column(dataset, "age", range(3, 5)) == [3, 4]
    with pytest.raises(ValueError, match="no column 'captions', it has age, caption, image, more"):
        read_column(dataset, "captions", range(5))


# what goes wrong ------------------------------------------------------------------------------------------------------


def test_captions_that_cannot_be_scored_are_refused_or_skipped(job: Any, tmp_path: Path, caplog: Any) -> None:
    with MDSWriter(out=str(tmp_path / "data"), columns={"image": "bytes", "caption": "str"}) as writer:
        for caption in ("a snail", " \n", "a dog"):
            writer.write({"image": png(), "caption": caption})
    dataset = {"local": str(tmp_path / "data")}
    with pytest.raises(BadSampleError, match=r"sample 1 .*shard.00000.mds\): the caption is empty"):
        score_captions(job(dataset=dataset))
    done = score_captions(job(dataset={**dataset, "on_bad_sample": "skip"}))
    assert (done.samples, done.skipped) == (3, 1)
    assert [len(values) > 0 for values in stored(done.out)] == [True, False, True]
    assert "1 samples skipped" in str(done)


@pytest.mark.parametrize("bad", [float("nan"), 0.5])
def test_impossible_scores_are_refused_or_skipped(job: Any, monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    def diverged(captions: list[str], *args: Any) -> list[np.ndarray]:
        return [np.array([-1, bad if i == 7 else -2], dtype=np.float32) for i in range(len(captions))]

    monkeypatch.setattr(score, "score_texts", diverged)
    with pytest.raises(BadSampleError, match=r"sample 7 .*: its scores are NaN or positive \(on_bad_sample=skip"):
        score_captions(job())
    assert not Path(job().out, "index.json").exists()
    done = score_captions(job("skipping", dataset={"on_bad_sample": "skip"}))
    assert done.skipped == 5  # one in each unit
    assert [len(values) for values in stored(done.out)[6:9]] == [2, 0, 2]


def test_scores_of_another_reference_are_refused(job: Any, tokenizer: Any, tmp_path: Path) -> None:
    score_captions(job())
    small_lm(tokenizer, seed=2).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ScoresError, match=r"what differs: the reference's weights \(.* here\)\. Delete"):
        score_captions(job(reference=str(tmp_path / "other")))
    with pytest.raises(ScoresError, match=r"what differs: prompt \('' there, 'Say: ' here\)\. Delete"):
        score_captions(job(dataset={"prompt": "Say: "}))


def test_what_is_no_reference_is_refused(job: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScoresError, match="is neither a folder with a model nor a hub id"):
        score_captions(job(reference=str(tmp_path / "empty")))


# recipes and the command line -----------------------------------------------------------------------------------------


def test_scores_in_bfloat16_are_those_in_float32_but_for_some_digits(job: Any) -> None:
    exact, rounded = (
        np.concatenate(stored(score_captions(job(str(dtype), dtype=dtype)).out)) for dtype in (None, "bfloat16")
    )
    differences = np.abs(np.expm1(exact) - np.expm1(rounded))
    assert 1e-5 < differences.mean() < 0.01
    assert differences.max() < 0.1


def test_a_recipe_says_how_its_scores_are_made() -> None:
    path = ROOT / "yamls" / "prior_vit.yaml"
    recipe = load_recipe(path, ["scoring={dtype: bfloat16, unit_samples: 8}"])
    made = job_of(recipe, recipe.train_loader["dataset"])
    assert (made.dtype, made.unit_samples, made.batch_tokens) == ("bfloat16", 8, None)
    assert job_of(recipe, recipe.train_loader["dataset"], dtype="float32").dtype == "float32"


def test_a_recipe_s_scores_are_made_once(folders: Any, scenes: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(folders[0])
    recipe = load_recipe(
        ROOT / "yamls" / "prior_vit.yaml",
        [
            f"data.out={scenes}",
            f"tokenizer.name={folders[1]}",
            f"reference.run_folder={run}",
            f"train_loader.dataset.scores={tmp_path / 'scores'}",
            "progress_bar=false",
        ],
    )
    ensure_scores(recipe)
    ensure_scores(recipe)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(f"tokens of 96 samples in {tmp_path / 'scores'}")
    assert second == f"Scores: reusing {tmp_path / 'scores'}"
    metadata = Scores(str(tmp_path / "scores"), tmp_path).metadata
    assert isinstance(metadata, ScoresMetadata)
    assert metadata.max_caption_tokens == 128


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["out=x"],
            "Without a recipe, give out=..., reference=... or viewer=..., tokenizer.name=...",
        ),
        (["outt=x"], "outt is not a key. Did you mean 'out'?"),
        (["no.yaml"], "The recipe no.yaml does not exist."),
        (["unit_samples=0", "out=x", "reference=y", "tokenizer.name=z", "dataset.local=d"], "unit_samples=0: expected"),
        (["yamls/prior_vit.yaml", "loader=test"], "loader='test': expected train or eval."),
        (["yamls/prior_vit.yaml", "train_loader.dataset.scores=null"], "Where do the scores go? Give out=..."),
        (["yamls/reference.yaml", "out=x"], "The recipe has no reference."),
    ],
)
def test_errors_are_one_line(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as error:
        main(words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_reference_that_algorithms_name_scores_the_streams_of_a_recipe() -> None:
    words = ["reference=null", "algorithms.prior.reference=folder", "train_loader.dataset.local=null"]
    words += ["model.language.pretrained=null", "train_loader.dataset.scores=null"]
    streams = "train_loader.dataset.streams={a: {local: a}, b: {local: b}}"
    made = load_recipe(ROOT / "yamls/prior_vit.yaml", [*words, streams])
    job = job_of(made, made.train_loader["dataset"], out="scores")
    assert (job.model, [*job.dataset["streams"]]) == ("folder", ["a", "b"])


def test_scores_are_pushed_with_a_card_of_what_they_belong_to(
    folders: Any, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "scores"
    words = [f"out={out}", f"reference={folders[0]}", f"tokenizer.name={folders[1]}", "progress_bar=false"]
    words += [f"dataset.local={scenes / 'train'}", "push_to_hub=u/scores"]
    with serving(monkeypatch, tmp_path / "cache") as hub:
        main(words)
        with pytest.raises(SystemExit, match="push_to_hub=u/scores: a folder is pushed, and s3://b/x is a remote"):
            main([*words, "out=s3://b/x"])
    pushed = hub.repositories["datasets/u/scores"][-1]
    assert {*pushed} == {"README.md", *(file.name for file in out.iterdir())}
    assert all(pushed[file.name] == file.read_bytes() for file in out.iterdir())
    assert ScoresMetadata.from_json((out / "scores.json").read_bytes(), "").data in pushed["README.md"].decode()


def test_without_words_the_usage_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("usage: ")
