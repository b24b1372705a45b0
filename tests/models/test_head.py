"""The head and loss on labelled positions, against the dense float64 oracle."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.models import head as head_module
from composer_prior.models.head import (
    TransformedHead,
    labelled_nll,
    linear_nll,
    logits_nll,
    target_logprobs,
    weighted_mean,
)

pytestmark = pytest.mark.usefixtures("device")

WIDTH, VOCABULARY = 16, 1031


@pytest.fixture(params=["kept", "computed anew", "partly kept"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: str) -> str:
    """Several blocks of the vocabulary, of which the backward pass finds all, none or some."""
    kept = {"kept": 2**23, "computed anew": 0, "partly kept": 600 * 40}[request.param]
    monkeypatch.setitem(head_module.BLOCK_ELEMENTS, device, 256)
    monkeypatch.setitem(head_module.KEPT_ELEMENTS, device, kept)
    return request.param


def make_case(
    labelled: float, bias: bool = False, scale: float = 1.0, width: int = WIDTH
) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(17)
    hidden = torch.randn(4, 12, width) * scale
    labels = torch.randint(0, VOCABULARY, (4, 12)).masked_fill(torch.rand(4, 12) >= labelled, IGNORE_INDEX)
    return hidden, nn.Linear(width, VOCABULARY, bias=bias), labels, torch.rand(4, 12) * 3


def oracle(hidden: Tensor, head: nn.Linear, labels: Tensor) -> tuple[Tensor, Tensor]:
    """All logits, in float64."""
    logits = head(hidden.double())[:, :-1]
    nll = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=IGNORE_INDEX)
    correct = (logits.argmax(-1) == labels[:, 1:]) & (labels[:, 1:] != IGNORE_INDEX)
    return F.pad(nll.unflatten(0, logits.shape[:2]), (1, 0)), F.pad(correct, (1, 0))


def gradients(function, hidden: Tensor, head: nn.Linear, labels: Tensor, weights: Tensor) -> list[Tensor]:
    hidden = hidden.clone().requires_grad_()
    nll, _ = function(hidden, head, labels)
    weighted_mean(nll, weights.to(nll.dtype), labels).backward()
    return [hidden.grad, *(parameter.grad for parameter in head.parameters())]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("labelled", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_loss_and_gradients_are_those_of_the_dense_oracle(blocks: str, labelled: float, bias: bool, scale: float):
    hidden, head, labels, weights = make_case(labelled, bias, scale)
    double = copy.deepcopy(head).double()
    nll, correct = labelled_nll(hidden, head, labels)
    expected_nll, expected_correct = oracle(hidden, double, labels)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), expected_nll, rtol=1e-5, atol=1e-5)
    assert (correct == expected_correct).all()
    ours = gradients(labelled_nll, hidden, head, labels, weights)
    expected = gradients(oracle, hidden.double(), double, labels, weights)
    for gradient, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5 * (1 + float(wanted.abs().max())))


def test_float64_gradients_are_exact(blocks: str):
    hidden, head, labels, weights = make_case(0.5, bias=True)
    head = head.double()
    assert labelled_nll(hidden.double(), head, labels)[0].dtype == torch.float64
    ours = gradients(labelled_nll, hidden.double(), copy.deepcopy(head), labels, weights)
    expected = gradients(oracle, hidden.double(), head, labels, weights)
    for gradient, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_what_is_frozen_gets_no_gradient(blocks: str, frozen: str):
    hidden, head, labels, weights = make_case(0.5)
    both = gradients(labelled_nll, hidden, copy.deepcopy(head), labels, weights)
    if frozen == "head":
        alone = gradients(labelled_nll, hidden, head.requires_grad_(False), labels, weights)
        assert torch.equal(alone[0], both[0])
        assert head.weight.grad is None
    else:
        weighted_mean(labelled_nll(hidden, head, labels)[0], weights, labels).backward()
        torch.testing.assert_close(head.weight.grad, both[1])


def test_microbatch_without_labels_stays_in_the_graph(blocks: str):
    hidden, head, labels, weights = make_case(0.0)
    hidden_gradient, weight_gradient = gradients(labelled_nll, hidden, head, labels, weights)
    assert not hidden_gradient.any()
    assert weight_gradient.shape == head.weight.shape
    assert not weight_gradient.any()


def test_logits_of_all_tokens_are_never_held(blocks: str, monkeypatch: pytest.MonkeyPatch):
    hidden, head, labels, weights = make_case(1.0)
    widths = []
    logits = head_module._logits
    monkeypatch.setattr(head_module, "_logits", lambda *a: widths.append(logits(*a).shape[1]) or logits(*a))
    gradients(labelled_nll, hidden, head, labels, weights)
    assert max(widths) <= 256
    forward, computed_anew = 5, {"kept": 0, "partly kept": 3, "computed anew": 5}[blocks]
    assert len(widths) == forward + computed_anew


def test_logprobs_need_no_graph(blocks: str):
    hidden, head, labels, _ = make_case(1.0)
    rows, targets = hidden[:, 0], labels[:, 0]
    expected = torch.log_softmax(copy.deepcopy(head).double()(rows.double()), -1).gather(1, targets[:, None])[:, 0]
    logprobs = target_logprobs(rows, head, targets)
    assert not logprobs.requires_grad
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    assert target_logprobs(rows[:0], head, targets[:0]).shape == (0,)


@pytest.mark.parametrize("target", [-1, VOCABULARY])
def test_target_outside_of_the_vocabulary_is_refused(target: int, device: str):
    if device == "cuda":
        pytest.skip("a GPU is not asked, as the host would wait; it would use the device no more")
    hidden, head, labels, _ = make_case(1.0)
    with pytest.raises(IndexError, match=f"vocabulary of {VOCABULARY} tokens"):
        linear_nll(hidden[0], head, labels[0].fill_(target))


def test_equally_likely_tokens_count_as_argmax_does(blocks: str):
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    nn.init.zeros_(head.weight)
    _, correct = linear_nll(torch.randn(3, WIDTH), head, torch.tensor([0, 1, VOCABULARY - 1]))
    assert correct.tolist() == [True, False, False]


class Adapted(nn.Module):
    """A head that is more than a linear layer, as LoRA makes it."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.adapter = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + self.adapter(hidden)


