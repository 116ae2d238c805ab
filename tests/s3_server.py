"""An S3 server on loopback for the tests: moto behind a layer that counts requests and injects faults.

``python s3_server.py`` prints its port and ends with its parent. ``POST /_control`` takes a JSON command; the commands
are the methods of ``Control``. Faults happen where a real network or service has them: before or after moto has
stored something.
"""

from __future__ import annotations

import ctypes
import json
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote

from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import make_server

Environ = dict[str, Any]
Start = Callable[..., Any]


class Control:
    """What tests may ask of the server."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rules: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.running, self.most, self.delay = 0, 0, 0.0

    @property
    def backend(self) -> Any:
        return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]

    def bucket(self, name: str) -> None:
        """Make a bucket."""
        self.backend.create_bucket(name, "us-east-1")

    def keys(self, name: str) -> list[str]:
        """All keys of a bucket, temporary ones too."""
        return sorted(self.backend.get_bucket(name).keys)

    def uploads(self, name: str) -> list[str]:
        """Keys of multipart uploads that were neither completed nor aborted."""
        return sorted(upload.key_name for upload in self.backend.get_bucket(name).multiparts.values())

    def flip(self, name: str, key: str, offset: int) -> None:
        """Flip the bits of one stored byte."""
        stored = self.backend.get_bucket(name).keys[key]
        value = bytearray(stored.value)
        value[offset] ^= 0xFF
        stored.value = bytes(value)

    def fill(self, name: str, keys: list[str]) -> None:
        """Store empty objects under many keys."""
        for key in keys:
            self.backend.put_object(name, key, b"")

    def fault(self, action: str, method: str = "", match: str = "", times: int = 1, skip: int = 0) -> None:
        """Do ``action`` to the next ``times`` requests (0: all) whose method and URL match, after ``skip`` of them.

        Actions: ``drop`` (no reply, not processed), ``lose`` (processed, no reply), ``cut`` (half of the reply),
        ``409`` (that status, not processed), ``500 after`` (processed), ``unconditional`` (if-none-match is ignored).
        """
        with self.lock:
            self.rules.append({"action": action, "method": method, "match": match, "times": times or -1, "skip": skip})

    def watch(self, delay: float = 0.0) -> None:
        """Forget faults and counts; from now on every request takes ``delay`` seconds more."""
        with self.lock:
            self.rules, self.requests, self.most, self.delay = [], [], 0, delay

    def seen(self) -> dict[str, Any]:
        """The requests since ``watch`` as ``METHOD /bucket/key?query``, and how many were under way at once."""
        with self.lock:
            return {"requests": list(self.requests), "most": self.most}

    def action_for(self, method: str, url: str) -> str:
        with self.lock:
            for rule in self.rules:
                if rule["method"] in ("", method) and rule["match"] in url and rule["times"]:
                    if rule["skip"]:
                        rule["skip"] -= 1
                        continue
                    rule["times"] -= 1
                    return str(rule["action"])
        return ""


CONTROL = Control()
MOTO = DomainDispatcherApplication(create_backend_app)
CONDITIONAL = threading.Lock()  # moto looks, then stores: two threads could both win


def application(environ: Environ, start: Start) -> Iterable[bytes]:
    method, path, query = environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"]
    if path == "/_control":
        command = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        result = getattr(CONTROL, command.pop("do"))(**command)
        start("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(result).encode()]
    url = unquote(path) + (f"?{query}" if query else "")
    with CONTROL.lock:
        CONTROL.requests.append(f"{method} {url}")
        CONTROL.running += 1
        CONTROL.most = max(CONTROL.most, CONTROL.running)
    try:
        time.sleep(CONTROL.delay)
        return answer(environ, start, CONTROL.action_for(method, url))
    finally:
        with CONTROL.lock:
            CONTROL.running -= 1


def answer(environ: Environ, start: Start, action: str) -> Iterable[bytes]:
    if action == "drop":
        return hang_up(environ)
    if action.isdigit():
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start(f"{action} Injected", [("Content-Type", "application/xml")])
        return [b"<Error><Code>Injected</Code><Message>injected by the test</Message></Error>"]
    if action == "unconditional":
        environ.pop("HTTP_IF_NONE_MATCH", None)
    said: list[Any] = []
    if "HTTP_IF_NONE_MATCH" in environ:
        with CONDITIONAL:
            body = b"".join(MOTO(environ, lambda *args: said.extend(args[:2])))
    else:
        body = b"".join(MOTO(environ, lambda *args: said.extend(args[:2])))
    if action == "lose":
        return hang_up(environ)
    if action.endswith(" after"):
        start(f"{action.removesuffix(' after')} Injected", [("Content-Type", "text/plain")])
        return [b"injected by the test"]
    start(said[0], said[1])
    if action == "cut":
        environ["wsgi.cut"] = True
        return [body[: len(body) // 2]]
    return [body]


def hang_up(environ: Environ) -> Iterable[bytes]:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionError("injected by the test")


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    logging.disable(logging.CRITICAL)
    sys.stderr = open("/dev/null", "w")  # noqa: SIM115 - tracebacks of injected faults
    server = make_server("127.0.0.1", 0, application, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
