"""Fixtures that several files share."""

from common.real_scale import bucket, here  # noqa: F401
