"""Recipes: what is read, and what is refused before anything heavy starts."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from composer_prior.data.messages import one_line
from composer_prior.registry import register, snake_case
from composer_prior.training.config import identified, load_recipe, written
from composer_prior.training.keys import check_keys
from composer_prior.training.reference import compared_with, short_viewer

YAMLS = Path(__file__).parents[2] / "yamls"
RECIPES = sorted(path.stem for path in YAMLS.glob("*.yaml") if path.stem != "emoji_scenes")


def load(name, *overrides):
    return load_recipe(YAMLS / f"{name}.yaml", overrides)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid(name):
    recipe = load(name)
    check_keys(recipe)
    assert recipe.run_name == name
    assert recipe.run_folder == f"runs/{name}"


def test_the_recipes_that_are_promised_are_there():
    assert {"reference", "prior_vit", "prior_patch", "ntp_vit", "ntp_patch", "prior_vit_l_14_336"} <= set(RECIPES)
    assert {"stage1", "stage2", "sft", "chat_vit"} <= set(RECIPES)


@pytest.mark.parametrize("family", ["vit", "patch"])
def test_the_baseline_differs_by_prior_alone(family):
    prior, ntp = asdict(load(f"prior_{family}")), asdict(load(f"ntp_{family}"))
    expected = {"reference": "runs/reference/model", "alpha": 1.0, "floor": 0.1}
    assert prior["algorithms"].pop("prior") == expected
    assert prior["train_loader"]["dataset"].pop("scores") == "runs/reference/scores"
    for key in ("run_name", "run_folder", "save_folder"):
        prior.pop(key), ntp.pop(key)
    assert prior == ntp


def test_all_recipes_have_one_floor():
    given = [load(name).algorithms.get(method) for name in RECIPES for method in ("prior", "image_gain")]
    floors = [arguments["floor"] for arguments in given if arguments]
    assert floors == [0.1] * 10


def test_overrides_reach_the_recipes_inside():
    recipe = load(
        "prior_vit", "max_duration=20ba", "model.vision.freeze=true", "data.out=/x", "reference.run_name=other"
    )
    assert recipe.max_duration == "20ba"
    assert recipe.model["vision"]["freeze"] is True
    assert recipe.train_loader["dataset"]["local"] == "/x/train"
    assert recipe.tokenizer["name"] == "/x_tokenizer"
    assert recipe.reference["train_loader"]["dataset"]["local"] == "/x/train"
    assert recipe.reference["tokenizer"] == recipe.tokenizer
    assert recipe.model["language"]["pretrained"] == "runs/other/model"
    assert recipe.algorithms["prior"]["reference"] == "runs/other/model"
    assert load("prior_vit", "save_folder=null").save_folder is None


REFUSED = [
    (["max_durations=3ba"], r"max_durations is not a key of a recipe. Did you mean 'max_duration'"),
    (["global_train_batch_size=many"], r"global_train_batch_size"),
    (["max_duration=soon"], r"max_duration='soon': expected a time"),
    *(
        ([f"{key}={value}"], rf"^{key}=['\[]*{value}['\]]*: expected a time such as 500ba")
        for key in (
            *("save_interval", "eval_interval", "max_duration", "reference.save_interval", "scheduler.t_warmup"),
            *("scheduler.t_max", "callbacks.hf_checkpointer.interval", "benchmarks.captioning.interval"),
        )
        for value in ("2", "50", "1.5ba", "-3ba", "soon")
    ),
    (["scheduler.alpha_f=low"], r"scheduler.alpha_f='low': expected float"),
    (["save_interval=0ba"], r"save_interval='0ba': expected a time"),
    (["train_loader.dataset.max_caption_tokens=0"], r"train_loader.dataset.max_caption_tokens=0: .* of at least 1"),
    (["reference.eval_loader.dataset.max_caption_tokens=-1"], r"max_caption_tokens=-1: expected int of at least 1"),
    (["callbacks.data_wait_monitor.window_size=0"], r"window_size=0: expected int of at least 1"),
    (["sample_captions=-1"], r"sample_captions=-1: expected at least 0"),
    (["save_num_checkpoints_to_keep=0"], r"save_num_checkpoints_to_keep=0: expected at least 1, or -1 for all"),
    (["precision=fp8"], r"precision='fp8'"),
    (["device_train_microbatch_size=0"], r"device_train_microbatch_size=0: expected"),
    (["global_train_batch_size=0"], r"global_train_batch_size=0: expected at least 1"),
    (["model.vision.patch=3"], r"model.vision.patch is not a key of open_clip"),
    (["model.vision.freeze=perhaps"], r"model.vision.freeze='perhaps': expected bool"),
    (["model.vision.name=openclip"], r"model.vision.name='openclip' is not a known vision. Did you mean 'open_clip'"),
    (["model.vision.architecture=ViT-B-33"], r"'ViT-B-33' is not in OpenCLIP. Did you mean 'ViT-B-32"),
    (["model.vision.image_size=100"], r"image_size=100 is not a multiple"),
    (["model.projector.name=conv"], r"model.projector.name='conv': expected"),
    (
        ["model.language.pretrain=x"],
        r"model.language.pretrain is not a key of model.language. Did you mean 'pretrained'",
    ),
    (["model.vison.name=patches"], r"model.vison is not a key of lvlm. Did you mean 'vision'"),
    (
        ["train_loader.dataset.locale=x"],
        r"train_loader.dataset.locale is not a key of train_loader.dataset. Did you mean 'local'",
    ),
    (["train_loader.dataset.on_bad_sample=ignore"], r"train_loader.dataset.on_bad_sample='ignore': expected"),
    (
        ["train_loader.num_worker=1"],
        r"train_loader.num_worker is not a key of train_loader. Did you mean 'num_workers'",
    ),
    (["eval_loader.dataset.shuffle=maybe"], r"eval_loader.dataset.shuffle='maybe': expected bool"),
    (["optimizer.name=adam"], r"optimizer.name='adam' is not a known optimizer. Did you mean 'adamw'"),
    (["optimizer.learning_rate=1"], r"optimizer.learning_rate is not a key of decoupled_adamw"),
    (["optimizer.betas=0.9"], r"optimizer.betas=0.9: expected tuple\[float, float\]"),
    (["optimizer.name=adamw", "optimizer.lr=fast"], r"optimizer.lr='fast': expected"),
    (["optimizer.group.vision.lr=1"], r"optimizer.group is not a key of decoupled_adamw. Did you mean 'groups'"),
    (["optimizer.groups=vision"], r"optimizer.groups='vision': expected arguments by prefix"),
    (["optimizer.groups.vision=0.1"], r"optimizer.groups.vision=0.1: expected arguments such as"),
    (
        ["optimizer.groups.vision.lrr=1"],
        r"optimizer.groups.vision.lrr is not a key of decoupled_adamw. Did you mean 'lr'",
    ),
    (["optimizer.groups.language.lm_head.lr=x"], r"optimizer.groups.language.lm_head.lr='x': expected float"),
    (["optimizer.decay_all=1"], r"optimizer.decay_all=1: expected bool"),
    (
        ["parallelism_config.fsdp2.device_mesh=[2,2]"],
        r"parallelism_config.fsdp2.device_mesh is not a key of parallelism_config.fsdp2",
    ),
    (["scheduler.t_warm=1"], r"scheduler.t_warm is not a key of cosine_with_warmup. Did you mean 't_warmup'"),
    (["algorithms.prior.alfa=1"], r"algorithms.prior.alfa is not a key of prior. Did you mean 'alpha'"),
    (["algorithms.prior.normalization=row"], r"algorithms.prior.normalization='row': expected"),
    (["algorithms.piror.alpha=1"], r"algorithms.piror.name='piror' is not a known algorithm. Did you mean 'prior'"),
    (["callbacks.speed_monitr.window_size=1"], r"is not a known callback. Did you mean 'speed_monitor'"),
    (["loggers.tensorbord.log_dir=x"], r"is not a known logger. Did you mean 'tensorboard'"),
    (
        ["benchmarks.scene_foilz={}"],
        r"benchmarks.scene_foilz.name='scene_foilz' is not a known benchmark. Did you mean",
    ),
    (["benchmarks.mine={benchmark: foils}"], r"benchmarks.mine needs data"),
    (["benchmarks.captioning.limit=0"], r"benchmarks.captioning.limit=0: expected a number of samples"),
    (["benchmarks.captioning.interval=often"], r"benchmarks.captioning.interval='often': expected a time"),
    (
        ["benchmarks.captioning.split_=x"],
        r"benchmarks.captioning.split_ is not a key of captioning. Did you mean 'split'",
    ),
    (["benchmarks.captioning=yes"], r"benchmarks.captioning=True: expected arguments of the benchmark"),
    (["data.name=emojis"], r"data.name='emojis' is not a known data. Did you mean 'emoji_scenes'"),
    (["data.train_sample=3"], r"data.train_sample is not a key of emoji_scenes. Did you mean 'train_samples'"),
    (["tokenizer.trained.vocab_size=3"], r"tokenizer.trained is not a key. Did you mean 'train'"),
    (["reference.max_durations=3ba"], r"max_durations is not a key of a recipe"),
    (["reference.optimizer.lrr=1"], r"reference.optimizer.lrr is not a key of decoupled_adamw. Did you mean 'lr'"),
    (["reference.run_name"], r"'reference.run_name' is not an override; write key=value"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[" ".join(overrides) for overrides, _ in REFUSED])
def test_what_cannot_be_meant_is_refused_in_one_line(overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_keys(load("prior_vit", *overrides))
    assert "\n" not in str(caught.value)


HIDDEN = ("progress_bar=false",)


def test_a_patch_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"^model\.vision\.max_side=96 is not a multiple of patch_size=10"):
        check_keys(load("prior_patch", "model.vision.patch_size=10"))


@pytest.mark.parametrize("value", ["vision", "[visoin]"])
def test_the_parts_that_can_be_frozen_are_named(value):
    with pytest.raises(ValueError, match=r"model\.freeze=.*: expected a list of 'vision', 'projector', 'language'"):
        check_keys(load("smolvlm", f"model.freeze={value}"))


def test_progress_bars_of_helpers_are_shown_with_that_of_the_run():
    shown = [
        [one.progress_bar for one in (recipe, *recipe.helpers.values())]
        for recipe in (load("gain_vit", *words) for words in ((), HIDDEN, (*HIDDEN, "reference.progress_bar=true")))
    ]
    assert shown == [[True] * 3, [False] * 3, [False, True, False]]


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.yaml does not exist"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(FileNotFoundError, match=r"nowhere.yaml does not exist"):
        load("prior_vit", "data=nowhere.yaml")


@pytest.mark.parametrize("text", ["key: !!python/object/apply:os.system ['touch {marker}']", "a: [1", "- a list"])
def test_hostile_and_broken_yaml_is_refused(tmp_path, text):
    marker = tmp_path / "marker"
    (tmp_path / "recipe.yaml").write_text(text.format(marker=marker))
    with pytest.raises(ValueError, match=r"recipe.yaml"):
        load_recipe(tmp_path / "recipe.yaml")
    assert not marker.exists()


def test_missing_keys_are_named(tmp_path):
    recipe = yaml.safe_load((YAMLS / "reference.yaml").read_text())
    del recipe["optimizer"], recipe["model"], recipe["data"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe).replace("${data.out}", "x"))
    with pytest.raises(ValueError, match=r"recipe.yaml lacks model, optimizer"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_component_from_outside():
    @register("optimizer", "mine")
    def mine(params, lr: float):
        return params, lr

    recipe = load("ntp_vit", "optimizer={name: mine, lr: 1.0}")
    recipe.optimizer = {"name": "mine", "lr": 1.0}
    check_keys(recipe)
    recipe.optimizer["lr"] = "x"
    with pytest.raises(ValueError, match=r"optimizer.lr='x': expected float"):
        check_keys(recipe)


@pytest.mark.parametrize(
    ("name", "snake"),
    [("SpeedMonitor", "speed_monitor"), ("LRMonitor", "lr_monitor"), ("SAM", "sam"), ("OOMObserver", "oom_observer")],
)
def test_names_of_composers_classes(name, snake):
    assert snake_case(name) == snake


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, "more than 100000 values"),
        ("a: " + "[" * 5000, "nested too deep"),
        ("a: &a [*a]", "nested too deep"),
        ("#" * (2 << 20), "at most 1048576 are accepted"),
    ],
)
def test_a_recipe_that_would_not_end_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert len(str(caught.value).splitlines()) == 1


def test_what_comes_from_the_environment_is_written_as_it_was_said(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN", "s3cret-token")
    monkeypatch.setenv("SEED", "23")
    monkeypatch.setenv("PLACE", str(tmp_path / "place"))
    recipe = load(
        "prior_vit",
        "run_folder=${oc.env:PLACE}/${run_name}",
        "seed=${oc.env:SEED}",
        "model.language.config.width=${oc.decode:${oc.env:SEED}}",
        "tokenizer.kwargs.token=${oc.env:TOKEN}",
        "loggers.wandb.init_kwargs.header=Bearer ${oc.env:TOKEN}",
        "loggers.wandb.init_kwargs.again=${.header}",
        "reference.loggers.mine.tokens=[a,'${oc.env:TOKEN}']",
        "scheduler.t_warmup=${oc.env:NOT_THERE,'3ba'}",
    )
    assert (recipe.seed, recipe.model["language"]["config"]["width"]) == (23, 23)
    assert recipe.loggers["wandb"]["init_kwargs"]["again"] == "Bearer s3cret-token"
    assert recipe.reference["tokenizer"]["kwargs"]["token"] == "s3cret-token"
    text = yaml.safe_dump(written(recipe))
    assert "s3cret" not in text
    assert "23" not in text.replace("'23'", "")
    assert "${oc.env:PLACE}/${run_name}" in text
    assert written(recipe.reference_recipe)["loggers"]["mine"]["tokens"] == ["a", "${oc.env:TOKEN}"]
    Path(tmp_path, "config.yaml").write_text(text)
    again = load_recipe(tmp_path / "config.yaml")
    assert asdict(again) == asdict(recipe)
    assert written(again) == written(recipe)


def test_another_value_of_the_environment_makes_another_run(monkeypatch):
    def made_from(seed):
        monkeypatch.setenv("SEED", seed)
        return identified(load("prior_vit", "seed=${oc.env:SEED}"), ("seed", "model"))

    assert made_from("1") == made_from("1") != made_from("2")
    assert made_from("1")["seed"] == "${oc.env:SEED}"
    plain = load("prior_vit", "seed=1")
    assert identified(plain, ("seed", "model")) == {"seed": 1, "model": plain.model}


def test_no_error_shows_what_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("TOKEN", "s3cret-token")
    recipe = load("prior_vit", "model.vision.layer=${oc.env:TOKEN}")
    with pytest.raises(ValueError, match="s3cret") as caught:
        check_keys(recipe)
    assert one_line(caught.value).startswith("model.vision.layer='${oc.env:TOKEN}': expected int")


def test_every_milestone_of_a_schedule_is_a_time():
    recipe = load("prior_vit")
    recipe.scheduler = {"name": "multistep_with_warmup", "t_warmup": "2ba", "milestones": ["1ba", 2]}
    with pytest.raises(ValueError, match=r"scheduler.milestones=\['1ba', 2\]: expected a time such as 500ba"):
        check_keys(recipe)


def test_a_shipped_recipe_is_a_base_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("z").mkdir()
    for name in ("prior_vit", "mine"):
        Path(f"z/{name}.yaml").write_text((YAMLS / "prior_vit.yaml").read_text())
        assert asdict(load_recipe(f"z/{name}.yaml")) == asdict(load("prior_vit"))
    Path("z/reference.yaml").write_text((YAMLS / "reference.yaml").read_text().replace("seed: 17", "seed: 18"))
    assert load_recipe("z/mine.yaml").reference["seed"] == 18
    with pytest.raises(
        FileNotFoundError, match=r"prior_vt.yaml does not exist. Did you mean 'prior_vit.yaml'\? Those th"
    ):
        load_recipe("prior_vt.yaml")


def test_a_reference_is_named_after_the_processor_of_its_tokenizer(tmp_path):
    """Its name may depend on its seed, and a stage's processor is in the folder of a run."""
    for recipe in ("smolvlm", "prior_vit", "emoji_scenes"):
        shutil.copy(YAMLS / f"{recipe}.yaml", tmp_path)
    helpers = [tmp_path / "reference_smollm2.yaml", tmp_path / "reference.yaml"]
    text = (YAMLS / "reference_smollm2.yaml").read_text()

    def name(*changes, recipe="smolvlm"):
        return load_recipe(tmp_path / f"{recipe}.yaml", changes).reference["run_name"]

    def write(run_name):
        for helper in helpers:
            helper.write_text(text.replace("run_name: reference_smollm2\n", run_name))

    write("run_name: reference_smollm2\n")
    assert name() == "reference_smollm2-SmolVLM-256M-Base"
    assert name("model.pretrained=runs/stage1/model") == "reference_smollm2-stage1"
    assert name("model.pretrained=runs/stage1/model", "model.processor.name=org/mine") == "reference_smollm2-mine"
    assert name("reference.run_name=given") == "given"
    write("run_name: reference_${seed}\n")
    assert name("reference.seed=7") == "reference_7-SmolVLM-256M-Base"
    assert name("reference.seed=7", recipe="prior_vit") == "reference_7"
    write("")
    assert name("reference.run_name=given") == "given"
    for recipe in ("smolvlm", "prior_vit"):
        with pytest.raises(ValueError, match=r"reference.run_name: .* missing"):
            name(recipe=recipe)


