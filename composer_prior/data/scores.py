"""The log-probabilities of caption tokens under a reference or a viewer, computed once and stored beside the data.

Scores are a separate MDS data set, whose sample ``i`` belongs to sample ``i`` of the captions. Its one column,
``ref_logprobs`` or ``viewer_logprobs`` (bytes), holds the log-probability of each caption token, the end of sequence
included, as little-endian float16: 2 bytes for each token, and 8 for each sample. The weight ``1 - P`` that results is
within 2^-11 of the exact one, relatively, or within 2^-25 absolutely.

    OUT/scores.json             metadata: data, tokenizer and the model that scored
    OUT/shard.<unit>.000.mds    one file for each unit of work, moved here when it is whole
    OUT/index.json              written last; without it the scores are incomplete
"""

import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from filelock import FileLock
from numpy.typing import NDArray
from streaming.base.constant import DEFAULT_TIMEOUT
from streaming.base.format import FileInfo
from transformers import PreTrainedTokenizerBase

from composer_prior.data.batch import LOGPROBS
from composer_prior.data.download import ATTEMPTS, check_file
from composer_prior.data.files import parse_json
from composer_prior.data.mds import sample_extent
from composer_prior.data.messages import DataError
from composer_prior.data.remote import Remote
from composer_prior.data.storage import is_remote
from composer_prior.data.stores import is_denied
from composer_prior.data.tokenizer import tokenizer_fingerprint

COLUMN, VIEWER_COLUMN = LOGPROBS
KEYS = {"scores": COLUMN, "viewer_scores": VIEWER_COLUMN}  # of a data set in a recipe
METADATA = "scores.json"
INDEX = "index.json"
VERSION = 1
_LOWEST = -65504.0  # of float16


class ScoresError(ValueError):
    """Scores that are missing, damaged, or belong to something else."""


class CaptionData(Protocol):
    """The attributes of a :class:`.StreamingCaptionDataset` that scores depend on."""

    tokenizer: PreTrainedTokenizerBase
    prompt: str
    max_caption_tokens: int
    num_samples: int

    @property
    def fingerprint(self) -> str: ...

    @property
    def chat_digest(self) -> str: ...


def index_fingerprint(indices: Iterable[bytes]) -> str:
    """Return a digest of the indices of a data set's streams, which hold the shards' sizes and hashes."""
    return hashlib.sha256(b"".join(indices)).hexdigest()[:16]


@dataclass(frozen=True)
class ScoresMetadata:
    """The metadata of scores: the data, tokenizer and reference that they belong to.

    Args:
        data: fingerprint of the data set's index.
        samples: how many it has.
        tokenizer: fingerprint of the model's tokenizer, whose tokens the scores are of.
        prompt: text before the caption.
        max_caption_tokens: where captions are cut.
        reference: ``path``, and fingerprints ``config``, ``weights`` and ``tokenizer`` of the model that scored.
        version: of the format.
        column: ``ref_logprobs`` of a text-only reference, or ``viewer_logprobs`` of a model that sees the images.
        chat: digest of how conversations and documents become text; "" where there are none.
    """

    data: str
    samples: int
    tokenizer: str
    prompt: str
    max_caption_tokens: int
    reference: dict[str, str]
    version: int = VERSION
    column: str = COLUMN
    chat: str = ""

    @classmethod
    def of(cls, data: CaptionData, reference: Mapping[str, str], column: str = COLUMN) -> "ScoresMetadata":
        """Return the metadata of the scores that a reference, or a viewer, gives a data set."""
        return cls(
            data.fingerprint,
            data.num_samples,
            tokenizer_fingerprint(data.tokenizer),
            data.prompt,
            data.max_caption_tokens,
            dict(reference),
            column=column,
            chat=data.chat_digest,
        )

    @classmethod
    def from_json(cls, text: bytes, where: str) -> "ScoresMetadata":
        """Read the metadata.

        Raises:
            ScoresError: if the text is no such metadata, or of another version.
        """
        try:
            known = parse_json(text)
            if known["version"] != VERSION:
                raise ScoresError(f"{where}: scores of version {known['version']}, {VERSION} is read. Score again.")
            return cls(**known)
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, ScoresError):
                raise
            raise ScoresError(f"{where}/{METADATA} does not describe scores ({error}).") from error

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=2).encode()

    def card(self) -> str:
        """Return the text of a card of a folder with the scores."""
        head = "---\ntags: [composer-prior, mds]\n---\n# Scores\n\nLog-probabilities of captions, written by"
        return f"{head} `composer-prior score`.\n\n```json\n{self.to_json().decode()}\n```\n"

    def check(self, other: "ScoresMetadata", where: str, reference: bool = True) -> None:
        """Refuse scores with this metadata if a run needs other ones.

        Args:
            other: the metadata that the run needs.
            where: path or URL of the scores.
            reference: compare the references too.

        Raises:
            ScoresError: naming all fields that differ.
        """
        ours, theirs = _flat(self, reference), _flat(other, reference)
        differing = [
            f"{name} ({ours[name]!r} there, {theirs[name]!r} here)"
            for name in ours
            if name in theirs and ours[name] != theirs[name]  # of another column, the column alone says it
        ]
        if differing:
            raise ScoresError(
                f"The scores in {where} do not belong to this run; what differs: {', '.join(differing)}. Delete them "
                "to score again, or name another path."
            )


