"""Recipes: YAML files with dot-list overrides.

Reading one needs neither Composer nor torch, so that a key that does not exist is answered at once.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from composer_prior.data.files import load_yaml
from composer_prior.data.messages import hidden, hide
from composer_prior.data.storage import is_remote
from composer_prior.registry import did_you_mean

SHIPPED = Path(__file__).parents[1] / "yamls"  # found by name where the working folder has no file of that name
_OWN_DATA = ("train", "validation")
HELPERS = ("reference", "viewer")
_NAMED = (
    "eval_loaders",
    "algorithms",
    "callbacks",
    "loggers",
    "benchmarks",
)  # keys that hold any number of components by name


@dataclass
class TrainConfig:
    """The keys of a recipe; those that LLM Foundry has are named and mean what they do there.

    Args:
        train: your own captions instead of the recipe's, a folder or remote; reference, tokenizer and scores are made
            from them. The loaders of run and reference read them.
        validation: likewise for validation; without it, a run on ``train`` has none.
        run_name: names the run.
        run_folder: where everything goes that the run writes.
        seed: decides everything random.
        max_duration: how long to train, such as 600ba (batches) or 2ep (epochs).
        global_train_batch_size: samples of one optimizer step, over all ranks; rows where they are packed.
        device_train_microbatch_size: likewise; null: those of the rank at once; auto: what fits, on CUDA without fsdp2.
        device_eval_batch_size: samples that a rank evaluates at once.
        precision: auto is amp_bf16 on CUDA and fp32 on the CPU.
        nan_steps: how many steps whose loss or gradient is not finite change nothing; the next one ends the run.
        data: what makes the data if they are missing: a ``name`` and its arguments, or a file with them.
        tokenizer: ``name``, a hub id or folder; ``kwargs``; ``train: {vocab_size}`` makes it if it is missing;
            ``image_tokens: false`` adds none; ``chat_template`` writes conversations: ``own``, a file, or a text. A
            model of transformers, ``hugging_face``, brings its own tokenizer.
        reference: the recipe of the text-only reference, which is trained first if it is missing.
        viewer: the recipe of the viewer, an LVLM whose scores the algorithm ``image_gain`` needs; likewise.
        scoring: how stored scores are made: ``batch_tokens``, ``unit_samples``, ``dtype``, as options of the job score.
        model: a ``name`` and its arguments.
        train_loader: ``dataset`` and the arguments of torch's DataLoader.
        eval_loader: likewise; null: no validation.
        eval_loaders: name: a further loader, with metrics such as ``metrics/eval/NAME/loss``; null leaves one out.
        eval_interval: how often to evaluate; 1dur is at the end.
        optimizer: a ``name`` and its arguments; ``groups``: by part (``vision``, ``language.lm_head``) arguments of its
            own; ``decay_all``: weight decay on norms, biases and embeddings too.
        scheduler: a ``name`` and its arguments.
        algorithms: name: arguments, in their order; null leaves one out.
        callbacks: name: arguments; null leaves one out.
        loggers: name: arguments; null leaves one out.
        benchmarks: name: arguments, with ``interval`` and ``limit``; ``benchmark`` if the name is another.
        save_folder: where checkpoints go, a folder that all nodes see or a bucket; null: none are saved.
        save_interval: how often to save a checkpoint.
        save_num_checkpoints_to_keep: how many checkpoints stay; -1: all, as in a bucket always.
        load_path: a checkpoint of this run, to go on from.
        init_from: a run folder, checkpoint or model folder whose weights a new run starts from.
        autoresume: go on from the newest whole checkpoint, if there is one.
        parallelism_config: ``fsdp2``: its arguments, and ``data_parallel_replicate_degree``, how many copies of the
            model; null: every rank has the whole model.
        compile_config: arguments of torch.compile, such as {dynamic: true}.
        profiler: record some steps with torch.profiler, into ``profiler`` in the run's folder: arguments of Composer's
            cyclic_schedule, such as {skip_first: 10, active: 3}.
        code_paths: Python files to run first, which register components.
        progress_bar: show one; so do reference and viewer, unless their recipes say otherwise.
        sample_captions: validation images captioned at the end.
        push_to_hub: ``USER/NAME``, a repository of the Hub that ``model/`` is uploaded to at the end; a new one is
            private.
        dist_timeout: seconds that ranks wait for each other, also while data are being made.
    """

    train: str | None = None
    validation: str | None = None
    run_name: str = MISSING
    run_folder: str = "runs/${run_name}"
    seed: int = 17
    max_duration: str = MISSING
    global_train_batch_size: int = MISSING
    device_train_microbatch_size: Any = None
    device_eval_batch_size: int = 64
    precision: str = "auto"
    nan_steps: int = 0
    data: dict[str, Any] | None = None
    tokenizer: dict[str, Any] = MISSING
    reference: dict[str, Any] | None = None
    viewer: dict[str, Any] | None = None
    scoring: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = MISSING
    train_loader: dict[str, Any] = MISSING
    eval_loader: dict[str, Any] | None = None
    eval_loaders: dict[str, Any] = field(default_factory=dict)
    eval_interval: str = "1dur"
    optimizer: dict[str, Any] = MISSING
    scheduler: dict[str, Any] = MISSING
    algorithms: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    loggers: dict[str, Any] = field(default_factory=dict)
    benchmarks: dict[str, Any] = field(default_factory=dict)
    save_folder: str | None = "${run_folder}/checkpoints"
    save_interval: str = "1000ba"
    save_num_checkpoints_to_keep: int = 2
    load_path: str | None = None
    init_from: str | None = None
    autoresume: bool = False
    parallelism_config: dict[str, Any] | None = None
    compile_config: dict[str, Any] | None = None
    profiler: dict[str, Any] | None = None
    code_paths: list[str] = field(default_factory=list)
    progress_bar: bool = True
    sample_captions: int = 4
    push_to_hub: str | None = None
    dist_timeout: float = 3600.0

    @cached_property
    def helpers(self) -> "dict[str, TrainConfig]":
        """Return the recipes of the models that are trained first, ``reference``, then ``viewer``, by their key."""
        found = {}
        for key in HELPERS:
            if getattr(self, key) is not None:
                found[key] = TrainConfig(**getattr(self, key))
                vars(found[key])["texts"] = vars(self).get("texts", {}).get(key, {})
        return found

    @property
    def loaders(self) -> dict[str, dict[str, Any]]:
        """Return the loaders by their keys, ``train_loader``, ``eval_loader`` and ``eval_loaders.NAME``."""
        further = {f"eval_loaders.{name}": loader for name, loader in self.eval_loaders.items()}
        found = {"train_loader": self.train_loader, "eval_loader": self.eval_loader, **further}
        return {key: loader for key, loader in found.items() if loader is not None}

    @property
    def reference_recipe(self) -> "TrainConfig | None":
        """Return the recipe of the reference."""
        return self.helpers.get("reference")


_SCHEMA = OmegaConf.structured(TrainConfig)
_TYPED: dict[tuple[str, Path, str], TrainConfig] = {}
_KEPT = ContextVar("kept", default=False)


def _of_environment(name: str, *default: str | None) -> Any:
    """Resolve ``oc.env`` and hide its value in errors; where ``_KEPT`` is set, return its own text."""
    text = f"${{oc.env:{name}}}"
    if _KEPT.get():
        return text
    if name in os.environ:
        hide(os.environ[name], text)
    return oc.env(name, *default)


OmegaConf.register_new_resolver("oc.env", _of_environment, replace=True)


def written(recipe: TrainConfig) -> dict[str, Any]:
    """Return a recipe for files, pages and trackers: values from the environment are interpolations again."""
    return _with_texts(asdict(recipe), vars(recipe).get("texts", {}))


def identified(recipe: TrainConfig, keys: Sequence[str]) -> dict[str, Any]:
    """Return some keys of a recipe, with a digest of their values where some come from the environment."""
    told, values = ({key: whole[key] for key in keys} for whole in (written(recipe), asdict(recipe)))
    if told == values:
        return told
    digest = hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=8)
    return {**told, "environment": digest.hexdigest()}


def _with_texts(value: Any, texts: Any) -> Any:
    if isinstance(texts, str):
        return texts
    items = value.items() if isinstance(value, dict) else enumerate(value)
    changed = {key: _with_texts(one, texts[key]) if key in texts else one for key, one in items}
    return changed if isinstance(value, dict) else [*changed.values()]


def _texts(node: Any, raw: Any) -> dict[Any, Any]:
    """Return the interpolations of the values that come from the environment, at their keys."""
    found: dict[Any, Any] = {}
    for key, text in raw.items() if isinstance(raw, dict) else enumerate(raw):
        if isinstance(text, dict | list):
            found[key] = _texts(node._get_node(key), text)
        elif isinstance(text, str) and "${" in text:
            try:
                value = str(node[key])
            except Exception:  # of a resolver that makes something of the value
                value = "${oc.env:"
            found[key] = text if "${oc.env:" in value else {}
    return {key: one for key, one in found.items() if one}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe, put in those it names (``data``, ``reference``, ``viewer``) and the overrides, check its schema.

    ``data`` and ``tokenizer`` of reference and viewer are those of the run, and so is the viewer's reference. Paths of
    recipes are relative to the file that names them; ``reference.key=value`` overrides the reference's recipe.

    Args:
        path: of the recipe, or the name of one that is shipped.
        overrides: ``key=value``, with dots in the key.

    Raises:
        FileNotFoundError: if a recipe is missing.
        ValueError: for an unknown key or a value of the wrong type, naming the key.
    """
    path = _find(Path(path))
    recipe = _read(path)
    changes = _parse_overrides(overrides)
    own_data, data_changes = _part(recipe.pop("data", None), path), changes.pop("data", {})
    helpers: dict[str, Any] = {key: _part(recipe.pop(key, None), path) for key in HELPERS}
    helper_changes = {key: changes.pop(key, {}) for key in HELPERS}
    for key, given in helper_changes.items():
        if isinstance(given, str) and given.endswith((".yaml", ".yml")):
            helpers[key], helper_changes[key] = _part(given, path), {}
    for word in overrides:  # an empty mapping alone would change nothing
        key, _, text = word.partition("=")
        head, _, rest = key.partition(".")
        part, name = (helpers[head], rest) if head in HELPERS else (recipe, key)
        if part is not None and name in _NAMED and text.strip() == "{}":
            part.pop(name, None)
    data = own_data
    read_by = _suffix(_processor_of(cast(DictConfig, OmegaConf.merge(recipe, changes))))
    train, validation = (changes.pop(key, None) or recipe.get(key) for key in _OWN_DATA)
    for key in _OWN_DATA:
        recipe.pop(key, None)
    if train:
        data = None
        _read_own_data(recipe, helpers, train, validation, read_by)
    elif validation:
        raise ValueError("validation= is given without train=: give both, or change eval_loader.dataset alone.")
    data = _changed(data, data_changes, path)
    if own_data is not None and data is None:
        for part in filter(None, (recipe, *helpers.values())):
            part.pop("benchmarks", None)  # those of the recipe are about its own data
    recipe = cast(DictConfig, OmegaConf.unsafe_merge(recipe, changes, {"data": data}))
    if (processor := _processor_of(recipe)) is not None:
        trusted: Any = {"kwargs": {"trust_remote_code": True}} if recipe.model.get("trust_remote_code") else {}
        given = recipe.get("tokenizer") or {}
        recipe.tokenizer = OmegaConf.merge({"name": processor, **trusted}, given, {"image_tokens": False})
    texts: dict[str, Any] = {}
    for key in HELPERS:
        given = helper_changes[key]
        other = isinstance(given, str)
        helper = None if other else _changed(helpers[key], given, path)
        if helper is None:
            naming = [*_naming(OmegaConf.to_container(recipe), key)]
            if other:
                words = " ".join(f"{one}=..." for one in naming or [f"algorithms.NAME.{key}"])
                raise ValueError(f"{key}={given}: expected FILE.yaml, a recipe. For a model, give {key}=null {words}")
            if naming:
                raise ValueError(f"{key}=null: also give {', '.join(naming)}, which name files of the {key}.")
            continue
        if read_by and not train and "run_name" not in given:
            name = cast(Any, OmegaConf.to_container(helper, resolve=False)).get("run_name")
            if name not in (None, MISSING):
                helper.run_name = f"{name}{read_by}"
        if "progress_bar" in recipe and "progress_bar" not in helper:
            helper.progress_bar = recipe.progress_bar
        shared = {"data": data, "tokenizer": recipe.get("tokenizer")}
        if key == "viewer":
            for name in {"data", "tokenizer", "reference"} & {*helper_changes[key]}:
                raise ValueError(f"viewer.{name} is that of the run: give {name} itself.")
            helper.pop("reference", None)
            shared["reference"] = recipe.get("reference")
        nested = cast(DictConfig, OmegaConf.unsafe_merge(helper, shared))
        theirs = _typed_helper(nested, path, helper_changes[key], f"{key}.")
        recipe[key] = asdict(theirs)
        texts[key] = {**texts, **vars(theirs)["texts"]}
    typed = _typed(recipe, path, changes)
    vars(typed)["texts"] |= texts
    return typed


