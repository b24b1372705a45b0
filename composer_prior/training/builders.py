"""From the parts of a recipe to the objects of a run."""

import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from composer.core import DataSpec, Precision
from composer.utils import ParallelismConfig, dist
from composer.utils.parallelism import FSDP2Config
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from composer_prior import registry
from composer_prior.data.captions import StreamingCaptionDataset, caption_data_spec
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.models.language import build_language_model, hidden_size, language_skeleton
from composer_prior.models.lvlm import LVLM
from composer_prior.models.projector import build_projector
from composer_prior.models.sharding import share_tensor_attributes
from composer_prior.models.vision import OpenCLIPTower
from composer_prior.registry import register
from composer_prior.training.checks import check_lvlm


@register("model", "lvlm")
def build_lvlm(
    tokenizer: PreTrainedTokenizerBase,
    language: dict[str, Any],
    vision: dict[str, Any] | None = None,
    projector: dict[str, Any] | None = None,
    label_smoothing: float = 0.0,
    pack: bool = False,
    image_related_metrics: bool = False,
) -> ComposerLVLM:
    """An LVLM; without ``vision``, a language model on the captions alone, such as the reference.

    Args:
        tokenizer: with the image tokens, as of :func:`.build_tokenizer`.
        language: arguments of :func:`.build_language_model`.
        vision: ``name`` of a vision tower and its arguments.
        projector: ``name`` (``linear`` or ``mlp``) and ``freeze``; for towers of another width than the LM's.
        label_smoothing, pack: see :class:`.LVLM`.
        image_related_metrics: see :class:`.ComposerLVLM`.
    """
    lm = build_language_model(tokenizer, **language)
    return _assemble(lm, tokenizer, vision, projector, label_smoothing, pack, image_related_metrics)


def lvlm_skeleton(tokenizer: PreTrainedTokenizerBase, language: dict[str, Any], **config: Any) -> ComposerLVLM:
    """What :func:`build_lvlm` builds, on the meta device: every shape and no weight, in seconds for any size.

    Raises:
        ValueError: as :func:`build_lvlm`, but for what only weights can show.
    """
    vision = config.pop("vision", None)
    tower: Any = None if vision is None else registry.look_up("vision", vision["name"], "model.vision")
    if vision is not None and tower is not OpenCLIPTower and registry.takes(tower, "pretrained"):
        vision = {**vision, "pretrained": None}  # OpenCLIP's says by it what becomes of pictures, and loads nothing
    logging.disable(logging.WARNING)  # OpenCLIP says that there are no weights, and not that none are wanted
    try:
        with torch.device("meta"):
            return _assemble(language_skeleton(tokenizer, **language), tokenizer, vision, **config)
    finally:
        logging.disable(logging.NOTSET)


def build_model(
    config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, parallelism: Mapping[str, Any] | None = None
) -> Any:
    """The model of a recipe; with FSDP2 the first rank alone loads weights, and Composer brings them to the others.

    Args:
        config: the recipe's ``model``.
        tokenizer: of :func:`.build_tokenizer`.
        parallelism: the recipe's ``parallelism_config``.
    """
    if "fsdp2" in (parallelism or {}) and dist.get_global_rank() != 0 and config["name"] == "lvlm":
        try:
            return lvlm_skeleton(tokenizer, **_without_name(config))
        except RuntimeError:
            pass  # a tower from outside that computes while it is built
    return build_named("model", config, tokenizer=tokenizer)


def _assemble(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vision: dict[str, Any] | None = None,
    projector: dict[str, Any] | None = None,
    label_smoothing: float = 0.0,
    pack: bool = False,
    image_related_metrics: bool = False,
) -> ComposerLVLM:
    width = hidden_size(lm)
    tower = projection = None
    if vision is not None:
        tower = _build_tower(vision, width)
    if projector is not None and tower is not None:
        projection = build_projector(width_in=tower.width, width_out=width, **projector)
    elif tower is not None and tower.width != width:
        raise ValueError(f"model.projector is missing: features of {tower.width} do not fit an LM of {width}.")
    model = LVLM(tower, projection, lm, tokenizer, label_smoothing, pack)
    return ComposerLVLM(model, image_related_metrics)


build_lvlm.check = check_lvlm  # type: ignore[attr-defined]
register("language", "causal_lm")(build_language_model)
register("projector", "projector")(build_projector)


def _build_tower(config: Mapping[str, Any], width: int) -> Any:
    tower = registry.look_up("vision", config["name"], "model.vision.name")
    given = {"width": width} if registry.takes(tower, "width") else {}
    return tower(**given, **_without_name(config))


def build_loader(
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    image_processor: Any,
    batch_size: int,
    shuffle_seed: int,
    drop_last: bool,
) -> DataSpec:
    """The loader of a recipe: ``dataset`` and arguments of torch's DataLoader.

    Args:
        config: the recipe's ``train_loader`` or ``eval_loader``.
        tokenizer, image_processor: those of the model.
        batch_size: samples per rank.
        shuffle_seed: for a recipe that gives none.
        drop_last: leave out a last batch that is not full, unless the recipe says otherwise.
    """
    arguments = {"shuffle_seed": shuffle_seed, **config["dataset"]}
    dataset = StreamingCaptionDataset(
        tokenizer=tokenizer, image_processor=image_processor, batch_size=batch_size, **arguments
    )
    loader = {"drop_last": drop_last, **{key: value for key, value in config.items() if key != "dataset"}}
    return caption_data_spec(dataset, batch_size, **loader)


