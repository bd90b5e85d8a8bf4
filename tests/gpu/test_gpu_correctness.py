"""Right kernels are found right, and each way of being wrong is found and named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jslora.gpu import oracle
from jslora.gpu.cases import FULL, TINY
from jslora.gpu.correctness import Bench, Operation, check_attention, check_lora
from jslora.gpu.hard_cases import AttentionCase, LoraCase, attention_cases, lora_cases
from jslora.gpu.report import render
from jslora.gpu.session import Session
from jslora.gpu.supervise import Document
from pallas_kernels.launch import Kernels
from pallas_kernels.lora.api import add_lora
from pallas_kernels.lora.finish import Finish
from pallas_kernels.paged_attention.api import paged_attention

REFERENCE, PALLAS = (Kernels(name, name, "cpu") for name in ("reference", "pallas"))
LORA = {case.name: case for case in lora_cases(TINY)}
ATTENTION = {case.name: case for case in attention_cases(TINY)}
OWN, GAPS, BAD = (
    LORA[name]
    for name in (
        "every row its own adapter", "targets of their own, rows between without", "a bad adapter"
    )
)  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(TINY, REFERENCE)


def told(
    check: Callable[..., None], bench: Bench, case: LoraCase | AttentionCase, *operation: Operation
) -> dict[str, Any]:
    records: list[dict[str, Any]] = []
    check(Session("s", records.append, 60), bench, case, *operation)
    (record,) = records
    return record


@pytest.mark.parametrize("case", LORA)
def test_the_reference_is_right_in_every_case(bench: Bench, case: str) -> None:
    record = told(check_lora, bench, LORA[case])
    assert record["ok"] and 0 < record["error"] < 1e-5, record


@pytest.mark.parametrize("case", ATTENTION)
def test_the_references_attention_is_right_in_every_case(bench: Bench, case: str) -> None:
    record = told(check_attention, bench, ATTENTION[case])
    assert record["ok"] and 0 < record["error"] < 1e-5, record


def test_pallas_in_bfloat16() -> None:
    bench = Bench(replace(TINY, dtype="bfloat16"), PALLAS)
    record = told(check_lora, bench, GAPS)
    assert record["ok"] and record["dtype"] == "bfloat16" and record["error"] > 1e-4, record
    record = told(check_attention, bench, ATTENTION["decode"])
    assert record["ok"] and record["error"] > 1e-4, record


@pytest.mark.parametrize("case", [case for case in LORA if LORA[case].storages != ("full",)])
def test_pallas_with_integers(case: str) -> None:
    """Rows of TINY are too short for blocks of integers in words of 32 bits."""
    plan = replace(TINY, dtype="bfloat16", model=replace(TINY.model, hidden=128, kv_heads=4))
    record = told(check_lora, Bench(plan, PALLAS), LORA[case])
    assert record["ok"] and record["error"] > 1e-4, record


def test_the_cases_reach_the_far_end_of_a_pool_beyond_32_bits() -> None:
    pages = FULL.wide_numbers // FULL.page_numbers // 2
    assert (2 * pages - 1) * FULL.page_numbers > 2**31
    assert any(part.where == "top" for case in lora_cases(FULL) for part in case.parts)


# Wrong kernels -----------------------------------------------------------------------------------


def on_sums(wrong: Operation) -> Operation:
    """Wrong in the sums, right in what a step makes of them."""

    def operation(y: jax.Array, *rest: Any, **more: Any) -> jax.Array:
        return (wrong if more["finish"] is Finish.SUM else add_lora)(y, *rest, **more)

    return operation


@on_sums
def slightly_off(y: jax.Array, *rest: Any, **more: Any) -> jax.Array:
    return y + 1.0005 * (add_lora(y, *rest, **more) - y)


@on_sums
def one_row_off(y: jax.Array, *rest: Any, **more: Any) -> jax.Array:
    return add_lora(y, *rest, **more).at[2, 5].add(0.5)


@on_sums
def other_rows_touched(y: jax.Array, *rest: Any, **more: Any) -> jax.Array:
    return add_lora(y, *rest, **more).at[1].add(1e-6)


@on_sums
def nan_hidden(y: jax.Array, *rest: Any, **more: Any) -> jax.Array:
    return jnp.nan_to_num(add_lora(y, *rest, **more))


@on_sums
def nan_spread(y: jax.Array, *rest: Any, **more: Any) -> jax.Array:
    after = add_lora(y, *rest, **more)
    return after + 0 * jnp.sum(after)


@pytest.mark.parametrize(
    ("operation", "case", "fault"),
    [
        (slightly_off, OWN, None),
        (one_row_off, OWN, None),
        (other_rows_touched, GAPS, "1 rows without an adapter changed"),
        (nan_hidden, BAD, "weights that are no numbers were hidden"),
        (nan_spread, BAD, None),
    ],
)
def test_wrong_lora_is_found(
    bench: Bench, operation: Operation, case: LoraCase, fault: str | None
) -> None:
    record = told(check_lora, bench, case, operation)
    assert not record["ok"]
    if operation is nan_spread:
        assert record["error"] is None, "no number"
    elif fault:
        assert any(fault in text for text in record["faults"]), record["faults"]
    else:
        assert record["error"] > record["limit"]


def test_an_error_that_is_no_number_leaves_the_file_json(bench: Bench, tmp_path: Path) -> None:
    document = Document(tmp_path / "gpu_check.json", {"tiny": True})
    check_lora(Session("s", document.add, 60), bench, BAD, nan_spread)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(document.path.read_text(), parse_constant=refuse)
    assert found["records"][0]["error"] is None
    assert "error no number" in render(found)


@pytest.mark.parametrize("finish", [Finish.GATED, Finish.RESIDUAL])
def test_a_wrong_finish_is_found(bench: Bench, finish: Finish) -> None:
    def other_rows_unfinished(y: jax.Array, *rest: Any, **more: Any) -> jax.Array:
        after = add_lora(y, *rest, **more)
        return after.at[0].multiply(1.001) if more["finish"] is finish else after

    record = told(check_lora, bench, GAPS, other_rows_unfinished)
    assert not record["ok"] and 5e-4 < record["error"] < 2e-3, record


def test_a_kernel_that_changes_its_mind_is_found(bench: Bench) -> None:
    calls = iter(range(100))

    @on_sums
    def moody(y: jax.Array, *rest: Any, **more: Any) -> jax.Array:
        added = jnp.float32(1e-6) * jax.pure_callback(
            lambda: np.float32(next(calls)), jax.ShapeDtypeStruct((), jnp.float32)
        )
        return add_lora(y, *rest, **more) + added

    record = told(check_lora, bench, LORA["one adapter of the highest rank"], moody)
    assert any("a second run gave other bits" in text for text in record["faults"])


def one_position_too_many(q: Any, pages: Any, first: Any, rows: Any, **more: Any) -> jax.Array:
    rows = rows._replace(context=jnp.where(rows.context > 0, rows.context + 1, 0))
    return paged_attention(q, pages, first, rows, **more)


def one_position_too_few(q: Any, pages: Any, first: Any, rows: Any, **more: Any) -> jax.Array:
    rows = rows._replace(context=jnp.maximum(rows.context - 1, 1))
    return paged_attention(q, pages, first, rows, **more)


def another_layer(q: Any, pages: Any, first: Any, rows: Any, **more: Any) -> jax.Array:
    return paged_attention(q, pages, first - first, rows, **more)


@pytest.mark.parametrize("case", ["decode", "prefill beside decode"])
@pytest.mark.parametrize("operation", [one_position_too_many, one_position_too_few, another_layer])
def test_wrong_attention_is_found(bench: Bench, operation: Operation, case: str) -> None:
    record = told(check_attention, bench, ATTENTION[case], operation)
    assert not record["ok"]
    assert record["error"] is None or record["error"] > record["limit"]  # None: it read poison


# The oracle --------------------------------------------------------------------------------------


def test_the_oracle_of_attention_token_by_token() -> None:
    random = np.random.default_rng(0)
    q, kv = random.normal(size=(3, 4, 8)), random.normal(size=(7, 2, 2, 8))
    found = oracle.attend(q, kv, 0.3)
    for token in range(3):
        for head in range(4):
            keys, values = kv[: 5 + token, 0, head // 2], kv[: 5 + token, 1, head // 2]
            weights = np.exp(0.3 * keys @ q[token, head])
            wanted = weights @ values / weights.sum()
            np.testing.assert_allclose(found[token, head], wanted, rtol=1e-12)


def test_an_error_is_that_of_the_worst_token() -> None:
    wanted = np.array([[3.0, 4.0], [0.0, 1.0], [np.nan, 0]])
    found = np.array([[3.0, 4.5], [0.0, 1.0], [7.0, 0]])
    assert oracle.worst(found, wanted, np.array([0, 1])) == 0.1
    assert oracle.worst(found, wanted, np.array([0, 1, 2])) == np.inf, "NaN never passes"
    assert oracle.worst(found, wanted, np.array([], int)) == 0