def _processor_of(recipe: DictConfig) -> str | None:
    """Return the folder or hub id of the processor of a model of transformers, "" if it lacks one; else None."""
    model = recipe.get("model") or {}
    if model.get("name") != "hugging_face":
        return None
    return (model.get("processor") or {}).get("name") or model.get("pretrained") or ""


def _suffix(processor: str | None) -> str:
    """Return what tells references of several tokenizers apart: the end of a hub id, or the name of a run."""
    if not processor:
        return ""
    place = Path(processor)
    return f"-{place.parent.name if place.name == 'model' else place.name}"


def _naming(value: Any, section: str, key: str = "") -> Iterator[str]:
    """Yield the keys of the values that interpolate a section."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _naming(one, section, f"{key}.{name}".lstrip("."))
    elif f"${{{section}." in str(value):
        yield key


def _find(path: Path, beside: Path | None = None) -> Path:
    """Find a recipe: the file, beside the one that names it, or else the shipped one of that name."""
    place, shipped = path if beside is None else beside.parent / path, SHIPPED / path.name
    return shipped if not place.exists() and len(path.parts) == 1 and shipped.exists() else place


def _part(value: Any, path: Path) -> DictConfig | None:
    """Return a section of a recipe, which may be in a file of its own."""
    return _read(_find(Path(value), path)) if isinstance(value, str) else value


def _changed(part: DictConfig | None, changes: Any, path: Path) -> Any:
    """Apply overrides to a section; one may name another file, and null leaves the section out."""
    if isinstance(changes, str):
        part, changes = _part(changes, path), {}
    return None if part is None or changes is None else OmegaConf.merge(part, changes)


def _read_own_data(
    recipe: DictConfig, helpers: Mapping[str, Any], train: str, validation: str | None, read_by: str
) -> None:
    """Let run, reference and viewer read data of the user's; name what is made of them after them and ``read_by``."""
    folders = dict.fromkeys(HELPERS, "${run_folder}")
    for key, helper in helpers.items():
        if helper is not None:
            helper.run_name = f"{key}-{name_of_data(train)}{read_by}"
            folders[key] = f"runs/{helper.run_name}"
    for part in (recipe, *helpers.values()):
        if part is None:
            continue
        vision = part.model.get("vision") or {}
        if vision.get("pretrained") == "emoji_scenes":  # this tower knows the drawings of the embedded data and no more
            vision.update({"pretrained": None, "freeze": False})
        if "train" in (part.get("tokenizer") or {}):
            part.tokenizer.name = f"{folders['reference']}/tokenizer"
        part.pop("eval_loaders", None)
        if validation is None:
            part.eval_loader = None
        for key, place in (("train_loader", train), ("eval_loader", validation)):
            if place is not None:
                loader = part.setdefault(key, OmegaConf.create({})) if key == "eval_loader" else part[key]
                dataset = OmegaConf.to_container(loader.get("dataset") or OmegaConf.create({}))
                loader.dataset = _dataset_in(place, cast(dict[str, Any], dataset), folders, read_by)


