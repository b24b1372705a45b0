"""Caption images: ``python scripts/caption.py MODEL photo.jpg folder/ s3://bucket/images [out=captions.jsonl] …``.

``composer-prior caption --help`` lists the options.
"""

import sys

from composer_prior.commands.cli import main

if __name__ == "__main__":
    main(["caption", *sys.argv[1:]])
