"""That memory is kept once it is asked for: an array allocated again has its pages."""

import subprocess
import sys

import pytest

# The arrays are made by a thread, as those of XLA are; each is written to.
PROGRAM = """
import ctypes, resource, sys, threading
from jslora.training.heap import keep_freed_memory

if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit(77)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array = libc.malloc(ctypes.c_size_t(1 << 27))
    ctypes.memset(array, 1, 1 << 27)
    libc.free(ctypes.c_void_p(array))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = []
thread = threading.Thread(target=lambda: found.extend(faults() for _ in range(3)))
thread.start()
thread.join()
print(found[-1])
"""


def last_faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("malloc is not a newer glibc's")
    assert not done.returncode, done.stderr
    return int(done.stdout)


def test_an_array_of_freed_memory_needs_no_new_pages() -> None:
    assert last_faults("kept") <= 8


def test_and_needs_all_of_them_otherwise() -> None:
    assert last_faults("as it is") >= 64  # the array has so many of 2 MiB
