"""The recipes at real scale as they ship, made smaller by overrides alone; captions and scores lie in a bucket."""

import json
from pathlib import Path

import pytest

from common.models import small_lm
from common.recipes import LOADERS, ROOT, SMALL_REAL_SCALE, losses
from common.s3_server import s3_server
from common.tokenizers import plain_tokenizer
from composer_prior.conversion.convert import convert_captions
from composer_prior.emoji_scenes.writing import make_emoji_scenes

SAMPLES = 32
RECIPE = ROOT / "yamls/prior_vit_l_14_336.yaml"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """``s3://bucket/captions`` with training and validation data, as the recipes name them."""
    folder = tmp_path_factory.mktemp("scenes")
    make_emoji_scenes(
        folder / "out", train_samples=SAMPLES, validation_samples=8, canvas=48, num_workers=0, progress=False
    )
    with s3_server("bucket") as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment, "XDG_CACHE_HOME": str(folder / "cache")}.items():
            patch.setenv(name, value)
        for split in ("train", "validation"):
            write_as_parquet(folder / "out" / split, folder / f"{split}.parquet")
            convert_captions(folder / f"{split}.parquet", f"s3://bucket/captions/{split}", processes=1)
        yield environment


def write_as_parquet(data, file):
    """Write the samples of an MDS data set as Parquet, a format of user data."""
    import pyarrow
    import pyarrow.parquet
    from streaming import StreamingDataset

    samples = [*StreamingDataset(local=str(data), batch_size=1)]
    pyarrow.parquet.write_table(pyarrow.table({key: [s[key] for s in samples] for key in ("image", "caption")}), file)


@pytest.fixture
def here(bucket, tmp_path, monkeypatch):
    """Change to an empty folder with separate caches and scores."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pretrained(kind, tokenizer_captions):
    """Write a language model with its tokenizer, as a hub has it."""
    tokenizer = plain_tokenizer(kind, tokenizer_captions)
    small_lm(tokenizer, max_position_embeddings=512).save_pretrained("pretrained")
    tokenizer.save_pretrained("pretrained")
    return tokenizer


def smaller(*overrides):
    """Return overrides that make the shipped recipe small, with folders for a hub and a node's disk."""
    return [
        *SMALL_REAL_SCALE,
        *(f"{loader}.dataset.local=cache/{loader.split('.')[-1]}" for loader in LOADERS),
        "train_loader.dataset.scores=s3://bucket/captions/scores-" + Path.cwd().name,
        *overrides,
    ]


def captions_of(folder):
    return [f"two red hammers on grey paper, photo {number} by Ana Lindqvist" for number in range(20)]


def check(output=""):
    """Check the outputs of a run."""
    steps = losses("runs/prior_vit_l_14_336")
    assert [batch for batch, _ in steps] == [0, 1]
    assert all(0 < loss < 20 for _, loss in steps)
    lines = [json.loads(line) for line in Path("runs/prior_vit_l_14_336/metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[-1]["metrics/eval/loss"] < 20
    assert all(0 < line["prior/effective_sample_size"] <= 1 for line in lines if "loss/train/total" in line)
    card = json.loads(Path("runs/reference_smollm2/model/reference.json").read_text())
    assert card["validation"]["loss"] > 0
    if output:
        assert output.count("generated:") == output.count("true:") == 4
        assert "lacks a part" not in output
