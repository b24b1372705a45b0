"""Evaluate a trained model with lmms-eval in two steps.

    python scripts/lmms_eval.py install [env=.venv_lmms_eval]
    python scripts/lmms_eval.py task DATA OUT [name=captions] [max_new_tokens=64]

``install`` makes a separate virtual environment, as the dependencies of lmms-eval and Composer conflict. With it,
``--model composer_prior`` is a model of lmms-eval:

    .venv_lmms_eval/bin/lmms-eval --model composer_prior --model_args pretrained=runs/prior_vit \
        --tasks ... --batch_size 16

``task`` makes a task of your captions: DATA is a Parquet file with the columns ``image`` (encoded) and ``caption``, or
an MDS folder. Its metrics, ``exact_match`` and ``word_f1``, need no download. Add ``--include_path OUT --tasks
captions``; without a hub, set HF_HUB_OFFLINE=1 and HF_DATASETS_OFFLINE=1.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composer_prior.options import options_of, parse_options

ROOT = Path(__file__).parents[1]
LMMS_EVAL = ["lmms-eval==0.7.3", "decord2==3.4.0"]
# Packages that affect captions, in the versions of constraints.txt: captions equal those of `composer-prior caption`.
SHARED = (
    "filelock",
    "huggingface-hub",
    "numpy",
    "open-clip-torch",
    "pillow",
    "safetensors",
    "timm",
    "tokenizers",
    "torch",
    "torchvision",
    "transformers",
)
TASK = """\
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: Describe the image.
doc_to_target: caption
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  until: []
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
  - metric: word_f1
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 1.0
"""


def install(*, env: str = ".venv_lmms_eval") -> None:
    """Create or update the virtual environment.

    Args:
        env: folder of the environment.
    """
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        sys.exit("error: uv makes the environment: pip install uv.")
    known = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in known if line.partition("==")[0] in SHARED]
    if not Path(env, "bin/python").exists():
        _run(uv, "venv", "--quiet", "--python", sys.executable, env)
    pip = (uv, "pip", "install", "--quiet", "--python", f"{env}/bin/python")
    _run(*pip, *LMMS_EVAL, *pins)
    _run(*pip, "--no-deps", "--editable", str(ROOT))
    print(f"{env}/bin/lmms-eval has the model composer_prior.")


def make_task(data: str, out: str, *, name: str = "captions", max_new_tokens: int = 64) -> None:
    """Write a task of image-caption pairs.

    Args:
        data: Parquet file, or MDS folder, which is converted to one.
        out: folder of the task, for ``--include_path``.
        name: name of the task.
        max_new_tokens: longest caption in tokens.
    """
    folder, file = Path(out), Path(data)
    if not file.exists():
        sys.exit(f"error: {data}: there is no such file or folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if file.is_dir():
        file = write_as_parquet(file, folder / f"{name}.parquet")
    text = TASK.format(name=json.dumps(name), file=json.dumps(str(file.resolve())), max_new_tokens=max_new_tokens)
    (folder / f"{name}.yaml").write_text(text)
    (folder / "utils.py").write_text(
        '"""Functions of the task beside this file."""\n\n'
        "from composer_prior.inference.lmms_eval_plugin import doc_to_visual, process_results  # noqa: F401\n"
    )
    print(f"{folder} holds the task {name}: --include_path {folder} --tasks {name}")


def write_as_parquet(data: Path, file: Path) -> Path:
    """Write the samples of an MDS folder to a Parquet file."""
    import pyarrow  # here: an optional package
    from pyarrow import parquet
    from streaming import StreamingDataset

    samples = StreamingDataset(local=str(data), batch_size=1, shuffle=False)
    schema = pyarrow.schema({"image": pyarrow.binary(), "caption": pyarrow.string()})
    with parquet.ParquetWriter(file, schema) as writer:
        for start in range(0, len(samples), 256):
            some = [samples[number] for number in range(start, min(start + 256, len(samples)))]
            writer.write_table(pyarrow.table({key: [one[key] for one in some] for key in schema.names}, schema))
    return file


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(command[:3])} failed; see its output above.")


def main(arguments: Sequence[str]) -> int:
    """Run a command line.

    Args:
        arguments: words of the command line.

    Returns:
        The exit status.
    """
    jobs: dict[str, tuple[Any, int]] = {"install": (install, 0), "task": (make_task, 2)}
    if not arguments or arguments[0] not in jobs:
        print(__doc__)
        return 2
    job, count = jobs[arguments[0]]
    try:
        words, chosen = parse_options(arguments[1:], options_of(job))
    except ValueError as error:
        sys.exit(f"error: {error}")
    if len(words) != count:
        print(__doc__)
        return 2
    job(*words, **chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
