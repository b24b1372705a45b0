"""LoRA on a language model: adapters of PEFT in its layers, which are merged into them where the model is saved."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from composer_prior.data.messages import one_line
from composer_prior.registry import Count

_A, _B, _BASE = "lora_A.default", "lora_B.default", "base_layer"


def add_lora(
    model: PreTrainedModel,
    r: Count = 8,
    target_modules: str | list[str] = "all-linear",
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
) -> None:
    """Put adapters into the layers of a language model, and freeze all else of it.

    Args:
        model: a causal LM, changed in place.
        r: rank of the adapters.
        target_modules: ends of the names of the linear layers that get one, or a regular expression for whole names.
            Default: all but the head.
        lora_alpha: an adapter is scaled by ``lora_alpha / r``. Default: ``r``.
        lora_dropout: of an adapter's input, in [0, 1).
        use_rslora: scale by ``lora_alpha / sqrt(r)``.

    Raises:
        ValueError: one line, for layers that do not exist or that cannot have an adapter.
    """
    from peft import LoraConfig, inject_adapter_in_model  # an optional package

    settings: dict[str, Any] = {"r": r, "lora_alpha": r if lora_alpha is None else lora_alpha}
    settings |= {"target_modules": target_modules, "lora_dropout": lora_dropout, "use_rslora": use_rslora}
    try:
        inject_adapter_in_model(LoraConfig(**settings), model)
    except ValueError as error:
        raise ValueError(f"lora: {one_line(error)}") from error
    for name, layer in _adapted(model):
        if not isinstance(layer.base_layer, nn.Linear):
            kind = type(layer.base_layer).__name__
            raise ValueError(f"lora.target_modules: {name} is no linear layer, but of {kind}.")


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers that have an adapter."""
    return ((name, layer) for name, layer in model.named_modules() if hasattr(layer, _A.partition(".")[0]))


def scaling_of(model: nn.Module) -> float | None:
    """Return the factor of a model's adapters, the same for all; None without adapters."""
    return next((layer.scaling["default"] for _, layer in _adapted(model)), None)


def merged(weights: Mapping[str, Tensor], scaling: float | None) -> dict[str, Tensor]:
    """Return the weights of a model with its adapters merged into their layers, by the names without adapters.

    Args:
        weights: whole, by their names in the model; without adapters they stay as they are.
        scaling: factor of the adapters; None without adapters.

    Raises:
        ValueError: one line, for adapters without a factor.
    """
    found = dict(weights)
    for name in [name.removesuffix(f".{_A}.weight") for name in weights if name.endswith(f".{_A}.weight")]:
        if scaling is None:
            raise ValueError("it has adapters and does not hold their scaling")
        a, b = (found.pop(f"{name}.{part}.weight") for part in (_A, _B))
        base = found.pop(f"{name}.{_BASE}.weight")
        found[f"{name}.weight"] = base + (scaling * (b.float() @ a.float())).to(base.dtype)
        if f"{name}.{_BASE}.bias" in found:
            found[f"{name}.bias"] = found.pop(f"{name}.{_BASE}.bias")
    return found


def beside_adapters(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return weights by the names that they have in a model with adapters, whose own adapters they leave as they are.

    Args:
        weights: of a model with adapters or without.
        model: where it has no adapters, the names stay as they are.
    """
    found, own = dict(weights), model.state_dict()
    for name, _ in _adapted(model):
        for part in ("weight", "bias"):
            if f"{name}.{part}" in found:
                found[f"{name}.{_BASE}.{part}"] = found.pop(f"{name}.{part}")
        for place in (f"{name}.{_A}.weight", f"{name}.{_B}.weight"):
            found.setdefault(place, own[place])
    return found
