"""Steps of decoding without a prompt: the engine's own program over a cache of random keys and values.

A prompt of 4,000 tokens takes longer to compile and to run than all that follows; what a step takes does not depend on
what the cache holds, only on how much.

The trap: each call makes the rows longer. The limit counts the cache at its mean length over all calls.
"""

import concurrent.futures
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
from falcon_jax.generate.engine import Engine
from falcon_jax.generate.programs import decode
from falcon_jax.generate.sampling import Sampling
from falcon_jax.generate.state import CHUNK, DecodeState
from falcon_jax.model.cache import KVCache

NUM_CALLS = 5
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
    def new_tokens(self) -> int:
        """Of a row, in all calls that are waited for."""
        return CHUNK * (1 + NUM_CALLS)

    @property
    def most_tokens(self) -> int:
        """That a row gets in all."""
        return self.new_tokens + CHUNK * NUM_CALLS + NUM_TRACED_STEPS

    def limit(self, config: FalconConfig, weights: str, rates: Rates) -> Limit:
        """`rates` may lack that of products."""
        return Limit.of(
            config, Workload(self.num_rows, self.context_tokens, self.new_tokens), "bfloat16", weights, rates
        )


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
            list(pool.map(lambda case: jax.block_until_ready(self._call(case, self._state(case), 1)[1]), cases))
        self.compile_s = time.perf_counter() - begin

    def measure(self, case: StepCase, trace: Path | None = None) -> dict[str, Any]:
        """Milliseconds a step, of each call and their median, and where nobody waits for a call before the next begins;
        with a folder for a trace, kernels as well."""
        state = self._state(case)
        seconds = []
        for _ in range(1 + NUM_CALLS):
            begin = time.perf_counter()
            state, tokens = self._call(case, state, CHUNK)
            jax.block_until_ready(tokens)
            seconds.append(time.perf_counter() - begin)
        ms = [1e3 * second / CHUNK for second in seconds[1:]]
        begin = time.perf_counter()
        for _ in range(NUM_CALLS):
            state, tokens = self._call(case, state, CHUNK)
        jax.block_until_ready(tokens)
        ms_ahead = 1e3 * (time.perf_counter() - begin) / CHUNK / NUM_CALLS
        ms_per_step = statistics.median(ms)
        found: dict[str, Any] = {
            "ms_per_step": ms_per_step,
            "decode_tokens_per_s": 1e3 * case.num_rows / ms_per_step,
            "calls_ms_per_step": [round(x, 5) for x in ms],
            "ahead_ms_per_step": ms_ahead,
        }
        if trace is not None:
            file = training_profile.record(
                lambda: jax.block_until_ready(self._call(case, state, NUM_TRACED_STEPS)[1]), trace
            )
            found["kernels"] = kernels(training_profile.read(file), NUM_TRACED_STEPS)
        return found

    def _call(self, case: StepCase, state: DecodeState, num_steps: int) -> tuple[DecodeState, Array]:
        """The state that follows, `state` being donated, and the tokens of up to CHUNK steps."""
        model = self.engine.model._replace(cuda_graphs=case.cuda_graphs and self.engine.model.cuda_graphs)
        none_stopped = np.zeros(case.num_rows, bool)
        sampling = Sampling()
        fixed = (None, sampling.values, NO_TOKEN)
        arguments = (self.engine.params, state, np.int32(num_steps), none_stopped, *fixed)
        peers = self.engine.peers(case.num_rows)
        state, chunk = decode(*arguments, model=model, kind=sampling.kind, peers=peers)
        return state, chunk.tokens

    def _state(self, case: StepCase) -> DecodeState:
        made, mesh = _random_state(self.engine, case), self.engine.model.mesh
        if mesh is None:
            return jax.device_put(made, jax.tree.leaves(self.engine.params)[0].sharding)
        return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding.rows_sharding(leaf.shape, mesh)), made)


def _random_state(engine: Engine, case: StepCase) -> DecodeState:
    """After a prompt that never was."""
    _, capacity = engine.plan(case.context_tokens, case.num_rows, case.most_tokens)
    empty = KVCache.create(engine.model.config, case.num_rows, capacity, engine.dtype)
    filled = [_random(i, x) for i, x in enumerate((*empty.keys, *empty.values))]
    lengths = jnp.full(case.num_rows, case.context_tokens, jnp.int32)
    num_layers = len(empty.keys)
    cache = KVCache(tuple(filled[:num_layers]), tuple(filled[num_layers:]), lengths)
    return DecodeState(cache, jnp.arange(case.num_rows, dtype=jnp.int32), jnp.zeros(case.num_rows, bool), None)


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
