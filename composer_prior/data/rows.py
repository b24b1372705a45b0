"""Packing ahead of the batch: rows of constant length, which are filled with whole samples before they are batched.

Each worker of a loader reads ``BUFFER`` samples ahead. A row takes the sample that has waited longest, then of the
others the longest that fits, until none does. So rows are a function of the worker's samples in their order. A batch
brings with it how far its worker is, its :class:`Place`; the places of all workers are what a checkpoint needs.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count, islice, pairwise
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from composer.utils import dist
from numpy.typing import NDArray
from streaming import StreamingDataLoader
from streaming.base.dataset import _Iterator
from streaming.base.world import World
from torch import Tensor

from composer_prior.data.batch import ROW
from composer_prior.data.nodes import on_first_rank
from composer_prior.data.streams import CheckedDataset

BUFFER = 64  # samples that a worker holds: 97 % of the positions are real for uniform lengths up to that of a row
_MEASURED = (8, 64)  # shards of each stream, and samples of each of them, for packing_ratio=auto
_FILLED = 0.97
_PLACE = "place"  # key of a batch, until the loader takes it out


class Place(NamedTuple):
    """How far a worker is in an epoch: whose samples it reads, how many it has read, and which of them wait."""

    worker: int  # of the run that began the epoch
    read: int = 0
    waiting: tuple[int, ...] = ()  # numbers in the order of reading, from 0


def first_fit(lengths: Sequence[int], tokens: int) -> list[int]:
    """Return which samples make the next row: the first, then the longest that fit.

    Args:
        lengths: of the samples that wait, in tokens, at least one.
        tokens: of a row.
    """
    taken = []
    for place in (0, *sorted(range(1, len(lengths)), key=lambda place: -lengths[place])):
        if lengths[place] <= tokens:
            taken.append(place)
            tokens -= lengths[place]
    return sorted(taken)


def _spread(first: int, size: int, most: int) -> NDArray[np.int64]:
    """Return at most so many numbers, spread over those from the first on."""
    return np.linspace(first, first + size - 1, min(size, most), dtype=np.int64)


class RowsDataset(CheckedDataset):
    """A data set that yields rows, lists of samples with their :class:`Place`, where it has a ``packing_ratio``.

    An epoch then has no end of its own, :class:`RowsLoader` counts its batches: a worker all of whose samples are in
    rows begins them again.
    """

    packing_ratio: float | Literal["auto"] | None = None
    max_tokens: int
    workers = 1  # of the loader
    left = 0  # batches of this epoch
    _goes_on = True  # the next sample is not the first again
    _places: tuple[Place, ...] = ()  # of this rank's workers, the next to deliver first
    _resumed: int | None = None  # the epoch that begins at these places

    @cached_property
    def samples_per_row(self) -> float:
        """The mean number of samples in a row, given or measured on some samples of each stream."""
        if self.packing_ratio == "auto":
            return on_first_rank(self._measure)
        return float(self.packing_ratio or 1)

    def _measure(self) -> float:
        tokens = samples = 0.0
        for stream, first, size in zip(self.streams, self.shard_offset_per_stream, self.shards_per_stream, strict=True):
            shards = _spread(first, size, _MEASURED[0])  # which may have to be downloaded
            ranges = ((self.sample_offset_per_shard[one], self.samples_per_shard[one]) for one in shards)
            numbers = chain.from_iterable(_spread(*one, _MEASURED[1]) for one in ranges)
            tokens += stream.choose * float(np.mean([len(self[int(one)]["input_ids"]) for one in numbers]))
            samples += stream.choose
        return max(1.0, _FILLED * self.max_tokens * samples / tokens)

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__() if self.packing_ratio is None else self._rows(super().__iter__())

    def _rows(self, samples: Iterator[Any]) -> Iterator[tuple[list[Any], Place]]:
        waiting: list[tuple[int, Any]] = []
        while True:
            while not waiting or (self._goes_on and len(waiting) < BUFFER):
                sample = next(samples, None)
                if sample is None:
                    return  # the samples have no end: this was told to stop
                waiting.append((self._number, sample))
            lengths = [len(sample["input_ids"]) for _, sample in waiting]
            if max(lengths) > self.max_tokens:
                raise ValueError(f"A sample of {max(lengths):,} tokens is longer than a row: raise max_tokens.")
            taken = first_fit(lengths, self.max_tokens)
            row = [waiting[place][1] for place in taken]
            waiting = [one for place, one in enumerate(waiting) if place not in taken]
            read = max(self._start.read, self._number + 1)
            yield row, Place(self._start.worker, read, tuple(number for number, _ in waiting))

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        if self.packing_ratio is None:
            return super()._get_work(epoch, sample_in_epoch)
        world = self._parallel_worker_world
        mine = world.worker_of_rank
        self._start = self._places[mine] if self._resumed == epoch else Place(mine)
        worker = world.rank * world.workers_per_rank + self._start.worker
        self._parallel_worker_world = World(world.num_nodes, world.ranks_per_node, world.workers_per_rank, worker)
        found = super()._get_work(epoch, 0)
        self._own = found[found >= 0]
        return np.roll(self._own, -self._start.read)  # what is downloaded ahead

    def _each_sample_id(self, it: _Iterator) -> Iterator[int]:
        if self.packing_ratio is None:
            yield from super()._each_sample_id(it)
            return
        size = len(self._own)
        for number, following in pairwise(chain(self._start.waiting, count(self._start.read))):
            if it.should_exit() or self._event.is_set():
                break
            self._number, self._goes_on = number, number // size == following // size
            it.yield_index = it.ready_index = max(0, number - self._start.read)
            yield self._own[number % size]
        it.on_exit()
        self.raise_failure()

    def begin(self, batches: int) -> int:
        """Begin an epoch of some batches, or the rest of the one of a checkpoint, and return how many are left."""
        if self._resumed is None or self.next_epoch > self._resumed:
            self._resumed, self.left = None, batches
            self._places = tuple(map(Place, range(self.workers)))
        elif not self.left:
            self.next_epoch = self._resumed + 1  # the workers count the others, but do not begin this one
        return self.left

    def deliver(self, place: Sequence[Any]) -> None:
        """Note how far the worker of the next batch is; workers deliver in turn."""
        self._places = (*self._places[1:], Place(*place))
        self.left -= 1

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return the state, with the places of all ranks' workers in the middle of an epoch; every rank must call it.

        Its last value is a text, as a sharded checkpoint restores values and no new keys.
        """
        state = super().state_dict(num_samples, from_beginning)
        if self.packing_ratio is None:
            return state
        rows = None
        if num_samples and self._places:
            places = dist.all_gather_object(self._places)
            rows = {"left": self.left, "packed": self._packed, "places": places}
        return {**state, "sample_in_epoch": 0, "rows": json.dumps(rows)}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Load a state.

        Raises:
            ValueError: for one from the middle of an epoch that other ranks or workers have begun, or without rows.
        """
        rows = json.loads(obj.get("rows") or "null")
        theirs = rows["packed"] if rows else "unpacked"
        unfinished = rows["left"] if rows else obj["sample_in_epoch"]
        if unfinished and theirs != self._packed:
            raise ValueError(
                f"The checkpoint is from the middle of an epoch that was {theirs}, and would go on {self._packed}: "
                "take the same, or a checkpoint from the end of an epoch."
            )
        super().load_state_dict({key: value for key, value in obj.items() if key != "rows"})
        if rows is not None:
            self._resumed, self.left = obj["epoch"], rows["left"]
            places = rows["places"][dist.get_global_rank()] if unfinished else map(Place, range(self.workers))
            self._places = tuple(Place(*place) for place in places)

    @property
    def _packed(self) -> str:
        """Return what the rows of an epoch depend on beside the seed."""
        if self.packing_ratio is None:
            return "unpacked"
        nodes = self._parallel_rank_world.num_nodes
        ranks = f"{dist.get_world_size()} ranks on {nodes} nodes"
        return f"packed by {ranks} with {self.workers} workers and {self.batch_size} rows each"


class RowsLoader(StreamingDataLoader):
    """A loader of batches of rows; its length is that of an epoch, and the data set's places are those it has reached.

    Args:
        dataset: with a ``packing_ratio``.
        collate_fn: makes a batch of samples.
        kwargs: those of :class:`torch.utils.data.DataLoader`; ``batch_size`` are the rows of a batch.
    """

    dataset: RowsDataset

    def __init__(self, dataset: RowsDataset, collate_fn: Callable[[list[Any]], dict[str, Any]], **kwargs: Any):
        super().__init__(dataset, collate_fn=RowsCollator(collate_fn), **kwargs)
        dataset.workers = max(1, self.num_workers)

    def __len__(self) -> int:
        batches = int(len(self.dataset) / (cast(int, self.batch_size) * self.dataset.samples_per_row))
        return batches - batches % self.dataset.workers  # each worker has as many samples, and delivers in turn

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in islice(super().__iter__(), self.dataset.begin(len(self))):
            self.dataset.deliver(batch.pop(_PLACE))
            yield batch


@dataclass(frozen=True)
class RowsCollator:
    """Make a batch of the samples of rows, with ``row`` (``[B]`` int64), the number of the row that a sample is in."""

    collator: Callable[[list[Any]], dict[str, Any]]

    def __call__(self, rows: Sequence[tuple[list[Any], Place]]) -> dict[str, Any]:
        batch = self.collator([sample for row, _ in rows for sample in row])
        numbers = [number for number, (row, _) in enumerate(rows) for _ in row]
        return {**batch, ROW: torch.tensor(numbers), _PLACE: [*rows[-1][1]]}


def count_rows(batch: Mapping[str, Tensor]) -> int:
    """Return what a batch counts as samples: its rows, where it has them."""
    return len(batch[ROW].unique()) if ROW in batch else len(batch["input_ids"])
