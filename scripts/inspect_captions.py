"""Show a caption data set: ``python scripts/inspect_captions.py DATA [page=samples.html] [scores=…] [tokenizer=…] …``.

Prints counts, caption lengths, image sizes and the most frequent captions; ``page=`` writes samples as one HTML file,
in which ``scores=`` shades each token by its weight.
"""

import sys

from composer_prior.commands.cli import main

if __name__ == "__main__":
    main(["inspect", *sys.argv[1:]])
