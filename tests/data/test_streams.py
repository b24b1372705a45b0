"""Data sets of one node side by side: each has a number of its own in shared memory, whoever looks at the same time."""

import _posixshmem
import os
import tempfile
import threading
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory as BuiltinSharedMemory
from pathlib import Path

import pytest
from common.data import write_tiles
from streaming import MDSWriter
from streaming.base.constant import BARRIER_FILELOCK, CACHE_USAGE, LOCALS, RESUME
from streaming.base.shared import memory as streaming_memory
from streaming.base.shared import prefix
from streaming.base.shared.memory import SharedMemory

from composer_prior.data import streaming_fixes
from composer_prior.data.captions import StreamingCaptionDataset, caption_data_spec, read_captions
from composer_prior.data.messages import DataError
from composer_prior.data.streams import CheckedDataset


@pytest.fixture
def tiles(tmp_path):
    return write_tiles(tmp_path / "tiles", 4)


def test_a_number_that_another_program_takes_meanwhile_is_left_to_it(tiles, monkeypatch):
    first = CheckedDataset(local=tiles, batch_size=1)
    look, looks = streaming_fixes.free_number, []

    def late(*arguments):
        """What was free when it looked has been taken since, the first time."""
        looks.append(arguments)
        return first._shm_prefix_int if len(looks) == 1 else look(*arguments)

    monkeypatch.setattr(streaming_fixes, "free_number", late)
    second = CheckedDataset(local=tiles, batch_size=1)
    assert second._shm_prefix_int != first._shm_prefix_int
    assert len(looks) == 2
    assert second[3]["caption"].startswith("a tile of shade 3")
    taken = SharedMemory(prefix._get_path(second._shm_prefix_int, LOCALS), False)
    assert prefix._unpack_locals(bytes(taken.buf))[0] == [tiles]


def test_where_no_number_is_to_be_had_there_is_one_line(tiles, monkeypatch):
    first = CheckedDataset(local=tiles, batch_size=1)
    monkeypatch.setattr(streaming_fixes, "free_number", lambda *_: first._shm_prefix_int)
    with pytest.raises(DataError, match=r"^no number in shared memory could be had in 20 attempts$"):
        CheckedDataset(local=tiles, batch_size=1)


@pytest.mark.parametrize("remote", [False, True])
def test_a_number_with_leftovers_of_a_killed_program_is_passed_over(remote, tiles, tmp_path):
    place = {"local": tiles, "remote": None} if not remote else {"local": str(tmp_path / "cache"), "remote": tiles}
    first = CheckedDataset(local=tiles, batch_size=1)
    caches = [place["local"]] if remote else []
    expected = streaming_fixes.free_number(caches)
    leftover = SharedMemory(prefix._get_path(expected, CACHE_USAGE), True, 8)
    second = streaming_fixes.free_number(caches)
    lock = Path(tempfile.gettempdir(), prefix._get_path(second, BARRIER_FILELOCK))
    lock.touch()
    try:
        third = CheckedDataset(**place, batch_size=1)
    finally:
        lock.unlink()
        leftover.cleanup()
    assert third._shm_prefix_int not in {first._shm_prefix_int, expected, second}
    assert third[3]["caption"].startswith("a tile of shade 3")


def test_looking_for_a_number_opens_nothing_for_good(tiles, tmp_path):
    data = [CheckedDataset(local=tiles, batch_size=1) for _ in range(3)]
    opened = len(os.listdir("/proc/self/fd"))
    assert streaming_fixes.free_number([str(tmp_path / "cache")]) not in {each._shm_prefix_int for each in data}
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_cache_that_another_data_set_uses_is_refused(tiles, tmp_path):
    cache = str(tmp_path / "cache")
    first = CheckedDataset(remote=tiles, local=cache, batch_size=1)
    with pytest.raises(ValueError, match=r"^Reused local directory: .*cache\. Provide a different one\.$"):
        streaming_fixes.free_number([cache, "/elsewhere"], retry=2)
    assert first[3]["caption"].startswith("a tile of shade 3")


def empty_memory(number, name):
    """Shared memory as it is between the two calls of the system that make it."""
    return _posixshmem.shm_open(f"/{prefix._get_path(number, name)}", os.O_CREAT | os.O_EXCL | os.O_RDWR, mode=0o600)


@pytest.mark.parametrize("remote", [False, True])
def test_a_number_whose_program_was_killed_as_it_took_it_is_passed_over(remote, tiles, tmp_path, monkeypatch):
    place = {"local": tiles, "remote": None} if not remote else {"local": str(tmp_path / "cache"), "remote": tiles}
    monkeypatch.setattr(streaming_fixes, "_SIZED_WITHIN", 0.05)
    number = streaming_fixes.free_number([place["local"]] if remote else [])
    os.close(empty_memory(number, LOCALS))
    try:
        dataset = CheckedDataset(**place, batch_size=1)
    finally:
        _posixshmem.shm_unlink(f"/{prefix._get_path(number, LOCALS)}")
    assert dataset._shm_prefix_int != number
    assert streaming_memory.BuiltinSharedMemory is streaming_fixes.open_when_sized
    assert dataset[3]["caption"].startswith("a tile of shade 3")


def test_memory_that_another_rank_is_making_is_waited_for(tiles):
    """Ranks resume side by side, and the first to come makes the memory for it."""
    dataset = CheckedDataset(local=tiles, batch_size=1)
    descriptor = empty_memory(dataset._shm_prefix_int, RESUME)
    name = prefix._get_path(dataset._shm_prefix_int, RESUME)
    maker = threading.Timer(0.3, os.ftruncate, (descriptor, 4096))
    try:
        maker.start()
        with pytest.raises(ValueError, match=r"^cannot mmap an empty file$"):
            BuiltinSharedMemory(name, create=False)
        dataset.load_state_dict({"epoch": 2})
        assert bytes(SharedMemory(name, False).buf).startswith(b'{"epoch": 2}\0')
    finally:
        maker.join()
        os.close(descriptor)
        _posixshmem.shm_unlink(f"/{name}")


