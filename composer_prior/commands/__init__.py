"""The entry points of ``composer-prior JOB``, one module each, and the command line that they share (``cli.py``)."""
