"""Memory of a process that computes on a CPU: what is freed is kept for what is allocated next.

XLA:CPU allocates the results and the scratch of every program anew. glibc gives arrays of that size
back to the kernel as soon as they are freed, so each step would have its pages mapped and zeroed
again: a fifth of the time of a training step. Host only: no jax.
"""

import ctypes

# <malloc.h>
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed; False where it cannot be told to, and nothing changes.

    Call it before jax opens a device: threads that are there keep arenas of their own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        return False
    # The first is what older versions of glibc refuse, and the others are no good without it.
    # Other arenas than the main one map large arrays one by one, whatever the thresholds are.
    rules = (_MMAP_THRESHOLD, 2**30), (_TRIM_THRESHOLD, _NEVER), (_ARENA_MAX, 1)
    return all(mallopt(rule, value) for rule, value in rules)
