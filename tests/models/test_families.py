"""Families of transformers trained through their own processors: losses against each family's own forward pass."""

import inspect
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from common.families import FAMILIES, save_family
from common.models import small_lm
from common.recipes import ROOT
from composer import Callback, DataSpec, Trainer
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, TrainingArguments
from transformers import Trainer as HFTrainer

from composer_prior import PRIOR, PRIORMixin, ReferenceLM
from composer_prior.algorithms.token_weighting.image_tokens import text_positions
from composer_prior.data.batch import IGNORE_INDEX, CaptionCollator, count_tokens, split_packed_images
from composer_prior.data.captions import BadSampleError, StreamingCaptionDataset
from composer_prior.data.processing import image_placeholder
from composer_prior.data.tokenizer import bos_id, build_tokenizer, encode_caption, tokenizer_fingerprint
from composer_prior.emoji_scenes.writing import make_emoji_scenes
from composer_prior.models.hugging_face import (
    build_hugging_face,
    check_image_tokens,
    hugging_face_skeleton,
    unused_weights,
)
from composer_prior.models.image_text_model import ImageTextModel, model_inputs
from composer_prior.models.language import new_configuration
from composer_prior.models.llava import export_llava
from composer_prior.models.llava_check import LlavaError
from composer_prior.models.viewer import check_processors
from composer_prior.training.optimizer import build_optimizer

CAPTIONS = [f"two red hammers on grey paper, photo {number} by Ana Lindqvist" for number in range(20)]
SIZES = ((48, 48), (60, 20), (24, 40), (30, 90))
PROMPT = "a photo of"


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families") / "out"
    make_emoji_scenes(folder, train_samples=16, validation_samples=8, canvas=48, num_workers=0, progress=False)
    return folder


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """Return a function from a family to its folder, which is made once."""
    folder = tmp_path_factory.mktemp("hub")

    def made(kind):
        if not (folder / kind).exists():
            save_family(kind, folder / kind, CAPTIONS)
        return str(folder / kind)

    return made


def built(path, **options):
    tokenizer = build_tokenizer({"name": path, "image_tokens": False})
    return build_hugging_face(tokenizer, path, **options).eval()


def shaped(image: Image.Image) -> Image.Image:
    """Give images several sizes, so that they have unlike numbers of tokens and tiles."""
    return image.resize(SIZES[sum(image.getpixel((24, 24))) % len(SIZES)])


def samples_of(model, scenes, prompt, **options):
    data = StreamingCaptionDataset(
        tokenizer=model.tokenizer, image_processor=model.image_processor, transform=shaped, local=f"{scenes}/train",
        prompt=prompt, batch_size=1, max_caption_tokens=24, **options,
    )  # fmt: skip
    return data, [data[i] for i in range(6)]


def collated(model, samples):
    return CaptionCollator(model.tokenizer.pad_token_id)(samples)


def alone(kind, path, data, index, prompt):
    """Mean loss and number of a caption's tokens by the family's own processor and forward pass, one at a time."""
    model, processor = AutoModelForImageTextToText.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
    image, caption = data.image_and_caption(index)
    text = image_placeholder(processor) + prompt
    inputs = processor(images=[[shaped(image.copy())]], text=[text], return_tensors="pt")
    ids = [*processor.tokenizer(caption, add_special_tokens=False)["input_ids"], processor.tokenizer.eos_token_id][:24]
    start = inputs["input_ids"].shape[1]
    inputs.pop("labels", None)  # PaliGemma's in transformers 5
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if kind == "paligemma":  # as its processor writes a suffix
        inputs["token_type_ids"] = (torch.arange(start + len(ids)) >= start).long()[None]
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs and inputs[key].shape[1] == start:
            inputs[key] = F.pad(inputs[key], (0, len(ids)))
    labels = torch.where(torch.arange(start + len(ids)) < start, IGNORE_INDEX, inputs["input_ids"][0])[None]
    with torch.no_grad():
        return float(model(**inputs, labels=labels).loss), len(ids), start


