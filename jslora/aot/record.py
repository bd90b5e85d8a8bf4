"""What compiling a case told: plain data, written as JSON. Host only: no jax."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Figures of one compiled program; of its larger one when it was compiled twice.

    Attributes:
        name: of the case, and of the kernel or program where each stands alone.
        what: "step", "kernel" or "program".
        rows, tokens: the most that the case has.
        per_layer: launches a layer by "kind label", those outside layers left out.
        outside: launches outside layers; all of a program's.
        collectives: by name and bytes of what one puts out on a device, in one layer.
        collectives_outside: the same of all others; all of a program's.
        loops: names of `while` and `conditional` outside kernels.
        pool_copies: what leaves an array as large as a layer's pages in new memory.
        weight_copies: what leaves an array like a weight there.
        temporaries, aliased, donated: bytes; on one device.
        launched: names of our kernels, in layers and outside.
        assembled: registers and spilled bytes of our kernels, and of all others that spill.
        most_registers: of any kernel.
        bytes_per_layer, bytes_outside: that are read and written, as far as shapes tell.
        floor_per_layer: the fewest bytes of a layer, counted alike (`jslora.bench.floor`).
        error: why it could not be compiled; everything else is then empty.
    """

    name: str
    what: str
    phase: str = ""
    rows: int = 0
    tokens: int = 0
    kernels: str = ""
    per_layer: dict[str, float] = field(default_factory=dict)
    outside: float = 0
    collectives: dict[str, float] = field(default_factory=dict)
    collectives_outside: dict[str, float] = field(default_factory=dict)
    loops: list[str] = field(default_factory=list)
    pool_copies: list[str] = field(default_factory=list)
    weight_copies: list[str] = field(default_factory=list)
    temporaries: int = 0
    aliased: int = 0
    donated: int = 0
    launched: list[str] = field(default_factory=list)
    assembled: dict[str, list[int]] = field(default_factory=dict)
    most_registers: int = 0
    bytes_per_layer: float = 0
    bytes_outside: float = 0
    floor_per_layer: float = 0
    seconds: float = 0
    error: str = ""
