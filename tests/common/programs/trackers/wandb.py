"""In the place of W&B, without a network: a line of ``wandb.jsonl`` for each start, and for each point."""

import json
from types import SimpleNamespace

run = None


def _write(**line):
    with open("wandb.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def init(**arguments):
    global run
    run = SimpleNamespace(dir=".", offline=True, entity="e", project="p", get_url=lambda: None)
    _write(start=arguments)


def log(metrics, step):
    _write(step=step, metrics=[*metrics])


def finish(*_):
    pass


config = SimpleNamespace(update=lambda _: None)
