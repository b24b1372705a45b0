"""What an OpenCLIP encoder's weights were trained with: activation and preprocessing, of the table and of files."""

import json

import open_clip
import pytest
import torch
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from composer_prior.models.build import lvlm_skeleton
from composer_prior.models.open_clip_source import find_source
from composer_prior.models.vision import build_open_clip, image_processor_of

PAIRS = [(name, tag) for name in open_clip.list_models() for tag in list_pretrained_tags_by_model(name)]
OTHER = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}
KEYS = ("mean", "std", "interpolation", "resize_mode")


def is_quick(name, trained=None):
    return bool((open_clip.get_model_config(name) if trained is None else trained).get("quick_gelu"))


@pytest.fixture
def folder(tmp_path):
    """Weights of ``prior-vit-tiny`` with ``open_clip_config.json``, as OpenCLIP's ``local-dir:`` has them."""
    clip = open_clip.create_model("prior-vit-tiny")
    torch.save(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    config = {"model_cfg": open_clip.get_model_config("prior-vit-tiny"), "preprocess_cfg": OTHER}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    return tmp_path


def is_the_folders(tower, folder):
    weights = torch.load(folder / "open_clip_pytorch_model.bin")
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    picture = Image.linear_gradient("L").resize((150, 70)).convert("RGB")
    pixels = image_processor_of(tower).process(picture)[0]["pixel_values"]
    return torch.equal(tower.encoder.conv1.weight, weights["visual.conv1.weight"]) and torch.equal(
        pixels, transform(picture)
    )


def test_every_pair_of_the_table_has_the_activation_that_it_was_trained_with():
    refused = 0
    for name, tag in PAIRS:
        trained = get_pretrained_cfg(name, tag)
        if is_quick(name) == is_quick(name, trained):
            find_source(name, tag, {})
            continue
        refused += 1
        with pytest.raises(ValueError, match="QuickGELU") as error:
            find_source(name, tag, {})
        remedy = str(error.value).partition("set model.vision.architecture=")[2]
        if remedy.startswith("hf-hub:"):  # no architecture of the table is as the weights
            assert trained["hf_hub"].rstrip("/") in remedy
            assert name + "-quickgelu" not in open_clip.list_models()
        else:
            twin = remedy.rstrip(".")
            assert is_quick(twin) == is_quick(twin, get_pretrained_cfg(twin, tag)) == is_quick(name, trained)
    assert refused == 28


def test_the_check_of_a_recipe_knows_the_activation():
    build_open_clip.check(architecture="ViT-B-32-quickgelu", pretrained="openai")
    with pytest.raises(ValueError, match=r"QuickGELU.*set model\.vision\.architecture=ViT-B-32-quickgelu"):
        build_open_clip.check(architecture="ViT-B-32", pretrained="openai")


def test_weights_by_path_have_the_preprocessing_that_all_weights_of_their_architecture_share(tmp_path):
    file = tmp_path / "weights.bin"
    file.touch()
    known = 0
    for name in open_clip.list_models():
        given = [get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)]
        shared = [key for key in KEYS if len({str(one[key]) for one in given}) == 1]
        if len(shared) == 4 or name == "prior-vit-tiny":
            known += 1
            find_source(name, str(file), {})
            continue
        with pytest.raises(ValueError, match="the keys mean, std, interpolation and resize_mode of") as e:
            find_source(name, str(file), {})
        assert f"({', '.join(key for key in KEYS if key not in shared)})" in str(e.value)
        find_source(name, str(file), {key: OTHER[key] for key in KEYS if key not in shared})
    assert known > 100


def test_siglip_by_path_has_the_pixels_of_siglip(tmp_path):
    file, trained = tmp_path / "siglip.pt", get_pretrained_cfg("ViT-B-16-SigLIP", "webli")
    file.touch()
    with torch.device("meta"):
        tower = build_open_clip("ViT-B-16-SigLIP", pretrained=str(file))
    picture = Image.linear_gradient("L").resize((150, 70)).convert("RGB")
    transform = image_transform_v2(PreprocessCfg(size=224, **{key: trained[key] for key in KEYS}), is_train=False)
    assert torch.equal(image_processor_of(tower).process(picture)[0]["pixel_values"], transform(picture))


def test_a_configuration_beside_a_file_counts_more_than_the_table_and_keys_of_the_recipe_more_than_both(folder):
    file = str(folder / "open_clip_pytorch_model.bin")
    assert is_the_folders(build_open_clip("prior-vit-tiny", pretrained=file), folder)
    given = build_open_clip("prior-vit-tiny", pretrained=file, mean=(0.1, 0.2, 0.3)).config["preprocess"]
    assert given == {**given, **OTHER, "mean": (0.1, 0.2, 0.3)}


