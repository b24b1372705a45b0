"""Where a step with stored scores makes the host wait for the device, counted on a pretended GPU."""

import traceback
from collections import Counter

import torch
from common.gpus import PretendedGPU
from common.models import small_lvlm
from common.programs.one_step import make_samples
from common.training import fit
from composer.core import Callback, DataSpec, Event
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from composer_prior import PRIOR
from composer_prior.data.batch import CaptionCollator, count_tokens

ATEN = torch.ops.aten
MUST = {
    "count_tokens": 1,  # Composer counts those of a microbatch where they are
    "labelled": 1,  # how many labels has the head?
    "_log": 1,
}


class Waits(TorchDispatchMode):
    """Count operations on the GPU whose result the host needs, by the function of the package that asks."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu, self.found, self.counts = gpu, Counter(), False

    def note(self, tensor):
        parts = ("/composer_prior/", "/transformers/")
        stack = [frame for frame in traceback.extract_stack() if any(part in frame.filename for part in parts)]
        ours = bool(stack) and parts[0] in stack[-1].filename  # version 5 of transformers looks at masks of attention
        if self.counts and ours and self.gpu.holds(tensor):
            self.found[stack[-1].name] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = func.overloadpacket
        indexed = kind in (ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_)
        masks = indexed and any(index is not None and index.dtype == torch.bool for index in args[1])
        if masks or kind in (ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal):
            self.note(args[0])
        with torch._C.DisableTorchFunction():  # to the pretended GPU it is no call
            return func(*args, **(kwargs or {}))


class Second(Callback):
    """Count in the second step, from its batch to its end."""

    def __init__(self, waits):
        self.waits = waits

    def run_event(self, event, state, logger):
        if event is Event.BATCH_START:
            self.waits.counts = state.timestamp.batch.value == 1
        elif event is Event.EPOCH_END:
            self.waits.counts = False


def noted(method, waits):
    def call(tensor, *args, **kwargs):
        if torch._C._len_torch_function_stack():  # within, the GPU calls this again
            waits.note(tensor)
        return method(tensor, *args, **kwargs)

    return call


def test_a_step_waits_no_oftener_than_it_must(tokenizer, monkeypatch):
    gpu = PretendedGPU()
    waits = Waits(gpu)
    for name in ("tolist", "cpu", "numpy"):  # these are no operations of torch where the tensor is on the CPU
        monkeypatch.setattr(torch.Tensor, name, noted(getattr(torch.Tensor, name), waits))
    model = small_lvlm("encoder", tokenizer)
    samples = [dict(sample) for sample in make_samples(model, tokenizer)]
    for sample in samples:
        sample["ref_logprobs"] = -torch.rand(len(sample["labels"]))
        del sample["stream"]
    loader = DataLoader(samples, batch_size=6, collate_fn=CaptionCollator(tokenizer.pad_token_id))
    spec = DataSpec(loader, get_num_tokens_in_batch=count_tokens)
    with gpu, waits:
        fit(model, spec, [PRIOR(floor=0.1)], "2ba", [Second(waits)], device=None)
    assert waits.found == MUST
