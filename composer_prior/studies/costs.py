"""What the runs of a study used, and whether the methods used the same."""

from collections.abc import Mapping

from composer_prior.studies.blocks import Block, Heading, Paragraph, Table
from composer_prior.studies.numbers import amount, counted, duration, listed
from composer_prior.studies.results import TRAINING
from composer_prior.studies.study import METHOD, SEED, Run, Study

REFERENCE = ("reference_flops", "scoring_flops")
"""What PRIOR's weights cost, apart from the run."""

_USED = {
    "steps": "steps",
    "samples": "samples",
    "unique_samples": "unique samples",
    "tokens": "tokens",
    "flops": "FLOPs",
}
_ALL = "all_flops"
_EQUAL = 0.005  # relative: padding differs a little from seed to seed


def used(cell: Run, name: str) -> float | None:
    """A figure of a run's training, or all FLOPs: of the run, the reference and the scoring."""
    if name != _ALL:
        return cell.figures.get(f"{TRAINING}/{name}")
    own = used(cell, "flops")
    return None if own is None else own + sum(used(cell, part) or 0.0 for part in REFERENCE)


def all_flops(cell: Run) -> float | None:
    """FLOPs of the run with those of the reference and the scoring."""
    return used(cell, _ALL)


def what_was_run(study: Study) -> list[Block]:
    """A table of the finished runs of the grids, a row per setting and method, and what of it is equal."""
    rows, sentences = list[list[str]](), dict[str, list[str]]()
    missing, absent, settings = 0, 0, 0
    for key, by_method in _planned(study).items():
        setting = dict(zip((axis for axis in study.axes if axis not in (METHOD, SEED)), key, strict=True))
        found = {method: study.by_seed(setting, method, seeds) for method, seeds in by_method.items()}
        settings += any(found.values())
        for method, cells in found.items():
            missing += len(by_method[method]) - len(cells)
            if not cells:
                absent += 1
                continue
            name = " · ".join(filter(None, (study.said(setting), method)))
            means = [_mean(cells, figure) for figure in (*_USED, *REFERENCE)]
            time = duration(_mean(cells, "seconds"))
            rows.append([name, f"{len(cells)} of {len(by_method[method])}", *map(amount, means), time])
        if sentence := equality(found, study.baseline):
            sentences.setdefault(sentence, []).append(study.said(setting) or "At the defaults")
    header = ["run", "seeds", "steps", "samples", "unique samples", "tokens", "FLOPs of the run"]
    blocks: list[Block] = [
        Heading(2, "What was run"),
        Table([*header, "FLOPs of the reference", "FLOPs of the scoring", "time per run"], rows),
        Paragraph(
            "Figures are means over the finished seeds. What the training of the reference and the scoring took stands "
            "apart and is not in the FLOPs of the run. An empty field was not counted."
        ),
    ]
    if missing:
        left_out = f"; {counted(absent, 'row')} without any finished run left out" if absent else ""
        blocks.append(Paragraph(f"{counted(missing, 'planned run')} not finished{left_out}."))
    everywhere = [len(at) for at in sentences.values()] == [settings]
    blocks += (Paragraph(text if everywhere else f"{'; '.join(at)}: {text}") for text, at in sentences.items())
    return blocks


def equality(found: Mapping[str, Mapping[str, Run]], baseline: str) -> str:
    """What the methods used as much of as the baseline at the same seeds, and what not, in a sentence or none.

    Args:
        found: cells by method and seed.
        baseline: a method.
    """
    others = {method: cells for method, cells in found.items() if method != baseline and cells}
    names = {name: (said, "") for name, said in _USED.items()}
    if any(used(cell, part) for cells in found.values() for cell in cells.values() for part in REFERENCE):
        names[_ALL] = ("FLOPs", " when the reference and the scoring are counted")
    equal, parts = list[str](), list[str]()
    for name, (said, how) in names.items():
        ratios = {method: _ratio(found.get(baseline, {}), cells, name) for method, cells in others.items()}
        by_ratio = dict[str, list[str]]()
        for method, ratio in ratios.items():
            if ratio is not None and abs(ratio - 1) > _EQUAL:
                by_ratio.setdefault(f"{ratio:.3g}", []).append(method)
        parts += [
            f"{listed(methods)} used {ratio} times the {said} of {baseline}{how}" for ratio, methods in by_ratio.items()
        ]
        if ratios and not by_ratio and None not in ratios.values():
            equal.append(said + how)
    if equal:
        start = f"{listed(equal)} are equal within {100 * _EQUAL:g} %"
        parts.insert(0, start[0].upper() + start[1:])
    return f"{'; '.join(parts)}." if parts else ""


def _planned(study: Study) -> dict[tuple[str, ...], dict[str, list[str]]]:
    """By setting and method, the baseline first, the planned seeds."""
    found: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for key in study.planned:
        values = dict(zip(study.axes, key, strict=True))
        seed, method = values.pop(SEED), values.pop(METHOD)
        found.setdefault(tuple(values.values()), {}).setdefault(method, []).append(seed)
    return {key: dict(sorted(of.items(), key=lambda item: item[0] != study.baseline)) for key, of in found.items()}


def _mean(cells: Mapping[str, Run], name: str) -> float | None:
    known = [value for cell in cells.values() if (value := used(cell, name)) is not None]
    return sum(known) / len(known) if known else None


def _ratio(baseline: Mapping[str, Run], method: Mapping[str, Run], name: str) -> float | None:
    pairs = [(used(baseline[seed], name), used(method[seed], name)) for seed in baseline if seed in method]
    known = [(own, other) for own, other in pairs if own is not None and other is not None]
    total = sum(own for own, _ in known)
    return sum(other for _, other in known) / total if total else None