@pytest.mark.parametrize("labelled", [0.0, 0.5])
def test_any_head_goes_by_chunks_of_tokens(labelled: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(head_module, "CHUNK_TOKENS", 5)
    hidden, base, labels, weights = make_case(labelled)
    head = Adapted(base)
    double = copy.deepcopy(head).double()
    ours = gradients(labelled_nll, hidden, head, labels, weights)
    expected = gradients(oracle, hidden.double(), double, labels, weights)
    for gradient, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)


TRANSFORMS = {"capped": {"softcap": 4.0}, "scaled": {"scale": 0.3}, "both": {"scale": 3.0, "softcap": 2.0}}


def transformed(head: nn.Module, scale: float = 1.0, softcap: float | None = None):
    """Losses and gradients from all logits, in the words of transformers' models."""

    def function(hidden: Tensor, _: nn.Module, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden) * scale
        if softcap is not None:
            logits = logits / softcap
            logits = torch.tanh(logits)
            logits = logits * softcap
        return oracle(hidden, lambda _: logits, labels)

    return function


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_scaled_and_capped_logits(blocks: str, transform: str, bias: bool, adapted: bool):
    hidden, head, labels, weights = make_case(0.5, bias, scale=10.0)
    module = (Adapted(head) if adapted else head).double()
    hidden, weights = hidden.double(), weights.double()
    assert float(module(hidden).abs().max()) > 10

    def ours(hidden: Tensor, module: nn.Module, labels: Tensor) -> tuple[Tensor, Tensor]:
        return labelled_nll(hidden, TransformedHead(module, **TRANSFORMS[transform]), labels)

    theirs = transformed(module, **TRANSFORMS[transform])
    for value, wanted in zip(ours(hidden, module, labels), theirs(hidden, module, labels), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    results = []
    for function in (ours, theirs):
        module.zero_grad()
        results.append(gradients(function, hidden, module, labels, weights))
        module.zero_grad()
    for gradient, wanted in zip(*results, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-13)


def test_a_cap_in_float32_is_float64s(blocks: str):
    hidden, head, labels, weights = make_case(0.5, scale=30.0)
    double = copy.deepcopy(head).double()
    ours = gradients(lambda h, m, t: labelled_nll(h, TransformedHead(m, 1.0, 30.0), t), hidden, head, labels, weights)
    expected = gradients(transformed(double, softcap=30.0), hidden.double(), double, labels, weights)
    for gradient, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5 * (1 + float(wanted.abs().max())))


def test_logprobs_under_a_cap():
    hidden, head, labels, _ = make_case(1.0, scale=30.0)
    head = TransformedHead(head, softcap=5.0)
    expected = head(hidden[:, 0]).log_softmax(-1).gather(1, labels[:, :1])[:, 0]
    torch.testing.assert_close(target_logprobs(hidden[:, 0], head, labels[:, 0]), expected)


