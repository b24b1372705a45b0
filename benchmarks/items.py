"""The measurements. Each returns rows for the JSON file, and prints its lines of the table."""

import copy
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from PIL import Image
from streaming import MDSWriter
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import flops
from benchmarks.measure import (
    PRODUCT_FLOPS,
    Stamps,
    in_process,
    interleaved,
    interleaved_steps,
    matrix_product,
    peak_bytes,
    ratio,
)
from benchmarks.setup import (
    CLIPPING,
    FIRST_WORD,
    FRONT_ENDS,
    IMAGE_TOKENS,
    VOCABULARY,
    adamw,
    build_front_end,
    build_llava,
    build_lm,
    build_nanovlm,
    build_ours,
    build_smolvlm,
    build_tokenizer,
    caption_lengths,
    hugging_face_trainer,
    our_trainer,
    training_batches,
    wrap,
)
from composer_prior.algorithms.prior import PRIOR
from composer_prior.data.batch import CaptionCollator
from composer_prior.data.captions import StreamingCaptionDataset
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.models.head import labelled_nll, weighted_mean
from composer_prior.models.language import head_of, last_hidden_states
from composer_prior.models.reference import ReferenceLM

Row = dict[str, Any]


def row(item: int, what: str, value: float, unit: str = "x", goal: str = "", **more: Any) -> Row:
    """Print one line of the table, and return it as a row."""
    print(f"| {item} | {what} | {value:.4g} {unit} | {goal} |", flush=True)
    return {"item": item, "what": what, "value": value, "unit": unit, "goal": goal, **more}


def note(text: str) -> None:
    """Print a comment below the table, such as the losses."""
    print(f"<!-- {text} -->", flush=True)


def prior_over_ntp(repetitions: int) -> list[Row]:
    """Measure items 1 and 2: next-token prediction, PRIOR with stored scores, PRIOR with a live reference."""
    batches = training_batches(8)
    without_scores = [{key: value for key, value in b.items() if key != "ref_logprobs"} for b in batches]
    ours = build_ours()
    torch.manual_seed(5)
    lm = build_lm()
    reference = PRIOR(ReferenceLM(lm, build_tokenizer()))
    stamps = {name: Stamps() for name in ("ntp", "stored", "live")}
    runs = {
        "ntp": (our_trainer(copy.deepcopy(ours), without_scores, stamps["ntp"]), stamps["ntp"]),
        "stored": (our_trainer(copy.deepcopy(ours), batches, stamps["stored"], [PRIOR()]), stamps["stored"]),
        "live": (our_trainer(ours, without_scores, stamps["live"], [reference]), stamps["live"]),
    }
    seconds = interleaved_steps(runs, repetitions, steps=4)
    note(f"NTP, PRIOR stored, PRIOR live: first losses {[round(s.losses[0], 5) for s in stamps.values()]}")
    needed = 1 + sum(flops.reference_forward(lm, b, IMAGE_TOKENS) for b in batches) / sum(
        sum(flops.training_parts(ours, b).values()) for b in batches
    )
    stored, live = ratio(seconds["stored"], seconds["ntp"]), ratio(seconds["live"], seconds["ntp"])
    return [
        row(1, "step, PRIOR with stored scores / NTP", stored, goal="<= 1.01", seconds=seconds),
        row(2, "step, PRIOR with a live reference / NTP", live, seconds=seconds),
        row(2, "the same by count of operations", needed),
        row(2, "measured / counted", live / needed, goal="<= 1.05"),
    ]


