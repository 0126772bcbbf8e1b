"""Layers of a model without their attention, as loops that decoding or a prompt would run: ours and XLA's.

A program is a chain of layers, each with weights of its own, so that launches follow one another as in decoding and no
weight is still in the second-level cache. One program has output stages alone, the other input stages as well; the
input stage's time is the difference.

The trap: a program's first round records its graph anew and every round costs the host some 36 us (kernel_decode.py):
hence many layers in a round, and many rounds.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.kernel_turns import Entry, Group, Program, prepare
from falcon_jax.config import FalconConfig
from falcon_jax.errors import RequestError
from falcon_jax.generate.programs import WITHOUT_CUDA_GRAPHS
from pallas_kernels import compat
from pallas_kernels.attention_norm import attention_norm, new_meeting
from pallas_kernels.attention_norm.reference import attention_norm_reference
from pallas_kernels.quantized_matmul import MAX_ROWS, Product, project, quantize
from pallas_kernels.quantized_matmul.plan import Plan, input_launch, output_launch
from pallas_kernels.quantized_matmul.product import form_of
from pallas_kernels.quantized_matmul.wide_plan import WidePlan, default_plan

PLAIN = "XLA"
PARTS = ("output", "both")
# What the weights of a chain take: far more than a second-level cache.
CHAIN_BYTES = {"cpu": 2**20, "gpu": 2 * 2**30}
MAX_LAYERS, MIN_LAYERS = 24, 2
SECONDS = {"cpu": 0.01, "gpu": 0.05}  # that a program takes, roughly
GUESSED_BYTES_PER_S = {"cpu": 5e9, "gpu": 4e12}
GUESSED_FLOPS = {"cpu": 5e10, "gpu": 6e14}


@dataclasses.dataclass(frozen=True)
class StageCase:
    """One kind of layer: a model's, with its weights in one form, and so many rows."""

    name: str
    config: FalconConfig
    weights: str
    num_rows: int

    def __str__(self) -> str:
        return f"{self.name} {self.weights} R={self.num_rows}"

    @property
    def outputs(self) -> dict[str, int]:
        """Of each projection of the input stage."""
        heads = {"query": self.config.num_heads, "key": self.config.num_kv_heads, "value": self.config.num_kv_heads}
        return {name: count * self.config.head_dim for name, count in heads.items()} | {"up": self.config.mlp_width}

    def layer(self, key: Array) -> dict[str, Any]:
        """Random weights of one layer."""
        return {
            name: _weight(jax.random.fold_in(key, i), *size, self.weights)
            for i, (name, size) in enumerate(self.sizes.items())
        }

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each projection."""
        D, attended = self.config.width, self.outputs["query"]
        sizes = {name: (D, size) for name, size in self.outputs.items()}
        return sizes | {"output": (attended, D), "down": (self.config.mlp_width, D)}

    def bytes_of(self, layer: dict[str, Any], part: str) -> int:
        """Bytes of weights that a layer reads."""
        return sum(array.nbytes for name in _of_part(part, layer) for array in jax.tree.leaves(layer[name]))

    def flops(self, part: str) -> int:
        """That a layer's products take."""
        return sum(2 * self.num_rows * math.prod(self.sizes[name]) for name in _of_part(part, self.sizes))


