"""The one place that makes obstore clients: settings, credentials from the environment, forks, and what errors mean.

obstore takes credentials and endpoints from the environment by itself (``AWS_*``, ``GOOGLE_*``, ``AZURE_*``; the
list is in docs/storage.md). It is imported at the first request, so that local work never pays for it.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from distckpt.config import ObjectStoreConfig
from distckpt.errors import ConfigError, NotFound, StoreError

if TYPE_CHECKING:
    from obstore.store import AzureStore, GCSStore, S3Store

    Client = S3Store | GCSStore | AzureStore

SERVICES: Final = {
    "s3": ("S3", "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL"),
    "gs": ("Google Cloud Storage", "GOOGLE_APPLICATION_CREDENTIALS"),
    "az": ("Azure Blob Storage", "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY"),
}
"""URL scheme to the service's name and the variables to look at first when it refuses."""

_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist", re.IGNORECASE)
_NO_CREDENTIALS = re.compile(
    r"169\.254\.169\.254|169\.254\.170\.2|metadata\.google\.internal|Account must be specified"
)
_STATUS = re.compile(r"status code: (\d{3})")
_AGAIN = frozenset({408, 409, 425, 429})
_REFUSED = ("PermissionDeniedError", "UnauthenticatedError")
_HOPELESS = frozenset({*_REFUSED, "NotSupportedError", "NotImplementedError", "InvalidPathError", "FileNotFoundError",
                       "UnknownConfigurationKeyError", "ValueError", "TypeError"})  # fmt: skip

_talking: int | None = None
"""The process in which obstore has been at work; a fork of it must never use it."""


@dataclass(frozen=True, slots=True)
class Clients:
    """Two clients of one bucket. ``steady`` repeats what failed by itself; ``once`` asks a single time.

    ``once`` is for conditional puts, whose errors have to be resolved by reading back, not by asking again.
    Whatever happens, a request of ``steady`` ends within the deadline of the settings, one of ``once`` in a quarter.
    """

    steady: Client
    once: Client


def open_clients(scheme: str, bucket: str, settings: ObjectStoreConfig, url: str) -> Clients:
    """Make the clients; nothing is sent. ``ConfigError`` where the environment lacks what the service needs."""
    try:
        from obstore import store as services
    except ImportError as error:
        raise ConfigError(f"{url}: object stores need obstore: pip install obstore ({error})") from error
    kinds: dict[str, Any] = {"s3": services.S3Store, "gs": services.GCSStore, "az": services.AzureStore}
    request_s = settings.deadline_s / 4
    # Given as configuration and not as ``client_options``, which would drop what the environment says (allow_http).
    config = {"timeout": f"{round(request_s * 1000)}ms", "connect_timeout": f"{round(min(5.0, request_s) * 1000)}ms"}
    patient = {"max_retries": 10, "retry_timeout": timedelta(seconds=settings.deadline_s - request_s)}
    try:
        return Clients(
            kinds[scheme](bucket, config=config, retry_config=patient),
            kinds[scheme](bucket, config=config, retry_config={"max_retries": 0}),
        )
    except Exception as error:
        what = f"{url}: {SERVICES[scheme][0]} cannot be used: {reason_of(error)}; check {SERVICES[scheme][1]}"
        raise ConfigError(what) from error


def check_process(url: str) -> None:
    """Refuse to use obstore in a fork of a process that has used it: its threads are not there, and it would hang."""
    global _talking
    if _talking is None:
        _talking = os.getpid()
    elif _talking != os.getpid():
        raise StoreError(
            errno.EOPNOTSUPP,
            f"this process was forked from one ({_talking}) that had used an object store, whose threads did not come "
            "along; start processes by spawn (torchrun does), or fork before the first use",
            url,
        )


def reason_of(error: BaseException) -> str:
    """Return the first lines of an obstore error, in one line, without its debugging output."""
    text = " ".join(str(error).partition("\n\nDebug source")[0].split())
    return text if len(text) <= 500 else f"{text[:500]}…"


def is_hopeless(error: BaseException) -> bool:
    """Whether asking again cannot help: refused, malformed, unsupported, no such bucket."""
    if type(error).__name__ in _HOPELESS:
        return True
    status = _status(error)
    return status is not None and status not in _AGAIN and status < 500


def is_past_the_end(error: BaseException) -> bool:
    """Whether a read failed because its range begins at or after the end of the object."""
    return _status(error) == 416


def refuses_conditions(error: BaseException) -> bool:
    """Whether the store says that it has no conditional put."""
    return type(error).__name__ in ("NotSupportedError", "NotImplementedError") or _status(error) == 501


def _status(error: BaseException) -> int | None:
    found = _STATUS.search(str(error))
    return None if found is None else int(found[1])


def object_error(error: BaseException, operation: str, where: str, scheme: str) -> StoreError:
    """Return the ``StoreError`` for what obstore raised while doing ``operation`` on the URL ``where``."""
    if isinstance(error, StoreError):
        return error
    text = str(error)
    service, variables = SERVICES[scheme]
    if _NO_BUCKET.search(text):
        return StoreError(errno.ENXIO, f"{operation}: there is no such bucket ({service}); check the URL", where)
    if isinstance(error, FileNotFoundError):
        return NotFound(errno.ENOENT, f"{operation}: no such object", where)
    if type(error).__name__ in _REFUSED or _status(error) in (401, 403):
        advice = f"{service} refused it: check {variables} and the rights on the bucket"
        return StoreError(errno.EACCES, f"{operation}: {advice} ({reason_of(error)})", where)
    if _NO_CREDENTIALS.search(text):
        advice = f"no credentials for {service} were found: set {variables}"
        return StoreError(errno.EACCES, f"{operation}: {advice} ({reason_of(error)})", where)
    if type(error).__name__ == "InvalidPathError":
        return StoreError(errno.EINVAL, f"{operation}: no name for an object: {reason_of(error)}", where)
    advice = "check the network, the endpoint and the service's health; DISTCKPT_STORE_DEADLINE_S sets how long to try"
    return StoreError(errno.EIO, f"{operation}: {reason_of(error)} ({advice})", where)
