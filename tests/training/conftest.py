"""Fixtures that several files share."""

import pytest
from common.data import write_tiles
from common.real_scale import bucket, here  # noqa: F401
from common.recipes import ALONE, FAULTS, NO_REPORT


@pytest.fixture(scope="session")
def tiles(tmp_path_factory):
    """Return overrides of a run on 32 samples in batches of 8, with a shared tokenizer."""
    folder = tmp_path_factory.mktemp("tiles")
    data = f"train_loader.dataset.local={write_tiles(folder / 'tiles', 32, several=True)}"
    every_batch = ["save_interval=1ba", "save_num_checkpoints_to_keep=-1"]
    rest = ["eval_loader=null", f"data.out={folder / 'scenes'}", *every_batch, *NO_REPORT, FAULTS]
    return [*ALONE, data, *rest]