def over_hugging_face(repetitions: int) -> list[Row]:
    """Measure item 3: Composer's Trainer and our model against transformers' Trainer and LLaVA."""
    batches = training_batches(8)
    ours = build_ours()
    names = {"adamw_torch": "its default AdamW", "adamw_torch_fused": "AdamW fused"}
    stamps = {name: Stamps() for name in ("ours", *names)}
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: (hugging_face_trainer(build_llava(ours), batches, stamps[name], folder, name), stamps[name])
            for name in names
        }
        runs["ours"] = (our_trainer(ours, batches, stamps["ours"]), stamps["ours"])
        seconds = interleaved_steps(runs, repetitions)
    for name, stamp in stamps.items():
        note(f"losses of {name}: {[round(loss, 4) for loss in stamp.losses[:4]]} ... {stamp.losses[-1]:.4f}")
    return [
        row(3, f"training throughput / Hugging Face, {text}", ratio(seconds[name], seconds["ours"]), "x", ">= 2.0")
        for name, text in names.items()
    ] + [row(3, "step, ours", median(seconds["ours"]), "s", seconds=seconds)]


def memory(
    vocabularies: Sequence[int] = (2_000, 16_384, VOCABULARY, 151_936),
    of_smolvlm: Sequence[int] = (VOCABULARY, 152_064),
) -> list[Row]:
    """Measure item 4: peak memory of one step above the level before it, in separate processes."""
    rows = []
    sizes = [("", "Hugging Face", v) for v in vocabularies] + [("SmolVLM, ", "its own loss", v) for v in of_smolvlm]
    for model, other, vocabulary in sizes:
        ours, theirs = (in_process(_step_memory, name, model, vocabulary) for name in ("ours", "theirs"))
        note(f"{model}V = {vocabulary}: losses {ours[1]:.5f} and {theirs[1]:.5f}")
        goal = "<= 0.5" if vocabulary == VOCABULARY and not model else ""
        rows += [
            row(4, f"peak memory of a step, {model}V = {vocabulary}, ours", ours[0] / 2**20, "MiB"),
            row(4, f"peak memory of a step, {model}V = {vocabulary}, {other}", theirs[0] / 2**20, "MiB"),
            row(4, f"ours / {other}, {model}V = {vocabulary}", ours[0] / theirs[0], goal=goal),
        ]
    return rows


def _step_memory(name: str, family: str, vocabulary: int) -> tuple[int, float]:
    batches = training_batches(3, vocabulary=vocabulary)
    if family:
        model: Any = build_smolvlm(vocabulary)
        for batch in batches:
            batch["pixel_values"] = batch["pixel_values"][:, None]  # it may have several images
        model = wrap(model) if name == "ours" else model
    else:
        model = build_ours(vocabulary)
        model = model if name == "ours" else build_llava(model)
    step = _training_step(model)
    losses = [step(batch) for batch in batches]
    return peak_bytes(lambda: step(batches[0])), losses[0]


def _training_step(model: Any) -> Callable[[Mapping[str, Tensor]], float]:
    """Return a function that trains on a batch, ours, transformers' or nanoVLM's, and returns the loss."""
    optimizer = adamw(model)

    def loss_of(batch: Mapping[str, Tensor]) -> Tensor:
        if isinstance(model, ComposerLVLM):
            return model.loss(model(batch), batch)
        if isinstance(model, PreTrainedModel):
            return model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels", "pixel_values")}).loss
        targets = batch["labels"].roll(-1, 1)  # the first, which comes last, is of the image
        return model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"], targets)[1]

    def step(batch: Mapping[str, Tensor]) -> float:
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


NANOVLM = "nanoVLM"


def front_ends(repetitions: int, nanovlm: str | None = None) -> list[Row]:
    """Measure item 7: steps on images of 640 x 480 pixels, by tower and projector; memory is of separate processes."""
    names = [*FRONT_ENDS, *([NANOVLM] if nanovlm else [])]
    steps: dict[str, Callable[[], float]] = {}
    tokens: dict[str, int] = {}
    for name in names:
        steps[name], tokens[name] = front_end_step(name, nanovlm)
    seconds = interleaved(steps, repetitions)
    peaks = {name: in_process(_front_end_memory, name, nanovlm) for name in names}
    rows = []
    for name in names:
        base = "mlp" if name != NANOVLM else "pixel_shuffle by 2"
        rows += [
            row(7, f"{name}: image tokens", tokens[name], ""),
            row(7, f"{name}: step", median(seconds[name]), "s", seconds=seconds[name]),
            row(7, f"{name}: step / {base}", ratio(seconds[name], seconds[base])),
            row(7, f"{name}: peak memory of a step", peaks[name] / 2**20, "MiB"),
            row(7, f"{name}: peak memory / {base}", peaks[name] / peaks[base]),
        ]
    return rows


