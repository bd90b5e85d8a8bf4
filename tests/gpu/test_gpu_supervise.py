"""Sections run in order, at once where they time nothing, within the budget, and survive a kill."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jslora.gpu.supervise import (
    Document,
    Group,
    Supervisor,
    Task,
    environment,
    first_group,
    groups,
    only,
    unmatched,
)

# Stands for a section's process: its name says what it does.
CHILD = """
import json, os, sys, time
name = sys.argv[1]
say = lambda **fields: print(json.dumps({"section": name, "kind": "x", **fields}), flush=True)
say(flags=os.environ.get("XLA_FLAGS"), seconds=float(sys.argv[3]), options=sys.argv[4:])
if name == "hangs":
    time.sleep(60)
if name == "starved":
    os.kill(os.getpid(), 9)
if name == "crashes":
    os.abort()
say(ended=time.time())
"""


def supervise(
    tmp_path: Path, todo: list[Group], seconds: float = 100.0, **options: Any
) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    log = (tmp_path / "log").open("wb")
    document = Document(tmp_path / "gpu_check.json", {"started": "now"})
    with log:
        Supervisor(
            document, log, seconds, said.append, (sys.executable, "-c", CHILD), **options
        ).run(todo)
    return json.loads(document.path.read_text()), said


def test_records_and_ends_of_sections_are_on_disk(tmp_path: Path) -> None:
    tasks = Task("a", 30, "--xla_x", {}, ("--tiny",)), Task("b", 30)
    found, said = supervise(tmp_path, [(task,) for task in tasks])
    assert [record["section"] for record in found["records"]] == ["a", "a", "b", "b"]
    first = found["records"][0]
    assert first["options"] == ["--tiny"] and "--xla_x" in first["flags"]
    assert first["seconds"] == 30
    assert found["sections"]["a"]["code"] == 0 and found["sections"]["a"]["records"] == 2
    assert found["started"] == "now" and [text.split(":")[0] for text in said] == ["a", "b"]


def test_a_crash_ends_one_section_only(tmp_path: Path) -> None:
    found, said = supervise(tmp_path, [(Task("crashes", 30),), (Task("after", 30),)])
    assert found["sections"]["crashes"] | {"seconds": 0} == {
        "seconds": 0, "records": 1, "code": -6, "killed": False
    }  # fmt: skip
    assert found["sections"]["after"]["code"] == 0 and "exit code -6" in said[0]


def test_a_section_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jslora.gpu.supervise.GRACE_SECONDS", 0.5)
    started = time.monotonic()
    found, said = supervise(tmp_path, [(Task("hangs", 0.5),)])
    assert time.monotonic() - started < 30
    assert found["sections"]["hangs"]["code"] == -9
    assert found["sections"]["hangs"]["killed"] and "(killed)" in said[0]
    assert len(found["records"]) == 1, "what it recorded before is kept"


def test_who_is_killed_by_another_has_crashed(tmp_path: Path) -> None:
    """As the system does when memory is short."""
    found, said = supervise(tmp_path, [(Task("starved", 30),)])
    assert found["sections"]["starved"]["code"] == -9
    assert not found["sections"]["starved"]["killed"] and "exit code -9" in said[0]


def test_half_a_record_is_left_out(tmp_path: Path) -> None:
    """As when a process is killed while it writes."""
    code = """import sys; print('{"section": "cut", "kind": "x"}\\n{"section": "c', end="")"""
    document = Document(tmp_path / "gpu_check.json", {})
    command = (sys.executable, "-c", code)
    with (tmp_path / "log").open("wb") as log:
        Supervisor(document, log, 100, lambda _: None, command).run([(Task("cut", 9),)])
    assert document.records == [{"section": "cut", "kind": "x"}]


def test_what_there_is_no_time_for_is_skipped_by_name(tmp_path: Path) -> None:
    now = iter([0.0, 0.0, 0.0, 0.0, 90.0] + [95.0] * 20)
    found, _ = supervise(
        tmp_path, [(Task("a", 30),), (Task("b", 30), Task("c", 30))], clock=lambda: next(now)
    )
    assert "code" in found["sections"]["a"]
    assert found["sections"]["b"] == found["sections"]["c"] == {"skipped": True}


def test_a_section_is_not_started_with_less_than_it_needs(tmp_path: Path) -> None:
    group = Task("a", 30, least=45), Task("b", 30, least=35)
    found, said = supervise(tmp_path, [group], seconds=50)
    assert found["sections"]["a"] == {"skipped": True} and found["sections"]["b"]["code"] == 0
    assert said[0] == "a: skipped, too little time left"


def test_a_section_gets_no_more_than_is_left(tmp_path: Path) -> None:
    found, _ = supervise(tmp_path, [(Task("a", 300),)], seconds=50)
    assert 35 < found["records"][0]["seconds"] <= 40


def test_sections_of_a_group_run_at_once(tmp_path: Path) -> None:
    group = tuple(Task(name, 30) for name in "abc")
    found, _ = supervise(tmp_path, [group])
    assert {record["section"] for record in found["records"]} == {"a", "b", "c"}


def test_flags_are_added_to_those_that_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_mine")
    assert environment(Task("a", 1, "--xla_more"))["XLA_FLAGS"] == "--xla_mine --xla_more"
    assert environment(Task("a", 1, "", {"X": "1"}))["X"] == "1"
    monkeypatch.delenv("XLA_FLAGS")
    assert "XLA_FLAGS" not in environment(Task("a", 1))


@pytest.mark.parametrize(
    ("chosen", "other"), [("triton", "pallas"), ("pallas", "triton"), ("reference", "pallas")]
)
def test_the_chosen_implementation_comes_first(chosen: str, other: str, tmp_path: Path) -> None:
    names = [task.section for group in groups(tmp_path, chosen, tmp_path / "x", tiny=True)
             for task in group]  # fmt: skip
    every = ["correctness:triton", "correctness:pallas", "correctness:reference"]
    assert names[:5] == ["ceilings", *every, f"step:{chosen}"]
    kinds = ("lora", "attention", "baselines")
    assert names[5:8] == [f"{kind}:{chosen}" for kind in kinds]
    assert names.index(f"step:{other}") > 8
    assert len(names) == len(set(names))
    for task in (*first_group(tmp_path, tiny=True)[0], *groups(tmp_path, chosen, tmp_path,
                                                              tiny=True)[1]):  # fmt: skip
        assert task.options[-1] == "--tiny"


def test_the_chosen_implementations_shares_fit_into_eight_minutes(tmp_path: Path) -> None:
    todo = first_group(tmp_path, tiny=False) + groups(tmp_path, "triton", tmp_path, tiny=False)
    shares = {group[-1].section: max(task.seconds for task in group) for group in todo}
    others = [name for name in shares if name.endswith(":pallas")]
    assert len(others) == 3
    assert sum(seconds for name, seconds in shares.items() if name not in others) <= 470
    assert all(0 < task.least < task.seconds for group in todo for task in group)


def test_only_some_sections(tmp_path: Path) -> None:
    todo = groups(tmp_path, "triton", tmp_path, tiny=False)
    assert only(todo, None) == todo
    kept = [task.section for group in only(todo, "step,correctness:p") for task in group]
    assert kept == ["correctness:pallas", "step:triton", "step:pallas"]
    assert unmatched(todo, "step,correctness:p") == []
    assert unmatched(todo, "step,typo,baselines:pallas") == ["typo", "baselines:pallas"]
    assert unmatched(todo, ",") == [","]
