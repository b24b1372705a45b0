"""Chat templates in the forms that hubs' language models have, and data sets of conversations."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from streaming import MDSWriter

from composer_prior.data.conversations import pack_images

_HEADER = "'<|start_header_id|>' + {role} + '<|end_header_id|>\\n\\n'"
_CHATML = (
    "{{% for message in messages %}}"
    "{{% if loop.first and message['role'] != 'system' %}}"
    "{{{{ '<|im_start|>system\\n{system}<|im_end|>\\n' }}}}{{% endif %}}"
    "{{{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}}}"
    "{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}"
)
TEMPLATES = {  # texts alone
    "llama3": "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ " + _HEADER.format(role="message['role']") + " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ " + _HEADER.format(role="'assistant'") + " }}{% endif %}",
    "qwen2": _CHATML.format(system="You help."),
    "smollm2": _CHATML.format(system="You are small."),
    "vicuna": "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "mistral": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}",
}
TOKENIZERS = {"llama3": "llama3", "qwen2": "qwen2", "smollm2": "smollm2", "vicuna": "llama2", "mistral": "llama2"}
ENDS = {"llama3": "<|eot_id|>", "qwen2": "<|im_end|>", "smollm2": "<|im_end|>", "vicuna": "</s>", "mistral": "</s>"}
MARKED = (  # with parts, and what is learned marked
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'][0]['text'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def turns(*texts: str) -> list[dict[str, Any]]:
    """Return messages of user and assistant in turn; ``<image>`` in a text is an image."""
    return [{"role": ("user", "assistant")[n % 2], "content": parts(text)} for n, text in enumerate(texts)]


def parts(text: str) -> list[dict[str, str]]:
    """Return the parts of a text, in which ``<image>`` stands for an image."""
    found: list[dict[str, str]] = []
    for number, piece in enumerate(text.split("<image>")):
        found += [{"type": "image"}] * bool(number) + [{"type": "text", "text": piece}] * bool(piece)
    return found


def png(shade: int, width: int = 48, height: int = 48) -> bytes:
    """Return a PNG of one shade of green."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (40, shade % 256, 60)).save(buffer, "PNG")
    return buffer.getvalue()


def write_chats(out: Path, samples: Sequence[tuple[Sequence[Mapping[str, Any]], Sequence[bytes]]]) -> str:
    """Write a data set of messages and their images."""
    with MDSWriter(out=str(out), columns={"messages": "json", "images": "bytes"}) as writer:
        for messages, images in samples:
            writer.write({"messages": json.loads(json.dumps(messages)), "images": pack_images(images)})
    return str(out)