def front_end_step(name: str, nanovlm: str | None = None, samples: int = 4) -> tuple[Callable[[], float], int]:
    """Return a training step on one batch, and the positions that an image takes in the text."""
    model: Any = build_front_end("pixel_shuffle by 2" if name == NANOVLM else name)
    image = model.image_processor(Image.effect_noise((640, 480), 100))
    (batch,) = training_batches(1, samples, image=image)
    step = _training_step(build_nanovlm(str(nanovlm)) if name == NANOVLM else model)
    return lambda: step(batch), len(image.layout)


def _front_end_memory(name: str, nanovlm: str | None) -> int:
    step, _ = front_end_step(name, nanovlm)
    step()  # the optimizer makes its state
    return peak_bytes(step)


def scoring(repetitions: int) -> list[Row]:
    """Measure item 5: captions of log-normal length, mean 28, longest 154; every token but the first is scored."""
    torch.manual_seed(17)
    lm = build_lm().eval()
    lengths = caption_lengths(512, 3.13, 0.65, 154)
    texts = [[1, *torch.randint(FIRST_WORD, VOCABULARY, (n,)).tolist()] for n in lengths.tolist()]
    reference = ReferenceLM(copy.deepcopy(lm), build_tokenizer())
    results: dict[str, list[Tensor]] = {}
    seconds = interleaved(
        {
            "usual": lambda: results.update(usual=_usual_scores(lm, texts)),
            "ours": lambda: results.update(ours=reference.score_texts(texts, 1)),
            "product": matrix_product(),
        },
        repetitions,
    )
    sums = {name: float(torch.cat(values).double().sum()) for name, values in results.items()}
    largest = max(float((a - b).abs().max()) for a, b in zip(results["usual"], results["ours"], strict=True))
    note(f"sums of log-probabilities {sums}, largest difference {largest:.2g}")
    tokens = int(lengths.sum())
    operations = flops.lm_forward(lm, lengths + 1) + flops.head_forward(lm, tokens)
    note(f"{len(texts)} captions, mean {tokens / len(texts):.1f}, longest {int(lengths.max())}")
    reached = [operations / PRODUCT_FLOPS * p / s for p, s in zip(seconds["product"], seconds["ours"], strict=True)]
    return [
        row(5, "scoring, tokens/s", tokens / median(seconds["ours"]), "tokens/s", seconds=seconds),
        row(5, "scoring throughput / the usual loop", ratio(seconds["usual"], seconds["ours"]), goal=">= 3.0"),
        row(5, "scoring rate / matrix product of 2,048 cubed", 100 * median(reached), "%", ">= 60 %"),
    ]