def test_library_kernel_gets_the_scale_and_the_cap(monkeypatch: pytest.MonkeyPatch):
    def kernel(e: Tensor, c: Tensor, targets: Tensor, softcap: float | None = None, reduction: str = "mean") -> Tensor:
        logits = e @ c.T if softcap is None else softcap * torch.tanh(e @ c.T / softcap)
        return F.cross_entropy(logits, targets, reduction=reduction)

    hidden, head, labels, _ = make_case(0.5, scale=10.0)
    given = TransformedHead(head, 0.5, 3.0)
    expected = labelled_nll(hidden, given, labels)
    monkeypatch.setattr(head_module, "_kernel_takes", lambda _: True)
    monkeypatch.setattr(head_module, "linear_cross_entropy", kernel)
    assert head_module._implementation(hidden, given) is head_module._cut_cross_entropy
    for value, wanted in zip(labelled_nll(hidden, given, labels), expected, strict=True):
        torch.testing.assert_close(value, wanted)


def test_hooks_of_the_head_run():
    hidden, head, labels, _ = make_case(0.5)
    plain = labelled_nll(hidden, head, labels)[0]
    calls = []
    head.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(labelled_nll(hidden, head, labels)[0], plain)
    assert calls


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32(device: str):
    """On a GPU by cut-cross-entropy where that is installed."""
    hidden, head, labels, weights = make_case(0.5, width=64)
    exact = gradients(labelled_nll, hidden, copy.deepcopy(head), labels, weights)
    with torch.autocast(device, torch.bfloat16):
        nll = labelled_nll(hidden, head, labels)[0]
        ours = gradients(labelled_nll, hidden, head, labels, weights)
    assert nll.dtype == torch.float32
    for gradient, wanted in zip(ours, exact, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - wanted).norm() < 0.02 * wanted.norm()


def test_library_kernel_is_chosen_where_it_gives_exact_losses_per_token(monkeypatch: pytest.MonkeyPatch):
    head, with_bias = nn.Linear(4, 8, bias=False), nn.Linear(4, 8)
    on_gpu = SimpleNamespace(
        is_cuda=True, dtype=torch.bfloat16, device=SimpleNamespace(type="cuda"), __len__=lambda self: 3
    )
    monkeypatch.setattr(head_module, "_kernel_takes", lambda hidden: hidden is on_gpu)
    monkeypatch.setattr(head_module, "linear_cross_entropy", None)
    assert head_module._implementation(on_gpu, head) is head_module._linear_head
    monkeypatch.setattr(head_module, "linear_cross_entropy", lambda *_, **__: None)
    assert head_module._implementation(on_gpu, head) is head_module._cut_cross_entropy
    assert head_module._implementation(on_gpu, with_bias) is head_module._linear_head
    assert head_module._implementation(on_gpu, Adapted(with_bias)) is head_module._any_head
    assert head_module._implementation(torch.randn(2, 4), head) is head_module._linear_head


def test_kernel_takes_half_precision_on_cuda_alone():
    assert not head_module._kernel_takes(torch.randn(2, 4, dtype=torch.bfloat16, device="cpu"))


def test_logits_nll_refuses_what_is_not_aligned():
    with pytest.raises(ValueError, match="not aligned"):
        logits_nll(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))


def test_logits_nll_is_labelled_nll_on_full_logits():
    hidden, head, labels, _ = make_case(0.5)
    torch.testing.assert_close(logits_nll(head(hidden), labels), labelled_nll(hidden, head, labels)[0])


@pytest.mark.parametrize("vocabulary", [97, 32000, 49152, 128256, 151936])
@pytest.mark.parametrize("tokens", [0, 1, 600, 8192, 10**6])
@pytest.mark.parametrize(("device", "multiple"), [("cpu", 1), ("cuda", 128)])
def test_blocks_hold_every_token_once_and_are_whole_tiles_on_a_gpu(vocabulary, tokens, device, multiple):
    blocks = head_module._blocks(tokens, vocabulary, torch.device(device))
    assert [token for block in blocks for token in range(vocabulary)[block]] == list(range(vocabulary))
    sizes = [block.stop - block.start for block in blocks]
    assert all(size % multiple == 0 for size in sizes[:-1])
    assert max(sizes) * tokens <= max(head_module.BLOCK_ELEMENTS[device] * 1.5, 512 * tokens)
