"""Options of a conversion, and its summary."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from composer_prior.conversion.sources.base import SourceOptions, expect, expect_number
from composer_prior.data.messages import OneLineError

VERSION = 2  # of the output
_WITHOUT_EFFECT_ON_OUTPUT = (
    *("distributor", "processes", "max_rejected", "on_bad_file", "progress", "work"),
    *("upload_attempts", "download_timeout", "push_to_hub"),
)


class ConversionError(OneLineError, RuntimeError):
    """A conversion that cannot start, cannot go on, or rejected too much."""


@dataclass(frozen=True, kw_only=True)
class ConversionOptions(SourceOptions):
    """Options of a conversion, in addition to those of :class:`.SourceOptions` for reading.

    Args:
        captions: ``"all"`` or ``"sample"``, for several captions of one image. ``"all"``: one sample each,
            in the column ``caption``. ``"sample"``: one sample with all of them, in the column ``captions``, of which
            the loader draws one in each epoch.
        max_caption_chars: longer captions are rejected.
        check: of images, ``"structure"`` (the file is complete) or ``"full"`` (it can also be decoded). See
            :func:`composer_prior.data.images.check_image`.
        resize: shrink images to this longest side. Images pass through unchanged by default.
        reencode: ``"jpeg"``, ``"png"`` or ``"webp"``, with an optional quality as in ``"jpeg:90"``.
        size_limit: the largest shard, in bytes or as in ``"64mb"``.
        max_rejected: the largest share of the captions read that may be rejected.
        on_bad_file: ``"raise"`` or ``"skip"``, for a file that cannot be read to its end, such as a truncated one or a
            Git LFS pointer. ``"raise"``: raise an error that names it. ``"skip"``: keep the samples that were read, and
            count the others as rejected; their number is that in the file's footer, or else the mean of the readable
            files. Damaged samples within a readable file are always rejected one by one.
        distributor: ``"processes"`` of this machine, or tasks of a ``"ray"`` cluster, that of ``RAY_ADDRESS`` or of
            this machine. The output does not depend on it.
        processes: number of processes, by default one per CPU; with Ray, number of tasks at a time, by default two per
            CPU of the cluster. The output does not depend on it.
        progress: show a progress bar; by default if standard error is a terminal.
        work: the folder for the state and temporary files of a conversion to a remote. By default the user's cache.
        upload_attempts: number of attempts of an upload, with pauses of 1, 2, 4 … s.
        push_to_hub: ``USER/NAME``, a data set of the Hub that the folder is uploaded to, with a card; a new one is
            private.
    """

    captions: str = "all"
    max_caption_chars: int = 32_768
    check: str = "structure"
    resize: int | None = None
    reencode: str | None = None
    size_limit: int | str = 64 << 20
    max_rejected: float = 0.1
    on_bad_file: str = "raise"
    distributor: str = "processes"
    processes: int | None = None
    progress: bool | None = None
    work: str | None = None
    upload_attempts: int = 7
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        expect("captions", self.captions, self.captions in ("all", "sample"), "all or sample")
        expect("check", self.check, self.check in ("structure", "full"), "structure or full")
        is_number = isinstance(self.max_rejected, (int, float)) and not isinstance(self.max_rejected, bool)
        expect("max_rejected", self.max_rejected, is_number and 0 <= self.max_rejected <= 1, "0 to 1")
        expect("on_bad_file", self.on_bad_file, self.on_bad_file in ("raise", "skip"), "raise or skip")
        expect("distributor", self.distributor, self.distributor in ("processes", "ray"), "processes or ray")
        expect("progress", self.progress, self.progress in (None, True, False), "true or false")
        self._as_text("work")
        self._as_text("push_to_hub")
        for name in ("max_caption_chars", "upload_attempts", "resize", "processes"):
            if getattr(self, name) is not None or name not in ("resize", "processes"):
                expect_number(name, getattr(self, name), 1)
        known = self.reencode is None or re.fullmatch(r"png|(jpeg|webp)(:([1-9]\d?|100))?", str(self.reencode))
        expect("reencode", self.reencode, bool(known), "jpeg, png or webp, with a quality as in jpeg:90")
        size = size_in_bytes(self.size_limit)
        expect("size_limit", self.size_limit, size is not None and 0 < size < 1 << 32, "below 4gb, as in 64mb")

    @property
    def settings(self) -> dict[str, Any]:
        """Return the options that the output depends on."""
        settings = {**asdict(self), "size_limit": size_in_bytes(self.size_limit), "version": VERSION}
        return {name: value for name, value in settings.items() if name not in _WITHOUT_EFFECT_ON_OUTPUT}


@dataclass(frozen=True)
class ConversionSummary:
    """The summary of a conversion; ``read = captions + rejected``, and an image without captions counts as one."""

    read: int = 0  # captions
    captions: int = 0  # written
    samples: int = 0  # written; as many as captions, unless several captions share a sample
    rejected: int = 0  # captions, with a line in ``rejected.jsonl`` for each of them or each lost file
    reasons: dict[str, int] = field(default_factory=dict)  # rejected captions by reason, the most frequent first
    shards: int = 0
    bytes: int = 0  # of the shards
    estimated: int = 0  # those of ``rejected`` that are an estimate, as the content of an unreadable file is unknown
    further: int = 0  # conversations of which the answers behind the first one are left out
    what: str = "captions"  # that ``read``, ``captions`` and ``rejected`` count; with ``learn``, samples
    ignored: int = 0  # members of archives that are not samples; they have a line, but do not count

    def __str__(self) -> str:
        reasons = "".join(f"\n  {count:>9,} {reason}" for reason, count in self.reasons.items())
        share = f"{self.rejected / self.read:.2%}" if self.read else "none"
        share += f", {self.estimated:,} of them estimated from what the readable files hold" if self.estimated else ""
        if self.ignored:
            reasons += f"\n  {self.ignored:>9,} members of archives that are no samples, not counted"
        if self.further:
            reasons += f"\n  {self.further:>9,} captions are the first of several answers; learn=answers keeps them all"
        written = f"{self.captions:,} written" + f" as {self.samples:,} samples" * (self.what == "captions")
        return (
            f"{self.read:,} {self.what} read, {written} in {self.shards:,} "
            f"shards ({self.bytes / 1e6:,.1f} MB), {self.rejected:,} rejected ({share}){reasons}"
        )


def size_in_bytes(size: int | str) -> int | None:
    """Return a size in bytes, from a number or text such as ``64mb`` (of 1024 * 1024 bytes, as in streaming)."""
    match = re.fullmatch(r"(\d+)([kmg]?)b?", str(size).lower())
    return int(match[1]) * 1024 ** " kmg".index(match[2] or " ") if match else None
