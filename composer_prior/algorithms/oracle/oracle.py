"""The oracle as a Composer algorithm."""

from composer.core import State, Time
from torch import Tensor

from composer_prior.algorithms.oracle.weights import oracle_weights
from composer_prior.algorithms.token_weighting.normalize import Normalization, check_floor
from composer_prior.algorithms.token_weighting.token_weighting import Streams, TokenWeighting


class Oracle(TokenWeighting):
    """Weight the tokens that the image determines, where the data say which these are (``image_related``).

    It needs no reference, and is what a perfect one would give: an upper bound for methods that look for these tokens.

    Args:
        floor: weight of the other tokens, in [0, 1). Default: ``0.0``.
        normalization, start, end: see :class:`.TokenWeighting`.
        streams: those that stay unweighted, each with None, see :class:`.TokenWeighting`. Default: ``None``.

    Raises:
        ValueError: as :class:`.TokenWeighting`; also for a batch without ``image_related``.
    """

    name = "oracle"

    def __init__(
        self,
        floor: float = 0.0,
        normalization: Normalization = "sequence",
        start: str | Time = "0dur",
        end: str | Time = "1dur",
        streams: Streams | None = None,
    ):
        check_floor(floor)
        super().__init__(normalization, start, end, streams)
        self.floor = floor

    def raw_weights(self, state: State, mask: Tensor) -> Tensor:
        if "image_related" not in state.batch:
            raise ValueError(
                "Oracle needs `image_related` [B, T] in the batch: data whose captions mark what the image determines "
                "(the column `image_related_spans`), as the embedded data do."
            )
        return oracle_weights(state.batch["image_related"], mask, self.floor)
