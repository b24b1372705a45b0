"""The quick start on shrunken recipes: what is made, what is reused, what is refused, what is printed."""

import html
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from common.commands import train as main
from common.recipes import NO_REPORT, ROOT, SHRUNKEN, TOWER, VIT, losses, recipe, run_program
from composer.core import Callback
from PIL import Image
from safetensors.torch import load_file

from composer_prior import load
from composer_prior.registry import register
from composer_prior.training.config import load_recipe
from composer_prior.training.run import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory):
    """What ``make train`` runs, on a shrunken recipe, in an empty folder."""
    folder = tmp_path_factory.mktemp("quick_start")
    # One thread, as the tests: sums in another order differ in the last bit.
    command = Path(sys.executable).with_name("composer-prior")
    output, _ = run_program(command, "train", ROOT / "yamls/prior_vit.yaml", *SHRUNKEN, *VIT, cwd=folder)
    return folder, output


@pytest.fixture
def finished(quick_start, tmp_path, monkeypatch):
    """A copy of what the quick start left, to go on from."""
    shutil.copytree(quick_start[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_missing_is_made_in_order(quick_start):
    _, output = quick_start
    lines = [
        line.split(",")[0] for line in output.splitlines() if line.startswith(("Data:", "Tokenizer:", "Reference:"))
    ]
    assert lines == [
        "Data: making emoji_scenes in data/emoji_scenes",
        "Tokenizer: training 400 tokens on the training captions",
        "Reference: training reference",
    ]


def test_the_closing_table_and_captions(quick_start):
    folder, output = quick_start
    rows = [line.split() for line in output.splitlines() if line.startswith(("reference (text only) ", "prior_vit "))]
    card = json.loads((folder / "runs/reference/model/reference.json").read_text())["validation"]
    names = [f"{value}{suffix}" for suffix in ("", "_image_related", "_other") for value in ("loss", "accuracy")]
    assert rows[0][3:] == [f"{card[name]:.4f}" for name in names]
    assert rows[1][0] == "prior_vit"
    assert all(float(value) >= 0 for value in rows[1][1:])
    assert len(rows[1]) == 7
    assert output.count("true:") == output.count("generated:") == 2
    assert (
        "checkpoints in runs/prior_vit/checkpoints, the model in Hugging Face format in runs/prior_vit/model." in output
    )


def test_the_page_of_a_run(quick_start):
    """It shows what the terminal does, of the run and of its reference, which has neither images nor PRIOR."""
    folder, output = quick_start
    for name, curves in (("prior_vit", 5), ("reference", 2)):
        assert f"a page for your browser is runs/{name}/report.html; " in output
        page = (folder / f"runs/{name}/report.html").read_text()
        assert page.count('role="img"') == curves
        lines = [line for line in output.splitlines() if line.startswith(f"{name} ")]
        table = lines[0].split()[-6:]
        row = re.search(f"{name}</th>(.*?)</tr>", page)
        assert row is not None
        assert re.findall("<td>(.*?)</td>", row[1]) == [*table[::2], *table[1::2]]
        assert page.count("all, validation") == 2 * 2, "in the legend and the description of each chart"
        assert html.escape((folder / f"runs/{name}/config.yaml").read_text()) in page
        shown = [html.unescape(re.sub("<.*?>", "", text)) for text in re.findall(r'<p dir="auto">(.*?)</p>', page)]
        assert page.count("data:image/") == len(shown) // 2 == (2 if name == "prior_vit" else 0)
        for number, kind in enumerate(("true:", "generated:")):
            printed = [line.split(":", 1)[1].strip() for line in output.splitlines() if kind in line]
            assert [text.strip() for text in shown[number::2]] in (printed, [])


def test_the_closing_lines_of_benchmarks(quick_start):
    folder, output = quick_start
    logged = json.loads((folder / "runs/prior_vit/metrics.jsonl").read_text().splitlines()[-1])
    lines = {
        line.split()[0]: line for line in output.splitlines() if line.startswith(("scene_foils ", "hallucination "))
    }
    told = {
        "scene_foils": (("right", "image_gain"), ("text only", "text_only"), ("chance", "chance")),
        "hallucination": (("objects found", "recall"), ("captions all right", "all_right")),
    }
    for name, figures in told.items():
        for words, figure in figures:
            assert f"{words} {logged[f'eval/{name}/{figure}']:.3f}" in lines[name]
    assert 0.2 < logged["eval/scene_foils/chance"] < 0.5


def test_what_a_run_leaves(quick_start):
    folder, _ = quick_start
    assert [batch for batch, _ in losses(folder / "runs/prior_vit")] == [0, 1, 2, 3]
    resolved = (folder / "runs/prior_vit/config.yaml").read_text()
    assert "${" not in resolved
    again = load_recipe(folder / "runs/prior_vit/config.yaml")
    assert again.max_duration == "4ba"
    assert (folder / "runs/prior_vit/checkpoints/latest-rank0.pt").exists()
    names = {path.name for path in (folder / "runs/reference/model").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "reference.json"} <= names


def test_the_share_of_time_that_steps_wait_for_data_is_logged(quick_start):
    lines = (quick_start[0] / "runs/prior_vit/metrics.jsonl").read_text().splitlines()
    shares = [json.loads(line).get("throughput/data_wait_fraction") for line in lines]
    assert shares[0] is None  # nothing to compare with yet
    assert all(0 < share < 1 for share in shares[1:4])


def test_a_run_is_repeated_bitwise_from_what_exists(finished, capsys):
    first = losses("runs/prior_vit")
    train(recipe("prior_vit", "profiler={skip_first: 1, active: 2, warmup: 0}"))
    traces = [json.loads(file.read_text()) for file in Path("runs/prior_vit/profiler").glob("rank0.*.pt.trace.json")]
    assert any(event["name"] == "aten::addmm" for trace in traces for event in trace["traceEvents"])
    assert losses("runs/prior_vit") == first
    output = capsys.readouterr().out
    for line in ("Data: reusing", "Tokenizer: reusing", "Reference: reusing runs/reference/model"):
        assert line in output


def test_the_other_recipes_run(finished):
    for name in ("prior_patch", "ntp_patch", "ntp_vit"):
        train(recipe(name, "save_folder=null"))
        assert [batch for batch, _ in losses(f"runs/{name}")] == [0, 1, 2, 3]
        assert not Path(f"runs/{name}/checkpoints").exists()
    assert losses("runs/ntp_vit") != losses("runs/prior_vit")


def test_captions_and_questions_from_the_weights_of_the_quick_start(finished, capsys):
    """The recipe reuses captions, tokenizer and reference; its model answers, and captions as before."""
    smaller = [word for word in SHRUNKEN if not word.startswith(("reference.", "tokenizer."))]
    train(load_recipe("chat_vit.yaml", [*smaller, *TOWER, "benchmarks.scene_questions.samples=6"]))
    output = capsys.readouterr().out
    assert "Data: making emoji_scenes in data/emoji_questions" in output
    assert "Weights: language, projector, vision from runs/prior_vit/checkpoints/ep0-ba4-rank0.pt" in output
    logged = [json.loads(line) for line in Path("runs/chat_vit/metrics.jsonl").read_text().splitlines()]
    assert logged[0]["prior/questions/effective_sample_size"] == 1 > logged[0]["prior/captions/effective_sample_size"]
    assert all(0 < logged[-1][f"metrics/eval/{name}/loss"] < 20 for name in ("captions", "questions"))
    assert 0 <= logged[-1]["eval/scene_questions/generated"] <= 1
    assert f"answers right {logged[-1]['eval/scene_questions/generated']:.3f}" in output
    model, image = load("runs/chat_vit"), Image.new("RGB", (48, 48))
    asked = model.inputs([image], "How many drawings are there?")["input_ids"][0]
    assert model.tokenizer.decode(asked).replace("<image>", "") == "<bos>\nHow many drawings are there?"
    assert torch.equal(model.inputs([image])["input_ids"], load("runs/prior_vit").inputs([image])["input_ids"])


@pytest.mark.slow
def test_packing_compilation_and_label_smoothing_from_the_recipe(finished):
    """Packing and torch.compile change no loss, label smoothing does."""
    runs = {
        "plain": NO_REPORT,
        "packed": ["model.pack=true"],
        "compiled": ["compile_config.backend=aot_eager", "compile_config.dynamic=true"],
        "smooth": ["model.label_smoothing=0.1", *NO_REPORT],
    }
    found = {}
    for name, overrides in runs.items():
        train(recipe("ntp_patch", f"run_name={name}", "max_duration=2ba", *overrides))
        found[name] = [loss for _, loss in losses(f"runs/{name}")]
    assert found["packed"] == pytest.approx(found["plain"], abs=1e-4)
    assert found["compiled"] == pytest.approx(found["plain"], abs=1e-4)
    assert found["smooth"] != pytest.approx(found["plain"], abs=1e-4)


def test_overrides_of_the_readme(finished, monkeypatch):
    """And what comes from the environment reaches no file."""
    monkeypatch.setenv("TOKEN", "s3cret-token")
    monkeypatch.setenv("SMALL", "0.00125")
    words = ["max_duration=2ba", "model.vision.freeze=true", "loggers.tensorboard.log_dir=board"]
    secret = [
        "code_paths=['${oc.env:TOKEN}.py']",
        "optimizer.lr=${oc.decode:${oc.env:SMALL}}",
        "model.label_smoothing=${optimizer.lr}",
    ]
    train(recipe("prior_vit", *words, *secret))
    assert [batch for batch, _ in losses("runs/prior_vit")] == [0, 1]
    assert list(Path("board").rglob("events.out.tfevents.*"))
    files = [file for place in ("runs/prior_vit", "board") for file in Path(place).rglob("*") if file.is_file()]
    assert {"config.yaml", "report.html", "README.md", "ep0-ba2-rank0.pt"} <= {file.name for file in files}
    for file in files:
        data = file.read_bytes()
        assert b"s3cret-token" not in data, file
        assert b"0.00125" not in data or file.name == "metrics.jsonl", file


class Interrupted(Exception):
    pass


@register("callback", "interrupt")
class Interrupt(Callback):
    """Stop a run as if it had been killed, after its third batch."""

    def __init__(self, batch: int = 3):
        self.batch = batch

    def batch_end(self, state, logger):
        if state.timestamp.batch == self.batch:
            raise Interrupted


def test_an_interrupted_reference_is_resumed(finished, capsys):
    whole = load_file("runs/reference/model/model.safetensors")
    shutil.rmtree("runs/reference")
    with pytest.raises(Interrupted):
        train(recipe("reference", "callbacks.interrupt.batch=3"))
    assert not Path("runs/reference/model").exists()
    train(recipe("prior_vit", "max_duration=1ba"))
    assert "Reference: resuming reference" in capsys.readouterr().out
    resumed = load_file("runs/reference/model/model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [batch for batch, _ in losses("runs/reference")] == [0, 1, 2, 3]


def test_a_reference_of_another_recipe_is_refused(finished):
    with pytest.raises(
        ValueError, match=r"other values of max_duration than the recipe's \(max_duration: 4ba there, 5ba"
    ):
        train(recipe("prior_vit", "reference.max_duration=5ba"))


def test_a_reference_of_another_tokenizer_is_refused(finished):
    card = Path("runs/reference/model/reference.json")
    card.write_text(card.read_text().replace(json.loads(card.read_text())["tokenizer"], "0" * 16))
    with pytest.raises(ValueError, match="made with another tokenizer than the run's"):
        train(recipe("prior_vit"))


def test_a_reference_of_other_data_is_refused(finished):
    other = "data/other"
    train(recipe("reference", f"data.out={other}", "data.seed=3", "run_name=other"))
    with pytest.raises(ValueError, match="made from other data than the run's"):
        train(recipe("prior_vit", f"train_loader.dataset.local={other}/train", "train_loader.dataset.scores=null"))


def test_data_made_with_other_arguments_are_refused(finished):
    with pytest.raises(ValueError, match="train_samples"):
        train(recipe("prior_vit", "data.train_samples=65"))


def test_sequences_longer_than_the_model_are_refused(finished):
    with pytest.raises(
        ValueError, match=r"has 512 positions, and a sequence may take 605: bos, 4 image, 0 prompt and 600"
    ):
        train(recipe("prior_vit", "train_loader.dataset.max_caption_tokens=600", "train_loader.dataset.scores=null"))
    with pytest.raises(ValueError, match=r"lower eval_loader\.dataset\.max_caption_tokens"):
        train(recipe("prior_vit", "eval_loader.dataset.max_caption_tokens=600", "train_loader.dataset.scores=null"))


def test_nothing_to_train_is_refused(finished):
    frozen = [f"model.{part}.freeze=true" for part in ("vision", "projector", "language")]
    with pytest.raises(ValueError, match="all frozen"):
        train(recipe("prior_vit", *frozen))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "error: The recipe nowhere.yaml does not exist."),
        ([str(ROOT / "yamls/prior_vit.yaml"), "algorithms.prior.alfa=2"], "error: algorithms.prior.alfa is not a key"),
        ([str(ROOT / "yamls/ntp_vit.yaml"), "code_paths=[nowhere.py]"], "error: .*nowhere.py"),
        ([str(ROOT / "yamls/ntp_vit.yaml"), "profiler.actve=2"], "error: profiler: .*argument 'actve'"),
    ],
)
def test_errors_of_the_command_are_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as caught:
        main(arguments)
    assert "\n" not in str(caught.value.code)
    assert not list(tmp_path.iterdir())


