"""Put adapters that were just trained on a running server, under traffic.

The server reads the folder itself, so it must see it below one of its `adapters.roots`. A name that
it serves already moves to the new weights; requests that run end on the old ones.
Host only: no jax.
"""

import contextlib
import http.client
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jslora.errors import ConfigError, JsloraError

_SECONDS = 120.0
_MAX_ANSWER = 2**20
_MAX_TOLD = 1000


class PublishError(JsloraError):
    """A server did not take an adapter, which stays where it was written."""

    status = 502
    type = "publish_error"


@dataclass(frozen=True, slots=True)
class Server:
    """Where to publish: a base URL without `/v1`, and the API key of an administrator if any."""

    url: str
    key: str | None = field(default=None, repr=False)

    def check(self) -> None:
        """See that the server answers and knows the key, before anything slow begins.

        Raises:
            ConfigError: the URL is none.
            PublishError: it does not.
        """
        self._call("GET", "/v1/models", None)

    def publish(self, name: str, folder: Path) -> None:
        """Serve the adapter in `folder` as `name`.

        Raises:
            ConfigError: the URL is none.
            PublishError: it cannot be reached or refuses, with its reason.
        """
        body = {"lora_name": name, "lora_path": str(folder.resolve()), "load_inplace": True}
        try:
            self._call("POST", "/v1/load_lora_adapter", body)
        except PublishError as error:
            raise PublishError(f"{name} is in {folder}, but not published: {error}") from None

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> None:
        connection, prefix = self._connection()
        headers = {"content-type": "application/json"}
        if self.key is not None:
            headers["authorization"] = f"Bearer {self.key}"
        content = None if body is None else json.dumps(body)
        try:
            connection.request(method, prefix + path, content, headers)
            answer = connection.getresponse()
            told = answer.read(_MAX_ANSWER)
        except (OSError, http.client.HTTPException) as error:
            raise PublishError(f"{self.url} cannot be reached: {error or repr(error)}") from None
        finally:
            connection.close()
        if answer.status != 200:
            raise PublishError(f"{self.url} answers {answer.status}: {_reason(told)}")

    def _connection(self) -> tuple[http.client.HTTPConnection, str]:
        """A connection, which follows no redirects with the key, and the URL's own path."""
        if "@" in self.url:  # with what may be a password, so it is not told
            raise ConfigError("the URL names a user; http://host:port or https://host is expected")
        try:
            parts = urlsplit(self.url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"{self.url!r} is no URL: {error}") from None
        usable = parts.scheme in ("http", "https") and self.url.isascii()
        if not usable or not host or parts.query:
            raise ConfigError(f"{self.url!r}: http://host:port or https://host is expected")
        if parts.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=_SECONDS), parts.path.rstrip("/")
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(host, port, timeout=_SECONDS, context=context)
        return connection, parts.path.rstrip("/")


def key_from(environment: Mapping[str, str], variable: str | None) -> str | None:
    """The API key that an environment variable holds; None where none is named.

    Raises:
        ConfigError: the variable is not set, empty, or holds what no key can.
    """
    if variable is None:
        return None
    if not (key := environment.get(variable, "").strip()):
        raise ConfigError(f"the environment variable {variable}, for the API key, is not set")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the environment variable {variable} holds more than printable ASCII")
    return key


def _reason(told: bytes) -> str:
    """The message of an error as the server words it, or the beginning of whatever came."""
    text = told.decode("utf-8", errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        text = str(json.loads(text)["error"]["message"])
    return "".join(c if c.isprintable() else " " for c in text[:_MAX_TOLD])
