"""Whether a model over several devices computes what one device does, with the same random weights on both.

Logits in float32, greedy tokens with weights of 16 and 8 bits, and the loss and gradient norm of a training step. Norms
and biases are random too: a bias that each device adds once more would go unseen if it were zero.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from benchmarks.places import Say
from benchmarks.several_jobs import Job, Layout, Result, half_dtype
from falcon_jax import Falcon, sharding
from falcon_jax.config import FalconConfig
from falcon_jax.generate.sampling import Sampling
from falcon_jax.model import params as model_params
from falcon_jax.model.params import Params
from falcon_jax.model.step import ForwardOptions
from falcon_jax.train import step as train_step
from falcon_jax.train.step import StepOptions

SEED = 0
NOISE = 0.3  # of norms and biases
PROMPT_LENGTHS = (48, 33, 16, 5)  # a ragged batch
NUM_STEPS = 32
LOGITS_LIMIT = 1e-4  # of the largest logit
# Of the largest logit: how far below the best one a token may lie that rounding has preferred. bfloat16 has 8 bits.
ROUNDING = {"bfloat16": 4 * 2.0**-8, "float32": LOGITS_LIMIT}
LOSS_LIMITS = {"bfloat16": 1e-2, "float32": 2e-5}
# Rows that up to eight devices divide, two micro-batches for two stages.
NUM_MICRO_BATCHES, NUM_ROWS = 2, 8


@dataclasses.dataclass(frozen=True)
class _Compared(Job):
    part: ClassVar[str] = "correct"
    model: str
    config: FalconConfig
    layout: Layout
    timeout_s: float

    @property
    def xla_flags(self) -> str:
        # Compiling is nearly all of the time, and which of XLA's products is the fastest decides nothing here.
        return "--xla_gpu_autotune_level=0"

    def about(self) -> Result:
        return {"model": self.model, "num_layers": self.config.num_layers, "layout": str(self.layout)}


@dataclasses.dataclass(frozen=True)
class Logits(_Compared):
    """Float32 logits of prompts of several lengths."""

    @property
    def name(self) -> str:
        return f"{self.model} float32 logits, {self.layout}"

    def run(self, say: Say) -> Iterator[Result]:
        expected, found = _expected_logits(self.config), _logits(self.config, self.layout)
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        yield self.about() | {"error": error, "limit": LOGITS_LIMIT, "ok": error <= LOGITS_LIMIT}


@dataclasses.dataclass(frozen=True)
class Tokens(_Compared):
    """Greedy tokens of a ragged batch in half precision. weights: "native" or "int8"."""

    weights: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.weights} tokens, {self.layout}"

    def run(self, say: Say) -> Iterator[Result]:
        expected, logits = _expected_tokens(self.config, self.weights)
        found = greedy(
            make_model(self.config, self.layout, half_dtype(), self.weights), prompts(self.config), NUM_STEPS
        )
        about = self.about() | {"weights": self.weights, "dtype": half_dtype()}
        yield about | compare_tokens(found, expected, logits, ROUNDING[half_dtype()])


@dataclasses.dataclass(frozen=True)
class Step(_Compared):
    """Loss and gradient norm of a training step's first batch."""

    dtype: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.dtype} training step, {self.layout}"

    def run(self, say: Say) -> Iterator[Result]:
        expected, found = _expected_step(self.config, self.dtype), _step(self.config, self.layout, self.dtype)
        errors = {name: abs(found[name] - value) / abs(value) for name, value in expected.items()}
        limit = LOSS_LIMITS[self.dtype]
        yield self.about() | {
            "dtype": self.dtype,
            **found,
            **{f"{name}_error": error for name, error in errors.items()},
            "limit": limit,
            "ok": all(error <= limit for error in errors.values()),
        }


def jobs(model: str, config: FalconConfig, layouts: list[Layout], timeout_s: float) -> list[Job]:
    """All comparisons of one shape over meshes for inference."""
    made: list[Job] = []
    for layout in layouts:
        made.append(Logits(model, config, layout, timeout_s))
        made += [Tokens(model, config, layout, timeout_s, weights) for weights in ("native", "int8")]
    return made


def step_jobs(model: str, config: FalconConfig, count: int, timeout_s: float) -> list[Job]:
    """All comparisons of one shape's training step over `count` devices."""
    layouts = [Layout(fsdp=count), Layout(tensor=count), Layout(data=count)]
    if config.num_layers % 2 == 0:
        layouts.append(Layout(stage=2))
    dtypes = dict.fromkeys((half_dtype(), "float32"))
    return [Step(model, config, layout, timeout_s, dtype) for dtype in dtypes for layout in layouts]


def make_params(config: FalconConfig, dtype: str, weights: str = "native") -> Params:
    """All parameters random, on one device."""
    params = model_params.flatten(model_params.init(config, jax.random.key(SEED), dtype, None, weights))
    generator = np.random.default_rng(SEED)
    for path, leaf in params.items():
        if path.endswith((".scale", ".bias")):
            noise = NOISE * generator.standard_normal(leaf.shape, np.float32)
            params[path] = leaf + jnp.asarray(noise, leaf.dtype)
    return model_params.unflatten(params)