def build_named(kind: str, config: Mapping[str, Any], **given: Any) -> Any:
    """A component given as ``{name: ..., argument: ...}``."""
    return registry.build(kind, config["name"], _without_name(config), kind, **given)


def build_all(kind: str, configs: Mapping[str, Any]) -> list[Any]:
    """Components given as ``{name: {argument: ...}}``, in order; those whose arguments are None are left out."""
    return [
        registry.build(kind, name, arguments, f"{kind}s.{name}")
        for name, arguments in configs.items()
        if arguments is not None
    ]


def without_reference(algorithms: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's algorithms, of which none loads a reference."""
    return {
        name: {**given, "reference": None} if given is not None and "reference" in given else given
        for name, given in algorithms.items()
    }


def build_precision(name: str) -> Precision:
    """``auto`` is ``amp_bf16`` on CUDA and ``fp32`` on the CPU, where bf16 products can be 100 times slower."""
    if name == "auto":
        return Precision.AMP_BF16 if torch.cuda.is_available() else Precision.FP32
    return Precision(name)


def build_parallelism(config: Mapping[str, Any] | None) -> ParallelismConfig | None:
    """Composer's configuration of sharding, from ``{fsdp2: {...}}``.

    Composer itself would ignore ``fsdp2`` in a dict without a word and train with DDP.
    """
    if config is None:
        return None
    parts = {key: registry.build("parallelism", key, value, "parallelism_config") for key, value in config.items()}
    return ParallelismConfig(**parts)


@register("parallelism", "fsdp2")
@dataclass
class ShardingConfig(FSDP2Config):
    """FSDP2's configuration in Composer, with several copies of the model (HSDP) as Composer's FSDP1 has them.

    Args:
        data_parallel_replicate_degree: copies of the model, each sharded among as many ranks; None: one among all.
    """

    device_mesh: Any = field(default=None, init=False)  # Composer makes it
    data_parallel_replicate_degree: int | None = None


def prepare_sharded(model: torch.nn.Module) -> None:
    """What a model that FSDP2 may have sharded still needs: captions, gradients that are averages, and all tensors."""
    average_over_gloo(model)
    for module in model.modules():
        if isinstance(module, LVLM):
            if isinstance(module, FSDPModule) and dist.get_world_size() > 1:
                share_tensor_attributes(module, module.language.device)
            _keep_out_of_backward(module.vision)
            register_fsdp_forward_method(module, "generate_ids")
            register_fsdp_forward_method(module, "text_logprobs")


def _keep_out_of_backward(tower: torch.nn.Module | None) -> None:
    """Let FSDP2 not gather a frozen tower again for a backward pass, which does not reach it."""
    if tower is not None and not any(parameter.requires_grad for parameter in tower.parameters()):
        for module in tower.modules():
            if isinstance(module, FSDPModule):
                module.set_unshard_in_backward(False)


def average_over_gloo(model: torch.nn.Module) -> None:
    """Let FSDP2 average gradients on the CPU, as it does on CUDA.

    FSDP2 asks the backend for averages. Some versions of gloo return the sum instead, gradients as many times too large
    as there are ranks, or refuse to average between copies of the model; others do as they are asked. A gradient that
    is known shows which; where it is no average, FSDP2 asks for sums and divides, as it does where sums could overflow.
    Copies also need an event of the CPU's stream, which has none.

    Raises:
        RuntimeError: if gradients are no averages then, either.
    """
    meshes = dict.fromkeys(parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor))
    if not meshes or torch.distributed.get_backend() != "gloo":
        return
    if any(mesh.ndim > 1 for mesh in meshes):
        torch.cpu.Stream.record_event = lambda _: torch.cpu.Event()  # type: ignore[assignment]
    for mesh in meshes:
        with suppress(RuntimeError):  # gloo's refusal
            if math.isclose(_reduced_gradient(mesh), 1, rel_tol=1e-3):
                continue
        _ask_for_sums()
        found = _reduced_gradient(mesh)
        if not math.isclose(found, 1, rel_tol=1e-3):
            raise RuntimeError(
                f"FSDP2 of torch {torch.__version__} makes gradients over gloo that are {found:g} times their average; "
                "train on CUDA, with DDP (without parallelism_config), or with a version in constraints.txt."
            )


def _reduced_gradient(mesh: DeviceMesh) -> float:
    """A gradient that FSDP2 has reduced over the ranks of a mesh, as many times as it should be: an average is 1."""
    linear = torch.nn.utils.skip_init(torch.nn.Linear, 1, 1, bias=False, device="cpu")  # which draws no random number
    probe = fully_shard(linear, mesh=mesh)
    of_this_rank = mesh.size() if not any(mesh.get_coordinate() or ()) else 0
    probe(torch.full((1, 1), float(of_this_rank))).sum().backward()
    return cast(DTensor, probe.weight.grad).full_tensor().item()


def _ask_for_sums() -> None:
    """Let FSDP2 divide all gradients itself, as it does those in float16, which hold no large sums."""
    collectives: Any = _fsdp_collectives
    factors = collectives._get_gradient_divide_factors

    def of_float16(shards: Any, copies: Any, dtype: torch.dtype, *rest: Any) -> Any:
        return factors(shards, copies, torch.float16, *rest)

    collectives._get_gradient_divide_factors = of_float16


def per_rank_batch_size(global_batch_size: int, where: str = "") -> int:
    """Samples per rank of a step; the ranks must share them evenly."""
    ranks = dist.get_world_size()
    if global_batch_size % ranks:
        raise ValueError(
            f"{where}global_train_batch_size={global_batch_size} cannot be shared evenly by {ranks} ranks."
        )
    return global_batch_size // ranks


def _without_name(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "name"}