@pytest.mark.parametrize("prompt", ["", PROMPT])
@pytest.mark.parametrize("kind", FAMILIES)
def test_losses_are_the_familys_own_for_any_cut(kind, prompt, scenes, hub):
    model = built(hub(kind))
    data, samples = samples_of(model, scenes, prompt)
    batch = collated(model, samples)
    with torch.no_grad():
        nll = model(batch)["nll"]
        for size in (1, 4):
            parts = split_packed_images(batch, size)
            assert sum(len(part["labels"]) for part in parts) == len(samples)
            torch.testing.assert_close(torch.cat([model(part)["nll"] for part in parts]), nll, rtol=0, atol=1e-5)
        singly = [model(collated(model, [sample]))["nll"].sum() for sample in samples]
    torch.testing.assert_close(torch.stack(singly), nll.sum(1), rtol=0, atol=1e-4)
    for index in range(len(samples)):
        loss, tokens, start = alone(kind, hub(kind), data, index, prompt)
        assert int((batch["labels"][index] != IGNORE_INDEX).sum()) == tokens
        assert bool((batch["labels"][index, :start] == IGNORE_INDEX).all())
        assert float(nll[index].sum() / tokens) == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_texts_are_scored_and_written_as_in_training(kind, scenes, hub):
    """By benchmarks, which read image and prompt once: of images of unlike sizes, in one call."""
    model = built(hub(kind))
    data, samples = samples_of(model, scenes, PROMPT)
    with torch.no_grad():
        nll = model(collated(model, samples))["nll"]
    texts = [sample["labels"][sample["labels"] != IGNORE_INDEX].tolist() for sample in samples]
    images = [shaped(data.image_and_caption(index)[0].copy()) for index in range(len(samples))]
    scores = model.image_text_model.text_logprobs(images, [[text, text[:3]] for text in texts], PROMPT)
    for row, text, (whole, beginning) in zip(nll, texts, scores, strict=True):
        expected = -row[row != 0]
        assert torch.tensor(whole) == pytest.approx(expected, abs=1e-4)
        assert torch.tensor(beginning) == pytest.approx(expected[:3], abs=1e-4)
        assert len(whole) == len(text)
    together = model.image_text_model.generate_captions(images, PROMPT, max_new_tokens=6)
    assert together == [model.image_text_model.generate_captions([image], PROMPT, 6)[0] for image in images]


@pytest.mark.parametrize("kind", ["llava", "idefics3", "qwen2_vl"])
def test_what_a_tokenizer_gives_and_no_model_takes_is_left_out(kind, hub, tmp_path):
    """As ``token_type_ids``, which transformers' tokenizers give unless a folder says otherwise."""
    path = shutil.copytree(hub(kind), tmp_path / kind)
    file = path / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_input_names": names}))
    first, other = (built(str(folder)).image_text_model for folder in (hub(kind), path))
    images = [Image.new("RGB", (48, 48), colour) for colour in ("red", "blue")]
    given = {key for key in model_inputs(other.processor, images) if key not in other.inputs(images)}
    assert given == {"token_type_ids"}
    assert other.generate_captions(images, max_new_tokens=4) == first.generate_captions(images, max_new_tokens=4)
    assert other.text_logprobs(images, [[[5, 6]], [[7]]]) == first.text_logprobs(images, [[[5, 6]], [[7]]])


