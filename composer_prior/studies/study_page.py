"""The page of a study, from its results file alone: what was run, what differs from the baseline, and how surely."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from composer_prior.data.storage import write_whole
from composer_prior.reports import plots
from composer_prior.studies.blocks import Block, Heading, Paragraph, Picture, Table, html, markdown
from composer_prior.studies.comparison import (
    HELD,
    MIN_SEEDS,
    Average,
    Comparison,
    average_improvement,
    compare,
    steps_until_baseline,
    word,
)
from composer_prior.studies.costs import what_was_run
from composer_prior.studies.numbers import counted, difference, listed, mean_and_sd, relative, share
from composer_prior.studies.results import read_study_results
from composer_prior.studies.scaling_tables import scaling_blocks
from composer_prior.studies.study import METHOD, SEED, Curve, Grid, Setting, Study, Values, combinations

FIGURES = "study_figures"
"""The folder of the pictures, beside the page."""

_NAMED = 8  # missing runs that are named
_ABREAST = 5  # methods, in columns of a table


def write_report(results: Path) -> list[Path]:
    """Write ``study.md``, ``study.html`` and the pictures of ``study.md`` beside a results file.

    Pictures of an earlier page that this one does not have are removed.

    Returns:
        The written files, the two pages first.

    Raises:
        ValueError: if the file is no results file, in one line that names it and the line.
    """
    study = read_study_results(results)
    page = _Page(study)
    pages = {"study.md": markdown(study.name, page.blocks), "study.html": html(study.name, page.blocks)}
    pictures = {block.file: block.svg for block in page.blocks if isinstance(block, Picture)}
    if pictures:
        (results.parent / FIGURES).mkdir(exist_ok=True)
    old = _pictures_of(results.parent / "study.md") - pictures.keys()
    written = {results.parent / name: text for name, text in {**pages, **pictures}.items()}
    for path, text in reversed(written.items()):  # no page without its pictures
        write_whole(path, text.encode())
    for name in old:
        (results.parent / name).unlink(missing_ok=True)
    return list(written)


def _pictures_of(page: Path) -> set[str]:
    """Return the pictures that a Markdown page of ours links to."""
    text = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
    return set(re.findall(rf"(?<!\\)\]\(({FIGURES}/[A-Za-z0-9_.]+\.svg)\)$", text, re.MULTILINE))


def _known(values: Values) -> list[float]:
    return [value for value in values.values() if value is not None]


def _side_by_side(methods: Sequence[str]) -> list[Sequence[str]]:
    """Split methods into groups whose columns fit a screen."""
    size = math.ceil(len(methods) / math.ceil(len(methods) / _ABREAST)) if methods else 1
    return [methods[start : start + size] for start in range(0, max(1, len(methods)), size)]


class _Page:
    """The blocks of a study's page, in order."""

    def __init__(self, study: Study):
        self.study = study
        self.blocks: list[Block] = []
        self._looks = plots.looks_of(study.methods())
        self._files: Counter[str] = Counter()
        self._done = [key for key in study.planned if key in study.runs]
        self._verdicts: list[str] = []  # of each setting of the first grid
        self._forests: list[Picture] = []  # of the same settings
        self._overview()
        if study.runs:
            for grid in study.grids:
                self._grid(grid)
            self._how()
            self.blocks += what_was_run(study)
            self._made_of()
        self.blocks[:0] = [*self._answer(), *self._forests]

    def _say(self, *texts: str) -> None:
        self.blocks += (Paragraph(text) for text in texts if text)

    def _picture(self, svg: str, caption: str, *names: str) -> Picture:
        """Make a picture in a file with a name of these; a number tells names apart that differ in other characters."""
        stem = re.sub(r"[^A-Za-z0-9.]+", "_", " ".join(names)).strip("_.")[:100]
        self._files[stem.lower()] += 1
        number = self._files[stem.lower()]
        return Picture(f"{FIGURES}/{stem}{f'__{number}' if number > 1 else ''}.svg", svg, caption)

    def _overview(self) -> None:
        study, done = self.study, self._done
        recipe = f"Recipe: {study.recipe}. " if study.recipe else ""
        count = f"{len(done)} of {len(study.planned)} runs are finished."
        self._say(f"{recipe}Methods are compared with {study.baseline}. {count}")
        if study.defaults:
            default = ", ".join(f"{axis} {value}" for axis, value in study.defaults.items())
            self._say(f"Unless stated otherwise, runs have: {default}.")
        if missing := [key for key in study.planned if key not in done]:
            names = []
            for key in missing[:_NAMED]:
                values = dict(zip(study.axes, key, strict=True))
                method, seed = values.pop(METHOD), values.pop(SEED)
                names.append(", ".join(filter(None, (study.said(values), method, f"seed {seed}"))))
            more = f"; and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            self._say(f"Missing: {counted(len(missing), 'run')}: {'; '.join(names)}{more}.")
        if not done:
            self._say("No run of this study is finished: there is nothing to compare yet.")

    def _answer(self) -> list[Block]:
        """Return the sentence that the page opens with; none where nothing is finished or no figure is averaged."""
        study, grid = self.study, self.study.grids[0]
        if not study.averaged or not self._done:
            return []
        if not self._verdicts:
            return [Paragraph(f"No method can be compared with {grid.baseline} yet.")]
        planned = {tuple(values.values()) for values in combinations(grid.values)}
        done = len(planned.intersection(study.runs))
        part = f", of which {done} of {len(planned)} runs are finished," if done < len(planned) else ","
        figures = listed([*study.averaged])
        said = f"In grid {grid.name}{part} by the average of {figures}: {'; '.join(self._verdicts)}."
        return [Paragraph(said)]

    def _verdict(self, setting: str, base: str, averages: Mapping[str, Average]) -> str:
        """Say which methods are better than the baseline in the average, which worse, and of which it is not known."""
        said = defaultdict[str, list[str]](list)
        for method, one in averages.items():
            if one.value is not None:
                without = f", without {listed(one.left_out)}" if one.left_out else ""
                said[word(one.interval)].append(f"{method} ({relative(one.value, one.interval, '')}{without})")
        verdicts = {
            "better": f"better than {base}",
            "worse": f"worse than {base}",
            "no difference seen": f"not seen to differ from {base}",
            "": f"not judged, as fewer than {MIN_SEEDS} seeds have every figure",
        }
        parts = [
            f"{listed(said[verdict])} {'is' if len(said[verdict]) == 1 else 'are'} {words}"
            for verdict, words in verdicts.items()
            if said[verdict]
        ]
        return f"{f'with {setting}, ' if setting and parts else ''}{', '.join(parts)}"

    def _made_of(self) -> None:
        study, done = self.study, [self.study.runs[key] for key in self._done]
        if beyond := sum(key not in study.planned for key in study.runs):
            self._say(f"The file has {counted(beyond, 'finished run')} that no grid plans; the page is without them.")
        known = {name for run in done for name, value in run.figures.items() if value is not None}
        known |= {name for run in done for name in run.curves}
        if done and (absent := [name for name in study.named if name not in known]):
            self._say(f"No finished run has a number for: {', '.join(absent)}.")
        versions = sorted({pair for run in done for pair in run.versions.items()})
        if versions:
            said = (f"{name} {' and '.join(v for _, v in of)}" for name, of in groupby(versions, key=lambda p: p[0]))
            self._say(f"Versions: {', '.join(said)}.")

    def _how(self) -> None:
        seeds = len(self.study.axes[SEED])
        known = [count for count in HELD if count <= seeds]
        held = f", and hold the true mean in about {HELD[known[-1]]} % of cases, not 95" if known else ""
        self.blocks.append(Heading(2, "How it was measured"))
        self._say(
            "Methods are compared with the baseline at the same seeds: the difference is the mean over seeds "
            "of method minus baseline, and the relative improvement is that difference as a share of the baseline's "
            "mean, positive where the method is better. The average is the mean of the relative improvements of the "
            "figures marked with *.",
            f"Intervals are 95 % percentile bootstraps over seeds; with {counted(seeds, 'seed')} they are rough{held} "
            f"(for normally distributed differences). Fewer than {MIN_SEEDS} seeds have no interval. A method is "
            "called better or worse only where the interval excludes 0; of many intervals some exclude 0 by chance.",
        )

    def _grid(self, grid: Grid) -> None:
        study = self.study
        self.blocks.append(Heading(2, f"Grid {grid.name}"))
        one = {axis: value for axis, value in grid.settings[0].items() if axis not in grid.differing}
        common = ", ".join(f"{axis} {value}" for axis, value in one.items() if value != study.defaults[axis])
        if common:
            self._say(f"All runs of this grid have: {common}.")
        if grid.baseline != study.baseline:
            self._say(f"Methods of this grid are compared with {grid.baseline}.")
        without = []
        for setting in grid.settings:
            title = study.words({axis: setting[axis] for axis in grid.differing})
            methods = [m for m in study.methods(grid) if study.by_seed(setting, m, grid.values[SEED])]
            if not methods:
                without.append(title)
                continue
            if title:
                self.blocks.append(Heading(3, title))
            if grid.baseline in methods:
                self._differences(grid, setting, methods)
                self._steps_until(grid, setting, methods)
            else:
                self._say(f"No run of the baseline {grid.baseline} is here: nothing is compared.")
            self._curves(grid, setting, methods)
        if without:
            self._say(f"No run is finished of: {'; '.join(without)}." if grid.differing else "No run is finished.")
        if grid.scaling:
            self.blocks += scaling_blocks(study, grid, grid.scaling, self._looks, self._picture)

    def _differences(self, grid: Grid, setting: Setting, methods: Sequence[str]) -> None:
        """Compare the methods with the first, the baseline: tables of relative improvements and of differences."""
        study, seeds = self.study, grid.values[SEED]
        base, others = methods[0], methods[1:]
        values = {(m, name): study.values(setting, m, seeds, name) for m in methods for name in study.figures}
        figures = [name for name in study.figures if _known(values[base, name])]
        alone = [name for name in study.figures if name not in figures and any(_known(values[m, name]) for m in others)]
        if alone:
            self._say(f"{base} has no number for {', '.join(alone)}: not compared.")
        found = {(m, n): compare(values[base, n], values[m, n], study.figures[n]) for m in others for n in figures}
        averages = {
            m: average_improvement({n: (values[base, n], values[m, n], better) for n, better in study.averaged.items()})
            for m in others
        }
        improved = {(m, n): (one.improvement, one.improvement_interval) for (m, n), one in found.items()}
        if figures and others:
            self._say(f"Relative improvement over {base}, positive where the method is better:")
            for some in _side_by_side(others):
                means = [relative(one.value, one.interval, word(one.interval)) for one in (averages[m] for m in some)]
                rows = [["average of *", *means]] if study.averaged else []
                rows += [
                    [self._figure(n), *(relative(*improved[m, n], found[m, n].word) for m in some)] for n in figures
                ]
                self.blocks.append(Table(["figure", *some], rows))
            of_base = study.by_seed(setting, base, seeds)
            common = {m: sum(seed in of_base for seed in study.by_seed(setting, m, seeds)) for m in others}
            self._notes(base, common, found, averages)
        if figures:
            own = {name: mean_and_sd(_known(values[base, name])) for name in figures}
            self._say(
                f"{base}'s mean ± standard deviation over its seeds, and the others' difference to it, method minus "
                f"{base}: positive is better where higher is, negative where lower is, as each row says."
                if others
                else f"{base}'s mean ± standard deviation over its seeds:"
            )
            for some in _side_by_side(others):
                rows = [[self._figure(n), own[n], *(difference(found[m, n]) for m in some)] for n in figures]
                self.blocks.append(Table(["figure", base, *some], rows))
        # Other figures, a loss for instance, may change by many times what a benchmark does: they have curves.
        drawn = {"average of *": {m: (one.value, one.interval) for m, one in averages.items()}}
        for name in figures:
            if name in (study.averaged or study.figures):
                drawn[f"{name}{' *' * (name in study.averaged)}"] = {m: improved[m, name] for m in others}
        known = {
            name: {m: (value, interval) for m, (value, interval) in row.items() if value is not None}
            for name, row in drawn.items()
        }
        if shown := [(name, row) for name, row in known.items() if row]:
            said = study.said(setting, grid)
            caption = f"{said or grid.name}: relative improvement over {base} with 95 % intervals, right is better"
            svg = plots.forest(shown, base, self._looks)
            forest = self._picture(svg, caption, grid.name, said, "improvement")
            (self._forests if grid is study.grids[0] else self.blocks).append(forest)
        if grid is study.grids[0] and (verdict := self._verdict(study.said(setting, grid), base, averages)):
            self._verdicts.append(verdict)

    def _notes(
        self,
        base: str,
        common: Mapping[str, int],
        found: Mapping[tuple[str, str], Comparison],
        averages: Mapping[str, Average],
    ) -> None:
        """Say how many seeds the methods have in common with the baseline, and which figures are without some."""
        for count in dict.fromkeys(common.values()):
            methods = ", ".join(method for method, of_method in common.items() if of_method == count)
            few = f": fewer than {MIN_SEEDS}, so there is no interval" if count < MIN_SEEDS else ""
            self._say(f"{methods}: {counted(count, 'seed')} in common with {base}{few}.")
        for (method, name), comparison in found.items():
            if comparison.left_out:
                gone = ", ".join(comparison.left_out)
                self._say(f"{method}, {name}: without a number at seed {gone}, which is left out of this figure.")
            if comparison.seeds and comparison.improvement is None:
                self._say(f"{method}, {name}: the baseline's mean is 0, so there is no relative improvement.")
        for method, average in averages.items():
            if average.left_out and average.value is not None:
                self._say(f"{method}: the average is without {', '.join(average.left_out)}.")

    def _steps_until(self, grid: Grid, setting: Setting, methods: Sequence[str]) -> None:
        study, figure = self.study, self.study.curve
        if figure is None:
            return
        curves, better = self._of_seeds(grid, setting, methods, figure), study.better(figure)
        if grid.baseline not in curves:
            return
        if better is None:
            self._say(f"The study does not say whether {figure} is better when higher or lower: no steps until it.")
            return
        rows = []
        for method, of_seeds in curves.items():
            reached = steps_until_baseline(curves[grid.baseline], of_seeds, better)
            if reached.shares:
                never = list(reached.shares.values()).count(None)
                count = len(reached.shares)
                told = f"not reached in {never} of {count}" if never else f"reached in all {count}"
                rows.append([method, share(reached.mean, reached.interval), told])
        self._say(
            f"Steps until the baseline's final value of {figure} is reached, as a share of the baseline's steps: the "
            "mean over the seeds that reach it, linear between evaluations. Less is better."
        )
        self.blocks.append(Table(["method", "share of the steps", "seeds"], rows))

    def _curves(self, grid: Grid, setting: Setting, methods: Sequence[str]) -> None:
        for figure in filter(None, dict.fromkeys([self.study.curve, *self.study.beside])):
            curves = self._of_seeds(grid, setting, methods, figure)
            if any(len(batches) > 1 for of_seeds in curves.values() for batches, _ in of_seeds.values()):
                said, better = self.study.said(setting, grid), self.study.better(figure)
                by_method = {method: list(of_seeds.values()) for method, of_seeds in curves.items()}
                svg = plots.learning_curves(by_method, figure, self._looks)
                direction = f" ({better} is better)" if better else ""
                caption = f"{said or grid.name}: {figure}{direction}, mean over seeds, in a band from least to most"
                self.blocks.append(self._picture(svg, caption, grid.name, said, self.study.short(figure)))

    def _of_seeds(
        self, grid: Grid, setting: Setting, methods: Sequence[str], figure: str
    ) -> dict[str, dict[str, Curve]]:
        """Return the curves of a figure that hold a number, by method and seed."""
        found = {
            method: {
                seed: cell.curves[figure]
                for seed, cell in self.study.by_seed(setting, method, grid.values[SEED]).items()
                if any(value is not None for value in cell.curves.get(figure, ((), ()))[1])
            }
            for method in methods
        }
        return {method: of_seeds for method, of_seeds in found.items() if of_seeds}

    def _figure(self, name: str) -> str:
        return f"{name} ({self.study.figures[name]} is better){' *' if name in self.study.averaged else ''}"
