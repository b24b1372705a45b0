"""``composer-prior``, ``python -m composer_prior`` and, on many ranks, ``composer -n 8 -m composer_prior train``."""

import sys


def main() -> None:
    """Run a job; Ctrl-C is one line also while the first modules are imported."""
    try:
        from composer_prior.commands.cli import main as run  # here: Ctrl-C may come meanwhile
    except KeyboardInterrupt:
        print("\nStopped by Ctrl-C.", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
