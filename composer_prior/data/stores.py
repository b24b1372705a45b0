"""Errors of object stores: whether a retry can help, and their message."""

import os
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from composer_prior.data.messages import one_line

PROBE = ".composer-prior-can-write"  # a small object, written to a remote to test access
_ENDPOINTS = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_TRANSIENT = ("RequestTimeout", "BadDigest", "IncompleteBody")  # of S3 with status 400; a retry can help


def is_final(error: BaseException | None) -> bool:
    """Return whether another attempt is useless: the object is missing or denied, or the request is wrong."""
    status, code = _answer(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 429) and code not in _TRANSIENT
    return is_denied(error) or isinstance(error, FileNotFoundError | PermissionError)


def is_denied(error: BaseException | None) -> bool:
    """Return whether a store denied access, or there are no credentials."""
    return _answer(error)[0] in (401, 403) or any(type(one).__name__ == "NoCredentialsError" for one in _chain(error))


def is_missing(error: BaseException | None) -> bool:
    """Return whether a store says that there is no such object."""
    missing = isinstance(error, FileNotFoundError) or type(error).__name__ == "NotFound"  # Databricks' and Google's
    return _answer(error)[0] == 404 or (missing and not is_denied(error))


def told(error: BaseException, remote: str, length: int = 500) -> str:
    """Return an error as one line, with bucket and endpoint where it comes from a store."""
    if is_denied(error):
        status, code = _answer(error)
        reason = ", ".join(dict.fromkeys(str(part) for part in (status, code) if part)) or one_line(error)
        return f"access denied to {service(remote)} ({reason}); check the credentials and their permissions"
    text = one_line(error, length)
    behind = "" if isinstance(error, ValueError | TimeoutError) else service(remote)  # raised by our checks
    return f"{text} ({behind})" if behind else text


def service(remote: str) -> str:
    """Return the bucket and the endpoint of a remote; nothing for a folder."""
    parts = urlsplit(remote)
    if not parts.scheme:
        return ""
    given = urlsplit(next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), ""))
    s3 = f"{given.scheme}://{given.netloc.rpartition('@')[2]}" if given.netloc else "s3.amazonaws.com"
    endpoint = {"s3": s3, "gs": "storage.googleapis.com"}.get(parts.scheme, parts.scheme)
    return f"bucket {parts.netloc or parts.path} at {endpoint}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []  # an error that is raised twice may come from itself
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _answer(error: BaseException | None) -> tuple[int | None, str | None]:
    """Return the HTTP status and the store's code of an error of any library, or of its causes."""
    for one in _chain(error):
        response: Any = getattr(one, "response", None)
        if isinstance(response, Mapping):  # botocore's
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = str(response.get("Error", {}).get("Code"))
            if status or code.isdigit():
                return int(status or code), code
        names = ("status_code", "status", "code")
        for value in (getattr(holder, name, None) for holder in (response, one) for name in names):
            if isinstance(value, int) and 400 <= value < 600:
                return int(value), None
    return None, None
