"""What the routes share: configuration, engine, names, tokenizer, keys, metrics.

Tokenizing runs on threads of its own, so that long text holds up nobody else.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from jslora.config import EngineConfig
from jslora.errors import InvalidRequest, JsloraError, Unavailable
from jslora.request import EngineInfo
from jslora.server.auth import KeyRing
from jslora.server.client import EngineClient
from jslora.server.metrics import Metrics
from jslora.server.names import Names
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
    names: Names
    tokenizer: Tokenizer
    keys: KeyRing
    metrics: Metrics
    started: int
    draining: bool = False
    _pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(TOKENIZER_THREADS, "tokenizer")
    )

    def engine(self) -> EngineInfo:
        """What the engine said of itself.

        Raises:
            Draining: the server is about to stop.
            Unavailable, EngineGone: as `EngineClient.engine`.
        """
        if self.draining:
            raise Draining("the server is shutting down")
        return self.client.engine()

    async def encode(self, text: str, max_tokens: int, special: bool = True) -> list[int]:
        """Tokenize.

        Raises:
            InvalidRequest: the text is too long to be `max_tokens` tokens.
        """
        self._bound(len(text), max_tokens)
        return await self._call(self.tokenizer.encode, text, special)

    async def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
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
