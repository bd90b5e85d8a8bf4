"""A section as a process: `python -m jslora.gpu.sections NAME --seconds N`, a record a line.

Records are JSON on standard output; whatever else the process prints goes to standard error.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jslora.gpu import baselines, ceilings, correctness, decode, executable, facts, kernels
from jslora.gpu.cases import FULL, TINY, Plan
from jslora.gpu.session import Session
from jslora.programs import choose_kernels
from pallas_kernels import launch
from pallas_kernels.launch import Kernels


def uncaptured(session: Session, plan: Plan, kernels: Kernels) -> None:
    """The step without and with its first mix; the parent has turned command buffers off."""
    decode.run(session, replace(plan, step_mixes=plan.step_mixes[:1]), kernels)


OF_KERNELS: dict[str, Callable[[Session, Plan, Kernels], None]] = {
    "correctness": correctness.run,
    "step": decode.run,
    "uncaptured": uncaptured,
    "lora": kernels.run_lora,
    "attention": kernels.run_attention,
    "baselines": baselines.run,
}
"""Sections that are named "what:implementation"."""


def run(session: Session, plan: Plan, dump: Path | None, saved: Path | None) -> None:
    """Run the session's section; what fails is recorded, never raised.

    Args:
        dump: where XLA was told to describe the device.
        saved: an executable that was compiled without a GPU.
    """
    what, _, implementation = session.section.partition(":")
    if what == "device":
        session.attempt(what, partial(facts.run, session, plan, dump))
    elif what == "ceilings":
        session.attempt(what, partial(ceilings.run, session, plan))
    elif what == "executable":
        assert saved is not None, "no executable was named"
        session.attempt(what, partial(executable.run, session, saved))
    else:
        try:
            chosen = choose_kernels(plan.model, plan.page_size, implementation, launch.platform())
        except NotImplementedError as error:
            session.emit("unavailable", implementation=implementation, reason=str(error))
        else:
            session.attempt(what, partial(OF_KERNELS[what], session, plan, chosen))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one section."""
    parser = argparse.ArgumentParser(prog="python -m jslora.gpu.sections", description=__doc__)
    parser.add_argument("section")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--dump", type=Path)
    parser.add_argument("--executable", type=Path)
    args = parser.parse_args(arguments)
    records = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def emit(record: dict[str, Any]) -> None:
        print(json.dumps(record, allow_nan=False), file=records, flush=True)

    plan = TINY if args.tiny else FULL
    run(Session(args.section, emit, args.seconds), plan, args.dump, args.executable)


if __name__ == "__main__":
    main()
