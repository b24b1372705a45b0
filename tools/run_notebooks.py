"""Run notebooks and store what their cells print and plot: ``python tools/run_notebooks.py examples/*.ipynb``.

It runs the cells of each notebook in one namespace, in the working folder, and needs no Jupyter.
"""

import base64
import contextlib
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib


def run_notebook(notebook: dict[str, Any], instead: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run the code of a notebook, and put the outputs into its cells.

    Args:
        notebook: as its file has it.
        instead: texts of the code, which it must have, and what runs in their place.

    Returns:
        the names that the code has defined.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, unused = dict[str, Any](), {*(instead or {})}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        code = "".join(cell["source"])
        for old, new in (instead or {}).items():
            unused -= {old} if old in code else set()
            code = code.replace(old, new)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(code, f"cell {number}", "exec"), names)
        text = said.getvalue().splitlines(keepends=True)
        outputs: list[dict[str, Any]] = [{"output_type": "stream", "name": "stdout", "text": text}] * bool(text)
        for figure in map(pyplot.figure, pyplot.get_fignums()):
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=80, bbox_inches="tight")
            data = {"image/png": base64.b64encode(picture.getvalue()).decode()}
            outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
        pyplot.close("all")
        cell.update(execution_count=number, outputs=outputs)
    if unused:
        raise ValueError(f"The notebook does not have {sorted(unused)}.")
    return names


def main(paths: list[str]) -> None:
    """Run each notebook and write it back."""
    for path in map(Path, paths):
        notebook = json.loads(path.read_text())
        run_notebook(notebook)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
