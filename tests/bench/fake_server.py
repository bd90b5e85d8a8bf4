"""Stands in for scripts/serve.py: a token takes a millisecond, and adapters are only counted.

Its device has room for `ROOM` adapters of 3 pages. Names that start with "called" and end with an
odd digit cannot be loaded. What it was asked is written to the file that is its argument, a line
for each call, when it is told to stop.
"""

import asyncio
import json
import socket
import sys
from collections import OrderedDict
from pathlib import Path

from aiohttp import web

ROOM = 4
PAGES = 1 + 2 * 2 + 3 * ROOM


class Fake:
    def __init__(self, log: Path) -> None:
        self.adapters = {f"adapter-{i}": i % 2 for i in range(10)}
        self.device: OrderedDict[str, None] = OrderedDict()
        self.loads = self.evictions = 0
        self.log = log
        self.calls: list[dict[str, object]] = []

    async def list_adapters(self, request: web.Request) -> web.Response:
        data = [
            {"name": name, "pages": 3, "bytes_disk": packed}
            for name, packed in self.adapters.items()
        ]
        return web.json_response({"object": "list", "data": data})

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            text=f'jslora:lora_loads_total{{model_name="base"}} {self.loads}.0\n'
            f'jslora:lora_evictions_total{{model_name="base"}} {self.evictions}.0\n'
            'jslora:num_preemptions_total{model_name="base"} 0.0\n'
            f'jslora:cache_config_info{{page_size="16",num_pages="{PAGES}"}} 1.0\n'
        )

    async def load(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.calls.append(body)
        name, path = body["lora_name"], body["lora_path"]
        odd = name.startswith("called") and name[-1] in "13579"
        if name in self.adapters or odd or not path.startswith("wide/rank-4/"):
            return web.json_response({"error": f"{name} cannot be loaded"}, status=400)
        self.adapters[name] = 1
        return web.Response()

    async def unload(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.calls.append(body)
        del self.adapters[body["lora_name"]]
        self.device.pop(body["lora_name"], None)
        return web.Response()

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.calls.append(body)
        if body["model"] != "base":
            if body["model"] not in self.adapters:
                return web.json_response({"error": "no such model"}, status=404)
            self._use(body["model"])
        await asyncio.sleep(body["max_tokens"] / 1000)
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        events = [{"choices": [{"text": "a"}]}] * body["max_tokens"]
        events += [{"choices": [], "usage": usage}]
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        return web.Response(text=text, content_type="text/event-stream")

    def _use(self, name: str) -> None:
        self.loads += name not in self.device
        self.device[name] = None
        self.device.move_to_end(name)
        while len(self.device) > ROOM:
            self.device.popitem(last=False)
            self.evictions += 1

    async def stopped(self, app: web.Application) -> None:
        self.log.write_text("".join(json.dumps(call) + "\n" for call in self.calls))


async def make(log: Path) -> web.Application:
    fake, app = Fake(log), web.Application()
    app.router.add_get("/v1/adapters", fake.list_adapters)
    app.router.add_get("/metrics", fake.metrics)
    app.router.add_post("/v1/load_lora_adapter", fake.load)
    app.router.add_post("/v1/unload_lora_adapter", fake.unload)
    app.router.add_post("/v1/completions", fake.complete)
    app.on_cleanup.append(fake.stopped)
    return app


if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", 0))
    url = "http://{}:{}".format(*listener.getsockname())
    print("packing: 100 %", f"Ready in 0.1 s: {url} (base + 10 adapters)", sep="\n", flush=True)
    web.run_app(make(Path(sys.argv[1])), sock=listener, print=None)