def test_a_processor_may_be_named_by_other_keys():
    recipe = load("smolvlm", "model.pretrained=runs/stage1-${seed}/model", "seed=3")
    assert recipe.tokenizer["name"] == "runs/stage1-3/model"
    assert recipe.reference["run_name"].endswith("-stage1-3")
    recipe = load("smolvlm", "model.processor.name=${tokenizer.name}", "tokenizer.name=org/mine")
    assert recipe.tokenizer == {"name": "org/mine", "image_tokens": False}


def test_the_tokenizer_of_a_trusted_model_is_trusted():
    recipe = load("smolvlm", "model.trust_remote_code=true", "tokenizer.kwargs.padding_side=left")
    assert recipe.tokenizer["kwargs"] == {"trust_remote_code": True, "padding_side": "left"}


def test_an_error_names_who_said_it(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text((YAMLS / "prior_vit.yaml").read_text() + "\nprogres_bar: false\n")
    with pytest.raises(
        ValueError, match=rf"^{file}: progres_bar is not a key of a recipe. Did you mean 'progress_bar'"
    ):
        load_recipe(file)
    for key, words in (("seed", ["seed=many"]), ("reference.seed", ["reference.seed=many"])):
        with pytest.raises(ValueError, match=rf"^{key}: Value 'many'"):
            load("prior_vit", *words)
    with pytest.raises(ValueError, match=r"^reference.max_durations is not a key of a recipe"):
        load("prior_vit", "reference.max_durations=3ba")
    file.write_text("# nothing yet\n")
    with pytest.raises(ValueError, match=rf"^{file} is empty; write a recipe's keys"):
        load_recipe(file)


def test_none_of_the_named_components_is_meant_by_null_and_by_an_empty_mapping():
    for key in ("benchmarks", "callbacks", "loggers", "algorithms"):
        for nothing in ("null", "{}"):
            recipe = load("prior_vit", f"{key}={nothing}", f"reference.{key}={nothing}")
            assert getattr(recipe, key) == recipe.reference[key] == {}
            check_keys(recipe)
    recipe = load("prior_vit", "benchmarks={}", "benchmarks.captioning.data=x", "callbacks.speed_monitor={}")
    assert recipe.benchmarks == {"captioning": {"data": "x"}}
    assert recipe.callbacks["speed_monitor"] == {"window_size": 20}


def test_an_interpolation_of_nothing_is_one_line():
    with pytest.raises(
        ValueError, match=r"benchmarks\.scene_foils\.canvas: Interpolation key 'data\.nothing'"
    ) as error:
        load("prior_vit", "benchmarks.scene_foils.canvas=${data.nothing}")
    assert "\n" not in str(error.value)


def test_the_viewer_has_the_data_tokenizer_and_reference_of_the_run():
    recipe = load("gain_vit", "data.seed=3", "reference.run_folder=there", "viewer.max_duration=7ba")
    assert list(recipe.helpers) == ["reference", "viewer"]
    viewer = recipe.helpers["viewer"]
    assert (viewer.data, viewer.tokenizer, viewer.reference) == (recipe.data, recipe.tokenizer, recipe.reference)
    assert viewer.model["language"]["pretrained"] == "there/model"
    assert (viewer.max_duration, recipe.max_duration) == ("7ba", "600ba")
    assert recipe.train_loader["dataset"]["viewer_scores"] == "runs/viewer/scores"
    assert load("gain_vit", "viewer=null", "train_loader.dataset.viewer_scores=x", VIEWER).viewer is None


VIEWER = "algorithms.image_gain.viewer=runs/ntp_vit/model"


def test_the_viewer_is_next_token_prediction_for_longer():
    viewer, ntp = asdict(load("viewer")), asdict(load("ntp_vit"))
    differing = {key for key in ntp if viewer[key] != ntp[key]}
    assert differing == {"run_name", "run_folder", "save_folder", "seed", "max_duration", "benchmarks", "autoresume"}
    gain, prior = asdict(load("gain_vit")), asdict(load("prior_vit"))
    assert {key for key in prior if gain[key] != prior[key]} == {
        *("run_name", "run_folder", "save_folder", "viewer", "algorithms", "train_loader")
    }


def test_own_data_are_the_viewers_too():
    recipe = load("gain_vit", "train=there/captions")
    viewer = recipe.helpers["viewer"]
    assert viewer.run_name.startswith("viewer-there-captions-")
    assert viewer.train_loader["dataset"]["local"] == "there/captions"
    assert viewer.benchmarks == {}
    assert viewer.model["vision"]["pretrained"] is None
    assert recipe.train_loader["dataset"]["viewer_scores"] == f"{viewer.run_folder}/scores"
    assert recipe.algorithms["image_gain"]["viewer"] == f"{viewer.run_folder}/model"
    remote = load("gain_vit", "train=s3://there/captions")
    assert remote.train_loader["dataset"]["viewer_scores"] == "s3://there/captions-viewer-scores"


def test_an_unknown_key_of_the_viewer_is_named():
    with pytest.raises(ValueError, match=r"viewer\.max_durations is not a key of a recipe"):
        load("gain_vit", "viewer.max_durations=1ba")
    recipe = load("gain_vit", "viewer.optimizer.beta=1")
    with pytest.raises(ValueError, match=r"^viewer\.optimizer\.beta is not a key"):
        check_keys(recipe)


@pytest.mark.parametrize(
    ("key", "words"),
    [("viewer", "train_loader.dataset.viewer_scores"), ("reference", "model.language.pretrained")],
)
def test_what_else_to_give_without_a_viewer_or_with_a_model_in_its_place(key, words):
    with pytest.raises(
        ValueError, match=rf"^{key}=null: also give {words}, .*algorithms\.image_gain\.{key}, which name"
    ):
        load("gain_vit", f"{key}=null")
    remedy = rf"{key}=null {words}=\.\.\. .*algorithms\.image_gain\.{key}=\.\.\.$"
    with pytest.raises(ValueError, match=rf"^{key}=runs/x/model: expected FILE\.yaml, a recipe.* {remedy}"):
        load("gain_vit", f"{key}=runs/x/model")
    with pytest.raises(ValueError, match=r"give viewer=null algorithms\.NAME\.viewer=\.\.\.$"):
        load("prior_vit", "viewer=runs/x/model")


def test_a_viewer_that_is_trained_on_less_than_the_run_is_told(tmp_path, monkeypatch):
    told = "is trained on 76,800 samples, fewer than the 128,000 of this run: tokens that it has not learned"
    assert short_viewer(load("gain_vit", "max_duration=2000ba")).startswith(
        f"Warning: the viewer runs/viewer/model {told}"
    )
    further = ["max_duration=2000ba", "algorithms.image_gain=null"]
    smaller = ["max_duration=2400ba", "global_train_batch_size=32"]
    for words in (["max_duration=1200ba"], ["max_duration=2ep"], smaller, further):
        assert short_viewer(load("gain_vit", *words)) == ""
    model, scores = tmp_path / "model", tmp_path / "scores"
    for folder, file, content in (
        (model, "training.json", {"recipe": {"max_duration": "20ba", "global_train_batch_size": 8}}),
        (scores, "scores.json", {"reference": {"path": str(model)}}),
    ):
        folder.mkdir()
        (folder / file).write_text(json.dumps(content))
    stored = load(
        "gain_vit",
        "max_duration=3ba",
        "viewer=null",
        f"train_loader.dataset.viewer_scores={scores}",
        "algorithms.image_gain.viewer=null",
    )
    assert f"the viewer {model} is trained on 160 samples, fewer than the 192 of this run" in short_viewer(stored)
    assert short_viewer(load("gain_vit", "max_duration=3ba"), str(model)) == short_viewer(stored)
    assert short_viewer(stored, "a/hub-id") == ""
    rows = stored.train_loader["dataset"]
    rows["packing_ratio"] = 2.5  # 480 samples in 192 rows
    assert "is trained on 160 samples, fewer than the 480 of this run" in short_viewer(stored)
    card = {"recipe": {"max_duration": "20ba", "global_train_batch_size": 8}, "packing_ratio": 3}
    (model / "training.json").write_text(json.dumps(card))
    assert short_viewer(stored) == ""
    rows["packing_ratio"] = 4
    assert "is trained on 480 samples, fewer than the 768 of this run" in short_viewer(stored)
    rows["packing_ratio"] = "auto"
    assert short_viewer(stored) == ""
    rows["packing_ratio"] = None
    (model / "training.json").write_text('{"recipe": {"max_duration": "2ep", "global_train_batch_size": 8}}')
    stored.max_duration = "3ep"  # of other data
    assert short_viewer(stored) == ""
    stored.train_loader["dataset"]["viewer_scores"] = None
    monkeypatch.chdir(model)  # a folder with a training.json of another run
    assert short_viewer(stored) == ""


def test_what_the_viewer_of_a_recipe_is_compared_with():
    over = "algorithms.image_gain={over: model, reference: null}"
    assert compared_with(load("gain_vit")) == ["reference"]
    assert compared_with(load("gain_vit", "algorithms.image_gain=null", "algorithms.vig.share=0.5")) == ["reference"]
    assert compared_with(load("gain_vit", over)) == ["model"]
    assert compared_with(load("gain_vit", "algorithms.image_gain=null")) == compared_with(load("prior_vit")) == []
