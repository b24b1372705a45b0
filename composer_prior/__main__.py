"""``python -m composer_prior`` and, on many ranks, ``composer -n 8 -m composer_prior train ...``."""

from composer_prior.cli import main

main()