def _dataset_in(place: str, dataset: dict[str, Any], folders: Mapping[str, str], read_by: str) -> dict[str, Any]:
    """Return the arguments of a data set at another path or url."""
    rest = {key: value for key, value in dataset.items() if key not in ("local", "remote", "split", "streams")}
    for key, helper in (("scores", "reference"), ("viewer_scores", "viewer")):
        if rest.get(key):
            end = key.replace("_", "-") + read_by
            rest[key] = f"{place.rstrip('/')}-{end}" if is_remote(place) else f"{folders[helper]}/scores"
    if not is_remote(place):
        return {**rest, "local": place}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "composer-prior/captions"
    return {**rest, "remote": place, "local": str(cache / name_of_data(place))}


def name_of_data(place: str) -> str:
    """Name a data set by the end of its path or url and a digest of the whole."""
    whole = place.rstrip("/") if is_remote(place) else os.path.realpath(os.path.expanduser(place))
    end = "-".join(part for part in whole.split("/")[-2:] if part.isidentifier())
    return f"{end or 'captions'}-{hashlib.blake2b(whole.encode(), digest_size=4).hexdigest()}"


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        hint = did_you_mean(path.name, [one.name for one in SHIPPED.glob("*.yaml")])
        raise FileNotFoundError(
            f"The recipe {path} does not exist. {hint.replace('Accepted', 'Those that are shipped')}"
        )
    try:
        recipe = _load(path, path.read_bytes())
    except Exception as error:
        raise ValueError(f"{path} is not a readable YAML file: {_one_line(error)}") from error
    if not isinstance(recipe, DictConfig):
        raise ValueError(f"{path} must hold keys and values.")
    if not recipe:
        raise ValueError(f"{path} is empty; write a recipe's keys, such as those of prior_vit.yaml.")
    return deepcopy(recipe)


