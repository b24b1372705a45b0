import itertools
import math
import re
from collections import Counter
from collections.abc import Callable

import pytest

from composer_prior.emoji_scenes import foils, questions
from composer_prior.emoji_scenes.captions import COUNT_WORDS, plural, write_caption
from composer_prior.emoji_scenes.foils import make_foils
from composer_prior.emoji_scenes.questions import make_question
from composer_prior.emoji_scenes.scenes import BACKGROUNDS, CLASSES, is_held_out, sample_rng, sample_scene
from composer_prior.emoji_scenes.statements import Statements
from tests.common.scene_oracle import answers, falsehoods

ITEMS = 240
FOILS = {category: [make_foils(category, index) for index in range(ITEMS)] for category in foils.CATEGORIES}
CLOZES = {category: [make_question(category, index) for index in range(ITEMS)] for category in questions.CLOZES}
QUESTIONS = {
    category: [make_question(category, index, form="question") for index in range(ITEMS)]
    for category in questions.CATEGORIES
}
SINGULAR = {plural(name): name for name in CLASSES} | {"drawings": "drawing"}
NUMBERS = {"a": "1", "an": "1", **{word: str(number) for number, word in enumerate(COUNT_WORDS, start=1)}}
NAMES = re.compile(rf"\b({'|'.join(sorted([*CLASSES, *SINGULAR], key=len, reverse=True))})\b")
OBJECT = re.compile(rf"(\d) (?:(large|small) )?({'|'.join(name.replace(' ', '_') for name in CLASSES)})\b")
TEXTS = {"class": 4, "count": 2, "size": 2, "colour": 4, "relation": 2, "absence": 2}


def plain(text: str) -> str:
    """The text with digits for numbers and articles, and every name in the singular and as one word."""
    text = NAMES.sub(lambda match: SINGULAR.get(match[0], match[0]).replace(" ", "_"), text.lower())
    return re.sub(r"\b(\w+)\b", lambda match: NUMBERS.get(match[0], match[0]), text)


def differences(first: str, second: str) -> list[tuple[str, str]]:
    """The words that differ, of texts with as many words."""
    return [
        pair for pair in zip(re.findall(r"\w+", first), re.findall(r"\w+", second), strict=True) if pair[0] != pair[1]
    ]


def pairs(category: str) -> list[tuple[str, str]]:
    return [(plain(item.texts[0]), plain(foil)) for item in FOILS[category] for foil in item.texts[1:]]


@pytest.mark.parametrize("category", foils.CATEGORIES)
def test_the_caption_is_true_and_every_foil_is_false(category: str):
    for item in FOILS[category]:
        assert not falsehoods(item.texts[0], item.scene)
        assert all(falsehoods(foil, item.scene) for foil in item.texts[1:])
        assert len(set(item.texts)) == len(item.texts) == TEXTS[category]


@pytest.mark.slow
def test_a_wrong_class_is_not_there_and_is_true_in_other_items_as_often():
    items = [make_foils("class", index) for index in range(1000)]
    true, false = Counter(), Counter()
    for item in items:
        changes = [differences(plain(item.texts[0]), plain(foil)) for foil in item.texts[1:]]
        wrong = {name.replace("_", " ") for ((_, name),) in changes}  # one word each
        assert len(wrong) == 3
        assert wrong <= set(CLASSES) - set(item.scene.groups)
        true[changes[0][0][0]] += 1
        false.update(name for ((_, name),) in changes)
    both = true + false  # a class is the true one in a quarter of the items in which it is one of the four
    squares = [(true[name] - both[name] / 4) ** 2 / (both[name] * 3 / 16) for name in both]
    assert len(both) > 0.95 * len(CLASSES)
    assert sum(squares) < len(both) + 3 * math.sqrt(2 * len(both))  # chi-squared, three standard deviations


def test_a_wrong_count_differs_in_that_number_and_the_total():
    seen = Counter()
    for truth, foil in pairs("count"):
        objects = zip(OBJECT.findall(truth), OBJECT.findall(foil), strict=True)
        changed = [(int(a[0]), int(b[0])) for a, b in objects if a != b]
        assert len(changed) == 1
        ((true, false),) = changed
        totals = [re.findall(r"(\d) drawing", text) for text in (truth, foil)]
        assert len(differences(truth, foil)) == 1 + len(totals[0])
        if totals[0]:
            assert int(totals[1][0]) - int(totals[0][0]) == false - true
        seen[true, false] += 1
    assert len(seen) == 12  # every pair of one to four, either of which may be true
    assert sum(seen[pair] for pair in seen if pair[0] < pair[1]) == ITEMS / 2


@pytest.mark.parametrize(
    ("category", "words"),
    [("size", [{"large", "small"}]), ("relation", [{"left", "right"}, {"above", "below"}]), ("colour", None)],
)
def test_a_wrong_size_relation_or_colour_is_one_other_word(category: str, words: list[set[str]] | None):
    for truth, foil in pairs(category):
        ((true, false),) = differences(truth, foil)
        assert {true, false} in words if words else {true, false} <= set(BACKGROUNDS)
    true = Counter(differences(truth, foil)[0][0] for truth, foil in pairs(category))
    assert len(set(true.values())) == 1  # each word is true as often


