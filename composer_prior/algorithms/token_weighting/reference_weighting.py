"""Methods whose weights come from a text-only reference language model."""

from typing import cast

import torch
from composer.core import Precision, State, Time, get_precision_context
from composer.utils import dist
from torch import Tensor
from transformers import PreTrainedModel

from composer_prior.algorithms.token_weighting.image_tokens import image_token_ids, text_positions
from composer_prior.algorithms.token_weighting.normalize import Normalization, check_logprobs
from composer_prior.algorithms.token_weighting.token_weighting import Streams, TokenWeighting, unwrapped
from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.data.tokenizer import bos_id
from composer_prior.models.reference import Dtype, ReferenceLM


class ReferenceWeighting(TokenWeighting):
    """Weight tokens by their log-probability under a text-only reference, ``ref_logprobs`` in the batch.

    Logged beside the rest: ``reference_nll`` (nats per token).

    Args:
        reference: a causal language model (:class:`.ReferenceLM`, a Hugging Face model, or the path of one), which
            scores each batch; or None, when the batch carries ``ref_logprobs``. Default: ``None``.
        normalization, start, end, streams: see :class:`.TokenWeighting`.
        shard_reference: keep one part of the reference's weights on each rank (FSDP2) instead of all of them; a
            pass gathers them block by block. A path is then read by the first rank alone. Default: ``False``.
        reference_dtype: of the weights of a reference given as a path, ``float32``, ``bfloat16`` or ``float16``.
            Default: that of its files, but float32 without a GPU.

    Raises:
        ValueError: as :class:`.TokenWeighting`; also for a reference with another vocabulary than the model's, a batch
            with neither ``ref_logprobs`` nor a reference to compute them, and NaN or positive log-probabilities.
    """

    def __init__(
        self,
        reference: ReferenceLM | PreTrainedModel | str | None = None,
        normalization: Normalization = "sequence",
        start: str | Time = "0dur",
        end: str | Time = "1dur",
        shard_reference: bool = False,
        reference_dtype: Dtype | None = None,
        streams: Streams | None = None,
    ):
        super().__init__(normalization, start, end, streams)
        reads = not self._shards(shard_reference) or dist.get_global_rank() == 0
        self.reference = None if reference is None else ReferenceLM.of(reference, reference_dtype, reads)
        self.shard_reference = shard_reference

    def prepare(self, state: State) -> None:
        if self.reference is None:
            return
        self.reference.check_vocabulary(unwrapped(state.model))
        if self._shards(self.shard_reference):
            self.reference.shard(cast(torch.device, state.device._device))
        image_token_ids(unwrapped(state.model))

    @staticmethod
    def _shards(asked: bool) -> bool:
        return asked and dist.get_world_size() > 1

    def begin_batch(self, state: State, mask: Tensor) -> None:
        check_logprobs(self._score(state, mask), self.weighted(state, mask))

    def ref_logprobs(self, state: State, mask: Tensor) -> Tensor:
        """Return ``ref_logprobs`` of the batch or microbatch, ``[B, T]`` float32."""
        logprobs = self._score(state, mask)
        if not logprobs.is_cuda:  # the whole batch was checked already: do not stall the device for it again
            check_logprobs(logprobs, self.weighted(state, mask))
        return logprobs

    def _score(self, state: State, mask: Tensor) -> Tensor:
        """Return ``ref_logprobs`` of the batch; the reference computes those of weighted tokens if they are missing."""
        batch = state.batch
        if "ref_logprobs" not in batch:
            if self.reference is None:
                name = type(self).__name__
                raise ValueError(
                    f"{name} found neither `ref_logprobs` in the batch nor a reference model: give "
                    f"{name}(reference=...) a causal LM trained on the captions, or load stored scores."
                )
            self.reference.to(cast(torch.device, state.device._device))
            with get_precision_context(state.precision or Precision.FP32, state.precision_config):
                is_text = text_positions(batch, unwrapped(state.model))
                # Stored scores are of texts behind bos, which a processor of transformers may not write.
                bos = bos_id(unwrapped(state.model).tokenizer) if "text_mask" in batch else None
                labels = batch["labels"].where(self.weighted(state, mask), IGNORE_INDEX)
                ref_logprobs = self.reference.logprobs(batch["input_ids"], is_text, labels, bos=bos)
            # The dict that the loader made stays as it is: a loader may yield it again.
            state.batch = {**batch, "ref_logprobs": ref_logprobs.to(batch["labels"].device)}
        return state.batch["ref_logprobs"]

    def sums(self, state: State, mask: Tensor) -> dict[str, Tensor]:
        return {"reference_nll": -state.batch["ref_logprobs"].where(mask, 0).double().sum()}