@lru_cache(maxsize=16)
def _load(path: Path, _: bytes) -> DictConfig | ListConfig:
    """Parse a file once while its bytes are the same: a study reads the same recipes hundreds of times."""
    return load_yaml(path)  # a safe loader: tags that construct Python objects are errors


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"{override!r} is not an override; write key=value.")
    changes = OmegaConf.create()
    try:
        for override in overrides:
            key, _, text = override.partition("=")
            OmegaConf.update(changes, key, _value(text))
    except Exception as error:
        raise ValueError(f"Overrides {' '.join(overrides)}: {_one_line(error)}") from error
    return changes


@lru_cache(maxsize=4096)
def _value(text: str) -> Any:
    return cast(Any, OmegaConf.to_container(OmegaConf.from_dotlist([f"x={text}"]), resolve=False))["x"]


def _typed_helper(recipe: DictConfig, path: Path, changes: Any, prefix: str) -> TrainConfig:
    """Resolve the recipe of a reference or a viewer once for all cells of a study that share it."""
    text = repr(OmegaConf.to_container(recipe, resolve=False))
    if re.search(r"\$\{[^}]*:", text):  # a resolver may answer something else the next time
        return _typed(recipe, path, changes, prefix)
    if (text, path, prefix) not in _TYPED:
        _TYPED[text, path, prefix] = _typed(recipe, path, changes, prefix)
    return _TYPED[text, path, prefix]


