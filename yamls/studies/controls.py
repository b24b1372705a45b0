"""Controls of studies, which a recipe loads with ``code_paths``: distillation, and ImageGain with other viewers."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from composer_prior.algorithms.image_gain.image_gain import ImageGain
from composer_prior.algorithms.permuted_prior.weights import permuted
from composer_prior.algorithms.token_weighting.noise import noise_of
from composer_prior.algorithms.token_weighting.token_weighting import unwrapped
from composer_prior.data.batch import loss_mask
from composer_prior.models.image_text_model import ImageTextModel
from composer_prior.models.language import causal_lm_of, decoder_of, head_of
from composer_prior.models.viewer import Viewer
from composer_prior.registry import register


@register("algorithm", "distillation")
class Distillation(Algorithm):
    """Learn from a viewer's probabilities of its most likely tokens beside the captions.

    Args:
        viewer: the folder of a model that reads the same batches.
        share: weight of the divergence from the viewer; the loss of the captions has the rest. Default: ``0.5``.
        top: number of the viewer's most likely tokens; all others count as one. Default: ``32``.
    """

    ours: Tensor  # the last hidden states of a forward pass
    theirs: Tensor

    def __init__(self, viewer: str | None = None, share: float = 0.5, top: int = 32):
        self.share, self.top = share, top
        if viewer is not None:  # checks of a recipe give none
            self.viewer = Viewer.of(viewer)

    def match(self, event: Event, state: State) -> bool:
        """Return True at the events that this algorithm needs."""
        return event in (Event.FIT_START, Event.BEFORE_FORWARD, Event.AFTER_LOSS)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Keep the hidden states of both models, and change the loss."""
        if event == Event.FIT_START:
            self.viewer.to(cast(torch.device, state.device._device)).check_inputs(unwrapped(state.model))
            for name, model in (("ours", unwrapped(state.model).model), ("theirs", self.viewer.model.model)):
                decoder = decoder_of(causal_lm_of(model))
                decoder.register_forward_hook(lambda *call, name=name: setattr(self, name, call[-1].last_hidden_state))
        elif event == Event.BEFORE_FORWARD:
            with torch.no_grad():
                self.viewer.model(state.batch)
        else:
            mask = loss_mask(state.batch, "Distillation")[:, 1:]
            ours, theirs = (
                head_of(model)(hidden[:, :-1][mask]).float().log_softmax(-1)
                for model, hidden in (
                    (unwrapped(state.model).model, self.ours),
                    (self.viewer.model.model, self.theirs),
                )
            )
            divergence = kl_of_top(ours, theirs.detach(), self.top).mean()
            state.loss = (1 - self.share) * cast(Tensor, state.loss) + self.share * divergence


def kl_of_top(ours: Tensor, theirs: Tensor, top: int) -> Tensor:
    """Return the divergence of our distribution from theirs, ``[n]``, over their ``top`` tokens and the rest as one.

    Args:
        ours: ``[n, V]`` log-probabilities.
        theirs: ``[n, V]`` log-probabilities.
        top: number of tokens.
    """
    values, ids = theirs.topk(top)
    pairs = []
    for known in (values, ours.gather(1, ids)):
        rest = (1 - known.exp().sum(1, keepdim=True)).clamp(min=1e-6).log()
        pairs.append(torch.cat([known, rest], 1))
    return (pairs[0].exp() * (pairs[0] - pairs[1])).sum(1)


@register("algorithm", "permuted_gain")
class PermutedGain(ImageGain):
    """Give each caption ImageGain's weights in a random order, new in each step: is it the tokens, or only the spread?

    Args:
        seed: of the order. Default: ``0``.
        **gain: see :class:`.ImageGain`.
    """

    name = "permuted_gain"

    def __init__(self, seed: int = 0, **gain: Any):
        super().__init__(**gain)
        self.seed = seed

    def raw_weights(self, state: State, mask: Tensor) -> Tensor:
        """Return the permuted weights, ``[B, T]`` float32."""
        weights = super().raw_weights(state, mask)
        return permuted(weights, mask, noise_of(state, mask, self.seed, "PermutedGain"))


class LiveGain(ImageGain):
    """ImageGain with a viewer that scores each batch."""

    def begin_batch(self, state: State, mask: Tensor) -> None:
        """Score the batch."""
        state.batch = {key: value for key, value in state.batch.items() if key != "viewer_logprobs"}
        super().begin_batch(state, mask)


class OtherImageViewer(Viewer):
    """A viewer that looks at the image of the sample before, in a rank's batch."""

    def logprobs(self, batch: Mapping[str, Any]) -> Tensor:
        """Return ``log P_v(labels[t] | another image, text before t)``, ``[B, T]`` float32.

        Args:
            batch: of the trained model, with images of one size.

        Raises:
            ValueError: if the images differ in their number of patches or tiles.
        """
        if any((batch[key] != batch[key][:1]).any() for key in ("patch_mask", "image_grid") if key in batch):
            raise ValueError("OtherImageGain exchanges images of one size: give data whose images have the same size.")
        images = {key: value.roll(1, 0) for key, value in batch.items() if key in ("pixel_values", "pixel_patches")}
        return super().logprobs({**batch, **images})


@register("algorithm", "other_image_gain")
class OtherImageGain(LiveGain):
    """ImageGain by a viewer that looks at another sample's image: are the weights those of what the image shows?

    Args:
        viewer: the folder of a model that reads the same batches.
        **gain: see :class:`.ImageGain`.
    """

    name = "other_image_gain"

    def __init__(self, viewer: str | ImageTextModel | None = None, **gain: Any):
        super().__init__(None if viewer is None else OtherImageViewer.of(viewer), **gain)


@register("algorithm", "own_average_gain")
class OwnAverageGain(LiveGain):
    """ImageGain whose viewer is an exponential moving average of the trained model's own weights.

    Args:
        decay: of the average in each step, in [0, 1]; with 0 the viewer is the model itself. Default: ``0.99``.
        **gain: see :class:`.ImageGain`; without ``viewer``.
    """

    name = "own_average_gain"

    def __init__(self, decay: float = 0.99, **gain: Any):
        super().__init__(**gain)
        self.decay = decay
        self.average: AveragedModel | None = None
        self.loaded: dict[str, Any] | None = None

    def prepare(self, state: State) -> None:
        """Copy the model, or take the average of a checkpoint."""
        super().prepare(state)
        model = unwrapped(state.model)
        self.average = AveragedModel(model.model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        if self.loaded is not None:
            self.average.load_state_dict(self.loaded)
        self.viewer = Viewer(ImageTextModel(self.average.module, model.processor))

    def begin_batch(self, state: State, mask: Tensor) -> None:
        """Average the weights of the steps so far, and score the batch."""
        cast(AveragedModel, self.average).update_parameters(unwrapped(state.model).model)
        super().begin_batch(state, mask)

    def state_dict(self) -> dict[str, Any]:
        """Return the average."""
        return {} if self.average is None else {"average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the average of a checkpoint until training starts."""
        self.loaded = state.get("average")
