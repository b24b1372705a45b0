"""ReGATE as a Composer algorithm."""

from typing import Any, Literal

import torch
from composer.core import Event, State, Time
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from transformers import PreTrainedModel

from composer_prior.algorithms.regate.weights import averaged, difficulty_weights
from composer_prior.algorithms.rho1.rho1 import Rho1
from composer_prior.algorithms.token_weighting.token_weighting import Streams
from composer_prior.data.batch import sample_ids
from composer_prior.models.reference import Dtype, ReferenceLM


class ReGATE(Rho1):
    """Train on the tokens of each caption that are hardest for the model and the reference (`arXiv 2507.21420`_).

    It is :class:`.Rho1` with another score: the moving average of the model's loss on the token, over the visits of the
    caption, plus the reference's loss. All tokens are kept in the first steps of each cycle.

    Args:
        share: of a caption's tokens that are kept, in (0, 1]. Default: ``0.5``, the paper's.
        reference_weight: factor of the reference's loss, >= 0. Default: ``0.5``, the paper's.
        decay: of the moving average, in [0, 1]. Default: ``0.9``, the paper's.
        cycle: steps of a cycle, counted from the run's first. Default: ``128``, the paper's.
        dense: steps at the start of each cycle that keep all tokens. Default: ``16``, the paper's.
        normalization: ``"sequence"`` (the loss is the mean over the tokens that are kept) or ``"none"``.
            Default: ``"sequence"``.
        start: see :class:`.TokenWeighting`. Default: ``"100ba"``, the paper's warm-up.
        reference, end, shard_reference, reference_dtype: see :class:`.ReferenceWeighting`.
        streams: those that stay unweighted, each with None, see :class:`.TokenWeighting`. Default: ``None``.

    Raises:
        ValueError: as :class:`.Rho1`; also for an impossible argument, or a batch without ``sample_id``.

    .. _arXiv 2507.21420: https://arxiv.org/abs/2507.21420
    """

    name = "regate"

    def __init__(
        self,
        reference: ReferenceLM | PreTrainedModel | str | None = None,
        share: float = 0.5,
        reference_weight: float = 0.5,
        decay: float = 0.9,
        cycle: int = 128,
        dense: int = 16,
        normalization: Literal["sequence", "none"] = "sequence",
        start: str | Time = "100ba",
        end: str | Time = "1dur",
        shard_reference: bool = False,
        reference_dtype: Dtype | None = None,
        streams: Streams | None = None,
    ):
        if not (reference_weight >= 0 and 0 <= decay <= 1 and 0 <= dense <= cycle and cycle > 0):
            raise ValueError(
                f"reference_weight={reference_weight}, decay={decay}, dense={dense}, cycle={cycle}: expected "
                "reference_weight >= 0, decay in [0, 1] and 0 <= dense <= cycle; the paper uses 0.5, 0.9, 16 and 128."
            )
        super().__init__(reference, share, normalization, start, end, shard_reference, reference_dtype, streams)
        self.reference_weight, self.decay, self.cycle, self.dense = reference_weight, decay, cycle, dense
        self.difficulty: dict[int, Tensor] = {}  # [k] float32 by caption, on the CPU, of the steps before
        self._of_step: dict[int, Tensor] = {}

    def raw_weights(self, state: State, mask: Tensor) -> Tensor:
        losses, rows = self.nll(state).detach().float().cpu(), mask.cpu()
        difficulty = torch.zeros_like(losses)
        labels = state.batch["labels"].cpu()
        for row, sample in enumerate(sample_ids(state.batch, "ReGATE").tolist()):
            caption = hash((sample, *labels[row][rows[row]].tolist()))  # a sample may have several captions
            average = averaged(losses[row][rows[row]], self.difficulty.get(caption), self.decay)
            self._of_step[caption] = difficulty[row][rows[row]] = average
        if int(state.timestamp.batch) % self.cycle < self.dense:
            return mask.float()
        ref_logprobs = self.ref_logprobs(state, mask)
        return difficulty_weights(difficulty.to(mask.device), ref_logprobs, mask, self.share, self.reference_weight)

    def match(self, event: Event, state: State) -> bool:
        return super().match(event, state) or event == Event.BATCH_END

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.BATCH_END:
            for part in dist.all_gather_object(self._of_step):  # the next visit may be another rank's
                self.difficulty |= part
            self._of_step.clear()
        else:
            super().apply(event, state, logger)

    def state_dict(self) -> dict[str, Any]:
        return {"difficulty": self.difficulty}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.difficulty = dict(state["difficulty"])
