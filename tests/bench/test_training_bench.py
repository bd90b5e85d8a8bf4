"""The comparison of trainers: processes that step in turn, and the table that is made of them."""

import sys

import pytest

from jslora.bench.training import Failed, Stepper, measure

FACTS = '{"model": "m", "parameters": 1000, "trained": 10, "batch": {"rows": 2}}'


def stepper(name: str, *seconds: float) -> Stepper:
    """A process whose steps of 100 tokens say that they took these seconds."""
    code = f"""
import json, sys
print("some library says hello")
print({FACTS!r}, flush=True)
left = {list(seconds)}
for line in sys.stdin:
    word = line.strip()
    if word == "step":
        if not left:
            sys.exit(7)
        answer = {{"seconds": left.pop(0), "cpu": 2.0, "tokens": 100, "loss": len(left)}}
    else:
        answer = {{"rate": 8e6}} if word == "rate" else {{"bytes": 3 * 2**30}}
    print(json.dumps(answer), flush=True)
"""
    return Stepper(name, [sys.executable, "-c", code])


def test_the_table_has_medians_without_the_first_step() -> None:
    ours, theirs = stepper("ours", 90, 0.1, 0.4, 0.2), stepper("theirs", 1, 0.5, 0.5, 0.5)
    lines = measure(ours, theirs, 3).splitlines()
    assert "3 steps" in lines[0] and "0 GFLOP/s" in lines[0]
    assert lines[4] == "| products alone (floor) | 2000 | 1 |  |  |  |"
    assert lines[5] == "| ours | 500 | 0.25 | 50 | 3.00 GiB | 0.0000 |"
    assert lines[6] == "| theirs | 200 | 0.10 | 50 | 3.00 GiB | 0.0000 |"
    assert lines[-1] == "2.50 times theirs; 1.00 times, a CPU second"


def test_ours_alone_and_a_process_that_ends() -> None:
    assert "times" not in measure(stepper("ours", 1, 1), None, 1)
    with pytest.raises(Failed, match="theirs ended with exit code 7"):
        measure(stepper("ours", 1, 1, 1), stepper("theirs", 1), 2)
