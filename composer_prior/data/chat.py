"""Conversations and documents as text: what a chat template writes, and which characters of it are learned."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from composer_prior.data.conversations import ANSWER, DOCUMENT, ChatError, checked, message
from composer_prior.data.messages import OneLineError, one_line

MARKS = "\ufdd0\ufdd1\ufdd2\ufdd3"  # noncharacters: begin and end of what is learned, begin and end of an image
OWN = "own"
_DAY = date(2024, 7, 26)  # that of Llama 3's templates where they are given none
DATED: dict[str, Any] = {"strftime_now": _DAY.strftime, "date_string": _DAY.strftime("%d %b %Y")}  # for a template
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_AS_TEXT = (  # before a template that takes texts alone
    "{%- set chat = namespace(messages=[], parts=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set chat.parts = [message['content']] -%}"
    "{%- else -%}{%- set chat.parts = [] -%}{%- for part in message['content'] -%}"
    "{%- set chat.parts = chat.parts + ['IMAGE' if part['type'] == 'image' else part['text']] -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set chat.messages = chat.messages + [dict(message, content=chat.parts | join('\\n'))] -%}"
    "{%- endfor -%}"
    "{%- set messages = chat.messages %}"
)

Span = tuple[int, int]  # first character and the one behind the last


class NoTemplateError(OneLineError, ChatError):
    """A conversation that needs a chat template, which the tokenizer lacks."""


@dataclass(frozen=True)
class Written:
    """A sample as text, in which each image is the model's placeholder."""

    text: str
    learned: tuple[Span, ...]
    images: tuple[Span, ...]

    @property
    def marked(self) -> str:
        """The text with ``MARKS`` around what is learned and around images."""
        pairs = [(span, MARKS[:2]) for span in self.learned] + [(span, MARKS[2:]) for span in self.images]
        places = [(place, mark) for span, marks in pairs for place, mark in zip(span, marks, strict=True)]
        text, end = list[str](), 0
        for place, mark in sorted(places, key=lambda one: (one[0], one[1] in MARKS[::2])):
            text += [self.text[end:place], mark]
            end = place
        return "".join([*text, self.text[end:]])


def use_template(tokenizer: PreTrainedTokenizerBase, template: str | None, image: str) -> None:
    """Let a tokenizer write conversations by a template, with parts for images; or by none.

    Args:
        tokenizer: its ``chat_template`` is set.
        template: ``own``, the path of a file, or the text of a Jinja template; None for none.
        image: the placeholder of an image, for a template that takes texts alone; "" for a model without images.

    Raises:
        ValueError: for a template that is missing, cannot write a conversation with an image, or whose answers cannot
            be told from the rest.
    """
    key = "tokenizer.chat_template"
    if template == OWN:
        template = tokenizer.chat_template
        if not isinstance(template, str):
            raise ValueError(f"{key}=own: the tokenizer has {'several' if template else 'none'}; give a text or file.")
    elif template is not None and "{" not in template:
        try:
            template = Path(template).expanduser().read_text()
        except OSError as error:
            raise ValueError(f"{key}={template!r} is no file that can be read, and no Jinja template.") from error
    tokenizer.chat_template = template
    if template is None:
        return
    probe = [message("user", "a", image=True), message(ANSWER, "b"), message("user", "c"), message(ANSWER, "d")]
    if not image or _rendered_or_none(tokenizer, probe).count(image) != 1:
        tokenizer.chat_template = _AS_TEXT.replace("IMAGE", image) + template
    try:
        written = ChatFormat(tokenizer, image).write(probe)
    except ChatError as error:
        raise ValueError(f"{key}: {error}") from error
    learned = [written.text[start:end].strip() for start, end in written.learned]
    shows = len(written.images) == bool(image)
    if not shows or any(text.strip() == answer for text, answer in zip(learned, "bd", strict=True)):
        lacks = "end of turn behind an answer" if shows else f"{image} for an image"
        raise ValueError(f"{key}: the template writes no {lacks}.")


