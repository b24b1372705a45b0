"""Checkpoints that make a folder named ``executed`` when something in them is unpickled without care."""

import io
import os
import pickle

import torch


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def one_file(path):
    """Write a checkpoint of one file."""
    torch.save({"state": {"model": {}, "callbacks": {}, "x": Hostile()}}, path)


def metadata(folder):
    """Write the metadata of a sharded checkpoint."""
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile()))


def value(folder):
    """Write a value of a sharded checkpoint that is not a tensor and not part of the identity."""
    known = pickle.loads((folder / ".metadata").read_bytes())
    (index,) = [index for index in known.storage_data if index.fqn == "state.run_name"]
    written = io.BytesIO()
    torch.save(Hostile(), written)
    place = known.storage_data[index]
    shard = folder / place.relative_path
    place.offset, place.length = shard.stat().st_size, written.tell()
    shard.write_bytes(shard.read_bytes() + written.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(known))


def file_elsewhere(folder):
    """Write a shard that a download would write outside of its folder."""
    known = pickle.loads((folder / ".metadata").read_bytes())
    next(iter(known.storage_data.values())).relative_path = "../executed"
    (folder / ".metadata").write_bytes(pickle.dumps(known))