def test_one_object_more_or_fewer_differs_in_its_mention_and_the_total():
    longer = 0
    for truth, foil in pairs("absence"):
        mentioned = [Counter(OBJECT.findall(text)) for text in (truth, foil)]
        more, fewer = mentioned[1] - mentioned[0], mentioned[0] - mentioned[1]
        assert sorted([more.total(), fewer.total()]) == [0, 1]
        totals = [sum(int(number) * times for (number, _, _), times in found.items()) for found in mentioned]
        texts = [text.replace(f"{total} drawing", "drawing") for text, total in zip((truth, foil), totals, strict=True)]
        assert all("drawing" in text and not re.search(r"\d drawing", text) for text in texts)
        assert len({re.sub(rf"{OBJECT.pattern}(, | and )?", "", text) for text in texts}) == 1
        longer += fewer.total()
    assert longer == ITEMS / 2


@pytest.mark.parametrize("category", questions.CATEGORIES)
def test_the_answer_is_right_and_the_others_are_wrong(category: str):
    for item in QUESTIONS[category]:
        assert answers(item.prompt, item.texts[0], item.scene)
        assert not any(answers(item.prompt, answer, item.scene) for answer in item.texts[1:])
    clozes = CLOZES.get(category, [])
    for item in clozes:
        assert item.prompt is None
        assert not falsehoods(item.texts[0], item.scene)
        assert all(falsehoods(text, item.scene) for text in item.texts[1:])
    assert [item.scene for item in clozes] == [item.scene for item in QUESTIONS[category]][: len(clozes)]
    assert len(clozes) == (0 if category == "total" else ITEMS)
    assert len({len(item.texts) for item in [*QUESTIONS[category], *clozes]}) == 1


@pytest.mark.parametrize("category", questions.CATEGORIES)
def test_every_answer_is_right_as_often(category: str):
    right = Counter(item.texts[0] for item in QUESTIONS[category])
    assert set(right.values()) == {ITEMS // len(right)}
    assert set(right) == set(QUESTIONS[category][0].texts)


def test_a_cloze_begins_like_a_caption():
    beginnings = {item.texts[0].split(": ")[0] for items in CLOZES.values() for item in items}
    captions = [caption(index) for index in range(500)]
    assert all(any(text.startswith(f"{beginning}: ") for text in captions) for beginning in beginnings)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("make", [make_foils, make_question])
def test_training_shows_no_scene_of_an_item(make, split):
    """And the questions to train on show no other."""
    categories = foils.CATEGORIES if make is make_foils else questions.CATEGORIES
    options = {} if make is make_foils else {"form": "question", "split": split}
    for seed in (17, 3):
        for category in categories:
            for index in range(40):
                item = make(category, index, seed=seed, **options)
                held_out = is_held_out(list(item.scene.groups), item.scene.colour, seed)
                assert held_out == (options.get("split") != "train")
                if options:
                    assert answers(item.prompt, item.texts[0], item.scene)


def test_training_shows_no_scene_of_a_foil():
    for category in ("class", "absence", "colour"):
        for item in FOILS[category]:
            for foil in item.texts:
                names = [name.replace("_", " ") for _, _, name in OBJECT.findall(plain(foil))]
                colours = [word for word in words(foil) if word in BACKGROUNDS] or [item.scene.colour]
                assert is_held_out(names, colours[0], 17)


def test_an_item_depends_on_category_index_and_seed_alone():
    assert make_foils("count", 7) == make_foils("count", 7)
    assert make_foils("count", 7) == FOILS["count"][7]
    assert make_question("position", 7) == CLOZES["position"][7]
    texts = {make_foils("count", index, seed=seed).texts for index in (7, 8) for seed in (17, 18)}
    assert len(texts) == 4
    larger = make_foils("class", 7, canvas=192)
    assert larger.texts == FOILS["class"][7].texts
    assert larger.scene.canvas == 192


def caption(index: int) -> str:
    rng = sample_rng("train", index, 17)
    return write_caption(sample_scene("train", rng), rng)[0]


def words(text: str) -> list[str]:
    return ["", *re.findall(r"\w+|[^\w\s]", text.lower())]


@pytest.fixture(scope="module")
def likelihood() -> Callable[[str], float]:
    """Log-probability of a text by the pairs of words in 3,000 training captions."""
    captions = [words(caption(index)) for index in range(3000)]
    pairs_seen = Counter(pair for text in captions for pair in itertools.pairwise(text))
    words_seen = Counter(word for text in captions for word in text)

    def score(text: str) -> float:
        return sum(
            math.log((pairs_seen[pair] + 0.1) / (words_seen[pair[0]] + 0.1 * len(words_seen)))
            for pair in itertools.pairwise(words(text))
        )

    return score


@pytest.mark.parametrize("items", [*FOILS.values(), *CLOZES.values()], ids=[*FOILS, *(f"{name}?" for name in CLOZES)])
def test_text_alone_does_not_tell_what_is_true(items: list[Statements], likelihood: Callable[[str], float]):
    chance = 1 / len(items[0].texts)
    for score in (likelihood, len, lambda text: -len(text)):
        points = 0.0
        for item in items:
            best = [score(text) >= max(map(score, item.texts)) - 1e-9 for text in item.texts]
            points += best[0] / sum(best)
        assert abs(points / len(items) - chance) < 3 * math.sqrt(chance * (1 - chance) / len(items))
