"""A follower process: started like an engine process, it finds its leader and obeys to the end.

    python -m jslora.distributed.follower       (its order comes on standard input, see `child`)

Exit codes: 0 told to stop, 2 refused by the leader or wrongly configured, 3 the model is wrong,
5 the group has ended. jax comes in once the leader has welcomed it.
"""

import argparse
import logging
import os
import threading
import time
from pathlib import Path
from typing import NoReturn

from jslora.child import end_with_group, end_with_parent, read_order
from jslora.config import EngineConfig
from jslora.distributed import messages
from jslora.distributed.agreement import agreement
from jslora.distributed.obedience import Obedience
from jslora.distributed.section import EXIT_CODE, PULSE_SECONDS
from jslora.distributed.uplink import Uplink
from jslora.errors import ConfigError, JsloraError, ModelError
from jslora.logs import configure
from jslora.progress import silent

log = logging.getLogger("jslora.distributed")


def follow(config: EngineConfig, folder: Path | None) -> int:
    """Obey until told to stop; returns the exit code.

    Raises:
        ConfigError, ModelError: the configuration or the model's files are wrong.
    """
    uplink = Uplink(config.distributed, agreement(config, folder), end_with_group)
    uplink.join()
    try:
        obedience = _build(config, folder, uplink)
        log.info("process %d is ready", config.distributed.process_id)
        while not isinstance(order := uplink.next(), messages.Stop):
            obedience.carry_out(order)
    except Exception as error:
        _give_up(uplink, error)
    _stop(uplink, obedience)
    return 0


def _stop(uplink: Uplink, obedience: Obedience) -> None:
    """Finish and part, or end at once where that takes too long: a step may wait for ever."""
    from jslora.distributed import launch

    log.info("told to stop")
    last = threading.Timer(2 * launch.LEAVE_SECONDS, os._exit, (EXIT_CODE,))
    last.daemon = True
    last.start()
    uplink.close()
    obedience.close()
    launch.leave()
    last.cancel()


def _build(config: EngineConfig, folder: Path | None, uplink: Uplink) -> Obedience:
    """The device, as the leader builds its own at the same time."""
    from jslora.build import build_device, build_shelf, memory_plan, read_model_config
    from jslora.distributed.deliveries import Deliveries
    from jslora.distributed.launch import join

    def agree(available: int) -> int:
        uplink.say(messages.Memory(available))
        order = uplink.next()
        assert isinstance(order, messages.Agreed), f"{type(order).__name__} for Agreed"
        return order.available

    join(config.distributed)
    model = read_model_config(config, folder)
    plan = memory_plan(config, model, agree)
    device = build_device(config, model, plan, folder, silent)
    shelf = build_shelf(config, model, plan)
    deliveries = Deliveries(shelf, device.geometry, device.upload, device.upload_rows, uplink.say)
    return Obedience(
        device, deliveries, config.distributed.digest_every, uplink.say,
        lambda error: _give_up(uplink, error),
    )  # fmt: skip


def _give_up(uplink: Uplink, error: Exception) -> NoReturn:
    """Tell the leader why, and end at once: threads may wait in a step for ever."""
    words = error.message if isinstance(error, JsloraError) else f"{type(error).__name__}: {error}"
    log.critical("process gives up: %s", words, exc_info=error)
    uplink.say(messages.Failed(words[: messages.MAX_TEXT]))
    os._exit(3 if isinstance(error, ModelError) else EXIT_CODE)


def main(arguments: list[str] | None = None) -> NoReturn:
    parser = argparse.ArgumentParser(description="jslora's follower process")
    parser.add_argument("--pulse", type=int, help="descriptor that is written to while it lives")
    options = parser.parse_args(arguments)
    config, folder = read_order()
    configure(config.logging)
    end_with_parent()
    if options.pulse is not None:
        threading.Thread(target=_beat, args=(options.pulse,), name="pulse", daemon=True).start()
    try:
        code = follow(config, folder)
    except JsloraError as error:
        log.error("%s", error.message)
        code = 2 if isinstance(error, ConfigError) else 3
    os._exit(code)  # jax would wait for a leader that may be gone


def _beat(descriptor: int) -> None:
    """Tell the parent that this process lives."""
    while True:
        os.write(descriptor, b".")
        time.sleep(PULSE_SECONDS)


if __name__ == "__main__":
    main()
