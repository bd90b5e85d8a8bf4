"""An executable that was saved runs again, and nothing else is taken for it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jslora.aot.saved import beside, load, save


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    def step(state: dict[str, jax.Array], unused: jax.Array, w: jax.Array) -> tuple:
        return {name: x + 1 for name, x in state.items()}, state["a"] @ w

    state = {name: jax.ShapeDtypeStruct((4, 4), jnp.float32) for name in "ab"}
    other = jax.ShapeDtypeStruct((3,), jnp.int32)
    w = jax.ShapeDtypeStruct((4, 2), jnp.float32)
    jitted = jax.jit(step, donate_argnums=0, keep_unused=True)
    path = tmp_path / "step.xla"
    save(path, jitted.lower(state, other, w).compile(), {"name": "a step"})
    return path


def test_a_saved_executable_runs(saved: Path) -> None:
    described, run = load(saved, jax.devices()[0])
    a, b, w = np.eye(4, dtype=np.float32), np.ones((4, 4), np.float32), np.ones((4, 2), np.float32)
    given = [jnp.asarray(x) for x in (a, b, np.zeros(3, np.int32), w)]
    new_a, new_b, product = run(given)
    np.testing.assert_array_equal(new_a, a + 1)
    np.testing.assert_array_equal(new_b, b + 1)
    np.testing.assert_array_equal(product, a @ w)
    assert [array.is_deleted() for array in given] == [True, True, False, False]
    assert described["case"] == {"name": "a step"} and described["jax"] == jax.__version__


def test_what_is_beside_it_tells_how_to_call_it(saved: Path) -> None:
    described = json.loads(beside(saved).read_text())
    matrix = {"shape": [4, 4], "dtype": "float32"}
    donated = matrix | {"donated": True}
    assert described["arguments"] == [
        donated, donated, {"shape": [3], "dtype": "int32"}, {"shape": [4, 2], "dtype": "float32"}
    ]  # fmt: skip
    assert described["results"] == [matrix, matrix, {"shape": [4, 2], "dtype": "float32"}]


def test_arguments_of_other_shapes_never_reach_it(saved: Path) -> None:
    _, run = load(saved, jax.devices()[0])
    with pytest.raises(AssertionError, match="compiled for"):
        run([jnp.zeros((4, 4))] * 4)


def test_another_file_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not the executable"):
        load(saved, jax.devices()[0])