@pytest.mark.parametrize("kind", FAMILIES)
def test_parts_are_found_by_the_structure(kind, hub):
    model = built(hub(kind), freeze=["vision", "language"])
    trained = {name for name, weight in model.model.named_parameters() if weight.requires_grad}
    places = ("connector", "multi_modal_projector", "image_newline", "visual.merger")
    assert trained == {name for name, _ in model.model.named_parameters() if any(place in name for place in places)}
    groups = {"projector": {"lr": 0.1}, "language": {"lr": 0.2}, "language.lm_head": {"lr": 0.3}, "vision": {"lr": 0.4}}
    model.model.requires_grad_(True)
    optimizer = build_optimizer({"name": "adamw", "lr": 1.0, "groups": groups}, model)
    rates = {weight: group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    for name, weight in model.model.named_parameters():
        part = 0.3 if "lm_head" in name else 0.1 if name in trained else 0.4 if "vis" in name else 0.2
        assert rates[weight] == part, name


def test_a_new_model_has_the_tokens_of_its_processor(scenes, hub):
    path = hub("qwen2_vl")
    tokenizer = build_tokenizer({"name": path, "image_tokens": False})
    config = {"model_type": "qwen2_vl", **FAMILIES["qwen2_vl"][2]}
    processor = {"name": path, "max_pixels": 256}
    model = build_hugging_face(tokenizer, config=config, processor=processor, attn_implementation="eager")
    pretrained = AutoModelForImageTextToText.from_pretrained(path).config
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        assert getattr(model.model.config, name) == getattr(pretrained, name)
    assert model.model.config.get_text_config().vocab_size == len(tokenizer)
    _, samples = samples_of(model, scenes, "")
    assert max(int(sample["processed"]["image_grid_thw"].prod()) for sample in samples) <= 256 / 4**2
    nll = model(collated(model, samples))["nll"]
    assert bool(nll.isfinite().all())


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_keys_of_the_text_part_may_stand_beside_the_others(kind, hub):
    """As in Qwen2-VL's config.json of a hub."""
    arguments = FAMILIES[kind][2]
    apart, flat = (
        skeleton(hub(kind), config={"model_type": kind, **one}, processor={"name": hub(kind)})
        for one in (arguments, {**arguments["text_config"], "vision_config": arguments["vision_config"]})
    )
    assert shapes(flat) == shapes(apart)
    texts = [model.model.config.get_text_config() for model in (flat, apart)]
    for name in ("vocab_size", "eos_token_id", "pad_token_id", "rope_scaling"):
        assert getattr(texts[0], name, None) == getattr(texts[1], name, None)


def test_the_new_model_of_the_docs(hub, scenes):
    (text,) = re.findall(r"```yaml\n(model:[^`]*model_type:[^`]*)```", (ROOT / "docs/models.md").read_text())
    config = yaml.safe_load(text)["model"]["config"]
    config["vision_config"]["patch_size"] = 4  # of the small processor
    tokenizer = build_tokenizer({"name": hub("qwen2_vl"), "image_tokens": False})
    model = build_hugging_face(tokenizer, config=config, processor={"name": hub("qwen2_vl")})
    assert len(model.model.model.language_model.layers) == len(model.model.model.visual.blocks) == 8
    _, samples = samples_of(model, scenes, "")
    with torch.no_grad():
        assert bool(model(collated(model, samples[:1]))["nll"].isfinite().all())


@pytest.mark.parametrize("kind", [*FAMILIES, "mistral3"])
def test_a_file_of_transformers_is_a_configuration(kind):
    """It may have keys without effect; CLIP's vision part has the size of a vocabulary."""
    for written in (CONFIG_MAPPING[kind]().to_dict(), CONFIG_MAPPING[kind]().to_diff_dict()):
        assert new_configuration(written, "model.config").model_type == written["model_type"]


def test_keys_without_effect_are_kept():
    vision = {"in_chans": 3, "spatial_patch_size": 14}
    settings = new_configuration({"model_type": "qwen2_vl", "vision_token_id": 1, "vision_config": vision}, "config")
    assert settings.vision_config.in_chans == 3
    assert new_configuration({"model_type": "llama", "rope_interleaved": False}, "config").rope_interleaved is False
    same = {"vocab_size": 32000, "text_config": {"vocab_size": 32000}}  # as LLaVA-1.5's file has it twice
    assert new_configuration({"model_type": "llava", **same}, "config").text_config.vocab_size == 32000


def shapes(model):
    return {name: weight.shape for name, weight in model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llava", {"hidden_size": 64}, "model.config.hidden_size is .* of a llava. It is one of .*text_config"),
        ("qwen2_vl", {"hidden_size": 64}, "model.config.hidden_size is .* of a qwen2_vl. It is one of .*text_config"),
        ("llava", {"text_config": {"num_hiden_layers": 2}}, r"text_config.num_hiden_layers .* 'num_hidden_layers'\?"),
        ("llava", {"vision_config": {"pach_size": 2}}, r"model.config.vision_config.pach_size .* 'patch_size'\?"),
        ("idefics3", {"scale_facter": 2}, r"model.config.scale_facter is not a key .* 'scale_factor'\?"),
        ("llava", {"model_type": "llavva"}, r"model.config.model_type='llavva' .* 'llava'\?"),
        ("llava", {"model_type": None}, "model.config.model_type=None is not a type of transformers"),
        ("llava", {"model_type": "blip"}, "model.config.model_type: Blip.* has no decoder"),
    ],
)
def test_a_key_that_a_configuration_does_not_know_is_refused(kind, changes, message, hub):
    """transformers would store it, and build a model of its own sizes."""
    arguments = {"model_type": kind} if changes.get("model_type") else {"model_type": kind, **FAMILIES[kind][2]}
    for key, change in changes.items():
        arguments[key] = {**arguments[key], **change} if isinstance(change, dict) else change
    with pytest.raises(ValueError, match=message) as refused:
        skeleton(hub(kind), config=arguments, processor={"name": hub(kind)})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "gemma3", "paligemma"])
