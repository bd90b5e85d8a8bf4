"""What training publishes to a real front end is served; its refusals are told in its words."""

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from server_harness import Server

from jslora.training import publish
from jslora.training.publish import PublishError

KEYS = {"keys": {"boss": {"admin": True}, "guest": {}}}


def test_an_adapter_is_published_and_again(start: Callable[..., Server], tmp_path: Path) -> None:
    url = start({"auth": KEYS}).url
    with pytest.raises(PublishError, match=r"answers 401: "):
        publish.Server(url, "nobody").check()
    publish.Server(url, "guest").check()
    with pytest.raises(PublishError, match=r"pirate is in .* not published: .* answers 40[13]: "):
        publish.Server(url, "guest").publish("pirate", tmp_path)
    boss = publish.Server(url, "boss")
    for _ in range(2):  # the second in place of the first
        boss.publish("pirate", tmp_path)
    with pytest.raises(PublishError, match="answers 400: "):
        boss.publish("bad", tmp_path / "bad")
    listed = httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer guest"}).json()
    assert "pirate" in [model["id"] for model in listed["data"]]
