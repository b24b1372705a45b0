"""PRIOR as a Composer algorithm."""

from typing import ClassVar

from composer.core import State, Time
from torch import Tensor
from transformers import PreTrainedModel

from composer_prior.algorithms.prior.weights import check_arguments, raw_weights
from composer_prior.algorithms.token_weighting.normalize import Normalization
from composer_prior.algorithms.token_weighting.reference_weighting import ReferenceWeighting
from composer_prior.algorithms.token_weighting.token_weighting import Streams
from composer_prior.models.reference import Dtype, ReferenceLM


class PRIOR(ReferenceWeighting):
    """Weight the loss of each caption token by ``(1 - P_r)^alpha`` (`arXiv 2505.08971`_, section 3).

    ``P_r`` is the token's probability under a text-only language model trained on the same captions. The weights enter
    the batch as ``token_weights`` (``[B, T]`` float32) on ``Event.BEFORE_LOSS`` and leave it on ``Event.AFTER_LOSS``.
    The model applies them in its loss, as :class:`.ComposerLVLM` does for any image-text-to-text model of transformers.

    Logged each step: ``prior/reference_nll`` (nats per token), ``prior/effective_sample_size``
    (``(sum w)^2 / (n sum w^2)``), ``prior/top_decile_share`` (share of the weight held by the heaviest tenth of the
    rank's tokens), ``prior/loss_weighted`` and ``prior/loss_unweighted``; where data mix several streams, also of each,
    as ``prior/{stream}/loss_weighted``.

    Args:
        reference: a causal language model (:class:`.ReferenceLM`, a Hugging Face model, or the path of one), which
            scores each batch; or None, when the batch carries ``ref_logprobs``. Default: ``None``.
        alpha: exponent, >= 0. Default: ``1.0``, the paper's.
        normalization: ``"sequence"``, ``"batch"`` (the global batch) or ``"none"``. Default: ``"sequence"``.
        floor: share of next-token prediction mixed in, in [0, 1). Default: ``0.0``, the paper's.
        start: time from which tokens are weighted. Default: ``"0dur"``.
        end: time from which they are not any more. Default: ``"1dur"``. Outside the interval the loss is the
            model's own next-token prediction.
        shard_reference: keep one part of the reference's weights on each rank (FSDP2) instead of all of them; a
            pass gathers them block by block. A path is then read by the first rank alone. Default: ``False``.
        reference_dtype: of the weights of a reference given as a path, ``float32``, ``bfloat16`` or ``float16``.
            Default: that of its files, but float32 without a GPU.
        streams: ``alpha`` and ``floor`` for samples of a stream of the data, by its name, such as
            ``{"chat": {"floor": 0.5}}``; None leaves their loss next-token prediction. Default: ``None``, the same
            for all.

    Raises:
        ValueError: for an impossible argument, a stream that the data do not have, another algorithm that it cannot run
            beside, a reference with another vocabulary than the model's, a batch without ``labels`` or with neither
            ``ref_logprobs`` nor a reference to compute them, NaN or positive log-probabilities, or a model that does
            not apply the weights.

    Example:
        .. code-block:: python

            trainer = Trainer(model=model, algorithms=[PRIOR(reference="runs/reference/model")], ...)

    .. _arXiv 2505.08971: https://arxiv.org/abs/2505.08971
    """

    name = "prior"
    by_stream: ClassVar[tuple[str, ...]] = ("alpha", "floor")
    check = staticmethod(check_arguments)

    def __init__(
        self,
        reference: ReferenceLM | PreTrainedModel | str | None = None,
        alpha: float = 1.0,
        normalization: Normalization = "sequence",
        floor: float = 0.0,
        start: str | Time = "0dur",
        end: str | Time = "1dur",
        shard_reference: bool = False,
        reference_dtype: Dtype | None = None,
        streams: Streams | None = None,
    ):
        check_arguments(alpha, normalization, floor)
        super().__init__(reference, normalization, start, end, shard_reference, reference_dtype, streams)
        self.alpha = alpha
        self.floor = floor

    def raw_weights(self, state: State, mask: Tensor) -> Tensor:
        return raw_weights(self.ref_logprobs(state, mask), mask, self.alpha, self.floor)
