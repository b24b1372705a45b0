"""Two nodes of one rank each: what is made once where they share a disk, and what they are told where they do not."""

import pytest
from common.recipes import ROOT, SHRUNKEN, TOWER, fork_ranks, losses
from composer.utils import dist

from composer_prior.data.nodes import check_same, check_shared

pytestmark = pytest.mark.slow

NO_BENCHMARKS = [f"benchmarks.{name}=null" for name in ("scene_foils", "hallucination", "captioning")]
PROGRAM = [str(ROOT / "train.py"), str(ROOT / "yamls/prior_vit.yaml"), *SHRUNKEN, *TOWER, *NO_BENCHMARKS]
PROGRAM += ["sample_captions=0"]
SHARDED = "parallelism_config.fsdp2={}"


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """What a run of two nodes on one disk leaves, and what it has printed."""
    folder = tmp_path_factory.mktemp("disk")
    return folder, fork_ranks(None, *PROGRAM, SHARDED, "save_interval=2ba", nodes=[folder, folder])


def test_on_a_shared_disk_the_first_rank_of_all_makes_what_is_missing(disk):
    folder, output = disk
    for line in ("Data: making", "Tokenizer: training", "Reference: training", "Scores: "):
        assert output.count(line) == 1
    assert [batch for batch, _ in losses(folder / "runs/prior_vit")] == [0, 1, 2, 3]
    assert not list(folder.rglob(".seen-by-all-nodes-*"))
    assert not list(folder.rglob("*.partial"))


def test_on_a_shared_disk_a_run_is_resumed_from_its_newest_whole_checkpoint(disk):
    folder, _ = disk
    checkpoints = folder / "runs/prior_vit/checkpoints"
    (checkpoints / "ep0-ba4/.metadata").unlink()
    fork_ranks(None, *PROGRAM, SHARDED, "autoresume=true", nodes=[folder, folder])
    assert (checkpoints / "ep0-ba4/.metadata").exists()
    assert [batch for batch, _ in losses(folder / "runs/prior_vit")] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("key", "shared"),
    [
        ("data.out", []),
        ("save_folder", ["data.out={}/data", "tokenizer.name={}/tokenizer", "reference.run_folder={}/reference"]),
    ],
)
def test_folders_that_nodes_do_not_share_are_named_by_all_and_nothing_is_made(tmp_path, key, shared):
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    for node in nodes:
        node.mkdir()
    overrides = [override.format(tmp_path) for override in shared]
    output = fork_ranks(None, *PROGRAM, *overrides, nodes=nodes, expect=1)
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2
    assert all(line.startswith(f"error: {key}: ") and "not seen by rank 1" in line for line in lines)
    assert {*tmp_path.rglob("*")} == {*nodes}


def test_copies_on_each_node_will_do_and_must_be_the_same(tmp_path, monkeypatch):
    """As two nodes with disks of their own would answer."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda found: None)
    monkeypatch.setattr(dist, "all_gather_object", lambda found: [found, {"data.out": tmp_path.exists()}])
    check_shared({"data.out": tmp_path, "save_folder": "s3://bucket/checkpoints"})
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr(dist, "all_gather_object", lambda found: [found, {**found, "data": "0"}])
    with pytest.raises(ValueError, match="Rank 1 has other data than the first rank: their nodes see different fol"):
        check_same({"data": "1", "seed": 17})