def _of_part(part: str, projections: Iterable[str]) -> Iterable[str]:
    return ("output", "down") if part == "output" else projections


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way of running ours.

    cuda_graphs: off launches each by itself.
    plan: what a launch's Plan (for many rows WidePlan) has beside its default: pairs of a field and its value, of both
      stages.
    """

    cuda_graphs: bool = True
    plan: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Variant":
        """From names and values. Raises: RequestError where there is no such setting, or no such value."""
        own = {name: value for name, value in settings.items() if name == "cuda_graphs"}
        for name, value in own.items():
            if not isinstance(value, bool):
                raise RequestError(f"--variants {name} is {value}; it must be true or false")
        rest = {name: value for name, value in settings.items() if name not in own}
        known = dict.fromkeys(field.name for plan in (Plan, WidePlan) for field in dataclasses.fields(plan))
        for name in rest:
            if name not in known:
                raise RequestError(f"--variants {name} is unknown; known are cuda_graphs, {', '.join(known)}")
        return cls(**own, plan=tuple(rest.items()))

    def __str__(self) -> str:
        words = ["no graphs"] * (not self.cuda_graphs)
        return " ".join(["ours", *words, *(f"{name}={value}" for name, value in self.plan)])

    def require_plan_for(self, num_rows: int) -> None:
        """Raises RequestError where launches for so many rows have other plans than this one changes."""
        kind = WidePlan if num_rows > MAX_ROWS else Plan
        known = [field.name for field in dataclasses.fields(kind)]
        for name, _ in self.plan:
            if name not in known:
                raise RequestError(
                    f"--variants {name} is not of plans for {num_rows} rows, which have {', '.join(known)}"
                )

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        return None if self.cuda_graphs else WITHOUT_CUDA_GRAPHS

    def project(self, products: list[Product]) -> list[Array]:
        if not self.plan:
            return project(products, implementation="mosaic")
        weights, outputs = [product.weight for product in products], [product.num_outputs for product in products]
        if (rows := products[0].num_rows) > MAX_ROWS:
            from pallas_kernels.quantized_matmul.wide import project_wide

            return project_wide(products, plan=self._changed(self._wide_plan(weights, rows, outputs)))
        from pallas_kernels.quantized_matmul.mosaic import project_mosaic

        launch = input_launch(weights, outputs, rows, compat.num_sms())
        return project_mosaic(products, plan=self._changed(launch.plan))

    def attention_norm(self, xs: list[Array], weights: list[Any], residual: Array, norms: Any, **options: Any) -> Any:
        if not self.plan:
            return attention_norm(xs, weights, residual, norms, **options, implementation="mosaic")
        rows, width = residual.shape
        meeting = options.pop("meeting")
        if rows > MAX_ROWS:
            from pallas_kernels.attention_norm.wide import attention_norm_wide

            plan = self._changed(self._wide_plan(weights, rows, [width]))
            return attention_norm_wide(xs, weights, [], residual, norms, meeting, **options, plan=plan)
        from pallas_kernels.attention_norm.mosaic import attention_norm_mosaic

        launch = output_launch(weights, width, rows, len(norms), compat.num_sms())
        plan = self._changed(launch.plan)
        return attention_norm_mosaic(xs, weights, [], residual, norms, meeting, **options, plan=plan)

    def _wide_plan(self, weights: Sequence[Any], num_rows: int, num_outputs: Sequence[int]) -> WidePlan:
        return default_plan(form_of(weights[0]), num_rows, num_outputs, compat.num_sms())

    def _changed[P: (Plan, WidePlan)](self, plan: P) -> P:
        return dataclasses.replace(plan, **dict(self.plan))


class Plain:
    """XLA's own."""

    compiler_options = None

    def __str__(self) -> str:
        return PLAIN

    def project(self, products: list[Product]) -> list[Array]:
        """XLA would not compute what nobody reads, attention being left out here: the last product reads a number of
        each of the others."""
        *others, last = project(products, implementation="xla")
        return [*others, last + sum((y[:, :1] * 0 for y in others), jnp.zeros((), last.dtype))]

    def attention_norm(self, *arguments: Any, **options: Any) -> Any:
        return attention_norm(*arguments, **options, implementation="xla")


@functools.partial(jax.jit, static_argnames=("num_inputs", "num_outputs", "form"))
def _weight(key: Array, num_inputs: int, num_outputs: int, form: str) -> Any:
    w = (jax.random.normal(key, (num_inputs, num_outputs), jnp.float32) * num_inputs**-0.5).astype(jnp.bfloat16)
    return w if form == "native" else quantize(w, form)


def run_layer(case: StageCase, part: str, way: Variant | Plain, weights: dict[str, Any], carry: Any, fixed: Any) -> Any:
    """One layer: carry is (residual, normed, hidden, meeting), fixed is (attention's result, norm)."""
    residual, normed, hidden, meeting = carry
    attended, norm = fixed

    def inputs(names: Sequence[str], x: Array) -> list[Array]:
        products = [
            Product(x, weights[name], case.outputs[name], None, "gelu" if name == "up" else None) for name in names
        ]
        return way.project(products)

    def finish(xs: list[Array], names: list[str], residual: Array, meeting: Array) -> Any:
        return way.attention_norm(
            xs, [weights[name] for name in names], residual, [norm], epsilon=case.config.norm_epsilon, meeting=meeting
        )

    both = part == "both"
    if case.config.block == "parallel":
        if both:
            *_, hidden = inputs(list(case.outputs), normed)
        residual, (normed,), meeting = finish([attended, hidden], ["output", "down"], residual, meeting)
        return residual, normed, hidden, meeting
    if both:
        attended = attended + inputs(["query", "key", "value"], normed)[-1][:, :1] * 0
    residual, (normed,), meeting = finish([attended], ["output"], residual, meeting)
    if both:
        (hidden,) = inputs(["up"], normed)
    residual, (normed,), meeting = finish([hidden], ["down"], residual, meeting)
    return residual, normed, hidden, meeting


