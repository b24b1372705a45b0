"""PRIOR: weight each caption token by how hard it is for a text-only reference (arXiv 2505.08971)."""

from typing import TYPE_CHECKING, Any

from composer_prior.algorithms.prior.weights import importance_weights

if TYPE_CHECKING:
    from composer_prior.algorithms.prior.prior import PRIOR

__all__ = ["PRIOR", "importance_weights"]


def __getattr__(name: str) -> Any:
    if name == "PRIOR":
        from composer_prior.algorithms.prior.prior import PRIOR

        return PRIOR
    raise AttributeError(f"module 'composer_prior.algorithms.prior' has no attribute '{name}'")