def _flat(metadata: ScoresMetadata, reference: bool) -> dict[str, Any]:
    """Return the fields to compare, without the path of the reference."""
    scorer = "reference" if metadata.column == COLUMN else "viewer"
    fields = {key: value for key, value in asdict(metadata).items() if key != "reference"}
    theirs = {f"the {scorer}'s {key}": value for key, value in metadata.reference.items() if key != "path"}
    return {**fields, **(theirs if reference else {})}


def encode_logprobs(logprobs: NDArray[np.floating]) -> bytes:
    """Encode log-probabilities as little-endian float16; those below its range become its lowest.

    Raises:
        ScoresError: if one is NaN or positive.
    """
    _check(logprobs)
    return np.maximum(logprobs, _LOWEST).astype("<f2").tobytes()


def decode_logprobs(data: bytes) -> NDArray[np.float32]:
    """Decode float32 log-probabilities, of :func:`encode_logprobs`.

    Raises:
        ScoresError: if one is NaN or positive, or the bytes are not whole numbers.
    """
    if len(data) % 2:
        raise ScoresError(f"{len(data)} bytes are not float16 values")
    logprobs = np.frombuffer(data, "<f2").astype(np.float32)
    _check(logprobs)
    return logprobs


def _check(logprobs: NDArray[np.floating]) -> None:
    bad = ~(logprobs <= 0)  # not (x <= 0) is true of NaN too
    if bad.any():
        raise ScoresError(
            f"{int(bad.sum())} of {len(logprobs)} log-probabilities are NaN or positive, the first "
            f"{float(logprobs[bad][0])}"
        )


@dataclass(frozen=True)
class Shard:
    """One file of scores: its name, number of samples, size and hash."""

    name: str
    samples: int
    size: int
    digest: str


class Scores:
    """Scores by random access, from a folder or a remote; shards of a remote are downloaded when they are needed.

    It is not a ``StreamingDataset``: it has no shared memory and no epochs, so that any process can open it any number
    of times. Downloaded shards are never evicted; they take a few bytes for each token.

    Args:
        path: folder or remote.
        cache: local folder under which the shards of a remote are kept.
        attempts, seconds: number of attempts of a download, and the longest time of each; see :func:`.download`.

    Raises:
        ScoresError: if they are missing, incomplete, or of an unknown format.
    """

    def __init__(self, path: str, cache: Path, attempts: int = ATTEMPTS, seconds: float = DEFAULT_TIMEOUT):
        self.path = path = os.path.expanduser(path)
        self.patience = (attempts, seconds)
        self.metadata = ScoresMetadata.from_json(_fetch(path, METADATA, *self.patience), path)
        index = _fetch(path, INDEX, *self.patience)
        self.shards = read_index(index, path, self.metadata.samples, self.metadata.column)
        self.bounds = np.cumsum([0, *(shard.samples for shard in self.shards)])  # [shards + 1]
        # The cache is named by the index, so that rewritten scores are downloaded again.
        digest = hashlib.sha256(index).hexdigest()[:16]
        self.folder = cache / digest if is_remote(path) else Path(path)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, sample_id: int) -> NDArray[np.float32]:
        """Return the log-probabilities ``[tokens]`` of the caption tokens of a sample.

        Raises:
            ScoresError: if its shard is missing or damaged, or a value is not a log-probability.
        """
        number = int(np.searchsorted(self.bounds, sample_id, "right")) - 1
        data = self._open(self.shards[number])
        begin, end = sample_extent(data, sample_id - int(self.bounds[number]))
        try:
            return decode_logprobs(data[begin + 4 : end])  # behind the size of the column
        except ScoresError as error:
            raise ScoresError(f"{self.path}, scores of sample {sample_id}: {error}") from error

    def read(self, sample_id: int, tokens: int, uncut: int | None = None) -> NDArray[np.float32]:
        """Return the log-probabilities of the first learned tokens of a sample.

        Args:
            sample_id: number of the sample.
            tokens: learned tokens of the sample as it is read.
            uncut: learned tokens of the whole sample, of which at least ``tokens`` have scores. Default: ``tokens``.

        Raises:
            ScoresError: as above, or if their number differs.
        """
        logprobs = self[sample_id]
        if not tokens <= len(logprobs) <= (uncut or tokens):
            more = "" if uncut in (None, tokens) else f", {uncut} before it is cut"
            raise ScoresError(f"{self.path} has {len(logprobs)} scores of sample {sample_id} for {tokens} tokens{more}")
        return logprobs[:tokens]

    def _open(self, shard: Shard) -> mmap.mmap:
        file = self.folder / shard.name
        try:
            return _open_shard(str(file), shard.size, shard.digest)
        except FileNotFoundError:
            if not is_remote(self.path):
                raise ScoresError(f"{file} is missing; delete {INDEX} beside it and score again") from None
        info = FileInfo(shard.name, shard.size, {"xxh64": shard.digest})
        _download(self.path, file, lambda file: check_file(file, info), *self.patience)
        return _open_shard(str(file), shard.size, shard.digest)


