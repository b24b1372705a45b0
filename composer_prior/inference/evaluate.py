"""Benchmarks of a model, from the command line: ``composer-prior evaluate MODEL benchmark=NAME [option=value ...]``."""

import json
import platform
import runpy
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash
from composer.utils import dist, get_device

from composer_prior import registry
from composer_prior.data.nodes import sole_job
from composer_prior.evaluation.benchmark import Benchmark, Figures, reasons, run_benchmark
from composer_prior.inference.loading import check_device, load

PACKAGES = ("composer-prior", "torch", "transformers", "open-clip-torch")


def evaluate(
    model: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    benchmark: str,
    out: str = "evaluation",
    limit: int | None = None,
    page: str | None = None,
    device: str | None = None,
    progress: bool | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    code_paths: list[str] | None = None,
) -> dict[str, Any]:
    """Run a benchmark and write ``results.json`` and ``predictions.jsonl``; what was stopped goes on where it was.

    Every rank of a launcher such as torchrun takes a share of the samples; the figures are the same.

    Args:
        model: as :func:`~composer_prior.inference.loading.load` takes it.
        arguments: of the benchmark.
        benchmark: captioning, foils, hallucination, image_dependence, pope, scene_foils, scene_questions, or one of
            ``code_paths``; MODEL benchmark=NAME --help lists its options.
        out: the folder that the results go to.
        limit: the first so many samples; null takes all.
        page: a page of HTML with samples and predictions, of benchmarks that make one.
        device: such as ``cuda:1``. Default: a GPU if there is one.
        progress: show a bar. Default: on a terminal.
        overwrite: replace what is in ``out``.
        trust_remote_code: run code that comes with the model.
        code_paths: Python files to run first, which register benchmarks.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError, OSError: naming the option, the model or the data.
    """
    arguments = dict(arguments or {})
    for file in code_paths or ():
        runpy.run_path(file)
    registry.check("benchmark", benchmark, arguments, "benchmark")
    check_device(device)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: expected at least 1, or null for all.")
    dist.initialize_dist(get_device(None))
    built = registry.build("benchmark", benchmark, arguments, "benchmark")
    if page is not None and type(built).page is Benchmark.page:
        built.page([], "")  # which says so, before anything is answered
    judged = load(model, trust_remote_code)
    judged.model.to(device or get_device(None)._device)
    fingerprint = model_fingerprint(judged.model)
    known = {"model": fingerprint, "benchmark": benchmark, "data": built.fingerprint, **arguments}
    folder = Path(out).expanduser()
    if (folder / "results.json").exists() and not ((folder / "predictions.jsonl").exists() or overwrite):
        raise FileExistsError(
            f"{folder}/results.json comes from another evaluation or program; give another out=, or overwrite=true."
        )
    with sole_job({"out": folder}):
        figures, predictions = run_benchmark(
            built,
            judged,
            predictions=folder / "predictions.jsonl",
            settings=json.loads(json.dumps(known, default=str)),
            limit=limit,
            progress=progress,
            overwrite=overwrite,
        )
        results = {
            "benchmark": benchmark,
            "arguments": arguments,
            "model": {"path": model, "fingerprint": fingerprint},
            "data": built.fingerprint,
            "samples": len(predictions),
            "figures": figures,
            "undefined": reasons(built, figures),
            **built.details(predictions),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        }
        if dist.get_global_rank() == 0:
            (folder / "results.json").write_text(json.dumps(results, indent=2, default=str) + "\n")
            if page is not None:
                title = f"{benchmark}: {model}"
                Path(page).expanduser().parent.mkdir(parents=True, exist_ok=True)
                Path(page).expanduser().write_text(built.page(predictions, title), encoding="utf-8")
    return results


def model_fingerprint(model: torch.nn.Module) -> str:
    """Digest of some values of every weight; the same on any device."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().flatten()
        some = values[:: max(1, values.numel() // 64)].float().cpu().numpy()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(some.tobytes())
    return digest.hexdigest()


def figures_table(figures: Figures) -> str:
    """One line for each figure, with its 95 % interval."""
    width = max(map(len, figures), default=0)
    return "\n".join(
        f"{name:{width}}  {_number(one['value'])}  [{_number(one['low'])}, {_number(one['high'])}]"
        for name, one in figures.items()
    )


def _number(value: float | None) -> str:
    return f"{'-':>8}" if value is None else f"{value:8.4f}"
