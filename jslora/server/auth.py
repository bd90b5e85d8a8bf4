"""Who is asking, and what they may see.

Every router but the one of the probes depends on the key, so the check goes by the matched route
and never by the text of a URL. Only digests of the keys are kept, and all of them are compared
every time, in constant time.
"""

import hashlib
import hmac

from jslora.config import AuthSection, Key
from jslora.errors import JsloraError, Unauthorized

_EVERYTHING = Key(admin=True)


class Forbidden(JsloraError):
    """The key is valid but lacks the right to do this."""

    status = 403
    type = "permission_error"


class KeyRing:
    """The configured keys; without any, whoever reaches the server may do everything."""

    def __init__(self, section: AuthSection) -> None:
        self._keys = [
            (_digest(secret.encode()), key) for secret, key in (section.keys or {}).items()
        ]
        self._open = section.keys is None

    def identify(self, authorization: str) -> Key:
        """The rights of the key in an `Authorization: Bearer …` header.

        Raises:
            Unauthorized: there is none, or it is not configured.
        """
        if self._open:
            return _EVERYTHING
        scheme, _, secret = authorization.partition(" ")
        # The header was decoded as latin-1, which keeps every byte.
        digest, found = _digest(secret.strip().encode("latin-1")), None
        for known, key in self._keys:
            if hmac.compare_digest(known, digest):
                found = key
        if found is None or scheme.lower() != "bearer":
            raise Unauthorized("no valid API key; send it as Authorization: Bearer KEY")
        return found


def may_use(key: Key, adapter: str) -> bool:
    """Whether an adapter exists as far as this key is concerned."""
    return key.adapters == "all" or adapter in key.adapters


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