def test_a_configuration_beside_a_file_tells_its_activation(tmp_path, capsys):
    file = tmp_path / "weights.bin"
    file.touch()
    config = {"model_cfg": open_clip.get_model_config("ViT-B-32-quickgelu")}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    find_source("ViT-B-32-quickgelu", str(file), {})
    with pytest.raises(ValueError, match=r"set model\.vision\.architecture=ViT-B-32-quickgelu"):
        find_source("ViT-B-32", str(file), {})
    (tmp_path / "open_clip_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"open_clip_config\.json cannot be read"):
        find_source("ViT-B-32", str(file), {})


def test_an_activation_that_nothing_tells_is_said_once(folder, capsys, monkeypatch):
    quick = {**open_clip.get_model_config("prior-vit-tiny"), "quick_gelu": True}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "prior-vit-tiny-quickgelu", quick)
    file = str(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"set model\.vision\.architecture=prior-vit-tiny"):
        build_open_clip("prior-vit-tiny-quickgelu", pretrained=file, **OTHER)
    (folder / "open_clip_config.json").unlink()
    build_open_clip("prior-vit-tiny-quickgelu", pretrained=file, **OTHER)
    said = [line for line in capsys.readouterr().out.splitlines() if "QuickGELU" in line]
    assert len(said) == 1
    assert said[0].endswith("need model.vision.architecture=prior-vit-tiny.")


def test_a_folder_or_a_hub_model_of_openclip_is_an_architecture_with_its_weights(folder, monkeypatch):
    assert is_the_folders(build_open_clip(f"local-dir:{folder}"), folder)

    def download(repo_id, filename, **_):
        assert repo_id == "somebody/clip"
        if not (folder / filename).is_file():
            raise FileNotFoundError(filename)
        return str(folder / filename)

    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", download)
    assert is_the_folders(build_open_clip("hf-hub:somebody/clip"), folder)


def test_what_a_folder_of_openclip_lacks_is_said(folder, tmp_path):
    with pytest.raises(ValueError, match=r"brings its weights; leave model\.vision\.pretrained out"):
        find_source(f"local-dir:{folder}", "openai", {})
    config = json.loads((folder / "open_clip_config.json").read_text())
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config["model_cfg"]}))
    with pytest.raises(ValueError, match=r"the keys mean, std, interpolation and resize_mode of model\.vision"):
        find_source(f"local-dir:{folder}", None, {})
    find_source(f"local-dir:{folder}", None, OTHER)
    with open(folder / "open_clip_pytorch_model.bin", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=r"model\.vision\.architecture=local-dir:.* cannot be loaded"):
        build_open_clip(f"local-dir:{folder}", **OTHER)
    (folder / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="there are no weights"):
        find_source(f"local-dir:{folder}", None, OTHER)
    with pytest.raises(ValueError, match=r"local-dir:/nosuch: open_clip_config\.json cannot be read"):
        find_source("local-dir:/nosuch", None, {})


def test_a_torchscript_archive_is_refused_with_what_to_take_instead(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "ViT-B-32.pt")
    with pytest.raises(ValueError, match=r"architecture=ViT-B-32-quickgelu and model\.vision\.pretrained=openai"):
        find_source("ViT-B-32", str(tmp_path / "ViT-B-32.pt"), {})


def test_a_bare_file_takes_the_preprocessing_of_a_tag(tmp_path):
    file = tmp_path / "weights.bin"
    file.touch()
    architecture = "ViT-L-14"  # whose tags differ
    with pytest.raises(ValueError, match=r"name a tag with the same ones as model\.vision\.preprocess_of"):
        find_source(architecture, str(file), {})
    for tag in ("laion2b_s32b_b82k", "openai"):
        expected = {key: getattr(PreprocessCfg(), key) for key in KEYS}
        expected |= {key: value for key, value in get_pretrained_cfg(architecture, tag).items() if key in KEYS}
        found = find_source(architecture, str(file), {"std": [0.1, 0.2, 0.3]}, tag).preprocess
        assert {key: found[key] for key in KEYS} == {**expected, "std": [0.1, 0.2, 0.3]}
    known = {key: get_pretrained_cfg(architecture, "openai").get(key, getattr(PreprocessCfg(), key)) for key in KEYS}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": known}))
    find_source(architecture, str(file), {}, "openai")
    with pytest.raises(ValueError, match=r"preprocess_of=laion2b_s32b_b82k: .* trained with another mean, std: leave"):
        find_source(architecture, str(file), {}, "laion2b_s32b_b82k")
    for refuse in (build_open_clip, build_open_clip.check):
        with pytest.raises(ValueError, match=r"preprocess_of='laion' is no tag of ViT-L-14"):
            refuse(architecture, str(file), preprocess_of="laion")


@pytest.mark.parametrize("given", [{"mean": [0.5, 0.5, 127]}, {"std": [0.5, 0, 0.5]}])
def test_impossible_means_and_deviations_are_refused(given):
    with pytest.raises(ValueError, match="expected three values of the range from 0 to 1"):
        find_source("prior-vit-tiny", None, given)


def test_ranks_without_weights_prepare_pictures_as_the_first_one_does(folder, tokenizer):
    """With FSDP2 the other ranks build the model without its weights, and read their own pictures."""
    vision = {"name": "open_clip", "architecture": "prior-vit-tiny"}
    vision["pretrained"] = str(folder / "open_clip_pytorch_model.bin")
    language = {"config": {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1}}
    model = lvlm_skeleton(tokenizer, language, vision=vision, projector={"name": "linear"}).model
    assert model.model.vision_tower.encoder.conv1.weight.is_meta
    assert model.model.vision_tower.config["preprocess"]["mean"] == OTHER["mean"]
