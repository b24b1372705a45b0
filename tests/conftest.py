"""Small real parts that the tests share: data on disk, a tokenizer, models of both families."""

import gc
import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # `make test-gpu` sets it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("COMPOSER_PRIOR_FSDP2_ON_CPU", os.path.join(os.path.dirname(__file__), "common/gloo.py"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub; asked without a network it costs half a minute

import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

# Composer takes many seconds to import. The process of xdist that only hands tests out must not wait for it.
if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from composer_prior import ComposerLVLM, ReferenceLM

_files, _most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(_files, min(_most_files, 16384)), _most_files))  # many data sets

settings.register_profile("repeatable", derandomize=True)  # pytest --hypothesis-profile=default draws others each time
settings.load_profile("repeatable")


# Files that take a minute or more, longest first, so that both cores stay busy until the end.
LONG = [
    "test_streaming_s3",
    "test_checkpoints",
    "test_two_ranks",
    "test_hostile",
    "test_real_scale",
    "test_run",
    "test_composability",
    "test_going_on",
    "test_real_scale_sharded",
    "test_bucket",
    "test_language_compile",
    "test_end_to_end",
    "test_docs",
    "test_exactness",
    "test_recovery",
    "test_convert_on_ray",
    "test_init_from",
    "test_optimizer",
    "test_bad_data",
    "test_finite",
    "test_nodes",
    "test_validate",
    "test_methods",
    "test_saving",
    "test_evaluate",
    "test_score",
    "test_trl",
    "test_cli",
    "test_convert",
]


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist would begin with the files of most tests, which are short


def pytest_runtest_setup(item: pytest.Item) -> None:
    import torch

    torch.set_num_threads(1)  # the models are too small for several cores; accelerate sets more
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.fail("CUDA_VISIBLE_DEVICES is set and there is no GPU", pytrace=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gc.freeze()  # what has been imported: each run collects garbage, and would look through all of it
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


_GPUS = [pytest.param("cuda", marks=pytest.mark.gpu)] if os.environ["CUDA_VISIBLE_DEVICES"] else []


@pytest.fixture(params=["cpu", *_GPUS])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Make new tensors on the CPU, and on a GPU where there is one."""
    import torch

    with torch.device(request.param):
        yield request.param


@pytest.fixture(params=["pretended", *_GPUS])
def gpu(request: pytest.FixtureRequest) -> Any:
    """Return a context in which Composer, and ``cuda`` in a call of torch, mean a pretended GPU, or a real one."""
    from common.gpus import PretendedGPU, real_gpu

    return PretendedGPU() if request.param == "pretended" else real_gpu()


@pytest.fixture
def outside_of_a_run(monkeypatch):
    """End the group of one rank that a Trainer of another test has left in this process, and forget its variables."""
    import torch
    from common.recipes import TORCHRUN

    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write emoji scenes: 96 training and 24 validation samples."""
    from composer_prior.emoji_scenes.writing import make_emoji_scenes

    out = tmp_path_factory.mktemp("data") / "scenes"
    make_emoji_scenes(out, train_samples=96, validation_samples=24, num_workers=0, progress=False)
    return out


@pytest.fixture(scope="session")
def tokenizer() -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE of 600 tokens, with the image tokens."""
    from composer_prior.data.tokenizer import train_tokenizer
    from composer_prior.emoji_scenes.writing import make_sample

    return train_tokenizer((make_sample("train", i)["caption"] for i in range(200)), 600)


_FAMILIES = ("encoder", "patches")  # common.models, which imports torch, has them for the tests


@pytest.fixture(params=_FAMILIES)
def lvlm(request: pytest.FixtureRequest, tokenizer: "PreTrainedTokenizerFast") -> "ComposerLVLM":
    """Build a small LVLM of each family."""
    from common.models import FAMILIES, small_lvlm

    assert FAMILIES == _FAMILIES
    return small_lvlm(request.param, tokenizer)


@pytest.fixture
def reference(tokenizer: "PreTrainedTokenizerFast") -> "ReferenceLM":
    """Build a small text-only reference with the models' tokenizer."""
    from common.models import small_lm

    from composer_prior import ReferenceLM

    return ReferenceLM(small_lm(tokenizer, seed=1), tokenizer)


@pytest.fixture
def make_spec(scenes: Path, tokenizer: "PreTrainedTokenizerFast") -> Callable[..., Any]:
    """Return a function that loads scenes for a model: ``make_spec(model, batch_size=8, split="train", **dataset)``."""
    from composer_prior import StreamingCaptionDataset
    from composer_prior.data.captions import caption_data_spec

    def make(model: Any, batch_size: int = 8, split: str = "train", **dataset: Any) -> Any:
        arguments = {"local": str(scenes / split), "max_caption_tokens": 64, **dataset}
        processor = model.image_processor if model is not None else None
        data = StreamingCaptionDataset(
            tokenizer=tokenizer, image_processor=processor, batch_size=batch_size, **arguments
        )
        return caption_data_spec(data, batch_size, drop_last=True)

    return make


@pytest.fixture
def make_batch(make_spec: Callable[..., Any]) -> Callable[..., "dict[str, torch.Tensor]"]:
    """Return a function that makes the first batch of :func:`make_spec`."""

    def make(model: Any, batch_size: int = 8, **dataset: Any) -> "dict[str, torch.Tensor]":
        return next(iter(make_spec(model, batch_size, **dataset).dataloader))

    return make
