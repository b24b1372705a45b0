"""``composer-prior evaluate MODEL benchmark=NAME [option=value ...]``."""

from collections.abc import Mapping
from typing import Any

from composer_prior.data.messages import announce, one_line_exit
from composer_prior.inference.evaluate import evaluate, figures_table


@one_line_exit()
def run(model: str, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Run a benchmark and print its figures.

    Args:
        model: what to load.
        arguments: of the benchmark.
        options: of :func:`.evaluate`.
    """
    results = evaluate(model, arguments, **options)
    announce(f"{results['benchmark']}, {results['samples']} samples, with 95 % intervals:")
    announce(figures_table(results["figures"]))
    for reason in dict.fromkeys(results["undefined"].values()):
        names = (name for name, why in results["undefined"].items() if why == reason)
        announce(f"undefined, as {reason}: {', '.join(names)}")
