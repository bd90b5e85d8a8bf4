"""What the scheduler itself takes of a step, in CPU time: `fetch`, `plan` and `commit`.

Everything else is virtual: the device ends a step at once, transfers are done at the next turn, and
whoever ends is replaced by a new request, so that the queue stays as long as it is. The pool is
first filled, because a full one is what a server lives with: every page that is wanted has then to
be taken from an idle adapter or from the prefix cache. Host only: no jax.
"""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jslora.bench.synthetic_store import SyntheticStore
from jslora.bench.virtual import Link, Timeline, Uploads
from jslora.bench.virtual_device import END, TOKEN, no_logprob
from jslora.memory.pages import PageAllocator
from jslora.memory.prefix import PrefixCache
from jslora.memory.residency import Residency
from jslora.memory.room import Room
from jslora.memory.worth import Clock
from jslora.model.config import ModelConfig, from_hf
from jslora.progress import Progress, silent
from jslora.request import Request, SamplingParams, Scaled
from jslora.schedule.plan import Limits, Plan, Results
from jslora.schedule.scheduler import Scheduler
from jslora.schedule.settings import SchedulerSection

STEP = 0.03
"""Virtual seconds of a step."""

_WRITES, _PAGE, _TENANTS = 64, 16, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What there is to schedule; prompts and answers have 8 to `longest` tokens."""

    rows: int = 256
    adapters: int = 2000
    waiting: int = 10_000
    pages: int = 24_000
    longest: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of each part of each step, [steps], and how full it was."""

    fetch: np.ndarray
    plan: np.ndarray
    commit: np.ndarray
    rows: int
    waiting: int
    free_pages: int

    @property
    def step(self) -> np.ndarray:
        """All three."""
        return self.fetch + self.plan + self.commit


def measure(
    policy: Sequence[str], size: Size, *, fill: int, steps: int, seed: int = 0,
    progress: Progress = silent,
) -> Times:  # fmt: skip
    """Time a stack of policies over `steps` steps, after `fill` to fill the pool."""
    section = {"policy": list(policy), "ttft_slo": 3600}  # or all of a long queue would be late
    world = _World(SchedulerSection.model_validate(section), size, seed)
    gc.collect()
    gc.freeze()  # a server does so too once it is built
    found = np.zeros((fill + steps, 3))
    for step in range(len(found)):
        found[step] = world.turn()
        progress("steps", step + 1, len(found), ", ".join(policy))
    gc.unfreeze()
    fetch, plan, commit = found[fill:].T
    scheduler = world.scheduler
    return Times(
        fetch=fetch, plan=plan, commit=commit, rows=len(scheduler.running),
        waiting=len(scheduler.waiting), free_pages=scheduler.room.pages.free,
    )  # fmt: skip


def _model() -> ModelConfig:
    """Small in everything that the scheduler does not look at."""
    return from_hf({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 128, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    })  # fmt: skip


class _World:
    def __init__(self, section: SchedulerSection, size: Size, seed: int) -> None:
        self._size, self._random, self._count = size, np.random.default_rng(seed), 0
        self._time, model = Timeline(), _model()
        numbers = 2 * _PAGE * model.kv_heads * model.head_dim
        clock, pages = Clock(), PageAllocator(size.pages)
        self._uploads = Uploads(self._time, Link(self._time, np.inf))
        residency = Residency(
            pages, clock, self._uploads, model.layers, size.pages, size.pages, 8, now=self._time
        )
        room = Room(pages, PrefixCache(pages, clock), residency)
        ranks = {f"adapter-{i:05}": (8 * (1 + i % 4),) * 7 for i in range(size.adapters)}
        self._names = list(ranks)
        self._store = SyntheticStore(ranks, model, numbers, size.pages - 2, self._time)
        limits = Limits(
            size.rows, 512, 4 * (size.waiting + size.rows), 2**40, model.max_positions, _PAGE,
            model.vocab_size, (END,),
        )  # fmt: skip
        self.scheduler = Scheduler(limits, room, self._store, section, self._time)
        self._inflight: Plan | None = None
        for _ in range(size.waiting + size.rows):
            self._add()

    def _add(self) -> None:
        name = self._names[self._random.integers(len(self._names))]
        prompt, answer = self._random.integers(8, self._size.longest, 2).tolist()
        self.scheduler.add(
            Request(
                id=str(self._count),
                prompt=tuple(self._random.integers(3, 32000, prompt).tolist()),
                params=SamplingParams(
                    max_tokens=answer, ignore_eos=True, temperature=0, seed=self._count
                ),
                adapters=(Scaled(name),),
                tenant=f"tenant-{self._count % _TENANTS}",
            ),
            (self._store.bind(name),),
        )
        self._count += 1

    def turn(self) -> tuple[float, float, float]:
        """Seconds of fetch, plan and commit."""
        scheduler, clock = self.scheduler, time.thread_time
        self._time.advance(self._time.now + STEP)
        began = clock()
        scheduler.fetch()
        fetched = clock()
        scheduler.room.residency.writes(_WRITES, 0.0)
        before = clock()
        plan = scheduler.plan()
        planned = clock()
        commit = self._commit(self._inflight) if self._inflight else 0.0
        for event in scheduler.failures():
            self._add()
            assert event.last, f"{event} ends nothing"
        self._inflight = plan
        return fetched - began, planned - before, commit

    def _commit(self, plan: Plan) -> float:
        n = len(plan.rows)
        results = Results(np.full(n, TOKEN, np.int32), np.ones(n, bool), no_logprob, {})
        began = time.thread_time()
        events = self.scheduler.commit(plan, results)
        seconds = time.thread_time() - began
        for event in events:
            if event.last:
                self._add()
        return seconds
