"""What captions get right, word by word: ``python tools/check_captions.py MODEL [images=1000]``.

MODEL is a run of the embedded data with the default seed. It captions validation scenes, and what each caption says of
drawings, counts, sizes, relations and the background's colour is compared with the scene.
"""

import re
import sys
from collections import Counter
from typing import Any

from composer_prior.emoji_scenes.captions import COUNT_WORDS, plural, true_relations
from composer_prior.emoji_scenes.scenes import BACKGROUNDS, CLASSES, Scene, draw_scene, sample_rng, sample_scene
from composer_prior.training.saving import load

NAMES = {form: name for name in CLASSES for form in (name, plural(name))}
ANY_NAME = "|".join(sorted(NAMES, key=len, reverse=True))
NOUN = re.compile(rf"\b(?:(a|an|{'|'.join(COUNT_WORDS)}) )?(?:(small|large) )?({ANY_NAME})\b", re.IGNORECASE)
RELATION = re.compile(
    rf"\b({ANY_NAME}) (left of|right of|above|below) (?:\w+ )?(?:(?:small|large) )?({ANY_NAME})\b", re.IGNORECASE
)
COLOUR = re.compile(rf"\b({'|'.join(BACKGROUNDS)})\b", re.IGNORECASE)


def compare(scene: Scene, caption: str) -> Counter[str]:
    """How often each kind of statement of a caption is made, or asked for by the scene, and is true: ``kind of``."""
    groups, tally = scene.groups, Counter[str]()

    def count(kind: str, right: bool) -> None:
        tally[f"{kind} of"] += 1
        tally[kind] += right

    text = caption.lower()
    named = {NAMES[form] for _, _, form in NOUN.findall(text)}
    count("captions with all objects right", named == set(groups))
    for name in named:
        count("named classes that are there (precision)", name in groups)
    for name in groups:
        count("classes that are named (recall)", name in named)
    for quantity, size, form in NOUN.findall(text):
        if (name := NAMES[form]) in groups:
            if quantity:
                number = COUNT_WORDS.index(quantity) + 1 if quantity in COUNT_WORDS else 1
                count("counts of right classes", number == len(groups[name]))
            if size:
                count("sizes of right classes", size == groups[name][0].size)
    for first, relation, second in RELATION.findall(text):
        if {NAMES[first], NAMES[second]} <= set(groups) and first != second:
            count("relations of right classes", relation in true_relations(groups[NAMES[first]], groups[NAMES[second]]))
    for colour in COLOUR.findall(text)[:1]:
        count("colours", colour == scene.colour)
    return tally


def main(arguments: list[str]) -> int:
    """Caption, compare, print."""
    given = dict(argument.split("=", 1) for argument in arguments[1:])
    if not arguments or "=" in arguments[0] or not set(given) <= {"images"}:
        print(__doc__)
        return 1
    model: Any = load(arguments[0])
    total = Counter[str]()
    images = int(given.get("images", 1000))
    for start in range(0, images, 50):
        scenes = [sample_scene("validation", sample_rng("validation", i, 17)) for i in range(start, start + 50)][
            :images
        ]
        for scene, caption in zip(scenes, model.generate([draw_scene(scene) for scene in scenes]), strict=True):
            total += compare(scene, caption)
            if start == 0 and scene in scenes[:4]:
                print(sorted((name, len(group)) for name, group in scene.groups.items()), scene.colour, "|", caption)
    for kind in sorted(kind for kind in total if not kind.endswith(" of")):
        print(f"{kind}: {total[kind] / total[f'{kind} of']:.3f} ({total[kind]} of {total[f'{kind} of']})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