def test_a_command_without_a_recipe_prints_its_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: composer-prior train RECIPE.yaml")


def test_the_recipe_at_real_scale_on_a_shrunken_model(finished):
    """Its own configuration but for what needs a hub, a bucket or a GPU, and for the size."""
    overrides = [
        "tokenizer.name=data/emoji_scenes_tokenizer",
        "train_loader.dataset.remote=null",
        "train_loader.dataset.local=data/emoji_scenes/train",
        "train_loader.dataset.cache_limit=null",
        "train_loader.dataset.scores=null",
        "train_loader.dataset.max_caption_tokens=64",
        "train_loader.num_workers=0",
        "train_loader.persistent_workers=false",
        "train_loader.pin_memory=false",
        "eval_loader=null",
        "reference=null",
        "model.vision.architecture=prior-vit-tiny",
        "model.vision.pretrained=null",
        "model.language.pretrained=runs/reference/model",
        "algorithms.prior.reference=runs/reference/model",
        "callbacks.memory_monitor=null",
        "parallelism_config=null",
        "precision=fp32",
        "device_train_microbatch_size=2",
        "global_train_batch_size=8",
        "max_duration=2ba",
        "progress_bar=false",
        "autoresume=false",
    ]
    train(load_recipe(ROOT / "yamls/prior_vit_l_14_336.yaml", overrides))
    assert [batch for batch, _ in losses("runs/prior_vit_l_14_336")] == [0, 1]