@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_a_live_reference_sees_what_stored_scores_are_made_of(kind, prompt, scenes, hub):
    model = built(hub(kind))
    data, samples = samples_of(model, scenes, prompt)
    reference = ReferenceLM(small_lm(model.tokenizer), model.tokenizer)
    batch = collated(model, samples)
    text, bos = text_positions(batch, model), bos_id(model.tokenizer)
    found = reference.logprobs(batch["input_ids"], text, batch["labels"], bos=bos)
    state = SimpleNamespace(batch=batch, model=model, device=SimpleNamespace(_device="cpu"), precision=None)
    state.precision_config = None
    weighted = PRIOR(reference).ref_logprobs(state, batch["labels"] != IGNORE_INDEX)
    torch.testing.assert_close(weighted, found, rtol=0, atol=1e-5)
    prefix = data.format.prefix_ids()
    texts = [row[row != IGNORE_INDEX].tolist() for row in batch["labels"]]
    expected = reference.score_texts([[*prefix, *text] for text in texts], len(prefix))
    for row, labels, scores in zip(found, batch["labels"], expected, strict=True):
        torch.testing.assert_close(row[labels != IGNORE_INDEX], scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_prior_is_that_of_transformers_trainer(kind, scenes, hub, tmp_path):
    """The same batch, whole there and in microbatches here."""
    model = built(hub(kind))
    _, samples = samples_of(model, scenes, "")
    reference = ReferenceLM(small_lm(model.tokenizer), model.tokenizer)
    losses, rows = [], [{"index": index} for index in range(len(samples))]
    accepted = {*inspect.signature(model.model.forward).parameters, "ref_logprobs"}
    batch = collated(model, samples)
    text = text_positions(batch, model)
    batch["ref_logprobs"] = reference.logprobs(batch["input_ids"], text, batch["labels"], bos=bos_id(model.tokenizer))

    def whole(_):
        return {key: value for key, value in batch.items() if key in accepted}

    class Recording(PRIORMixin, HFTrainer):
        def training_step(self, *args, **kwargs):
            losses.append(float(super().training_step(*args, **kwargs)))
            return torch.tensor(losses[-1])

    options = {"per_device_train_batch_size": len(samples), "max_steps": 1, "use_cpu": True, "report_to": []}
    options |= {"remove_unused_columns": False, "save_strategy": "no", "disable_tqdm": True}
    trained = Recording(
        model.model, TrainingArguments(str(tmp_path), **options), data_collator=whole, train_dataset=rows,
        processing_class=model.processor,
    )  # fmt: skip
    labelled = set()
    model.model.register_forward_pre_hook(lambda _, args, kwargs: labelled.add("labels" in kwargs), with_kwargs=True)
    trained.train()
    assert labelled == {kind == "paligemma"}  # which is causal only with them; the others would compute their loss

    class Sum(Callback):
        total, tokens = 0.0, 0.0

        def before_backward(self, state, logger):
            count = int((state.batch["labels"] != IGNORE_INDEX).sum())
            self.total, self.tokens = self.total + float(state.loss) * count, self.tokens + count

    model, ours = built(hub(kind)), Sum()
    loader = DataLoader(samples, batch_size=len(samples), collate_fn=lambda _: batch)
    spec = DataSpec(
        loader,
        split_batch=split_packed_images,
        get_num_samples_in_batch=lambda batch: len(batch["labels"]),
        get_num_tokens_in_batch=count_tokens,
    )
    Trainer(
        model=model, train_dataloader=spec, max_duration="1ba", algorithms=[PRIOR()], callbacks=[ours],
        optimizers=torch.optim.SGD(model.parameters(), lr=0.0), device_train_microbatch_size=2, device="cpu",
        accumulate_train_batch_on_tokens=True, progress_bar=False,
    ).fit()  # fmt: skip
    assert losses == [pytest.approx(ours.total / ours.tokens, rel=1e-6)]


def bad(folder, **changes):
    """Write a configuration without a model."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(changes))
    return str(folder)


def test_what_cannot_be_trained_is_refused_with_the_reason(hub, tmp_path):
    path = hub("idefics3")
    tokenizer = build_tokenizer({"name": path, "image_tokens": False})
    cases = [
        ({"pretrained": bad(tmp_path / "a", model_type="mllama")}, r"a mllama cannot .* by cross-attention"),
        ({"pretrained": bad(tmp_path / "b", model_type="llama")}, "a llama is no image-text-to-text model"),
        ({"pretrained": bad(tmp_path / "c", model_type="florence2")}, "florence2 cannot be trained here"),
        ({"pretrained": "nowhere/at/all"}, "model.pretrained='nowhere/at/all' does not exist"),
        ({}, "either `pretrained` .* or `config`"),
        ({"config": {"model_type": "idefics3"}}, "model.processor.name is missing"),
        ({"pretrained": path, "processor": {"sice": 3}}, r"model.processor.sice is not a key. Did you mean 'size'\?"),
        ({"pretrained": path, "processor": {"name": hub("llava")}}, "is another tokenizer than that of the processor"),
        ({"pretrained": path, "freeze": ["visoin"]}, "idefics3 has no part known as visoin"),
    ]
    for arguments, message in cases:
        with pytest.raises((ValueError, OSError), match=message) as refused:
            build_hugging_face(tokenizer, **arguments)
        assert "\n" not in str(refused.value)


def test_an_image_with_too_many_tokens_is_a_bad_sample(hub, scenes):
    model = built(hub("qwen2_vl"))
    maker = replace(model.image_processor, positions=14)
    assert len(maker(Image.new("RGB", (16, 16))).prefix["input_ids"]) < 14
    with pytest.raises(ValueError, match="image and prompt take 14 of the language model's 14 positions"):
        maker(Image.new("RGB", (40, 30)))
    with pytest.raises(ValueError, match="a caption up to 14"):
        replace(maker, caption_tokens=14)(Image.new("RGB", (16, 16)))
    with pytest.raises(ValueError, match="aspect ratio"):
        maker(Image.new("RGB", (1, 20_000)))


def test_a_bad_sample_is_skipped_beside_an_image_that_every_processor_reads(hub, scenes):
    model = built(hub("idefics3"))
    data, samples = samples_of(model, scenes, PROMPT)
    samples.append(data._without_labels(6))
    assert bool((samples[-1]["labels"] == IGNORE_INDEX).all())
    with torch.no_grad():
        assert bool((model(collated(model, samples))["nll"][-1] == 0).all())
    if not getattr(model.processor.image_processor, "is_fast", False):
        for read in (data.image_processor, lambda image: model.image_text_model.inputs([image])):
            with pytest.raises(
                ValueError, match=r"Idefics3ImageProcessor\w* takes its height of 3 for that many channels"
            ):
                read(Image.new("RGB", (40, 3)))


def test_a_model_folder_keeps_the_prompt_of_training(hub, tmp_path):
    model = built(hub("idefics3"))
    known = AutoProcessor.from_pretrained(hub("idefics3"))
    model.processor.prompt = ""
    check_processors(known, model.processor)  # a model that was never trained here
    model.processor.prompt = PROMPT
    model.image_text_model.save_pretrained(tmp_path / "model")
    saved = ImageTextModel.from_pretrained(tmp_path / "model")
    assert saved.prompt == PROMPT
    check_processors(saved.processor, model.processor)
    with pytest.raises(ValueError, match="The viewer has another prompt than the model"):
        check_processors(known, model.processor)


@pytest.mark.parametrize("kind", ["llava", "gemma3", "paligemma"])
def test_text_without_its_image_is_read_from_left_to_right(kind, scenes, hub):
    model = built(hub(kind))
    _, samples = samples_of(model, scenes, PROMPT)
    batch = collated(model, samples)
    parts = batch["input_ids"], text_positions(batch, model), batch["labels"]
    whole = model.text_label_logits(*parts, normalized=True)
    for length in range(whole.shape[1] - 4, whole.shape[1]):
        cut = model.text_label_logits(*(part[:, :length] for part in parts), normalized=True)
        torch.testing.assert_close(cut, whole[:, :length], rtol=0, atol=1e-5)


def skeleton(path, **options):
    return hugging_face_skeleton(build_tokenizer({"name": path, "image_tokens": False}), **options)


def test_the_tokenizer_is_as_its_processor_has_set_it(scenes, hub, tmp_path):
    """PaliGemma's folders of a hub have one that adds bos, and its processor writes bos itself."""
    path = shutil.copytree(hub("paligemma"), tmp_path / "paligemma")
    plain = AutoTokenizer.from_pretrained(path)
    plain.add_bos_token = True
    plain.save_pretrained(path)
    plain, tokenizer = AutoTokenizer.from_pretrained(path), build_tokenizer({"name": path, "image_tokens": False})
    assert plain("a")["input_ids"] == [plain.bos_token_id, *tokenizer("a")["input_ids"]]
    model = build_hugging_face(tokenizer, str(path))
    assert tokenizer_fingerprint(model.tokenizer) == tokenizer_fingerprint(tokenizer)
    _, samples = samples_of(model, scenes, PROMPT)
    assert all(int((sample["input_ids"] == tokenizer.bos_token_id).sum()) == 1 for sample in samples)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_skeleton_agrees_with_its_processor_and_is_whole_in_precision(kind, hub, tmp_path):
    """The parts of a hub's configuration may name half precision."""
    shutil.copytree(hub(kind), tmp_path / "half")
    file = tmp_path / "half" / "config.json"
    settings = json.loads(file.read_text())
    for part in (settings, settings["text_config"], settings["vision_config"]):
        part["dtype"] = "bfloat16"
    file.write_text(json.dumps(settings))
    model = skeleton(str(tmp_path / "half"), pretrained=str(tmp_path / "half"))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    check_image_tokens(model, {})


@pytest.mark.parametrize("kind", FAMILIES)
def test_weights_without_a_gradient_are_those_that_no_loss_needs(kind, scenes, hub):
    model = built(hub(kind))
    _, samples = samples_of(model, scenes, "")
    batch = collated(model, samples)
    model.loss(model(batch), batch).backward()
    expected = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert {*unused_weights(skeleton(hub(kind), pretrained=hub(kind)))} == expected
    assert bool(expected) == kind.startswith("llava")
    assert not unused_weights(skeleton(hub(kind), pretrained=hub(kind), freeze=["vision"]))


def test_a_family_with_features_of_another_form_is_neither_refused_nor_frozen(hub):
    """Qwen3-VL's layers read further features, which a list beside the first ones holds."""
    text, vision = FAMILIES["qwen2_vl"][2]["text_config"], dict(FAMILIES["qwen2_5_vl"][2]["vision_config"])
    for name in ("window_size", "fullatt_block_indexes"):
        vision.pop(name)
    further = {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    arguments = {"model_type": "qwen3_vl", "text_config": text, "vision_config": {**vision, **further}}
    config = {"config": arguments, "processor": {"name": hub("qwen2_vl")}}
    model = skeleton(hub("qwen2_vl"), **config)
    assert model.model.model.visual.deepstack_merger_list
    assert check_image_tokens(model, config) == ""
    assert unused_weights(model) == []


@pytest.mark.parametrize(
    ("kind", "changes", "processor", "message"),
    [
        ("llava", {"vision_config": {"patch_size": 8}}, {}, "writes 16 image tokens .* of which it makes 4 features"),
        (
            "llava_next",
            {"vision_config": {"patch_size": 8}},
            {},
            r"writes \d+ image tokens .* of which it makes \d+ fea",
        ),
        ("idefics3", {"scale_factor": 4}, {}, "writes 20 image tokens .* of which it makes 5 features"),
        ("qwen2_vl", {}, {"merge_size": 1}, "writes 64 image tokens .* of which it makes 16 features"),
        ("gemma3", {}, {"size": {"height": 32, "width": 32}}, "cannot read its processor's images: .* size"),
    ],
)
def test_a_processor_of_another_tower_is_refused(kind, changes, processor, message, hub):
    """Before the first step; Idefics3 alone would train on the first features."""
    arguments = {"model_type": kind, **FAMILIES[kind][2]}
    for key, change in changes.items():
        arguments[key] = {**arguments[key], **change} if isinstance(change, dict) else change
    config = {"config": arguments, "processor": {"name": hub(kind), **processor}}
    with pytest.raises(ValueError, match=message) as refused:
        check_image_tokens(skeleton(hub(kind), **config), config)
    keys = [f"model.processor.{key}" for key in config["processor"]]
    assert str(refused.value).endswith(f"; change {' or '.join([*keys, 'model.config.vision_config'])}.")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_that_is_not_known_is_warned_of(kind, hub, monkeypatch):
    """Where the numbers differ, and not where they agree."""
    monkeypatch.setattr("composer_prior.models.hugging_face._FEATURED", ())
    assert check_image_tokens(skeleton(hub(kind), pretrained=hub(kind)), {}) == ""
    if kind.startswith("llava"):
        vision = {**FAMILIES[kind][2]["vision_config"], "patch_size": 8}
        config = {"config": {"model_type": kind, **FAMILIES[kind][2], "vision_config": vision}}
        config["processor"] = {"name": hub(kind)}
        warning = check_image_tokens(skeleton(hub(kind), **config), config)
        assert re.match(r"Warning: model: its processor writes \d+ image tokens .* of which it makes \d+ f", warning)


@pytest.mark.parametrize(("kind", "token"), [("qwen2_vl", "<|image_pad|>"), ("gemma3", "<start_of_image>")])
def test_text_that_spells_an_image_is_refused(kind, token, scenes, hub):
    model = built(hub(kind))
    with pytest.raises(ValueError, match=re.escape(f"spells {token}: the image stands before the prompt")):
        samples_of(model, scenes, f"see {token}")
    with pytest.raises(ValueError, match=re.escape(f"spells {token}")):
        model.image_text_model.inputs([Image.new("RGB", (64, 64))], f"see {token}")


@pytest.mark.parametrize("special", [True, False])
def test_a_caption_that_spells_an_image_is_text_or_a_bad_sample(special, scenes, hub, tmp_path):
    """Text where the token is a special one, and a bad sample where the tokenizer reads the token in any text."""
    path = shutil.copytree(hub("llava"), tmp_path / "llava")
    tokenizer = AutoTokenizer.from_pretrained(path)
    if not special:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (file := path / name).exists():
                settings = json.loads(file.read_text())
                for key in ("additional_special_tokens", "extra_special_tokens"):
                    settings.pop(key, None)
                added = settings.get("added_tokens_decoder", {}).values()
                for token in (*settings.get("added_tokens", ()), *added):
                    token["special"] &= token["content"] != "<image>"
                file.write_text(json.dumps(settings))
    model = built(str(path))
    data, _ = samples_of(model, scenes, PROMPT)
    image = tokenizer.convert_tokens_to_ids("<image>")
    caption = "a <image> here"
    assert (image in encode_caption(model.tokenizer, caption).ids) == (not special)
    if not special:
        with pytest.raises(BadSampleError, match="the caption spells <image>, which the tokenizer takes for its own"):
            data._encode({"caption": caption}, 0)


def test_a_recurrent_language_model_is_refused(hub):
    path = hub("idefics3")
    text = {"model_type": "lfm2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": "lfm2_vl", "text_config": {**text, "layer_types": ["conv", "full_attention"]}}
    with pytest.raises(ValueError, match=r"a lfm2.vl cannot be trained here: its language model is recurrent"):
        skeleton(path, config=config, processor={"name": path})


def test_a_size_of_images_is_that_of_the_recipe(hub):
    """Qwen2-VL's folders also hold ``min_pixels`` and ``max_pixels``, of before."""
    path, image = hub("qwen2_vl"), Image.new("RGB", (48, 48))
    sizes = [None, {"size": {"shortest_edge": 64, "longest_edge": 256}}, {"max_pixels": 256}]
    patches = [
        int(built(path, processor=size).image_processor(image).tensors["processed"]["image_grid_thw"].prod())
        for size in sizes
    ]
    assert patches[0] > patches[1] == patches[2] == 256 // 4**2


def test_export_is_not_for_what_is_in_the_familys_own_form_already(hub, tmp_path):
    with pytest.raises(LlavaError, match="a llava needs no export: its model folder is in transformers' own form"):
        export_llava(built(hub("llava")).image_text_model, tmp_path / "out")