def open_scores(path: str, data: CaptionData, cache: Path, column: str = COLUMN, **patience: Any) -> Scores:
    """Open the scores of a data set.

    Args:
        path: folder or remote.
        data: the data set that they must belong to.
        cache: local folder under which the shards of a remote are kept.
        column: that they must have.
        patience: ``attempts`` and ``seconds`` of :class:`.Scores`.

    Raises:
        ScoresError: if they are missing or incomplete, or belong to other data, naming what differs.
    """
    scores = Scores(path, cache, **patience)
    scores.metadata.check(ScoresMetadata.of(data, {}, column), path, reference=False)
    return scores


def read_index(data: bytes, path: str, samples: int, column: str = COLUMN) -> list[Shard]:
    """Return the shards of scores, from the bytes of their index.

    Raises:
        ScoresError: if it is not an index of scores, or has another number of samples.
    """
    try:
        shards = [_parse_entry(entry, column) for entry in parse_json(data)["shards"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ScoresError(f"{path}/{INDEX} is not an index of scores ({error}).") from error
    found = sum(shard.samples for shard in shards)
    if found != samples:
        raise ScoresError(f"{path}/{INDEX} has {found} samples, {samples} were scored.")
    return shards


def _parse_entry(entry: Mapping[str, Any], column: str) -> Shard:
    raw = entry["raw_data"]
    if entry["format"] != "mds" or entry["compression"] or entry["column_names"] != [column]:
        raise ValueError(f"expected uncompressed MDS with the column {column}")
    if Path(raw["basename"]).name != raw["basename"]:
        raise ValueError(f"a shard outside of its folder: {raw['basename']}")
    return Shard(raw["basename"], int(entry["samples"]), int(raw["bytes"]), raw["hashes"]["xxh64"])


@lru_cache(maxsize=64)
def _open_shard(path: str, size: int, digest: str) -> mmap.mmap:
    """Map a shard's bytes, checked once; the cache bounds the open files of a process."""
    with open(path, "rb") as file:
        found = os.fstat(file.fileno()).st_size
        if found == size:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if xxhash.xxh64(data).hexdigest() == digest:
                return data
    raise ScoresError(f"{path} is damaged ({found} of {size} bytes); delete it and {INDEX} beside it, and score again")


def _fetch(path: str, name: str, attempts: int, seconds: float) -> bytes:
    """Read one small file of a folder or remote."""
    try:
        if not is_remote(path):
            return Path(path, name).read_bytes()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, name)
            _download(path, file, lambda file: json.loads(file.read_bytes()), attempts, seconds)
            return file.read_bytes()
    except (OSError, ScoresError) as error:
        if is_denied(error):
            raise
        raise ScoresError(
            f"{path} holds no whole scores: {name} cannot be read ({error}). Run composer-prior score RECIPE.yaml "
            f"out={path}."
        ) from error


def _download(url: str, file: Path, check: Callable[[Path], Any], attempts: int, seconds: float) -> None:
    """Download a file, in one of the processes that need it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if file.exists():
            return
        for leftover in file.parent.glob(f"{file.name}.*.partial"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
        try:
            Remote(url).get(file.name, file, check, attempts, seconds)
        except DataError as error:
            raise ScoresError(f"{url.rstrip('/')}/{file.name} cannot be downloaded ({error})") from error