@torch.no_grad()
def _usual_scores(lm: PreTrainedModel, texts: Sequence[Sequence[int]], batch_size: int = 16) -> list[Tensor]:
    """Score padded batches in file order: log_softmax over all logits, then gather."""
    scores: list[Tensor] = []
    for start in range(0, len(texts), batch_size):
        rows = [torch.tensor(text) for text in texts[start : start + batch_size]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        logprobs = lm(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        picked = logprobs[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        scores += [picked[i, : len(r) - 1] for i, r in enumerate(rows)]
    return scores


def utilization(repetitions: int) -> list[Row]:
    """Measure item 6: each part of a step alone, forward and backward, and its rate relative to a matrix product."""
    model = build_ours()
    lvlm: Any = model.model
    batch = training_batches(1)[0]
    optimizer = adamw(model)
    state: dict[str, Tensor] = {}

    def tower_forward() -> None:
        state["features"] = lvlm.model.get_image_features(pixel_values=batch["pixel_values"])
        state["leaf"] = state["features"].detach().requires_grad_()

    def lm_forward() -> None:
        embeddings = lvlm.causal_lm.get_input_embeddings()(batch["input_ids"])
        places = (batch["input_ids"] == lvlm.config.image_token_id)[..., None]
        state["hidden"] = last_hidden_states(
            lvlm.causal_lm, inputs_embeds=embeddings.masked_scatter(places, state["leaf"])
        )
        state["hidden leaf"] = state["hidden"].detach().requires_grad_()

    def head() -> None:
        nll, _ = labelled_nll(state["hidden leaf"], head_of(lvlm.causal_lm), batch["labels"])
        state["nll leaf"] = nll.detach().requires_grad_()
        loss()
        nll.backward(state["nll leaf"].grad)

    def loss() -> None:
        weighted_mean(state["nll leaf"], torch.ones_like(state["nll leaf"]), batch["labels"]).backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        data = _caption_data(folder, 64, model.image_processor)
        collate = CaptionCollator(0)
        seconds = interleaved(
            {
                "data (one process, on the step's own cores)": lambda: collate([data[i] for i in range(16)]),
                "tower forward": tower_forward,
                "LM forward": lm_forward,
                "head": head,
                "loss": loss,
                "LM backward": lambda: state["hidden"].backward(state["hidden leaf"].grad),
                "tower backward": lambda: state["features"].backward(state["leaf"].grad),
                "optimizer": update,
                "product": matrix_product(),
            },
            repetitions,
        )
    needed = flops.training_parts(model, batch)
    parts = {
        "tower and projector": _added(seconds["tower forward"], seconds["tower backward"]),
        "LM": _added(seconds["LM forward"], seconds["LM backward"]),
        **{name: seconds[name] for name in ("head", "loss", "optimizer")},
    }
    rows = []
    for name, times in parts.items():
        rows.append(row(6, f"{name}, time", median(times) * 1e3, "ms"))
        if name in needed:
            rows.append(
                row(6, f"{name}, rate / matrix product", _reached(needed[name], times, seconds["product"]), "%")
            )
    step = _added(*parts.values())
    rows.append(
        row(6, "whole step, rate / matrix product", _reached(sum(needed.values()), step, seconds["product"]), "%")
    )
    name = next(name for name in seconds if name.startswith("data"))
    rows.append(row(6, f"{name}, time", median(seconds[name]) * 1e3, "ms", seconds=seconds))
    rows.append(row(6, "matrix product", PRODUCT_FLOPS / median(seconds["product"]) / 1e9, "GFLOP/s"))
    return rows


def _added(*seconds: list[float]) -> list[float]:
    return [sum(turn) for turn in zip(*seconds, strict=True)]


def _reached(operations: float, seconds: list[float], product: list[float]) -> float:
    return 100 * median(operations / PRODUCT_FLOPS * p / s for s, p in zip(seconds, product, strict=True))


def _caption_data(folder: str, samples: int, image_processor: Any = None) -> StreamingCaptionDataset:
    """Write random JPEGs of 256 x 192 with captions of words outside the vocabulary, and open them."""
    pixels = torch.randint(0, 255, (12, 16, 3), dtype=torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((256, 192), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    words = caption_lengths(samples, 3.2, 0.5, 150).tolist()
    with MDSWriter(out=folder, columns={"image": "bytes", "caption": "str"}) as writer:
        for count in words:
            writer.write({"image": buffer.getvalue(), "caption": " ".join(["snail"] * count)})
    return StreamingCaptionDataset(
        tokenizer=build_tokenizer(), image_processor=image_processor, local=folder, batch_size=16
    )
