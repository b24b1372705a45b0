"""Images with captions: reference captions in their published file formats, and the samples of an MDS data set."""

import tempfile
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from composer_prior.data.captions import SPANS_COLUMN, BadSampleError, decode_image
from composer_prior.data.mds import read_column
from composer_prior.data.messages import DataError, one_line
from composer_prior.data.opening import open_captions, sample_captions
from composer_prior.data.scores import index_fingerprint
from composer_prior.data.streams import CheckedDataset
from composer_prior.evaluation.benchmark import Benchmark
from composer_prior.evaluation.samples import (
    ImageFolder,
    Unusable,
    data_files,
    digest,
    file_size,
    image_name,
    load_image,
    numbered,
    read_json,
    text,
    usable,
)
from composer_prior.models.image_text_model import ImageTextModel
from composer_prior.registry import Count, check_value

Entries = Iterator[tuple[str, Any]]


class CaptionBenchmark(Benchmark):
    """The base of benchmarks that judge generated captions.

    Args:
        data: an MDS folder, or the annotations of COCO, of Karpathy's splits or of NoCaps.
        images: folder of the images. Default: that of the annotations.
        split: of Karpathy's (default: test), or a folder in the MDS folder.
        prompt: text between image and caption. Default: that of training.
        max_new_tokens: longest caption in tokens.
    """

    def __init__(
        self,
        *,
        data: str,
        images: str | None = None,
        split: str | None = None,
        prompt: str | None = None,
        max_new_tokens: Count = 64,
    ):
        check_value("max_new_tokens", max_new_tokens, Count)
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.images = CaptionedImages(data, images, split)
        self.fingerprint = digest(self.images.fingerprint, prompt, max_new_tokens)

    def __len__(self) -> int:
        return len(self.images.samples)

    def predict(self, model: ImageTextModel, numbers: Sequence[int]) -> list[dict[str, Any]]:
        pictures = [self.images.image(number) for number in numbers]
        captions = model.generate_captions(pictures, self.prompt, self.max_new_tokens)
        predictions = []
        for number, caption in zip(numbers, captions, strict=True):
            sample = self.images.samples[number]
            known = {"image": sample.name, "category": sample.category, "caption": caption}
            predictions.append({**known, **self.truth(number, caption)})
        return predictions

    @abstractmethod
    def truth(self, number: int, caption: str) -> dict[str, Any]:
        """Return what a caption of a sample is judged by, as JSON values."""


@dataclass(frozen=True)
class CaptionedImage:
    """One image."""

    name: str
    references: tuple[str, ...]  # captions written by people
    image: Path | bytes | int  # its file, its bytes, or its number in an MDS data set
    category: str = ""  # such as the domain in NoCaps
    coco_id: int | None = None  # its number in COCO, if it has one


class CaptionedImages:
    """Images with reference captions, from the arguments of :class:`CaptionBenchmark`.

    An MDS folder has the columns ``image`` and ``caption`` or ``captions``. Annotations of COCO
    (``captions_val2014.json``), of Karpathy's splits (``dataset_coco.json``, ``dataset_flickr30k.json``) and of NoCaps
    (its domains are categories) are recognized from their keys. A DataError says in one line why none can be used.
    """

    def __init__(self, data: str, images: str | None = None, split: str | None = None):
        path = Path(data).expanduser()
        self._mds: CheckedDataset | None = None
        if path.is_dir():
            self._mds = _open_mds(path, split)
            entries: Entries = _entries_of_mds(self._mds)
            make: Callable[[Any], CaptionedImage] = _of_mds
        else:
            (file,) = data_files(data)
            entries, make = _of_annotations(file, read_json(file), ImageFolder(images or file.parent), split)
        self.samples = usable(data, entries, make)
        sizes: Any = [file_size(one.image) for one in self.samples if not isinstance(one.image, int)]
        if self._mds is not None:
            sizes = Path(self._mds.streams[0].local, "index.json").read_bytes()
        self.fingerprint = digest([(s.name, s.references, s.category) for s in self.samples], sizes)

    def image(self, number: int) -> Image.Image:
        """Return an image as RGB; a DataError names it."""
        place = self.samples[number].image
        if not isinstance(place, int):
            return load_image(place)
        assert self._mds is not None
        with _readable(self._mds.streams[0].local, place):
            return decode_image(self._mds[place]["image"])


class CaptionSample(NamedTuple):
    """One image."""

    image: Image.Image  # RGB
    encoded: bytes  # its bytes, as they are stored
    captions: list[str]  # at least one
    spans: list[tuple[int, int]] | None  # ``[start, end)`` characters that the image determines