def make_model(config: FalconConfig, layout: Layout, dtype: str, weights: str = "native") -> Falcon:
    """A model over a mesh with the weights that one device would have, to the bit."""
    params, mesh = make_params(config, dtype, weights), layout.mesh()
    if mesh is not None:
        leaves = model_params.flatten(params)
        params = model_params.unflatten(jax.device_put(leaves, model_params.layouts(config, mesh, weights)))
    return Falcon(config, params, mesh=mesh)


def prompts(config: FalconConfig) -> list[list[int]]:
    generator = np.random.default_rng(SEED)
    return [generator.integers(0, config.vocab_size, length).tolist() for length in PROMPT_LENGTHS]


def greedy(model: Falcon, rows: list[list[int]], num_steps: int) -> Int[np.ndarray, "B steps"]:
    """Exactly so many tokens a row."""
    engine = model.engine
    engine.eos_token_ids = np.array([-1], np.int32)  # no id: nothing ends early
    generation = engine.start(rows, max_new_tokens=num_steps, sampling=Sampling())
    chunks = []
    while not generation.finished:
        chunks.append(np.asarray(generation.next_chunk()[0]))
    return np.concatenate(chunks, axis=1)


def compare_tokens(
    found: Int[np.ndarray, "B steps"],
    expected: Int[np.ndarray, "B steps"],
    logits: Float[np.ndarray, "B steps V"],
    rounding: float,
) -> Result:
    """How far two runs agree. After its first difference a row continues another text, so that one alone is judged.

    logits: one device's, of what follows after the expected tokens before. A difference is right where the token that
      was found lies no further below the best than rounding may move it.
    """
    tolerance = rounding * float(np.abs(logits).max())
    differences = []
    for row in np.flatnonzero((found != expected).any(axis=1)):
        step = int(np.argmax(found[row] != expected[row]))
        second, best = np.sort(logits[row, step])[-2:]
        below = float(best - logits[row, step, found[row, step]])
        differences.append({"row": int(row), "step": step, "gap": float(best - second), "below_best": below})
    return {
        "agreeing_share": float((found == expected).mean()),
        "first_step_that_differs": min((difference["step"] for difference in differences), default=None),
        "first_differences": differences,
        "tolerance": tolerance,
        "ok": all(difference["below_best"] <= tolerance for difference in differences),
    }


# What one device gives is made once for all meshes. The largest, logits of a shape and form of weights, take 33 MB.


@functools.cache
def _expected_logits(config: FalconConfig) -> Float[np.ndarray, "tokens V"]:
    return _logits(config, Layout())


def _logits(config: FalconConfig, layout: Layout) -> Float[np.ndarray, "tokens V"]:
    # On a GPU float32 products are else rounded to tf32, three digits short.
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(make_model(config, layout, "float32").logits(prompts(config)))
    return np.concatenate([row[:length] for row, length in zip(logits, PROMPT_LENGTHS, strict=True)])


@functools.cache
def _expected_tokens(
    config: FalconConfig, weights: str
) -> tuple[Int[np.ndarray, "B steps"], Float[np.ndarray, "B steps V"]]:
    """One device's tokens, and its logits where it chose them."""
    model, rows = make_model(config, Layout(), half_dtype(), weights), prompts(config)
    tokens = greedy(model, rows, NUM_STEPS)
    whole = [row + made[:-1].tolist() for row, made in zip(rows, tokens, strict=True)]
    logits = np.asarray(model.logits(whole))
    return tokens, np.stack([logits[i, len(row) - 1 :][:NUM_STEPS] for i, row in enumerate(rows)])


@functools.cache
def _expected_step(config: FalconConfig, dtype: str) -> dict[str, float]:
    return _step(config, Layout(), dtype)


def _step(config: FalconConfig, layout: Layout, dtype: str) -> dict[str, float]:
    """Loss and gradient norm of the first step."""
    _, metrics = take_step(config, layout, dtype)
    return {name: float(metrics[name]) for name in ("loss", "grad_norm")}


def take_step(config: FalconConfig, layout: Layout, dtype: str) -> tuple[train_step.State, dict[str, Any]]:
    """The state after a step on random tokens, and what the step says of itself."""
    options = StepOptions(compute_dtype=dtype, num_micro_batches=NUM_MICRO_BATCHES)
    mesh, length = layout.mesh(), min(128, config.max_tokens)
    generator = np.random.default_rng(SEED)
    size = (NUM_MICRO_BATCHES, NUM_ROWS, length + 1)
    tokens = generator.integers(0, config.vocab_size, size).astype(np.int32)
    batch = jax.device_put(tokens, None if mesh is None else sharding.micro_batches_sharding(mesh))
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        state = train_step.init_state(config, options, SEED, mesh, make_params(config, "float32"))
        step = train_step.make_train_step(config, options, ForwardOptions(), mesh)
        state, metrics = step(state, batch, np.float32(1e-4))
    return state, jax.device_get(metrics)
