"""Convert the unfinished units of a source with the distributor that the options name.

A distributor is a function that takes units of work and yields their results as they finish, in any order.
"""

import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from composer_prior.conversion.options import ConversionError, ConversionOptions
from composer_prior.conversion.processes import convert_in_processes
from composer_prior.conversion.sources import Source
from composer_prior.conversion.units import Results, Task, Units, digest, json_line, unit_file
from composer_prior.data.files import parse_json
from composer_prior.data.remote import Output
from composer_prior.data.storage import write_whole

Distributor = Callable[[Task, Units], Results]


def distributor_of(options: ConversionOptions) -> Distributor:
    """Return the distributor that the options name.

    Raises:
        ConversionError: if its package is missing.
    """
    if options.distributor == "processes":
        return convert_in_processes
    try:
        import ray  # noqa: F401  tested alone, so that a missing module of ours is not reported as a missing package
    except ImportError as error:
        raise ConversionError("distributor=ray needs the package ray: pip install 'composer-prior[ray]'.") from error
    from composer_prior.conversion.on_ray import convert_on_ray

    return convert_on_ray


def convert_units(source: Source, output: Output, options: ConversionOptions, distributor: Distributor) -> int:
    """Convert every unfinished unit, and return the number of all units."""
    count = 0

    def missing() -> Units:
        nonlocal count
        present = output.names()
        for number, unit in enumerate(source.units()):
            count = number + 1
            done = _done(output.state, number, unit, present)
            if done is None:
                yield number, unit
            elif not bar.disable:
                bar.initial += done  # converted before, so not part of the speed
                bar.update(done)

    disable = None if options.progress is None else not options.progress
    disable = True if sys.stderr is None else disable
    with tqdm(total=source.total, unit=" samples", smoothing=0.1, disable=disable, dynamic_ncols=True) as bar:
        task, written, start = Task(source, output, options, source.folder), 0, time.monotonic()
        with closing(distributor(task, missing())) as results:
            for number, result in results:
                write_whole(unit_file(output.state, number), json_line(result))
                written += sum(shard["raw_data"]["bytes"] for shard in result["shards"])
                bar.set_postfix_str(f"{written / (time.monotonic() - start + 1e-9) / 1e6:.1f} MB/s", refresh=False)
                bar.update(result["read"])
    return count


def _done(state: Path, number: int, unit: Any, present: set[str] | None) -> int | None:
    """Return the number of captions that a finished unit read, or None if it has to be converted."""
    try:
        known = parse_json(unit_file(state, number).read_bytes())
        names = {shard["raw_data"]["basename"] for shard in known["shards"]}
        whole = known["unit"] == digest(unit) and (present is None or names <= present)
        return known["read"] if whole else None
    except (FileNotFoundError, ValueError, LookupError, TypeError):  # missing or damaged
        return None