class CaptionSamples:
    """An MDS data set of image-caption pairs by number, in a folder or a remote such as ``s3://bucket/captions``.

    Raises:
        FileNotFoundError: there is no ``index.json``.
        ValueError: a column is missing, or one is of an encoding that could run code.
    """

    def __init__(self, data: str):
        self.data = data
        self._cache = tempfile.TemporaryDirectory()
        self._dataset, index = open_captions(data, self._cache.name)
        self.fingerprint = index_fingerprint([index])

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, number: int) -> CaptionSample:
        with _readable(self.data, number):
            sample: Mapping[str, Any] = self._dataset[number]
            image = decode_image(sample["image"])
        return CaptionSample(image, sample["image"], sample_captions(sample), sample.get(SPANS_COLUMN))


@contextmanager
def _readable(data: str, number: int) -> Iterator[None]:
    """Raise a DataError that names a sample if reading it fails."""
    try:
        yield
    except (LookupError, ValueError, RuntimeError, BadSampleError) as error:
        raise DataError(f"{data}: sample {number} cannot be read ({one_line(error)}).") from error


def _open_mds(folder: Path, split: str | None) -> CheckedDataset:
    place = folder / (split or "")
    if not (place / "index.json").exists():
        splits = sorted(index.parent.name for index in folder.glob("*/index.json"))
        remedy = f"give split= {' or '.join(splits)}" if splits else "give an MDS folder or a file of annotations"
        raise DataError(f"{place} has no index.json; {remedy}.")
    data = CheckedDataset(local=str(place), batch_size=1)
    for shard in data.shards:
        names = shard.column_names  # type: ignore[attr-defined]
        if "image" not in names or not {"caption", "captions"} & set(names):
            raise DataError(f"{place} has the columns {', '.join(names)}; expected image and caption or captions.")
    return data


def _entries_of_mds(data: CheckedDataset) -> Entries:
    """Read the captions, and nothing else, of all samples."""
    several = "captions" in data.shards[0].column_names  # type: ignore[attr-defined]
    for number, found in enumerate(read_column(data, "captions" if several else "caption", range(data.num_samples))):
        yield f"sample {number}", (number, found if isinstance(found, list) else [found])


def _of_mds(entry: tuple[int, list[Any]]) -> CaptionedImage:
    number, captions = entry
    return CaptionedImage(str(number), _written(captions), number)


def _of_annotations(
    file: Path, content: Any, images: ImageFolder, split: str | None
) -> tuple[Entries, Callable[[Any], CaptionedImage]]:
    listed, annotations = (_objects(content, name) for name in ("images", "annotations"))
    if listed and "sentences" in listed[0]:
        splits = {str(entry.get("split")) for entry in listed}
        chosen = split or "test"
        if chosen not in splits:
            raise DataError(f"split={chosen}: {file.name} has the splits {', '.join(sorted(splits))}.")
        rows = ((place, entry) for place, entry in numbered(file, listed) if entry.get("split") == chosen)
        return rows, lambda entry: _of_karpathy(entry, images)
    if not listed or not annotations or "caption" not in annotations[0]:
        raise DataError(
            f"{file}: expected images and their captions, as COCO, Karpathy's splits and NoCaps have them, or an MDS "
            "folder."
        )
    if split is not None:
        raise DataError(f"split={split}: {file.name} is one split; leave it out.")
    captions = defaultdict(list)
    for annotation in annotations:
        captions[annotation.get("image_id")].append(annotation.get("caption"))
    return iter(numbered(file, listed)), lambda entry: _of_coco(entry, captions, images)


def _objects(content: Any, name: str) -> list[dict[str, Any]]:
    """Return the list of objects of this name in a file."""
    found = content.get(name) if isinstance(content, Mapping) else None
    return found if isinstance(found, list) and all(isinstance(entry, dict) for entry in found) else []


def _of_coco(entry: Any, captions: Mapping[Any, Sequence[Any]], images: ImageFolder) -> CaptionedImage:
    name = text(entry, "file_name")
    number = entry.get("id")
    references = _written(captions.get(number, []))
    category = entry.get("domain")
    coco_id = number if isinstance(number, int) and category is None else None
    image = images.find(name)
    return CaptionedImage(image_name(image, name), references, image, category or "", coco_id)


def _of_karpathy(entry: Any, images: ImageFolder) -> CaptionedImage:
    name = text(entry, "filename")
    references = _written([sentence.get("raw") for sentence in entry["sentences"]])
    folder = entry.get("filepath") or ""
    image = images.find(str(Path(folder, name)), name)
    return CaptionedImage(image_name(image, name), references, image, coco_id=entry.get("cocoid"))


def _written(captions: Any) -> tuple[str, ...]:
    found = tuple(caption for caption in captions if isinstance(caption, str) and caption.strip())
    if not found:
        raise Unusable("without a caption")
    return found
