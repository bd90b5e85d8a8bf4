"""A jslora server for the length of a measurement: start it, steer its adapters, read its counters.

Invariants: the server listens on a port of its own and is gone when the block ends, however it
ends. Its log goes to standard error. Host only: no jax.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from jslora.bench.stream import printable
from jslora.errors import Unavailable

STOP_SECONDS = 60.0
TIMEOUT_SECONDS = 120.0
# The engine tells its counters about once a second.
PULSE_SECONDS = 1.2
_READY = re.compile(rb"Ready in .*: (http://\S+) ")


@contextlib.asynccontextmanager
async def serving(command: Sequence[str]) -> AsyncIterator[str]:
    """Run `scripts/serve.py` as `command` says and yield its URL once it is ready.

    Raises:
        Unavailable: it ended before it was ready.
    """
    # A session of its own keeps a Ctrl-C on the terminal from it: it is stopped below.
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    try:
        async for line in process.stdout:
            if found := _READY.search(line):
                break
        else:
            raise Unavailable(f"the server ended with exit code {await process.wait()}")
        rest = asyncio.create_task(process.stdout.read())  # so that the pipe never fills
        yield found[1].decode()
        rest.cancel()
    finally:
        await _stop(process)


async def _stop(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()


class Adapter(msgspec.Struct):
    """What is read of one entry of `/v1/adapters`."""

    name: str
    pages: int
    bytes_disk: int = 0


class _Adapters(msgspec.Struct):
    data: list[Adapter]


class Counters(msgspec.Struct, frozen=True):
    """What the engine has counted since it started, and the shape of its pool."""

    loads: int
    evictions: int
    preemptions: int
    pages: int
    page_size: int

    @classmethod
    def parse(cls, text: str) -> "Counters":
        """Read what `/metrics` says; KeyError names a metric that is not there."""
        families = text_string_to_metric_families(text)
        samples = {sample.name: sample for family in families for sample in family.samples}
        shape = samples["jslora:cache_config_info"].labels
        return cls(
            loads=int(samples["jslora:lora_loads_total"].value),
            evictions=int(samples["jslora:lora_evictions_total"].value),
            preemptions=int(samples["jslora:num_preemptions_total"].value),
            pages=int(shape["num_pages"]),
            page_size=int(shape["page_size"]),
        )


class Control:
    """Calls to a server that no user's request makes; an async context manager."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        self._session = aiohttp.ClientSession(self._url, timeout=timeout)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def adapters(self) -> list[Adapter]:
        """The registered adapters, by name.

        Raises:
            Unavailable: as every call here, if the server does not answer with 200.
        """
        listed = msgspec.json.decode(await self._call("GET", "/v1/adapters"), type=_Adapters)
        return sorted(listed.data, key=lambda adapter: adapter.name)

    async def counters(self) -> Counters:
        """What has been counted until now."""
        await asyncio.sleep(PULSE_SECONDS)
        return Counters.parse((await self._call("GET", "/metrics")).decode())

    async def load(self, name: str, path: str) -> None:
        """Register the adapter in the folder `path` below the server's roots."""
        await self._call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    async def unload(self, name: str) -> None:
        """Forget an adapter."""
        await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        try:
            async with self._session.request(method, path, json=body) as response:
                content = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(f"{path}: {printable(str(error) or repr(error))}") from None
        if response.status != 200:
            raise Unavailable(f"{path}: HTTP {response.status}: {printable(content)}")
        return content
