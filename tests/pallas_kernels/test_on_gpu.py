"""The kernels where they belong, on a Hopper GPU and at full size, against the plain versions in float32."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, shapes
from pallas_kernels.attention_norm import attention_norm, attention_norm_deferred
from pallas_kernels.attention_norm.mosaic import add_mosaic
from pallas_kernels.attention_norm.reference import add_xla, attention_norm_reference
from pallas_kernels.decode_attention import decode_attention, decode_attention_in_chain, mosaic
from pallas_kernels.decode_attention.plan import Plan, Shape
from pallas_kernels.decode_attention.reference import decode_reference
from pallas_kernels.flash_attention import attention
from pallas_kernels.quantized_matmul import Product, project, quantize
from tests.pallas_kernels.packing import starts_of
from tests.pallas_kernels.stage_cases import input_stage, product_reference
from tests.pallas_kernels.tolerance import allowed, error, require_close

# Queries of which the reference is made: all of a long prompt's would need an array of scores.
MAX_REFERENCE_QUERIES = 256


@pytest.fixture(autouse=True)
def _hopper():
    if (reason := compat.mosaic_reason()) is not None:
        pytest.skip(reason)


pytestmark = pytest.mark.gpu


def in_float32(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    return inputs | {name: inputs[name].astype(jnp.float32) for name in names}


# Attention


def last_queries(
    case: shapes.AttentionCase, inputs: dict[str, Any], out: jax.Array
) -> tuple[dict[str, Any], jax.Array]:
    """The case with its last queries alone, as a chunk, and their part of the result."""
    count = min(case.T, MAX_REFERENCE_QUERIES)
    offset = jnp.zeros(case.B, jnp.int32) if inputs["query_offset"] is None else inputs["query_offset"]
    chunk = inputs | {"q": inputs["q"][:, -count:], "query_offset": offset + (case.T - count)}
    return chunk, out[:, -count:]


@pytest.mark.parametrize("case", shapes.GPU_ATTENTION, ids=str)
def test_attention_at_full_size(case):
    inputs = case.draw(0)
    call = jax.jit(lambda inputs: attention(**inputs, scale=case.scale, implementation="mosaic", alibi=alibi))
    plain = jax.jit(lambda inputs: attention(**inputs, scale=case.scale, implementation="xla", alibi=alibi))
    alibi = inputs.pop("alibi")
    out = call(inputs)
    np.testing.assert_array_equal(out, call(inputs))
    chunk, out = last_queries(case, inputs, out)
    require_close(out, plain(chunk), plain(in_float32(chunk, "q", "k", "v")))


@pytest.mark.parametrize("model", shapes.HEADS)
@pytest.mark.parametrize("tokens", [1024, 1001])
def test_log_sum_exp_of_every_head_where_the_last_tile_of_queries_is_not_full(model, tokens):
    """Its copies do not stop where a head ends, of their own accord."""
    case = shapes.attention_case(model, tokens, batch=2)
    inputs = case.draw(5)
    alibi = inputs.pop("alibi")

    @functools.partial(jax.jit, static_argnames="implementation")
    def lse(inputs, implementation):
        options = {"scale": case.scale, "alibi": alibi, "implementation": implementation}
        return attention(**inputs, **options, return_lse=True)[1]

    made = lse(inputs, "mosaic")
    for _ in range(20):
        np.testing.assert_array_equal(made, lse(inputs, "mosaic"))
    require_close(made, lse(inputs, "xla"), lse(in_float32(inputs, "q", "k", "v"), "xla"))


BACKWARD = [
    *(shapes.attention_case(model, 1024) for model in shapes.HEADS),
    *(shapes.attention_case(model, 1001, dtype="float16") for model in ("falcon-rw-1b", "falcon-40b-alibi")),
    *(
        dataclasses.replace(shapes.attention_case(model, 777), name=f"{model} hf_bf16", alibi="hf_bf16")
        for model in ("falcon-rw-1b", "falcon-40b-alibi")
    ),
    dataclasses.replace(shapes.attention_case("falcon-40b", 640, batch=2), name="ragged", lengths=(640, 301)),
]


@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_gradients_at_full_width(case):
    inputs = case.draw(1)
    alibi = inputs.pop("alibi")
    cotangent = jax.random.normal(jax.random.key(9), inputs["q"].shape, inputs["q"].dtype)

    def gradients(implementation, q, k, v, cotangent):
        def call(q, k, v):
            given = inputs | {"q": q, "k": k, "v": v}
            return attention(**given, scale=case.scale, implementation=implementation, alibi=alibi)

        return jax.vjp(call, q, k, v)[1](cotangent)

    made, again, plain = (jax.jit(functools.partial(gradients, name)) for name in ("mosaic", "mosaic", "xla"))
    arguments = (inputs["q"], inputs["k"], inputs["v"], cotangent)
    gradient = made(*arguments)
    exact = plain(*[x.astype(jnp.float32) for x in arguments])
    for x, once_more, same_dtype, right in zip(gradient, again(*arguments), plain(*arguments), exact):
        np.testing.assert_array_equal(x, once_more)
        require_close(x, same_dtype, right)


# Documents back to back: of one token, at the edges of tiles and beside them, across many, and what fills a row up.
PACKED = [
    *(
        (shapes.attention_case(model, 2048, batch=2), [(1, 127, 128, 1, 700, 1, 1090), (1984, 64)])
        for model in shapes.HEADS
    ),
    (
        dataclasses.replace(
            shapes.attention_case("falcon-rw-1b", 1001, dtype="float16"), name="hf_bf16", alibi="hf_bf16"
        ),
        [(333, 333, 335)],
    ),
    (
        dataclasses.replace(shapes.attention_case("falcon-40b-alibi", 640, batch=2), name="ragged", lengths=(500, 0)),
        [(300, 200, 140), (640,)],
    ),
]


@pytest.mark.parametrize(("case", "documents"), PACKED, ids=str)
def test_packed_documents_and_their_gradients_at_full_width(case, documents):
    inputs = case.draw(6)
    alibi = inputs.pop("alibi")
    starts = starts_of(documents)
    cotangent = jax.random.normal(jax.random.key(9), inputs["q"].shape, inputs["q"].dtype)

    @functools.partial(jax.jit, static_argnames="implementation")
    def results(q, k, v, cotangent, *, implementation):
        def call(q, k, v):
            given = inputs | {"q": q, "k": k, "v": v, "starts": starts}
            return attention(**given, scale=case.scale, implementation=implementation, alibi=alibi)

        out, pull_back = jax.vjp(call, q, k, v)
        return out, *pull_back(cotangent)

    arguments = (inputs["q"], inputs["k"], inputs["v"], cotangent)
    made = results(*arguments, implementation="mosaic")
    for _ in range(20):  # whatever block comes first
        for x, once_more in zip(made, results(*arguments, implementation="mosaic")):
            np.testing.assert_array_equal(x, once_more)
    plain = results(*arguments, implementation="xla")
    exact = results(*(x.astype(jnp.float32) for x in arguments), implementation="xla")
    for x, same_dtype, right in zip(made, plain, exact):
        require_close(x, same_dtype, right)


# Decode attention


def decode(case: shapes.DecodeCase, inputs: dict[str, Any], plan: Plan | None = None) -> jax.Array:
    arrays = inputs["q"], inputs["keys"], inputs["values"], inputs["lengths"]
    return mosaic.decode_mosaic(*arrays, inputs["slopes"], inputs["alibi"], case.scale, inputs["page_table"], plan=plan)


@functools.partial(jax.jit, static_argnames=("case", "dtype", "alibi"))
def _reference(case: shapes.DecodeCase, arrays: dict[str, Any], alibi: str, dtype: str) -> jax.Array:
    def of_row(row):
        keys, values = (arrays[name] for name in ("keys", "values"))
        if (table := arrays["page_table"]) is None:
            cache = keys[row], values[row]
        else:
            cache = (pool[table[row]].reshape(-1, case.K, case.H) for pool in (keys, values))
        q, keys, values = (x.astype(dtype)[None] for x in (arrays["q"][row], *cache))
        return decode_reference(q, keys, values, arrays["lengths"][row][None], arrays["slopes"], alibi, case.scale)[0]

    return jax.lax.map(of_row, jnp.arange(case.B))


def reference(case: shapes.DecodeCase, inputs: dict[str, Any], dtype: str = "float32") -> jax.Array:
    """Row after row: a whole batch in float32 would not fit beside the caches of other processes."""
    arrays = dict(inputs)
    return _reference(case, arrays, arrays.pop("alibi"), dtype)


@pytest.mark.parametrize("case", shapes.GPU_DECODE, ids=str)
def test_decode_at_full_size(case):
    inputs = case.draw(2)
    out = decode_attention(**inputs, scale=case.scale, implementation="mosaic")
    np.testing.assert_array_equal(out, decode_attention(**inputs, scale=case.scale, implementation="mosaic"))
    require_close(out, reference(case, inputs, case.dtype), reference(case, inputs))


# Both ways to combine, one warpgroup and several, heads whole and shared out, more and fewer tiles than warpgroups.
PLANS = [
    ("falcon-40b-alibi", 4096, (4096,), Plan(64, 2, 2, 16, max_heads=16)),
    ("falcon-40b-alibi", 4096, (4001,), Plan(128, 2, 1, 16, max_heads=24)),
    ("falcon-40b-alibi", 2048, (2000, 0, 65), Plan(64, 2, 2, 8, max_heads=32)),
    ("falcon-40b-alibi", 2048, (2000, 700), Plan(64, 2, 2, 16, "grid")),
    ("falcon-40b-alibi", 8192, (8000,), Plan(64, 1, 2, 64, "grid")),
    ("falcon-7b", 4096, (4001,), Plan(64, 4, 1, 16, max_heads=24)),
    ("falcon-7b", 1024, (1000, 3), Plan(64, 2, 2, 4)),
    ("falcon-40b", 1000, (1000, 77), Plan(64, 3, 2, 8)),
    ("falcon-40b", 8192, (1,), Plan(64, 1, 2, 16, "grid")),
    ("falcon-180b", 2048, (2048,), Plan(64, 2, 2, 8)),
    ("falcon2-11b", 2048, (1555,), Plan(64, 2, 2, 8)),
    ("falcon-rw-1b", 512, (512, 100), Plan(64, 2, 4, 1)),
    ("falcon-rw-1b", 2048, (2000, 1, 64, 65), Plan(64, 1, 4, 2)),
    ("falcon-rw-1b", 1024, (1000, 1, 0, 65), Plan(64, 4, 2, 1)),
]


@pytest.mark.parametrize(("model", "capacity", "lengths", "plan"), PLANS, ids=str)
@pytest.mark.parametrize("paged", [False, True])
def test_decode_by_any_plan(model, capacity, lengths, plan, paged):
    if paged and capacity % shapes.PAGE_SIZE:
        pytest.skip("pages hold 64 keys")
    case = shapes.decode_case(model, capacity, len(lengths), paged)
    inputs = dataclasses.replace(case, lengths=lengths).draw(3)
    out = decode(case, inputs, plan)
    np.testing.assert_array_equal(out, decode(case, inputs, plan))
    require_close(out, reference(case, inputs, case.dtype), reference(case, inputs))


@pytest.mark.parametrize("model", shapes.HEADS)
def test_a_thousand_decode_launches_with_fresh_inputs(model):
    case = shapes.decode_case(model, 1024, batch=2)

    def launch(index, worst):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(4), index), 4)
        cache = (case.B, case.S, case.K, case.H)
        inputs = case.draw(0) | {
            "q": jax.random.normal(keys[0], (case.B, case.N, case.H), case.dtype),
            "keys": jax.random.normal(keys[1], cache, case.dtype),
            "values": jax.random.normal(keys[2], cache, case.dtype),
            "lengths": jax.random.randint(keys[3], (case.B,), 0, case.S + 1),
        }
        exact = reference(case, inputs)
        ours, plain = error(decode(case, inputs), exact), error(reference(case, inputs, case.dtype), exact)
        return jnp.maximum(worst, ours / allowed(plain))  # NaN stays NaN

    assert float(jax.jit(lambda: jax.lax.fori_loop(0, 1000, launch, jnp.float32(0)))()) <= 1


@pytest.mark.parametrize(
    ("model", "batch", "tokens"), [("falcon-40b-alibi", 5, 4096), ("falcon-7b", 6, 1024), ("falcon-rw-1b", 1, 16384)]
)
def test_ten_thousand_launches_that_hand_their_counters_on(model, batch, tokens):
    case = shapes.decode_case(model, tokens, batch)
    plan = mosaic.default_plan(Shape(case.B, case.K, case.N // case.K, case.H, case.S), compat.num_sms())
    assert plan.through_memory
    inputs = case.draw(5)
    counters = jnp.zeros(case.B * case.N, jnp.int32)

    def attend(lengths, counters):
        return decode_attention_in_chain(
            inputs["q"], inputs["keys"], inputs["values"], slopes=inputs["slopes"], lengths=lengths, counters=counters,
            implementation="mosaic",
        )  # fmt: skip

    @jax.jit
    def different(lengths, counters):
        """Launches whose bits differ from those of a single one; rows get shorter in between, to one key and none."""
        expected, counters = attend(lengths, counters)

        def launch(index, carry):
            count, counters = carry
            _, counters = attend(jnp.where(index % 3 == 0, index % 200, lengths), counters)
            out, counters = attend(lengths, counters)
            return count + jnp.any(out != expected), counters

        return jax.lax.fori_loop(0, 5000, launch, (0, counters)), expected

    (count, _), expected = different(inputs["lengths"], counters)
    assert int(count) == 0
    np.testing.assert_array_equal(expected, decode(case, inputs))


# Stages of a few rows


FORMS = pytest.mark.parametrize("form", ["native", "int8", "int4"])
WIDTHS = pytest.mark.parametrize(
    ("width", "heads", "mlp_width"), [(8192, 8192, 32768), (4544, 4544, 18176), (2048, 2048, 8192)], ids=str
)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(jnp.bfloat16)


def weight(seed: int, num_inputs: int, num_outputs: int, form: str) -> Any:
    w = normal(seed, num_inputs, num_outputs) * num_inputs**-0.5
    return w if form == "native" else quantize(w, form)


@FORMS
@WIDTHS
def test_ten_thousand_output_stages_give_the_same_bits(width, heads, mlp_width, form):
    xs = [normal(0, 8, heads), normal(1, 8, mlp_width)]
    weights = [weight(2, heads, width, form), weight(3, mlp_width, width, form)]
    residual, norms = normal(4, 8, width), [(normal(5, width), normal(6, width))]

    @jax.jit
    def repeat(xs, weights, residual, norms):
        stage = functools.partial(attention_norm, xs, weights, residual, norms, epsilon=1e-5, implementation="mosaic")
        first, (first_normed,), meeting = stage()

        def again(_, carry):
            num_wrong, meeting = carry
            out, (normed,), meeting = stage(meeting=meeting)
            return num_wrong + (jnp.any(out != first) | jnp.any(normed != first_normed)), meeting

        num_wrong, _ = jax.lax.fori_loop(0, 10_000, again, (jnp.int32(0), meeting))
        return first, first_normed, num_wrong

    out, normed, num_wrong = repeat(xs, weights, residual, norms)
    assert num_wrong == 0
    plain_out, (plain_normed,), _ = attention_norm(xs, weights, residual, norms, epsilon=1e-5, implementation="xla")
    in_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), (xs, residual, norms))
    exact_out, (exact_normed,) = attention_norm_reference(
        in_float32[0], weights, [], in_float32[1], in_float32[2], 1e-5
    )
    require_close(out, plain_out, exact_out)
    require_close(normed, plain_normed, exact_normed)


@FORMS
@WIDTHS
@pytest.mark.parametrize("num_rows", [None, 4])
def test_ten_thousand_norms_that_end_where_they_are_read_give_the_same_bits(num_rows, width, heads, mlp_width, form):
    xs, residual, norms = [normal(0, 8, heads)], normal(4, 8, width), [(normal(5, width), normal(6, width))]
    weights, bias, up = [weight(2, heads, width, form)], normal(7, mlp_width), weight(3, width, mlp_width, form)
    num_tokens = num_rows or 6

    def stages(implementation, xs, weights, residual, norms, bias, up):
        out, (rows,), moments = attention_norm_deferred(
            xs, weights, residual, norms, epsilon=1e-5, num_rows=num_rows, implementation=implementation
        )
        product = Product(rows, up, mlp_width, bias, "gelu")
        (made,) = project([product], moments=moments, implementation=implementation)
        return out[:num_tokens], rows, made[:num_tokens]

    @jax.jit
    def repeat(*arguments):
        first = stages("mosaic", *arguments)

        def again(_, num_wrong):
            # Each pass reads the count, which is never below zero: none of them can be left out.
            xs, weights, residual, *rest = arguments
            made = stages("mosaic", xs, weights, residual + jnp.minimum(num_wrong, 0).astype(residual.dtype), *rest)
            wrong = [jnp.any(some != other) for some, other in zip(made, first, strict=True)]
            return num_wrong + jnp.any(jnp.stack(wrong))

        return first, jax.lax.fori_loop(0, 10_000, again, jnp.int32(0))

    arguments = xs, weights, residual, norms, bias, up
    (out, _, made), num_wrong = repeat(*arguments)
    assert num_wrong == 0
    plain_out, _, plain = stages("xla", *arguments)
    in_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), (xs, residual, norms, bias))
    exact_out, (normed,) = attention_norm_reference(in_float32[0], weights, [], in_float32[1], in_float32[2], 1e-5)
    require_close(out, plain_out, exact_out[:num_tokens])
    exact = product_reference(Product(normed, up, mlp_width, in_float32[3], "gelu"))
    require_close(made, plain, exact[:num_tokens])


@FORMS
@pytest.mark.parametrize(("width", "sizes"), [(8192, (1024, 4096)), (4544, (4544, 2304))], ids=str)
def test_a_devices_part_of_an_output_stage(width, sizes, form):
    xs = [normal(i, 8, size) for i, size in enumerate(sizes)]
    weights = [weight(2 + i, size, width, form) for i, size in enumerate(sizes)]
    plain = add_xla([Product(x, w, width) for x, w in zip(xs, weights, strict=True)])
    nothing = jnp.zeros((8, width), jnp.float32)
    exact, _ = attention_norm_reference([x.astype(jnp.float32) for x in xs], weights, [], nothing, [], 1e-5)
    require_close(jax.jit(add_mosaic, static_argnums=2)(xs, weights, width), plain, exact)


# Stages of many rows


@FORMS
@pytest.mark.parametrize(
    ("num_inputs", "outputs"), [(4544, (4544, 64, 64, 18176)), (384, (384, 64, 64, 1536)), (256, (320, 192))], ids=str
)
def test_products_of_any_number_of_outputs_and_their_bits(num_inputs, outputs, form):
    products = input_stage(form, num_inputs, outputs, 200)
    made, again = (project(products, implementation="mosaic") for _ in range(2))
    plain = project(products, implementation="xla")
    for some, same, other, product in zip(made, again, plain, products, strict=True):
        np.testing.assert_array_equal(some, same)
        require_close(some, other, product_reference(product))
