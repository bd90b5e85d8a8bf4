"""Registers and spills of every kernel, in the words of the assembler that makes it.

XLA starts `ptxas` for each kernel and keeps what it says to itself. So it is given a CUDA folder of
ours, whose `ptxas` is a shell script that runs the real one and keeps a copy of its words. Kernels
that come from jax-triton are assembled only where they run; their PTX, which jax-triton writes to a
folder when asked, is assembled here.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ARCH = "sm_90a"
_SCRIPT = """#!/bin/sh
{ptxas} -v "$@" 2> {words}/$$.txt
code=$?
cat {words}/$$.txt >&2
exit $code
"""
_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Assembled:
    """What one kernel takes; registers per thread, spills in bytes stored and loaded."""

    name: str
    registers: int
    spills: int


def make_cuda_folder(folder: Path, toolkit: Path, words: Path) -> None:
    """Make `folder` a stand-in for the CUDA toolkit that leaves what ptxas says in `words`."""
    (folder / "bin").mkdir(parents=True)
    words.mkdir(parents=True)
    for entry in toolkit.iterdir():
        if entry.name != "bin":
            (folder / entry.name).symlink_to(entry)
    for entry in (toolkit / "bin").iterdir():
        if entry.name != "ptxas":
            (folder / "bin" / entry.name).symlink_to(entry)
    script = folder / "bin" / "ptxas"
    script.write_text(_SCRIPT.format(ptxas=toolkit / "bin" / "ptxas", words=words))
    script.chmod(0o755)


def read_words(words: Path) -> list[Assembled]:
    """The kernels assembled since the last call; what was said of them is removed."""
    found = []
    for path in sorted(words.iterdir()):
        found += parse(path.read_text())
        path.unlink()
    return found


def assemble(ptx: Path, toolkit: Path) -> list[Assembled]:
    """Assemble PTX and say what it takes.

    Raises:
        subprocess.CalledProcessError: ptxas refuses it.
    """
    command = [f"{toolkit}/bin/ptxas", "-v", f"-arch={ARCH}", f"{ptx}", "-o", "/dev/null"]
    return parse(subprocess.run(command, capture_output=True, text=True, check=True).stderr)


def parse(words: str) -> list[Assembled]:
    """The kernels of what ptxas says with `-v`."""
    return [
        Assembled(
            found["name"], int(found["registers"]), int(found["stores"]) + int(found["loads"])
        )
        for found in _KERNEL.finditer(words)
    ]