@dataclass(frozen=True)
class ChatFormat:
    """How samples become text.

    Args:
        tokenizer: with a template, see :func:`use_template`, unless all samples are documents.
        image: the placeholder of an image, as the model's processor replaces it.
    """

    tokenizer: PreTrainedTokenizerBase
    image: str

    @cached_property
    def _reserved(self) -> re.Pattern[str]:
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return re.compile("|".join(map(re.escape, sorted({*MARKS, self.image, *special} - {""}, key=len)[::-1])))

    def write(self, messages: Any) -> Written:
        """Write a sample.

        Raises:
            ChatError: for no conversation, one that spells a special token, or one that the template does not write.
            NoTemplateError: for a conversation without a template.
        """
        messages = checked(messages)
        for one in messages:
            for part in one["content"]:
                if spelled := self._reserved.search(part.get("text", "")):
                    raise ChatError(f"the text spells {spelled[0]}, which the tokenizer takes for its own")
        is_document = messages[0]["role"] == DOCUMENT
        written = self._document(messages[0]["content"]) if is_document else self._conversation(messages)
        try:
            written.text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can spell and no tokenizer reads
            raise ChatError(f"character {error.start} of the text is not Unicode") from error
        return written

    def _conversation(self, messages: list[dict[str, Any]]) -> Written:
        if self.tokenizer.chat_template is None:
            raise NoTemplateError(
                "A conversation needs tokenizer.chat_template: own, a file, or the text of a template."
            )
        whole, marked = _render(self.tokenizer, messages)
        answers = [number for number, one in enumerate(messages) if one["role"] == ANSWER]
        if not _GENERATION.search(str(self.tokenizer.chat_template)):
            marked = [_answer(self.tokenizer, messages, number, whole) for number in answers]
        if len(marked) != len(answers):
            raise ChatError(f"the chat template marks {len(marked)} of {len(answers)} answers with generation")
        learned = [span for span, number in zip(marked, answers, strict=True) if messages[number].get("weight", 1)]
        return Written(whole, tuple(learned), self._places(whole))

    def _document(self, parts: Sequence[dict[str, str]]) -> Written:
        text, learned = first_token(self.tokenizer), list[Span]()
        for part in [*parts, {"text": str(self.tokenizer.eos_token)}]:
            start = len(text)
            text += part.get("text", self.image)
            learned += [(start, len(text))] if part.get("text") else []
        return Written(text, tuple(learned), self._places(text))

    def _places(self, text: str) -> tuple[Span, ...]:
        return tuple(found.span() for found in re.finditer(re.escape(self.image), text)) if self.image else ()


def _answer(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], number: int, whole: str) -> Span:
    """Return the characters of an answer and its end of turn: what it adds to the turns before and their prompt."""
    before = write_prompt(tokenizer, messages[:number])
    behind = _render(tokenizer, messages[: number + 1])[0].rstrip()
    if not (behind.startswith(before) and whole.startswith(behind)):
        raise ChatError(
            "the chat template does not write an answer behind its own generation prompt and before the next turn; "
            "put {% generation %} and {% endgeneration %} around what is learned"
        )
    return len(before), len(behind)


def write_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    """Return what stands before the model's answer to messages."""
    return _render(tokenizer, messages, prompt=True)[0]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], prompt: bool = False
) -> tuple[str, list[Span]]:
    """Return what the template writes, and what it marks as generated by the model."""
    template, special = str(tokenizer.chat_template), cast(Any, tokenizer.special_tokens_map)
    marks = not prompt and _GENERATION.search(template) is not None
    try:
        texts, spans = cast(Any, render_jinja_template)(
            [messages],
            chat_template=template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marks,
            **DATED,
            **special,
        )
    except Exception as error:  # whatever a template raises
        raise ChatError(f"the chat template cannot write the conversation: {one_line(error)}") from error
    return texts[0], [tuple(span) for span in spans[0]] if marks else []


def first_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of the beginning of sequence, or else of its end."""
    return str(tokenizer.bos_token or tokenizer.eos_token)


def _rendered_or_none(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    try:
        return _render(tokenizer, messages)[0]
    except ChatError:
        return ""


def characters(encoding: Encoding, text: str) -> list[Span]:
    """Return the characters of each token in its text.

    They include the spaces at the token's beginning, which byte-level tokenizers with ``trim_offsets`` leave out.
    """
    found = list[Span]()
    for token, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True):
        spaces = len(token) - len(token.lstrip("\u0120"))  # GPT-2's letter for a space
        trimmed = spaces and not text[start:end].startswith((" ", "\u0120")) and text.endswith(" " * spaces, 0, start)
        found.append((start - spaces if trimmed else start, end))
    return found


def within(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Return for each token, given by its characters, whether a span has one of them.

    A token without characters, ``start == end``, is in a span that has the character at ``start``.
    """
    return [any(start < last and first < max(end, start + 1) for first, last in spans) for start, end in offsets]
