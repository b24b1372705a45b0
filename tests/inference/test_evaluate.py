"""The command that judges a model: results, predictions, refusals."""

import json
import re
from pathlib import Path

import pytest
from common.commands import evaluate as main
from common.models import small_lm, small_lvlm
from common.recipes import ROOT, fork_ranks
from streaming import MDSWriter

from composer_prior import load
from composer_prior.commands.cli import main as command
from composer_prior.emoji_scenes.writing import make_sample
from composer_prior.inference.evaluate import model_fingerprint
from composer_prior.models.llava import export_llava


@pytest.fixture
def here(tokenizer, scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_lvlm("encoder", tokenizer).image_text_model.save_pretrained("model")
    small_lm(tokenizer).save_pretrained("reference")
    tokenizer.save_pretrained("reference")
    Path("data").symlink_to(scenes)
    return tmp_path


def run(*words, expect=0):
    assert main(["model", "benchmark=image_dependence", "data=data/validation", *words]) == expect


def test_results_can_be_recounted(here, capsys):
    run("reference=reference", "limit=10", "page=new/page.html")
    results = json.loads(Path("evaluation/results.json").read_text())
    lines = [json.loads(line) for line in Path("evaluation/predictions.jsonl").read_text().splitlines()]
    assert [line["sample"] for line in lines] == [*range(10)]
    assert results["samples"] == 10
    tokens = sum(len(line["with_image"]) for line in lines)
    total = sum(sum(line["with_image"]) - sum(line["without"]) for line in lines)
    figure = results["figures"]["dependence"]
    assert figure["value"] == pytest.approx(total / tokens)
    assert figure["low"] < figure["value"] < figure["high"]
    assert results["model"]["fingerprint"] == model_fingerprint(load("model").model)
    assert results["arguments"] == {"data": "data/validation", "reference": "reference"}
    assert set(results["versions"]) == {"python", "composer-prior", "torch", "transformers", "open-clip-torch"}
    assert Path("new/page.html").read_text().count("<figure>") == 10
    out = capsys.readouterr().out
    assert out.startswith("image_dependence, 10 samples, with 95 % intervals:\n")
    assert "rank_correlation" in out


def test_an_undefined_figure_is_null_and_has_a_reason(here, capsys):
    """Of one image, CIDEr-D's frequencies tell nothing, and there is no other image."""
    with MDSWriter(out="one", columns={"image": "bytes", "caption": "str"}) as writer:
        writer.write({"image": make_sample("validation", 0)["image"], "caption": "an owl"})
    for benchmark, figure, reason in (
        ("captioning", "cider_d", "no n-gram of the references tells one image from another"),
        ("image_dependence", "dependence_shuffled", "there is no other image or nothing to divide by"),
    ):
        assert main(["model", f"benchmark={benchmark}", "data=one", f"out={benchmark}"]) == 0
        results = json.loads(Path(benchmark, "results.json").read_text())
        assert results["figures"][figure] == {"value": None, "low": None, "high": None}
        assert results["undefined"][figure] == reason
        out = capsys.readouterr().out
        assert re.search(rf"^{figure} +-  \[ +-, +-\]$", out, flags=re.MULTILINE)
        assert f"undefined, as {reason}: {figure}" in out


def test_an_export_to_transformers_gets_the_figures_of_the_model(here):
    export_llava(load("model"), "llava")
    assert type(load("llava").model).__name__ == "LlavaForConditionalGeneration"
    for benchmark in (["scene_foils", "samples=12", "canvas=48"], ["hallucination", "data=data/validation", "limit=8"]):
        found = []
        for model in ("model", "llava"):
            words = [model, f"benchmark={benchmark[0]}", *benchmark[1:], f"out={model}-{benchmark[0]}"]
            assert main(words) == 0
            found.append(json.loads(Path(f"{model}-{benchmark[0]}/results.json").read_text())["figures"])
        for name, figure in found[0].items():
            assert found[1][name] == pytest.approx(figure, abs=1e-6), name


def test_what_cannot_be_is_refused_in_one_line(here, capsys):
    def error(*words):
        assert main(words) == 1
        return capsys.readouterr().err

    assert "benchmark='image_dependance' is not a known benchmark. Did you mean 'image_dependence'?" in error(
        "model", "benchmark=image_dependance"
    )
    assert "limitt is not an option. Did you mean 'limit'?" in error("model", "benchmark=image_dependence", "limitt=3")
    assert "benchmark needs data." in error("model", "benchmark=image_dependence")
    data = ("benchmark=image_dependence", "data=data/validation")
    assert "limit=0: expected at least 1" in error("model", *data, "limit=0")
    no_page = ("model", "benchmark=captioning", "data=data/validation", "page=p.html", "out=no_page")
    assert "page= is given, and Captioning makes no page; leave it out" in error(*no_page)
    assert not Path("no_page").exists()
    Path("none").mkdir()
    assert "none" in error("none", *data)
    assert "nowhere" in error("model", "benchmark=image_dependence", "data=nowhere")
    run("limit=2")
    capsys.readouterr()
    assert "predictions.jsonl was not made with these options (reference differ)" in error(
        "model", *data, "reference=reference", "limit=2"
    )
    run("reference=reference", "limit=2", "overwrite=true")


def test_without_a_benchmark_their_names_are_listed(capsys):
    assert main(["model"]) == 2
    assert "image_dependence" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        command(["evaluate", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "limit" in shown
    assert "reference" not in shown
    with pytest.raises(SystemExit):
        command(["evaluate", "benchmark=image_dependence", "--help"])
    shown = capsys.readouterr().out
    assert "limit" in shown
    assert re.search(r"reference +PRIOR's reference, whose weights are judged \[null\]", shown)


@pytest.mark.slow
def test_ranks_share_the_samples_and_give_the_same_figures(here):
    words = ["model", "benchmark=image_dependence", "data=data/validation", "reference=reference", "limit=20"]
    assert main([*words, "out=one"]) == 0
    fork_ranks(here, ROOT / "scripts/evaluate.py", *words, "out=two")
    one, two = (json.loads(Path(out, "results.json").read_text()) for out in ("one", "two"))
    assert two["samples"] == 20
    for name, figure in one["figures"].items():
        assert two["figures"][name] == pytest.approx(figure, abs=1e-6), name
    lines = [json.loads(line)["sample"] for line in Path("two/predictions.jsonl").read_text().splitlines()]
    assert lines == [*range(20)]


MINE = """
from composer_prior.evaluation.benchmark import Benchmark
from composer_prior.registry import register

@register("benchmark", "lengths")
class Lengths(Benchmark):
    \"\"\"How long captions are.

    Args:
        shade: of the images.
    \"\"\"

    fingerprint = "none"

    def __init__(self, shade: int = 0):
        self.shade = shade

    def __len__(self):
        return 3

    def predict(self, model, numbers):
        from PIL import Image
        images = [Image.new("RGB", (32, 32), (self.shade, 0, number)) for number in numbers]
        return [{"length": len(caption)} for caption in model.generate_captions(images, max_new_tokens=5)]

    def count(self, prediction):
        return {"length": prediction["length"], "captions": 1.0}

    def figures(self, sums):
        return {"length": sums["length"] / sums["captions"]}
"""


def test_a_benchmark_from_outside(here, capsys):
    Path("mine.py").write_text(MINE)
    assert main(["model", "benchmark=lengths", "code_paths=[mine.py]", "shade=7"]) == 0
    assert json.loads(Path("evaluation/results.json").read_text())["figures"]["length"]["value"] > 0
    assert main(["model", "benchmark=lengths", "code_paths=[mine.py]", "shade=dark", "out=other"]) == 1
    assert "error: shade='dark': expected int." in capsys.readouterr().err
    assert main(["model", "benchmark=lengths", "code_paths=[nowhere.py]"]) == 1
    assert "nowhere.py" in capsys.readouterr().err
