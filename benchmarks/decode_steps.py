"""Steps of decoding without a prompt: the engine's own program over a cache of random keys and values.

A prompt of 4,000 tokens takes longer to compile and to run than all that follows; what a step takes does not depend on
what the cache holds, only on how much.

The trap: each call makes the rows longer. The limit counts the cache at its mean length over the calls that are timed.
"""

import concurrent.futures
import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks import training_profile
from benchmarks.limits import Limit, Rates, Workload
from benchmarks.several_jobs import half_dtype
from falcon_jax import Falcon, sharding
from falcon_jax.config import FalconConfig
from falcon_jax.generate.engine import Engine, Generation, Options
from falcon_jax.generate.sampling import Sampling
from falcon_jax.generate.state import CHUNK, Chunk, DecodeState, Request, Rows
from falcon_jax.model.cache import KVCache

# Calls that are not timed: where arrays lie is new to the graphs, and the first that goes ahead waits for nobody.
NUM_FIRST_CALLS = 2
NUM_CALLS = 6
NUM_TRACED_STEPS = 4
NUM_KERNELS = 12
# Programs compiled at a time: a machine's cores are enough, its memory may not be.
NUM_COMPILERS = 4
NO_TOKEN = np.array([-1], np.int32)  # nothing ends early


@dataclasses.dataclass(frozen=True)
class StepCase:
    """What one program decodes. cuda_graphs: as of `Falcon.from_config`."""

    num_rows: int
    context_tokens: int
    cuda_graphs: bool = True

    def __str__(self) -> str:
        return f"R={self.num_rows} S={self.context_tokens}" + ("" if self.cuda_graphs else " without CUDA graphs")

    @property
    def most_tokens(self) -> int:
        """That a row gets, in calls that are timed and others."""
        return CHUNK * (NUM_FIRST_CALLS + NUM_CALLS + 1)

    def limit(self, config: FalconConfig, weights: str, rates: Rates) -> Limit:
        """Of the calls that are timed. `rates` may lack that of products."""
        timed = Workload(self.num_rows, self.context_tokens + CHUNK * NUM_FIRST_CALLS, CHUNK * NUM_CALLS)
        return Limit.of(config, timed, "bfloat16", weights, rates)


class Steps:
    """A model with random weights in bfloat16, on one device or `tensor` of them, and its decoding compiled for some
    cases.

    Attributes:
      load_s, compile_s: seconds of making the weights, and of a first call for each of the cases.
    """

    def __init__(self, config: FalconConfig, weights: str, cases: Sequence[StepCase], tensor: int = 1):
        begin = time.perf_counter()
        mesh, dtype = (None, "bfloat16") if tensor == 1 else (sharding.make_mesh(tensor=tensor), half_dtype())
        self.engine: Engine = Falcon.from_config(config, dtype=dtype, weights=weights, mesh=mesh).engine
        jax.block_until_ready(self.engine.params)
        self.load_s = time.perf_counter() - begin
        begin = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(NUM_COMPILERS) as pool:
            list(pool.map(lambda case: self.generation(case).next_chunk(1), cases))
        self.compile_s = time.perf_counter() - begin

    def measure(self, case: StepCase, trace: Path | None = None) -> dict[str, Any]:
        """Milliseconds a step, of each call and their median; and where the host reads one call before it begins the
        next, as it does for text that a string may end. With a folder for a trace, kernels as well."""
        ahead, waited = (self._calls_ms(self.generation(case, ahead=ahead)) for ahead in (True, False))
        ms_per_step = statistics.median(ahead)
        found: dict[str, Any] = {
            "ms_per_step": ms_per_step,
            "decode_tokens_per_s": 1e3 * case.num_rows / ms_per_step,
            "calls_ms_per_step": [round(x, 5) for x in ahead],
            "waiting_ms_per_step": statistics.median(waited),
        }
        if trace is not None:
            generation = self.generation(case)
            file = training_profile.record(lambda: generation.next_chunk(NUM_TRACED_STEPS), trace)
            found["kernels"] = kernels(training_profile.read(file), NUM_TRACED_STEPS)
        return found

    def generation(self, case: StepCase, *, ahead: bool = False) -> Generation:
        """A run of random tokens after a cache of random keys and values, the call that makes no token behind it."""
        engine = copy.copy(self.engine)
        engine.model = engine.model._replace(cuda_graphs=case.cuda_graphs and engine.model.cuda_graphs)
        mesh, sampling = engine.model.mesh, Sampling()
        state, request = _random_state(engine, case), Request(jnp.int32(CHUNK), jnp.zeros(case.num_rows, bool))
        if mesh is None:
            state, request = jax.device_put((state, request), jax.tree.leaves(engine.params)[0].sharding)
        else:

            def place(leaf: Array) -> Array:
                return jax.device_put(leaf, sharding.rows_sharding(leaf.shape, mesh))

            state, request = jax.tree.map(place, (state, request))
        options = Options(case.most_tokens, sampling.kind, 0, ahead)
        fixed = engine.everywhere((None, sampling.values, NO_TOKEN))
        generation = Generation(engine, state, request, fixed, options)
        generation.next_chunk(1)
        return generation

    def _calls_ms(self, generation: Generation) -> list[float]:
        """Milliseconds a step of each of the calls that are timed."""
        seconds = []
        for _ in range(NUM_FIRST_CALLS + NUM_CALLS):
            begin = time.perf_counter()
            generation.next_chunk()
            seconds.append(time.perf_counter() - begin)
        return [1e3 * second / CHUNK for second in seconds[NUM_FIRST_CALLS:]]


def _random_state(engine: Engine, case: StepCase) -> DecodeState:
    """After a prompt that never was."""
    _, capacity = engine.plan(case.context_tokens, case.num_rows, case.most_tokens)
    empty = KVCache.create(engine.model.config, case.num_rows, capacity, engine.dtype)
    filled = [_random(i, x) for i, x in enumerate((*empty.keys, *empty.values))]
    lengths = jnp.full(case.num_rows, case.context_tokens, jnp.int32)
    num_layers = len(empty.keys)
    cache = KVCache(tuple(filled[:num_layers]), tuple(filled[num_layers:]), lengths)
    tokens = jnp.arange(case.num_rows, dtype=jnp.int32)
    rows = Rows(tokens, jnp.zeros(case.num_rows, bool), jnp.full_like(tokens, case.most_tokens))
    return DecodeState(cache, rows, Chunk.empty(case.num_rows))


@functools.partial(jax.jit, donate_argnums=1)
def _random(seed: int, x: Array) -> Array:
    """As large as x. All layers' are one program: compiled together they take a minute."""
    return jax.random.normal(jax.random.key(seed), x.shape, x.dtype)


def kernels(events: Sequence[training_profile.Event], num_steps: int) -> list[dict[str, Any]]:
    """The most expensive kinds of kernels: microseconds a step, and how often a step runs them."""
    total: dict[str, list[float]] = {}
    for event in events:
        total.setdefault(training_profile.without_numbers(event.kernel), []).append(event.ns)
    dearest = sorted(total, key=lambda name: -sum(total[name]))[:NUM_KERNELS]
    return [
        {
            "name": name,
            "us_a_step": round(sum(total[name]) / num_steps / 1e3, 2),
            "calls_a_step": round(len(total[name]) / num_steps, 1),
            "us_a_call": round(statistics.mean(total[name]) / 1e3, 2),
        }
        for name in dearest
    ]
