"""Runs kernels in the Triton language on numpy arrays, through Triton's own interpreter.

Needs neither a GPU nor torch. Pointers are the arrays' real addresses, so what a kernel loads
without a mask from a wild offset ends the process: a missing mask shows.

Invariant: TRITON_INTERPRET=1 is set before the kernels' module is imported, so they are tested in
a process of their own. A kernel does nothing with bfloat16 numbers but load, store, convert and
multiply them in `tl.dot`: the interpreter keeps them as 16-bit integers.
"""

from dataclasses import dataclass
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

BF16 = np.dtype(ml_dtypes.bfloat16)
TYPES = {
    np.dtype(np.float32): tl.float32,
    np.dtype(np.int32): tl.int32,
    np.dtype(np.int64): tl.int64,
    BF16: tl.bfloat16,
}


def launch(
    kernel: Any, grid: tuple[int, ...], *args: np.ndarray | int | float, **constexprs: Any
) -> None:
    """Run every program of `grid`, one after the other; arrays are written in place."""
    assert isinstance(kernel, interpreter.InterpretedFunction), "set TRITON_INTERPRET=1 first"
    pointers = [_Pointer(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
    with (
        np.errstate(all="ignore"),  # infinity and NaN are numbers to a device
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", _dot),
        mock.patch.object(interpreter, "_convert_float", _convert),
    ):
        _Executor(kernel.rewrite(), kernel.arg_names, grid)(*pointers, **constexprs)


@dataclass(frozen=True)
class _Pointer:
    """What the interpreter wants to know of an array."""

    array: np.ndarray

    def __post_init__(self) -> None:
        assert self.array.flags.c_contiguous, f"strides {self.array.strides}"

    @property
    def dtype(self) -> Any:
        return TYPES[self.array.dtype]

    def data_ptr(self) -> int:
        return self.array.ctypes.data


class _Executor(interpreter.GridExecutor):
    """Arrays lie in host memory already; the base class would copy torch tensors there and back."""

    def _init_args_hst(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs

    def _restore_args_dev(self, *_: Any) -> None:
        pass


def _dot(_: Any, a: Any, b: Any, c: Any, *__: Any) -> Any:
    """The interpreter's own would multiply the integers that it keeps for bfloat16 numbers."""
    product = np.matmul(_numbers(a), _numbers(b), dtype=c.data.dtype)
    return interpreter.TensorHandle(product + c.data, c.dtype.scalar)


def _numbers(handle: Any) -> np.ndarray:
    bits = handle.data
    return bits.view(BF16).astype(np.float32) if handle.dtype.scalar == tl.bfloat16 else bits


_original_convert = interpreter._convert_float


def _convert(bits: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    """As the device converts to bfloat16, to the nearest; the interpreter's own cuts off."""
    if (source, target) == (tl.float32, tl.bfloat16):
        return bits.view(np.float32).astype(BF16).view(np.uint16)
    if (source, target) == (tl.bfloat16, tl.float32):
        return bits.view(BF16).astype(np.float32).view(np.uint32)
    return _original_convert(bits, source, target, rounding)
