"""Source of an OpenCLIP encoder, and activation and preprocessing of its weights, found before it is built."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
from huggingface_hub import constants
from open_clip.pretrained import download_pretrained_from_hf, get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg

from composer_prior.data.hub import find_model
from composer_prior.data.messages import one_line
from composer_prior.registry import did_you_mean

open_clip.add_model_config(Path(__file__).parent / "open_clip_configs")
SHIPPED_WEIGHTS = Path(__file__).parent / "open_clip_weights"  # ARCHITECTURE.TAG.safetensors
CONFIG = "open_clip_config.json"
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
WEIGHTS = (".safetensors", ".bin", ".pth")  # of those that OpenCLIP looks for in a folder
LOCAL, HUB, QUICK = "local-dir:", "hf-hub:", "-quickgelu"


class Source(NamedTuple):
    """An encoder that OpenCLIP can build."""

    config: dict[str, Any]  # of its architecture
    weights: str | None  # a tag or a file; None for random weights and for those that come with the architecture
    preprocess: dict[str, Any]  # what becomes of pictures, by OpenCLIP's names
    assumption: str = ""  # a line about what the weights do not say and is taken for granted


def find_source(
    architecture: str, pretrained: str | None, given: Mapping[str, Any], preprocess_of: str | None = None
) -> Source:
    """Find an encoder of :func:`.build_open_clip` and the preprocessing of its weights, without reading weights.

    Keys of ``PREPROCESSING`` that are missing or None take the weights' values, or with
    ``preprocess_of`` those of that tag of the architecture. An error names the key.
    """
    find = _with_own_weights if brings_weights(architecture) else _of_table
    found = find(architecture, pretrained)
    told = found.preprocess
    if preprocess_of is not None:
        tags = list_pretrained_tags_by_model(architecture)
        if preprocess_of not in tags:
            raise ValueError(
                f"model.vision.preprocess_of={preprocess_of!r} is no tag of {architecture}. "
                f"{did_you_mean(preprocess_of, tags)}"
            )
        told = {**asdict(PreprocessCfg()), **get_pretrained_cfg(architecture, preprocess_of)}
        known = found.preprocess if found.weights and {*PREPROCESSING} <= {*found.preprocess} else told
        if other := [key for key in PREPROCESSING if [*known[key]] != [*told[key]]]:
            raise ValueError(
                f"model.vision.preprocess_of={preprocess_of}: the weights {pretrained} were trained with another "
                f"{', '.join(other)}: leave it out."
            )
    preprocess = {**told, **{key: value for key, value in given.items() if value is not None}}
    lacking = [key for key in PREPROCESSING if preprocess.get(key) is None]
    if lacking:
        raise ValueError(
            f"model.vision: nothing says on what pictures the weights {pretrained or architecture} were trained "
            f"({', '.join(lacking)}): set the keys mean, std, interpolation and resize_mode of model.vision, or name a "
            f"tag with the same ones as model.vision.preprocess_of, or put the {CONFIG} of the weights beside them."
        )
    for key in ("mean", "std"):
        if not all(0 <= value <= 1 for value in preprocess[key]) or (key == "std" and 0 in preprocess[key]):
            raise ValueError(f"model.vision.{key}={preprocess[key]}: expected three values of the range from 0 to 1.")
    kept = {key: preprocess[key] for key in (*PREPROCESSING, "fill_color") if key in preprocess}
    return found._replace(preprocess=kept)


def brings_weights(architecture: str) -> bool:
    """Return True if an architecture is a folder or a hub id, which hold weights too."""
    return architecture.startswith((LOCAL, HUB))


def _with_own_weights(architecture: str, pretrained: str | None) -> Source:
    """Find the source of ``local-dir:FOLDER`` or ``hf-hub:ORG/NAME``."""
    what, place = f"model.vision.architecture={architecture}", architecture.partition(":")[2]
    if pretrained:
        raise ValueError(f"{what} brings its weights; leave model.vision.pretrained out.")
    local = architecture.startswith(LOCAL)
    try:
        if not local and not constants.HF_HUB_OFFLINE:
            find_model(place)  # which says at once that a hub is not there
        file = Path(place, CONFIG) if local else download_pretrained_from_hf(place, CONFIG)
        told = json.loads(Path(file).read_bytes())
        config, preprocess = told["model_cfg"], told.get("preprocess_cfg")
        if not {"embed_dim", "vision_cfg", "text_cfg"} <= {*config}:
            raise ValueError("its model_cfg lacks embed_dim, vision_cfg or text_cfg")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{what}: {CONFIG} cannot be read: {one_line(error)}") from error
    if local and not any(file.suffix in WEIGHTS for file in Path(place).iterdir()):
        raise ValueError(f"{what}: there are no weights ({', '.join(WEIGHTS)}).")
    return Source(config, None, {**asdict(PreprocessCfg()), **preprocess} if preprocess else {})


def _of_table(architecture: str, pretrained: str | None) -> Source:
    """Find the source of an OpenCLIP architecture, with weights of its table, of ours, of a file, or random ones."""
    config, default = open_clip.get_model_config(architecture), asdict(PreprocessCfg())
    if config is None:
        raise ValueError(
            f"model.vision.architecture={architecture!r} is not in OpenCLIP. "
            f"{did_you_mean(architecture, open_clip.list_models())}"
        )
    shipped = {file.name.split(".")[-2]: str(file) for file in SHIPPED_WEIGHTS.glob(f"{architecture}.*.safetensors")}
    tags = {tag: get_pretrained_cfg(architecture, tag) for tag in list_pretrained_tags_by_model(architecture)}
    if not pretrained or pretrained in shipped:
        return Source(config, shipped.get(pretrained or ""), default)
    tag = get_pretrained_cfg(architecture, pretrained)
    if tag:
        _check_activation(architecture, config, tag, f"{pretrained}, as OpenCLIP's table says,", HUB + tag["hf_hub"])
        return Source(config, pretrained, {**default, **tag})
    if not Path(pretrained).is_file():
        raise ValueError(
            f"model.vision.pretrained={pretrained!r} is neither a file nor a tag of {architecture} "
            f"({', '.join([*tags, *shipped]) or 'it has none'}). A folder or a hub's model with {CONFIG} is named as "
            f"model.vision.architecture={LOCAL}FOLDER or {HUB}ORG/NAME."
        )
    known = [*tags.values(), *[default] * len(shipped)]
    return _of_file(Path(pretrained), architecture, config, known)


def _of_file(file: Path, architecture: str, config: dict[str, Any], known: list[dict[str, Any]]) -> Source:
    """Find the source of a checkpoint: by the configuration beside it, or by the values that all tags share."""
    if zipfile.is_zipfile(file) and any("/code/" in name for name in zipfile.ZipFile(file).namelist()):
        raise ValueError(
            f"model.vision.pretrained={file} is a TorchScript archive, as OpenAI's are: OpenCLIP does not read it. Set "
            f"model.vision.architecture={architecture.removesuffix(QUICK)}{QUICK} and model.vision.pretrained=openai."
        )
    try:
        beside = file.parent / CONFIG
        told = json.loads(beside.read_bytes()) if beside.is_file() else {}
        model, preprocess = told.get("model_cfg", {}), told.get("preprocess_cfg")
        if model:
            _check_activation(architecture, config, model, f"{file}, as {beside} says,", f"{LOCAL}{file.parent}")
    except (OSError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"model.vision.pretrained={file}: {beside} cannot be read: {one_line(error)}") from error
    agreed = {key: known[0][key] for key in PREPROCESSING if known and all(one[key] == known[0][key] for one in known)}
    twin, assumption = _twin(architecture), ""
    if not model and twin in open_clip.list_models():
        assumed = "QuickGELU" if config.get("quick_gelu") else "GELU"
        assumption = (
            f"Model: {file} does not say its activation, and {architecture} takes {assumed}; weights that were trained "
            f"with the other need model.vision.architecture={twin}."
        )
    return Source(config, str(file), {**asdict(PreprocessCfg()), **preprocess} if preprocess else agreed, assumption)


def _check_activation(architecture: str, config: Mapping[str, Any], trained: Any, what: str, other: str) -> None:
    """Refuse weights that were trained with another activation than an architecture has."""
    quick = bool(trained.get("quick_gelu"))
    if quick != bool(config.get("quick_gelu")):
        twin = _twin(architecture)
        remedy = twin if twin in open_clip.list_models() else other.rstrip("/")
        raise ValueError(
            f"model.vision.pretrained={what} was trained with{'' if quick else 'out'} QuickGELU, which {architecture} "
            f"{'lacks' if quick else 'has'}: set model.vision.architecture={remedy}"
            f"{'.' if remedy == twin else ', whose own configuration decides, and leave model.vision.pretrained out.'}"
        )


def _twin(architecture: str) -> str:
    """Return the name of an architecture with the other activation."""
    return architecture.removesuffix(QUICK) if architecture.endswith(QUICK) else architecture + QUICK
