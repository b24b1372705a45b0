"""Export a model to the format of another library: ``python scripts/export.py MODEL OUT [format=llava] [dtype=…] …``.

MODEL is a run folder, a model folder or a checkpoint. ``format=llava`` makes a folder that transformers loads as
``LlavaForConditionalGeneration``, without code of this package.
"""

import sys

from composer_prior.commands.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