def _typed(recipe: DictConfig, path: Path, changes: Any, prefix: str = "") -> TrainConfig:
    """Resolve a recipe; an error names the file, or the key alone if an override caused it."""
    names = [f.name for f in fields(TrainConfig)]

    def place(key: str) -> str:
        given = isinstance(changes, DictConfig) and key.split(".")[0].split("[")[0] in changes
        return f"{prefix}{key}" if given else f"{path}: {prefix}{key}"

    for key in map(str, recipe):
        if key not in names:
            raise ValueError(f"{place(key)} is not a key of a recipe. {did_you_mean(key, names)}")
    for key in _NAMED:
        if key in recipe and recipe[key] is None:
            recipe[key] = {}  # null is none of them
    typed: Any = None
    try:
        typed = OmegaConf.unsafe_merge(deepcopy(_SCHEMA), recipe)
        made = cast(TrainConfig, OmegaConf.to_object(typed))
    except OmegaConfBaseException as error:
        missing = list[str]()
        with suppress(OmegaConfBaseException):  # of an interpolation, which is the error itself
            missing = [] if typed is None else sorted(OmegaConf.missing_keys(typed))  # slow, and so after an error
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}.") from error
        raise ValueError(f"{place(str(error.full_key or ''))}: {_one_line(error)}") from error
    raw = cast(dict[str, Any], OmegaConf.to_container(typed, resolve=False))
    vars(made)["texts"] = {}
    if "oc.env" in repr(raw):
        token = _KEPT.set(True)
        try:
            vars(made)["texts"] = _texts(OmegaConf.create(raw), raw)
        finally:
            _KEPT.reset(token)
    return made


def _one_line(error: Exception) -> str:
    return " ".join(hidden(str(error)).split("\n    full_key")[0].split())
