"""Image-caption pairs in the usual formats: one small reader per format, all yielding the same records.

A source is cut into units of work by :meth:`.Source.units`, which is cheap, deterministic and runs in one process;
:meth:`.Source.read` turns one unit into records, in any process. Both keep at most one unit in memory, except for
COCO's JSON, whose two lists have to be joined.

| format | content |
| --- | --- |
| ``jsonl``, ``csv``, ``tsv`` | a file of captions beside a folder of images, one record per line |
| ``json`` | a JSON array: LLaVA's pre-training ``conversations``, or ``{"image": ..., "caption": ...}`` |
| ``coco`` | COCO captions: ``{"images": [...], "annotations": [...]}`` |
| ``webdataset`` | tar shards (img2dataset, LAION, CC12M) |
| ``folder`` | images with a ``.txt``, ``.caption`` or ``.json`` of the same name (kohya, SimpleTuner, img2dataset) |
| ``parquet`` | Parquet files with image bytes or paths |
| ``hf`` | a Hugging Face dataset saved with ``save_to_disk``, or of the Hub |

A table's delimiter is comma, semicolon, tab or ``|``, whichever splits its first line into known column names.

Readers yield a :class:`.Rejected` for each record that they cannot read. A file that is damaged from its beginning, or
truncated, is a :class:`.BadFile`, which may stand for many captions; a damaged sample within a readable file is
rejected alone. Links in the source's folder are followed, each real folder once; a path in a list must lead to a file
below the source or below ``images=``.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from composer_prior.conversion.sources.arrow import HubSource
from composer_prior.conversion.sources.base import SPANS, BadFile, Record, Rejected, Source, SourceError, SourceOptions
from composer_prior.conversion.sources.images import read_image
from composer_prior.conversion.sources.recognition import archives_of, open_local
from composer_prior.conversion.sources.remote import RemoteSource
from composer_prior.data.storage import is_remote

__all__ = ["SPANS", "BadFile", "Record", "Rejected", "Source", "SourceError", "open_source", "read_image"]


def open_source(path: str | Path, options: SourceOptions | None = None, **overrides: Any) -> Source:
    """Recognise the format of a source and open it.

    Args:
        path: a file or a folder, see the module's table; a remote (``s3://`` …) with tar shards or Parquet files; or a
            data set of the Hub, ``hf://datasets/USER/NAME[@REVISION][/SUBSET][/SPLIT]``.
        options: how to read it. Default: the fields' defaults.
        overrides: fields of :class:`.SourceOptions`.

    Raises:
        SourceError: if the format is unknown or ambiguous, or a column or optional package is missing.
    """
    options = replace(options or SourceOptions(), **overrides)
    if str(path).startswith("hf://") and not archives_of([Path(path)]):
        return HubSource.open(str(path), options)
    return RemoteSource.open(str(path), options) if is_remote(path) else open_local(Path(path), options)
