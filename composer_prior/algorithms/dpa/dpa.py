"""DPA as a Composer algorithm."""

from typing import Any, Literal

from composer.core import Time
from torch import Tensor

from composer_prior.algorithms.cal.cal import CAL
from composer_prior.algorithms.token_weighting.token_weighting import Streams


class DPA(CAL):
    """Weight the loss of each caption token by the probability that the image adds to it (`arXiv 2509.14735`_).

    It is :class:`.CAL` with probabilities in the place of logits, kept in [0, 1]. The paper divides by the sum over the
    batch; here each caption keeps its share, so that weights do not depend on how the batch is cut.

    Logged beside the rest: ``dpa/difference``, the mean of the differences before they are clamped.

    Args:
        window: an odd number of neighbours that are averaged, the token included. Default: ``3``, the paper's.
        normalization: ``"sequence"`` or ``"none"``. Default: ``"sequence"``.
        start, end: see :class:`.TokenWeighting`.
        streams: those that stay unweighted, each with None, see :class:`.TokenWeighting`. Default: ``None``.

    Raises:
        ValueError: as :class:`.CAL`.

    .. _arXiv 2509.14735: https://arxiv.org/abs/2509.14735
    """

    name = "dpa"
    normalized = True

    def __init__(
        self,
        window: int = 3,
        normalization: Literal["sequence", "none"] = "sequence",
        start: str | Time = "0dur",
        end: str | Time = "1dur",
        streams: Streams | None = None,
    ):
        super().__init__(window=window, normalization=normalization, start=start, end=end, streams=streams)
        self.low, self.high = 0.0, 1.0

    def contrast(self, outputs: Any, without: Tensor) -> Tensor:
        return (-outputs["nll"]).exp() - without.exp()