CAPTIONS = [f"{number:03} " + "word " * 200 for number in range(24)]


def write_shards(folder, compression=None):
    """About ten shards of 3 kB of captions."""
    with MDSWriter(out=str(folder), columns={"caption": "str"}, size_limit=3000, compression=compression) as writer:
        for caption in CAPTIONS:
            writer.write({"caption": caption})
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_small_cache_never_takes_shards_without_a_remote(tmp_path):
    own, bucket, cache = write_shards(tmp_path / "own"), write_shards(tmp_path / "bucket"), tmp_path / "cache"
    before = contents(own)
    places = {"own": {"local": str(own)}, "bucket": {"remote": str(bucket), "local": str(cache)}}
    limited = {"streams": places, "cache_limit": 16_000}
    for _ in range(2):
        assert list(read_captions(limited)) == 2 * CAPTIONS
        assert contents(own) == before
    data = CheckedDataset(batch_size=1, **limited)
    assert {data[number]["caption"] for number in range(48)} == set(CAPTIONS)
    assert 0 < sum(path.stat().st_size for path in cache.glob("*.mds")) <= 16_000 < sum(map(len, before.values()))
    with pytest.raises(DataError, match=r"own/shard\.00000\.mds has no remote, and is not removed"):
        data.evict_shard(0)
    for _ in range(data.num_shards):
        with suppress(ValueError, DataError):  # there are none left
            data.evict_coldest_shard()
    assert contents(own) == before
    assert not list(cache.glob("*.mds"))


@pytest.mark.parametrize("remote", ["own", "own/", "./own", "{folder}/own", "link", "{folder}/other/../own"])
def test_a_remote_that_is_the_local_folder_is_none(remote, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = write_shards(tmp_path / "own", "zstd")
    (tmp_path / "link").symlink_to(own)
    (tmp_path / "other").mkdir()
    place = {"remote": remote.format(folder=tmp_path), "local": "own", "cache_limit": 16_000}
    before = contents(own)
    assert list(read_captions(place)) == CAPTIONS
    assert before.items() <= contents(own).items()


def test_shards_that_lost_their_compressed_form_stay(tmp_path):
    """As they lie in the cache of a remote, which another recipe then names as local."""
    own = write_shards(tmp_path / "own", "zstd")
    assert list(read_captions({"local": str(own)})) == CAPTIONS
    for file in own.glob("*.zstd"):
        file.unlink()
    before = contents(own)
    assert list(read_captions({"local": str(own)})) == CAPTIONS
    assert contents(own) == before


def test_a_missing_shard_leaves_nothing_in_the_folder_of_the_user(tmp_path):
    own = write_shards(tmp_path / "own")
    (own / "shard.00003.mds").unlink()
    before = contents(own)
    data = CheckedDataset(local=str(own), batch_size=1)
    for _ in range(2):
        with pytest.raises(DataError, match=r"own/shard\.00003\.mds cannot be read: .* there is no remote"):
            [data[number] for number in range(24)]
    assert contents(own) == before


def test_each_sample_knows_its_stream(tmp_path, tokenizer):
    folders = [write_tiles(tmp_path / name / "train", count) for name, count in (("one", 3), ("two", 5))]
    unnamed = {"local": str(tmp_path / "two"), "split": "train"}
    data = StreamingCaptionDataset(
        tokenizer=tokenizer, streams={"tiles": {"local": folders[0]}, "": unnamed}, batch_size=8
    )
    assert data.stream_names == ["tiles", "train"]
    (batch,) = caption_data_spec(data, 8).dataloader
    streams = dict(zip(batch["sample_id"].tolist(), batch["stream"].tolist(), strict=True))
    assert streams == {number: int(number >= 3) for number in range(8)}
    alone = StreamingCaptionDataset(tokenizer=tokenizer, local=folders[0], batch_size=3)
    assert alone.stream_names == ["train"]
    (batch,) = caption_data_spec(alone, 3).dataloader
    assert "stream" not in batch


@pytest.mark.parametrize(("name", "refused"), [("", "tiles"), ("a/b", "a/b"), ("total", "total")])
def test_names_of_streams_that_metrics_cannot_have(name, refused, tiles):
    with pytest.raises(ValueError, match=f"^streams: '{refused}' cannot name a stream; .* other than total"):
        CheckedDataset(streams={"tiles": {"local": tiles}, name: {"local": tiles}}, batch_size=1)


@pytest.mark.parametrize(
    ("amounts", "error"),
    [
        (({"proportion": -0.5}, {"proportion": 1}), r"streams\.a\.proportion=-0\.5: expected a number of at least 0"),
        (({}, {"repeat": "2"}), r"streams\.b\.repeat='2': expected a number of at least 0"),
        (({"choose": 2, "repeat": 1}, {}), r"streams\.a has repeat and choose: give one of them"),
        (({"proportion": 0.5}, {}), r"streams\.b has no proportion, as others have"),
        (({"proportion": 0.5}, {"repeat": 2}), r"streams\.b has no proportion, as others have"),
        (({"proportion": 0}, {"proportion": 0.0}), r"streams: each proportion is 0"),
    ],
)
def test_amounts_of_streams_that_cannot_be_mixed_are_refused_by_name(tiles, amounts, error):
    streams = {name: {"local": tiles, **amount} for name, amount in zip("ab", amounts, strict=True)}
    with pytest.raises(ValueError, match=f"^{error}"):
        CheckedDataset(streams=streams, batch_size=1)
