"""Steps, samples and FLOPs of the runs of a study, and how they compare between methods."""

from collections.abc import Callable, Mapping
from functools import partial

from composer_prior.studies.blocks import Block, Heading, Paragraph, Table
from composer_prior.studies.numbers import amount, counted, duration, listed
from composer_prior.studies.results import TRAINING
from composer_prior.studies.study import METHOD, SEED, Run, Study

HELPERS = {
    "reference_flops": "FLOPs of the reference",
    "scoring_flops": "FLOPs of the scoring",
    "viewer_flops": "FLOPs of the viewer",
    "viewer_scoring_flops": "FLOPs of the viewer's scoring",
}
"""The cost of the weights, apart from the run."""

USED = {
    "steps": "steps",
    "samples": "samples",
    "unique_samples": "unique samples",
    "tokens": "tokens",
    "flops": "FLOPs",
}
"""Figures of a run's training, and their words."""

_EQUAL = 0.005  # relative: padding differs a little from seed to seed


def used(run: Run, name: str) -> float | None:
    """Return a figure of a run's training."""
    return run.figures.get(f"{TRAINING}/{name}")


def all_flops(run: Run) -> float | None:
    """Return the FLOPs of the run with those of its reference, viewer and scoring."""
    own = used(run, "flops")
    return None if own is None else own + sum(used(run, part) or 0.0 for part in HELPERS)


def what_was_run(study: Study) -> list[Block]:
    """Return a table of the finished runs of the grids, a row per setting and method, and what methods used equally.

    They are compared with the baseline of the study, and where a grid has another one, also with that.
    """
    planned: dict[tuple[str, ...], dict[str, list[str]]] = {}  # seeds by setting and method
    for key in study.planned:
        values = dict(zip(study.axes, key, strict=True))
        seed, method = values.pop(SEED), values.pop(METHOD)
        planned.setdefault(tuple(values.values()), {}).setdefault(method, []).append(seed)
    seen = any(used(run, "viewer_flops") for run in study.runs.values())
    helpers = {name: said for name, said in HELPERS.items() if seen or not name.startswith("viewer")}
    rows, sentences = list[list[str]](), dict[str, list[str]]()
    missing, absent, settings = 0, 0, 0
    for key, by_method in planned.items():
        setting = dict(zip(study.defaults, key, strict=True))
        methods = sorted(by_method, key=lambda method: method != study.baseline)
        found = {method: study.by_seed(setting, method, by_method[method]) for method in methods}
        settings += any(found.values())
        for method, runs in found.items():
            missing += len(by_method[method]) - len(runs)
            if not runs:
                absent += 1
                continue
            name = " · ".join(filter(None, (study.said(setting), method)))
            means = [_mean(runs, figure) for figure in (*USED, *helpers)]
            time = duration(_mean(runs, "seconds"))
            rows.append([name, f"{len(runs)} of {len(by_method[method])}", *map(amount, means), time])
        if sentence := equality(found, study.baseline):
            sentences.setdefault(sentence, []).append(study.said(setting) or "At the defaults")
    header = ["run", "seeds", "steps", "samples", "unique samples", "tokens", "FLOPs of the run"]
    blocks: list[Block] = [
        Heading(2, "What was run"),
        Table([*header, *helpers.values(), "time per run"], rows),
        Paragraph(
            "Figures are means over the finished seeds. The FLOPs of the run are without those of the training of its "
            "reference or viewer, and of the scoring. An empty field was not counted."
        ),
    ]
    if missing:
        left_out = f"; {counted(absent, 'row')} without any finished run left out" if absent else ""
        blocks.append(Paragraph(f"{counted(missing, 'planned run')} not finished{left_out}."))
    everywhere = [len(at) for at in sentences.values()] == [settings]
    blocks += (Paragraph(text if everywhere else f"{'; '.join(at)}: {text}") for text, at in sentences.items())
    for grid in study.grids:
        for setting in grid.settings if grid.baseline != study.baseline else ():
            found = {m: study.by_seed(setting, m, grid.values[SEED]) for m in grid.values[METHOD]}
            if sentence := equality(found, grid.baseline):
                said = study.said(setting, grid)
                blocks.append(Paragraph(f"Grid {grid.name}{said and f', {said}'}, beside {grid.baseline}: {sentence}"))
    return blocks


def equality(found: Mapping[str, Mapping[str, Run]], baseline: str) -> str:
    """Return a sentence on what methods, of runs by seed, used as much of as the baseline at the same seeds."""
    others = {method: runs for method, runs in found.items() if method != baseline and runs}
    figures: dict[str, Callable[[Run], float | None]] = {said: partial(used, name=n) for n, said in USED.items()}
    if any(used(run, part) for runs in found.values() for run in runs.values() for part in HELPERS):
        seen = any(used(run, "viewer_flops") for runs in found.values() for run in runs.values())
        counted_too = "the reference, the viewer and the scoring" if seen else "the reference and the scoring"
        figures[f"FLOPs when {counted_too} are counted"] = all_flops
    equal, parts = list[str](), list[str]()
    for said, figure in figures.items():
        by_ratio, alike = dict[str, list[str]](), 0
        for method, runs in others.items():
            of_both = [(figure(run), figure(runs[s])) for s, run in found.get(baseline, {}).items() if s in runs]
            known = [(own, other) for own, other in of_both if own is not None and other is not None]
            if total := sum(own for own, _ in known):
                ratio = sum(other for _, other in known) / total
                if abs(ratio - 1) > _EQUAL:
                    by_ratio.setdefault(f"{ratio:.3g}", []).append(method)
                else:
                    alike += 1
        what, when, rest = said.partition(" when")
        for ratio_said, methods in by_ratio.items():
            parts.append(f"{listed(methods)} used {ratio_said} times the {what} of {baseline}{when}{rest}")
        if others and alike == len(others):
            equal.append(said)
    if equal:
        start = f"{listed(equal)} are equal within {100 * _EQUAL:g} %"
        parts.insert(0, start[0].upper() + start[1:])
    return f"{'; '.join(parts)}." if parts else ""


def _mean(runs: Mapping[str, Run], name: str) -> float | None:
    known = [value for run in runs.values() if (value := used(run, name)) is not None]
    return sum(known) / len(known) if known else None
