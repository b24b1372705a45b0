"""The text-only reference language model, whose probabilities weight the tokens."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.data.hub import load_pretrained
from composer_prior.models.head import target_logprobs
from composer_prior.models.language import check_head, head_of, last_hidden_states, transformer_blocks, vocabulary_size

Dtype = Literal["float32", "bfloat16", "float16"]


class ReferenceLM:
    """A frozen causal LM that scores captions without their images.

    It is no ``nn.Module``, so it never becomes part of the trained model, its checkpoint or its optimizer.

    Args:
        model: a Hugging Face causal LM; put in eval mode, its gradients switched off.
        tokenizer: its tokenizer, against which that of the trained model is checked.
        batch_size: captions per forward pass. Default: ``64``.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, batch_size: int = 64):
        check_head(model)
        self.model = model.eval().requires_grad_(False)
        self._scorer = _Scorer(model)
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    @classmethod
    def of(
        cls, model: "ReferenceLM | nn.Module | str", dtype: Dtype | None = None, weights: bool = True
    ) -> "ReferenceLM":
        """One of these as it is, one around a Hugging Face model, or one of a path, see :meth:`from_pretrained`."""
        if isinstance(model, str):
            return cls.from_pretrained(model, dtype=dtype, weights=weights)
        return model if isinstance(model, cls) else cls(cast(PreTrainedModel, model))  # with PEFT it is none

    @classmethod
    def from_pretrained(
        cls, path: str, trust_remote_code: bool = False, dtype: Dtype | None = None, weights: bool = True
    ) -> "ReferenceLM":
        """Load model and tokenizer from a folder or hub id in Hugging Face format.

        Args:
            path: of the folder, or hub id.
            trust_remote_code: run code that comes with the model.
            dtype: of the weights, such as ``bfloat16``. Default: that of its files, but float32 without a GPU.
            weights: leave them out, on the meta device, for :meth:`shard` to bring them from the first rank.
        """
        config = load_pretrained(AutoConfig, path, trust_remote_code)
        if dtype is None and not torch.cuda.is_available():
            dtype = "float32"  # bf16 products can be 100 times slower there
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "dtype": dtype or config.dtype or "float32"}
        if weights:
            model = load_pretrained(AutoModelForCausalLM, path, **options)
        else:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, **options)
        return cls(model, load_pretrained(AutoTokenizer, path, trust_remote_code))

    def to(self, device: torch.device | str) -> "ReferenceLM":
        """Move the model's weights; does nothing when they are there already."""
        if self.model.device != torch.device(device):
            self.model.to(device)
        return self

    def shard(self, device: torch.device | str) -> "ReferenceLM":
        """Keep one part of the weights of the first rank on each (FSDP2); a pass gathers them block by block.

        All ranks must then score their captions together. They compute on the device.
        """
        from composer_prior.models.sharding import shard_from_first_rank  # here: models work without Composer

        if not isinstance(self._scorer, FSDPModule):
            shard_from_first_rank(self._scorer, transformer_blocks(self.model), torch.device(device))
        return self

    @torch.no_grad()
    def logprobs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        drop_token_ids: Sequence[int] = (),
        bos: int | None = None,
    ) -> Tensor:
        """``log P_r(labels[t] | text before t)``, ``[B, T]`` float32, 0 where there is no label.

        Args:
            input_ids: ``[B, T]`` int64, with or without image tokens.
            attention_mask: ``[B, T]``, 1 on real positions.
            labels: ``[B, T]`` int64, not shifted.
            drop_token_ids: ids that stand for the image: their positions are taken out and the text moves together.
            bos: id that each row's text begins with, put before one that does not. Default: rows stay as they are.
        """
        device = self.model.device
        input_ids, attention_mask, labels = (x.to(device) for x in (input_ids, attention_mask, labels))
        keep = attention_mask.bool() & ~torch.isin(input_ids, torch.tensor(list(drop_token_ids), device=device).long())
        scored = (labels != IGNORE_INDEX).any(1, keepdim=True)
        keep &= scored | (keep.cumsum(1) == 1)  # of a row without labels the first token alone
        if bos is not None:
            first = input_ids.gather(1, keep.byte().argmax(1, keepdim=True))
            keep = torch.cat([first != bos, keep], 1)
            input_ids, labels = F.pad(input_ids, (1, 0), value=bos), F.pad(labels, (1, 0), value=IGNORE_INDEX)
        ids, targets, positions, lengths = left_pack(input_ids, keep, labels)  # [B, S]
        packed = torch.zeros(ids.shape, dtype=torch.float32, device=device)
        passes = lengths.argsort().split(self.batch_size)
        if isinstance(self._scorer, FSDPModule):
            most = torch.tensor(len(passes), device=device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            passes = (*[passes[0][:1]] * (int(most) - len(passes)), *passes)  # of the shortest, which comes again
        for rows in passes:
            longest = int(lengths[rows].max())
            packed[rows, :longest] = self._score(ids[rows, :longest], targets[rows, :longest])
        if isinstance(self._scorer, FSDPModule):
            self._scorer.reshard()  # embeddings and head, which a root keeps after its forward pass
        scores = torch.zeros(labels.shape, dtype=torch.float32, device=device).scatter(1, positions, packed)
        return scores if bos is None else scores[:, 1:]

    def _score(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities ``[b, s]`` of the targets in right-padded text; padding needs no mask, being after it."""
        has_target = targets != IGNORE_INDEX
        if has_target[:, 0].any():  # nothing stands before the first token: let the sequence start with bos
            ids, targets = F.pad(ids, (1, 0), value=self._bos_id()), F.pad(targets, (1, 0), value=IGNORE_INDEX)
            return self._score(ids, targets)[:, 1:]
        logprobs = self._scorer(ids, has_target.flatten().nonzero()[:, 0] - 1, targets[has_target])
        return torch.zeros(ids.shape, dtype=torch.float32, device=ids.device).masked_scatter(has_target, logprobs)

    @torch.no_grad()
    def score_texts(self, texts: Sequence[Sequence[int]], start: int, batch_tokens: int | None = None) -> list[Tensor]:
        """``log P_r(text[t] | text[:t])`` for ``t`` from ``start`` on: float32 on the CPU, one tensor for each text.

        Texts of like length share a forward pass, so that there is next to no padding; give many at once.

        Args:
            texts: ids of each text, at least ``start`` of them.
            start: the first token to score, at least 1; a beginning-of-sequence token or a prompt comes before.
            batch_tokens: tokens of one forward pass, padding included, unless one text alone has more. Default: few
                enough to stay in the cache of a CPU (2,048), or many enough to fill another device (32,768).

        Raises:
            ValueError: if a text has more tokens than the model has positions.
        """
        batch_tokens = batch_tokens or (2048 if self.model.device.type == "cpu" else 32768)
        lengths = torch.tensor([len(text) for text in texts], dtype=torch.long)
        longest = max(map(len, texts), default=0)
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise ValueError(
                f"The reference has {positions} positions and a text takes {longest}; lower max_caption_tokens, or "
                "max_tokens of conversations."
            )
        batches = batches_by_length(lengths, batch_tokens)
        scores = [self._score_rows([texts[i] for i in rows.tolist()], lengths[rows], start) for rows in batches]
        if not scores:
            return []
        order = torch.cat(batches)
        pieces = torch.cat(scores).float().cpu().split((lengths[order] - start).tolist())
        return [pieces[place] for place in order.argsort().tolist()]

    def _score_rows(self, texts: Sequence[Sequence[int]], lengths: Tensor, start: int) -> Tensor:
        """Log-probabilities ``[n]`` of the tokens of a few texts from ``start`` on, one text after the other."""
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)  # [b, s]
        place = torch.arange(ids.shape[1])
        scored = ((place >= start) & (place < lengths[:, None])).flatten().nonzero()[:, 0]
        device = self.model.device
        return self._scorer(ids.to(device), (scored - 1).to(device), ids.flatten()[scored].to(device))

    def reads(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Return True if the ids of a tokenizer's text mean the same to the reference.

        The tokenizer may have further special tokens, such as those of images, which no caption contains.
        """
        return self.tokenizer is None or same_ids(self.tokenizer, tokenizer)

    def _bos_id(self) -> int:
        for token_id in (self.model.config.bos_token_id, self.model.config.eos_token_id):
            if isinstance(token_id, int):
                return token_id
        raise ValueError("A caption starts without a token before it, and the reference has no bos or eos token.")

    def check_vocabulary(self, model: Any) -> None:
        """Refuse a trained model whose token ids do not mean the same to the reference.

        The model's tokenizer may have more tokens (for images); those of the reference must stand at the same ids.
        Without two tokenizers to compare, the embedding matrices must have the same number of rows.

        Raises:
            ValueError: naming what differs.
        """
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is not None and self.tokenizer is not None:
            ids = tokenizer.get_vocab()
            differing = [token for token, i in self.tokenizer.get_vocab().items() if ids.get(token) != i]
            if differing:
                raise ValueError(
                    f"The reference has another vocabulary than the model: {len(differing)} of its tokens, such as "
                    f"{differing[0]!r}, are missing or have another id. Train both with one tokenizer."
                )
            return
        ours, theirs = vocabulary_size(self.model), vocabulary_size(getattr(model, "model", model))
        if ours != theirs:
            raise ValueError(
                f"The reference has another vocabulary than the model: {ours} and {theirs} tokens. Give both a "
                "tokenizer if one only has extra image tokens."
            )


def same_ids(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> bool:
    """Return True if the ids of a text mean the same to both tokenizers; the second may have further special tokens."""
    known, vocabulary = ours.get_vocab(), theirs.get_vocab()
    further = {*theirs.all_special_tokens} - {theirs.bos_token, theirs.eos_token}
    return all(vocabulary.get(token) == i for token, i in known.items()) and vocabulary.keys() - known.keys() <= further


class _Scorer(nn.Module):
    """A language model's decoder and head in one forward pass, around which FSDP2 gathers the weights of both."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, places: Tensor, targets: Tensor) -> Tensor:
        """Return log-probabilities ``[n]`` float32 of targets ``[n]`` behind the tokens at ``places [n]`` of flat ids.

        The ids ``[b, s]`` are padded at the end, which needs no mask.
        """
        hidden = last_hidden_states(self.model, input_ids=ids).flatten(0, 1)  # [b * s, D]
        return target_logprobs(hidden[places], head_of(self.model), targets)


def left_pack(input_ids: Tensor, keep: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Move the kept tokens of each row to its start, in order; all arguments are ``[B, T]``.

    Returns:
        the tokens and their labels ``[B, S]`` (``S``: the most kept in one row), the positions they come from
        ``[B, S]``, and how many of each row are kept ``[B]``; behind those stand 0 and no label.
    """
    lengths = keep.sum(1)
    positions = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(lengths.max())]
    padding = torch.arange(positions.shape[1], device=keep.device) >= lengths[:, None]
    # What was dropped may not even be in the vocabulary.
    ids = input_ids.gather(1, positions).masked_fill(padding, 0)
    return ids, labels.gather(1, positions).masked_fill(padding, IGNORE_INDEX), positions, lengths


def batches_by_length(lengths: Tensor, batch_tokens: int) -> list[Tensor]:
    """Return rows of like length together, the longest first, in batches of at most ``batch_tokens`` with padding.

    The lengths are ``[n]`` int64. Each row is in one batch, ``[b]`` int64; one that has more tokens stands alone.
    """
    order = lengths.argsort(descending=True, stable=True)
    batches = []
    while len(order):
        count = max(1, batch_tokens // max(1, int(lengths[order[0]])))
        batches.append(order[:count])
        order = order[count:]
    return batches
