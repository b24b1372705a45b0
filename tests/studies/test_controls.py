"""The controls of studies: what their weights have in common with ImageGain's, and what not."""

import runpy
from typing import Any

import pytest
import torch
from common.models import FAMILIES, small_lvlm
from common.recipes import ROOT
from common.training import fit
from composer.core import Callback

from composer_prior.algorithms.image_gain.image_gain import ImageGain
from composer_prior.algorithms.image_gain.weights import gain_weights
from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.models.viewer import Viewer

CONTROLS = runpy.run_path(str(ROOT / "yamls/studies/controls.py"))


class Recorded(Callback):
    """Keep what each step has: the batch with its weights, the model's likelihoods and parameters."""

    def __init__(self) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []
        self.nll: list[torch.Tensor] = []
        self.parameters: list[list[torch.Tensor]] = []

    def before_loss(self, state: Any, logger: Any) -> None:
        self.batches.append(dict(state.batch))
        self.nll.append(state.outputs["nll"].detach())
        self.parameters.append([p.detach().clone() for p in state.model.model.parameters()])


def recorded(model: Any, spec: Any, algorithm: Any, duration: str = "1ba") -> Recorded:
    steps = Recorded()
    fit(model, spec, [algorithm], duration=duration, callbacks=[steps], lr=0.5)
    return steps


def rows(values: torch.Tensor, mask: torch.Tensor) -> list[list[float]]:
    return [row[keep].tolist() for row, keep in zip(values, mask, strict=True)]


def test_permuted_weights_are_those_of_the_caption(tokenizer, make_spec, reference):
    viewer = small_lvlm("patches", tokenizer, 5).image_text_model
    found = []
    for algorithm in (ImageGain, CONTROLS["PermutedGain"]):
        model = small_lvlm("patches", tokenizer)
        found.append(recorded(model, make_spec(model), algorithm(viewer=viewer, reference=reference)).batches[0])
    mask = found[0]["labels"] != IGNORE_INDEX
    plain, moved = (rows(batch["token_weights"], mask) for batch in found)
    for here, there in zip(plain, moved, strict=True):
        assert sorted(here) == pytest.approx(sorted(there), rel=1e-6)
        assert here != pytest.approx(there, rel=1e-2)
    assert not found[1]["token_weights"][~mask].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_viewer_of_another_image(family, tokenizer, make_batch):
    model = small_lvlm(family, tokenizer, 5)
    viewer, other = Viewer(model.image_text_model), CONTROLS["OtherImageViewer"].of(model.image_text_model)
    batch = make_batch(model)
    images = "pixel_values" if family == "encoder" else "pixel_patches"
    found = other.logprobs(batch)
    for row in range(8):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        right, wrong = viewer.logprobs(alone), viewer.logprobs({**alone, images: batch[images][[row - 1]]})
        torch.testing.assert_close(found[row], wrong[0])
        assert not torch.allclose(found[row], right[0], atol=1e-3)
        torch.testing.assert_close(other.logprobs(alone), right)  # there is no other
    own = batch[images].clone()
    own[3] += 1.0
    changed = (other.logprobs({**batch, images: own}) - found).abs().amax(1) > 1e-3
    assert changed.tolist() == [row == 4 for row in range(8)]


def test_images_of_different_sizes_are_not_exchanged(tokenizer, make_batch):
    model = small_lvlm("patches", tokenizer)
    batch = make_batch(model)
    batch["patch_mask"][0, -1] = False
    with pytest.raises(ValueError, match=r"^OtherImageGain exchanges images of one size"):
        CONTROLS["OtherImageViewer"].of(model.image_text_model).logprobs(batch)


def test_gain_by_another_image_ignores_stored_scores_of_the_right_one(tokenizer, make_spec, reference):
    model, viewer = small_lvlm("patches", tokenizer), small_lvlm("patches", tokenizer, 5).image_text_model
    spec = make_spec(model)
    collate = spec.dataloader.collate_fn
    spec.dataloader.collate_fn = lambda samples: (
        (batch := collate(samples)) | {"viewer_logprobs": torch.zeros(batch["labels"].shape)}
    )
    steps = recorded(model, spec, CONTROLS["OtherImageGain"](viewer, reference=reference, floor=0.2))
    batch = steps.batches[0]
    mask = batch["labels"] != IGNORE_INDEX
    theirs = CONTROLS["OtherImageViewer"].of(viewer).logprobs(batch)
    expected = gain_weights(theirs, batch["ref_logprobs"], mask, floor=0.2)
    torch.testing.assert_close(batch["token_weights"], expected)


def test_an_average_without_memory_is_the_model_itself(tokenizer, make_spec, reference):
    model = small_lvlm("encoder", tokenizer)
    steps = recorded(model, make_spec(model), CONTROLS["OwnAverageGain"](0.0, reference=reference), "3ba")
    for batch, nll in zip(steps.batches, steps.nll, strict=True):
        torch.testing.assert_close(batch["viewer_logprobs"], -nll, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(steps.parameters[0][-1], steps.parameters[2][-1], atol=1e-4)


def test_the_average_is_that_of_the_weights_so_far(tokenizer, make_spec, reference):
    model = small_lvlm("patches", tokenizer)
    algorithm = CONTROLS["OwnAverageGain"](0.75, reference=reference)
    steps = recorded(model, make_spec(model), algorithm, "3ba")
    expected = steps.parameters[0]
    for now in steps.parameters[1:]:
        expected = [0.75 * average + 0.25 * one for average, one in zip(expected, now, strict=True)]
    torch.testing.assert_close([*algorithm.average.module.parameters()], expected)
    seen = Viewer(algorithm.viewer.model.image_text_model).logprobs(steps.batches[-1])
    torch.testing.assert_close(steps.batches[-1]["viewer_logprobs"], seen)
    continued = CONTROLS["OwnAverageGain"](1.0, reference=reference)  # never changes the average that it starts from
    continued.load_state_dict(algorithm.state_dict())
    recorded(small_lvlm("patches", tokenizer), make_spec(model), continued, "2ba")
    torch.testing.assert_close([*continued.average.module.parameters()], expected)
