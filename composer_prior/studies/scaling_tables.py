"""The scaling part of a study's page: points, fits and their differences, of a grid with an axis of sizes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import product

import numpy as np

from composer_prior.reports import plots
from composer_prior.studies.blocks import Block, Heading, Paragraph, Picture, Table
from composer_prior.studies.costs import USED, all_flops, used
from composer_prior.studies.numbers import coefficient, listed
from composer_prior.studies.scaling import Estimate, Fit, Points, differences, fit, points
from composer_prior.studies.study import AXES, SEED, Grid, Run, Setting, Study, combinations

_SAID = {**USED, "flops": "FLOPs of the run"}
_WITH_REFERENCE = "FLOPs with those of the reference and the scoring"
_ALIKE = 0.01  # relative: an axis along which C differs by less is no axis of sizes
_Size = Callable[[Run], float | None]
_Fits = dict[str, tuple[Points, Fit]]


def scaling_blocks(
    study: Study, grid: Grid, scale: str, looks: plots.Looks, picture: Callable[..., Picture]
) -> list[Block]:
    """Return a plot and tables of each setting and each figure of ``fits``, with C as a figure of the runs' training.

    ``picture`` makes a picture from an SVG, its caption and the names of its file.
    """
    size = partial(used, name=scale)
    blocks: list[Block] = [Heading(3, f"Scaling of grid {grid.name} with {_SAID[scale]}")]
    sizes = size_axes(study, grid, size)
    if not sizes:
        return [*blocks, Paragraph(f"There is no axis along which finished runs differ in {_SAID[scale]}: no fit.")]
    if not study.fits:
        return [*blocks, Paragraph("The study names no figure to fit.")]
    with_reference = scale == "flops" and any(all_flops(run) != size(run) for *_, run in _runs(study, grid))
    blocks.append(
        Paragraph(
            f"Sizes are the values of {listed(sizes)}; C is the {_SAID[scale]}, the mean over the seeds of a size. "
            "Two formulas are fitted to the runs of all seeds: L = a + b C^-c with a ≥ 0 by least squares of L, and "
            "the straight line log L = k0 - k log C by least squares of log L. Intervals are 95 % percentile "
            "bootstraps over seeds, all sizes of a seed together; they show how precisely the seeds determine a fit, "
            "but not whether the loss follows the formula. With a larger c or k the loss falls faster with C, with a "
            "smaller a it falls further; neither alone shows which method has the lower loss."
        )
    )
    if with_reference:
        blocks.append(
            Paragraph(
                "A second table counts the reference and the scoring too. A cost that is the same at every size "
                "makes C grow less from size to size, and so makes c and k larger without better scaling."
            )
        )
    for fixed in combinations({axis: of for axis, of in grid.values.items() if axis not in (*AXES, *sizes)}):
        said = study.said(fixed, grid)
        for figure, better in study.fits.items():
            title = f"{figure}, {said}" if said else figure
            blocks.append(Heading(4, title))
            if better == "higher":
                blocks.append(Paragraph(f"No fit: both formulas fall with size, and {figure} is better when higher."))
                continue
            fits = _fits(study, grid, sizes, fixed, figure, size)
            if not fits:
                blocks.append(Paragraph("No finished run has a number for it."))
                continue
            caption = (
                f"{title} ({better} is better): runs of all seeds; the line is L = a + b C^-c, the dotted one the "
                "straight line"
            )
            drawn = {method: _scatter(found, of_method) for method, (found, of_method) in fits.items()}
            svg = plots.scaling(drawn, _SAID[scale], figure, looks)
            blocks += _tables(fits, grid.baseline, _SAID[scale])
            blocks.append(picture(svg, caption, grid.name, said, "scaling", study.short(figure)))
            if with_reference:
                blocks += _tables(_fits(study, grid, sizes, fixed, figure, all_flops), grid.baseline, _WITH_REFERENCE)
    return blocks


def size_axes(study: Study, grid: Grid, size: _Size) -> list[str]:
    """Return the axes along which C differs and all values are numbers; without one, all axes along which C differs."""
    varying, numeric = [], []
    for axis, values in grid.values.items():
        if axis in AXES:
            continue
        runs: dict[tuple[str, ...], list[float]] = {}
        for method, setting, seed, run in _runs(study, grid):
            if (x := size(run)) is not None:
                rest = tuple(value for name, value in setting.items() if name != axis)
                runs.setdefault((method, seed, *rest), []).append(x)
        if any(max(of) - min(of) > _ALIKE * max(of) for of in runs.values()):
            varying.append(axis)
            with suppress(ValueError):  # a value that is no number
                if all(math.isfinite(float(value)) for value in values):
                    numeric.append(axis)
    return numeric or varying


def _runs(study: Study, grid: Grid) -> Iterator[tuple[str, dict[str, str], str, Run]]:
    """Yield method, setting and seed of the finished runs of a grid, and the runs."""
    for setting, method in product(grid.settings, study.methods(grid)):
        for seed, run in study.by_seed(setting, method, grid.values[SEED]).items():
            yield method, setting, seed, run


def _fits(study: Study, grid: Grid, sizes: Sequence[str], fixed: Setting, figure: str, size: _Size) -> _Fits:
    """Return the points and fits of the methods that have any."""
    found = {}
    for method in study.methods(grid):
        runs = {}
        for of_sizes in combinations({axis: grid.values[axis] for axis in sizes}):
            of_seeds = study.by_seed({**fixed, **of_sizes}, method, grid.values[SEED])
            runs[" ".join(of_sizes.values())] = {s: (size(run), run.figures.get(figure)) for s, run in of_seeds.items()}
        of_method = points(runs)
        if len(of_method.x):
            found[method] = of_method, fit(of_method)
    return found


def _scatter(found: Points, of_method: Fit) -> plots.Scatter:
    """Return the runs of a method with its fits: with asymptote as a line, the straight line dotted."""
    values = {name: estimate.value for name, estimate in of_method.coefficients.items()}
    along = np.geomspace(found.x.min(), found.x.max(), 60)
    fits = []
    if "c" in values:
        fits.append(("-", along, values["a"] + values["b"] * along ** -values["c"]))
    if "k" in values:
        fits.append((":", along, np.exp(values["k0"] - values["k"] * np.log(along))))
    return plots.Scatter(np.repeat(found.x, len(found.seeds)), found.y.ravel(), fits)


def _tables(fits: _Fits, baseline: str, scale: str) -> list[Block]:
    """Return tables of the coefficients and of their differences to the baseline's, and reasons to doubt them."""
    names = ("a", "b", "c", "k")
    rows = [
        [method, f"{len(found.x)}", f"{len(found.seeds)}", *_row(of_method.coefficients, names)]
        for method, (found, of_method) in fits.items()
    ]
    header = ["method", "sizes", "seeds", *names]
    blocks: list[Block] = [Paragraph(f"Coefficients, with C as {scale}:"), Table(header, rows)]
    if baseline in fits and len(fits) > 1:
        others = {method: found for method, (found, _) in fits.items() if method != baseline}
        apart = [[m, *_row(differences(fits[baseline][0], found), names, "+")] for m, found in others.items()]
        blocks += [Paragraph(f"Their difference to {baseline}'s, at the same seeds:"), Table(["method", *names], apart)]
    for note in dict.fromkeys(note for _, of_method in fits.values() for note in of_method.notes):
        methods = [method for method, (_, of_method) in fits.items() if note in of_method.notes]
        blocks.append(Paragraph(f"{listed(methods)}: {note}."))
    return blocks


def _row(found: Mapping[str, Estimate], names: Sequence[str], sign: str = "") -> list[str]:
    return [coefficient(found[name].value, found[name].interval, sign) if name in found else "none" for name in names]
