"""Convert image-caption pairs to an MDS data set: ``python scripts/convert_captions.py SOURCE OUT [option=value …]``.

SOURCE is a folder with captions.jsonl (or .csv, .tsv), COCO captions, LLaVA JSON, WebDataset shards, Parquet files or a
Hugging Face dataset saved to disk. OUT is a folder or a remote such as s3://bucket/captions.
"""

import sys

from composer_prior.commands.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
