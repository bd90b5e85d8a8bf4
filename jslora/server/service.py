"""What the routes share: configuration, engine, tokenizer, keys, metrics; and the names it serves.

A name is the base's, an adapter's that the caller may see, or unknown: nothing falls back to the
base, and an adapter of somebody else looks like one that does not exist.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from jslora.config import EngineConfig, Key
from jslora.errors import InvalidRequest, JsloraError, Unavailable, UnknownModel
from jslora.logs import printable
from jslora.request import AdapterInfo, EngineInfo
from jslora.server.auth import KeyRing, may_use
from jslora.server.client import EngineClient
from jslora.server.metrics import Metrics
from jslora.tokenizer import Tokenizer

CHARS_PER_TOKEN = 16
TOKENIZER_THREADS = 2


class Draining(Unavailable):
    """The server finishes what it runs and takes nothing new; another one may."""


@dataclass(slots=True)
class Service:
    """One server."""

    config: EngineConfig
    client: EngineClient
    tokenizer: Tokenizer
    keys: KeyRing
    metrics: Metrics
    started: int
    draining: bool = False
    _pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(TOKENIZER_THREADS, "tokenizer")
    )

    @property
    def base(self) -> str:
        """The base model's name."""
        return self.config.model.served_name

    def engine(self) -> EngineInfo:
        """What the engine said of itself.

        Raises:
            Draining: the server is about to stop.
            Unavailable, EngineGone: as `EngineClient.engine`.
        """
        if self.draining:
            raise Draining("the server is shutting down")
        return self.client.engine()

    def adapters(self, key: Key) -> list[AdapterInfo]:
        """The adapters this key may see, by name."""
        found = (info for name, info in self.client.adapters.items() if may_use(key, name))
        return sorted(found, key=lambda info: info.name)

    def adapter(self, model: str, key: Key) -> str | None:
        """The adapter that `model` names; None for the base.

        Raises:
            UnknownModel: neither is visible to the caller under this name.
        """
        if model == self.base:
            return None
        info = self.client.adapters.get(model)
        if info is None or info.state == "draining" or not may_use(key, model):
            raise UnknownModel(f"the model {printable(model)!r} does not exist", param="model")
        return model

    async def encode(self, text: str, max_tokens: int, special: bool = True) -> list[int]:
        """Tokenize on a thread, so that long text holds up nobody else.

        Raises:
            InvalidRequest: the text is too long to be `max_tokens` tokens.
        """
        self._bound(len(text), max_tokens)
        return await self._call(self.tokenizer.encode, text, special)

    async def decode(self, ids: list[int]) -> str:
        """The text of token ids, as `encode` on a thread."""
        return await self._call(self.tokenizer.decode, ids)

    async def render(
        self, messages: list[dict[str, str]], max_tokens: int, generate: bool
    ) -> list[int]:
        """Apply the chat template and tokenize.

        Raises:
            InvalidRequest: the text is too long, or the template refuses the messages.
        """
        self._bound(sum(len(message["content"]) for message in messages), max_tokens)
        return await self._call(self.tokenizer.apply_chat_template, messages, generate)

    def _bound(self, chars: int, max_tokens: int) -> None:
        if chars > max_tokens * CHARS_PER_TOKEN:
            raise InvalidRequest(
                f"the prompt has {chars} characters; at most {max_tokens * CHARS_PER_TOKEN} can "
                f"fit the {max_tokens} tokens of this model"
            )

    async def _call[Out](self, function: Callable[..., Out], *arguments: object) -> Out:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, function, *arguments)


def openai_error(error: JsloraError) -> dict[str, dict[str, object]]:
    """An error as OpenAI's clients expect it."""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.status,
        }
    }
