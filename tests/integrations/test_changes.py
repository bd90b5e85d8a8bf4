"""The log of changes: who obeys what it lacks ends where those are who obeyed everything."""

import json

from hypothesis import given
from hypothesis import strategies as st

from jslora.integrations.changes import ChangeLog, HttpRequest

ADAPTERS = ["x", "y"]


class World:
    """The names a server would have: what it would answer 2xx happens, the rest does not."""

    def __init__(self, preloaded: frozenset[str]) -> None:
        self.adapters = {name: "as configured" for name in preloaded}
        self.aliases: dict[str, str] = {}

    def obey(self, call: HttpRequest) -> bool:
        body = json.loads(call.body or b"{}")
        if call.path == "/v1/load_lora_adapter":
            if body["lora_name"] in self.adapters and not body.get("load_inplace"):
                return False
            self.adapters[body["lora_name"]] = body["lora_path"]
            return True
        if call.path == "/v1/unload_lora_adapter":
            if body["lora_name"] in self.aliases.values():
                return False
            return self.adapters.pop(body["lora_name"], None) is not None
        name = call.path.rpartition("/")[2]
        if call.method == "DELETE":
            return self.aliases.pop(name, None) is not None
        if body["target"] not in self.adapters:
            return False
        self.aliases[name] = body["target"]
        return True


def post(path: str, **body: object) -> HttpRequest:
    return HttpRequest(method="POST", path=path, body=json.dumps(body).encode())


CALLS = st.one_of(
    st.builds(
        lambda name, path, again: post(
            "/v1/load_lora_adapter", lora_name=name, lora_path=path, load_inplace=again
        ),
        st.sampled_from(ADAPTERS), st.sampled_from(["p", "q", "r"]), st.booleans(),
    ),
    st.builds(
        lambda name: post("/v1/unload_lora_adapter", lora_name=name), st.sampled_from(ADAPTERS)
    ),
    st.builds(
        lambda name, target: HttpRequest(
            method="PUT", path=f"/v1/aliases/{name}", body=json.dumps({"target": target}).encode()
        ),
        st.sampled_from("ab"), st.sampled_from(ADAPTERS),
    ),
    st.builds(
        lambda name: HttpRequest(method="DELETE", path=f"/v1/aliases/{name}"), st.sampled_from("ab")
    ),
)  # fmt: skip


@given(st.lists(CALLS, max_size=20), st.integers(0, 20), st.frozensets(st.sampled_from(ADAPTERS)))
def test_who_joins_late_or_lags_comes_to_the_same(
    calls: list[HttpRequest], pause: int, preloaded: frozenset[str]
) -> None:
    log, world, lagging = ChangeLog(), World(preloaded), World(preloaded)
    seen = 0
    for index, call in enumerate(calls):
        if index == pause:
            for change in log.after(0):
                lagging.obey(change.call)
            seen = log.last
        if world.obey(call):
            log.add(call)
    for change in log.after(seen):
        lagging.obey(change.call)
    new = World(preloaded)
    for change in log.after(0):
        new.obey(change.call)
    for other in (lagging, new):
        assert (other.adapters, other.aliases) == (world.adapters, world.aliases)


def test_the_log_holds_one_change_of_an_adapter_and_passes_on_whole() -> None:
    log, copy = ChangeLog(), ChangeLog()
    for _ in range(5):
        log.add(post("/v1/load_lora_adapter", lora_name="x", lora_path="p"))
        log.add(post("/v1/unload_lora_adapter", lora_name="x"))
    copy.put(log.after(0))
    assert len(copy.after(0)) == 1 and copy.last == log.last == 10
    assert log.after(log.last) == []


def test_reading_is_no_change() -> None:
    for path in ("/v1/aliases/a", "/v1/load_lora_adapter"):
        assert not HttpRequest(method="GET", path=path).is_change
    assert not post("/v1/completions").is_change
    assert post("/v1/aliases/a/rollback").is_change