class Work(NamedTuple):
    """What a program does: layers, and of each part of one the bytes of weights and its products' FLOPs."""

    num_layers: int
    num_bytes: dict[str, int]
    flops: dict[str, int]


def contestants(case: StageCase, variants: Sequence[Variant] = ()) -> tuple[list[Entry], Work]:
    """Compiled and, over one layer, compared with float32; and what each program does."""
    backend = jax.default_backend()
    key = jax.random.key(0)
    first = case.layer(key)
    num_bytes = {part: case.bytes_of(first, part) for part in PARTS}
    num_layers = max(MIN_LAYERS, min(MAX_LAYERS, math.ceil(CHAIN_BYTES.get(backend, 2**30) / num_bytes["both"])))
    layers = [first, *(case.layer(jax.random.fold_in(key, 100 + i)) for i in range(num_layers - 1))]
    guessed = max(
        num_bytes["both"] / GUESSED_BYTES_PER_S.get(backend, 1e12),
        case.flops("both") / GUESSED_FLOPS.get(backend, 1e14),
    )
    num_rounds = max(1, round(SECONDS.get(backend, 0.05) / (guessed * num_layers)))
    carry, fixed = _activations(case)

    def chain(part: str, way: Variant | Plain, layers: Any, carry: Any, fixed: Any) -> tuple[Any, ...]:
        def one_round(_: Any, carry: Any) -> Any:
            for weights in layers:
                carry = run_layer(case, part, way, weights, carry, fixed)
            return carry

        return tuple(jax.lax.fori_loop(0, num_rounds, one_round, carry))

    def one_layer(way: Variant | Plain, weights: Any, carry: Any, fixed: Any) -> tuple[Any, ...]:
        return tuple(run_layer(case, "both", way, weights, carry, fixed)[:2])

    def exact(weights: Any, carry: Any, fixed: Any) -> tuple[Any, ...]:
        return _exact_layer(case, weights, carry, fixed)

    reason = compat.mosaic_reason()
    chains, checks = [], []
    for way in (Variant(), *variants, Plain()):
        ours = isinstance(way, Variant)
        rest = {"ours": ours, "reason": reason if ours else None, "compiler_options": way.compiler_options}
        for part in PARTS:
            function = functools.partial(chain, part, way)
            chains.append(Program(f"{way}, {part}", function, (layers, carry, fixed), **rest))
        function = functools.partial(one_layer, way)
        checks.append(Program(f"{way}, one layer", function, (first, carry, fixed), num_checked=2, **rest))
    reference = Program("float32", exact, (first, carry, fixed))
    entries = prepare(Group([*checks, *chains], reference, f"{PLAIN}, one layer"))
    return entries, Work(
        num_layers * num_rounds, _with_input(num_bytes), _with_input({part: case.flops(part) for part in PARTS})
    )


def _with_input(of: dict[str, int]) -> dict[str, int]:
    return of | {"input": of["both"] - of["output"]}


def _activations(case: StageCase) -> tuple[Any, Any]:
    D = case.config.width

    def normal(seed: int, *shape: int) -> Array:
        return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(jnp.bfloat16)

    rows = case.num_rows
    carry = normal(0, rows, D), normal(1, rows, D), normal(2, rows, case.config.mlp_width), new_meeting(rows, D)
    return carry, (normal(3, rows, case.outputs["query"]), (normal(4, D), normal(5, D)))


def _exact_layer(case: StageCase, weights: dict[str, Any], carry: Any, fixed: Any) -> tuple[Any, ...]:
    """A layer in float32 from end to end: the residual and its norm."""
    residual, normed, attended = (x.astype(jnp.float32) for x in (carry[0], carry[1], fixed[0]))
    norm, epsilon = fixed[1], case.config.norm_epsilon

    def up(x: Array) -> Array:
        product = Product(x, _in_float32(weights["up"]), case.outputs["up"], None, "gelu")
        return project([product], implementation="xla")[0]

    def finish(xs: list[Array], names: list[str], residual: Array) -> Any:
        return attention_norm_reference(xs, [weights[name] for name in names], [], residual, [norm], epsilon)

    if case.config.block == "parallel":
        residual, (normed,) = finish([attended, up(normed)], ["output", "down"], residual)
        return residual, normed
    residual, (normed,) = finish([attended], ["output"], residual)
    residual, (normed,) = finish([up(normed)], ["down"], residual)
    return residual, normed


def _in_float32(weight: Any) -> Any:
    return weight.astype(jnp.float32) if isinstance(weight, jax.Array) else weight
