"""The input and the output stage: kernels interpreted with race detection, and XLA's form, against float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.attention_norm import attention_norm, new_meeting
from pallas_kernels.attention_norm.api import checked_products
from pallas_kernels.attention_norm.mosaic import add_mosaic, attention_norm_mosaic
from pallas_kernels.attention_norm.reference import add_xla, attention_norm_reference, attention_norm_xla
from pallas_kernels.quantized_matmul import Product, project, quantize, quantized_matmul, storage
from pallas_kernels.quantized_matmul.mosaic import gelu, project_mosaic
from pallas_kernels.quantized_matmul.plan import Plan, check_all_run_at_once, fitting_plan, output_launch
from pallas_kernels.quantized_matmul.reference import matmul_reference
from pallas_kernels.rotary import rotate
from tests.pallas_kernels.interpreted import interpreted
from tests.pallas_kernels.stage_cases import FORMS, input_stage, normal, product_reference, weight
from tests.pallas_kernels.tolerance import require_close
from tests.thorough import thorough

# Form, inputs, outputs of each product, rows, plan: several turns of a block, chunks past the end, more warpgroups.
INPUT_STAGES = [
    ("native", 256, (64, 128), 8, Plan(2, 2)),
    ("native", 192, (128, 192), 8, Plan(3, 2)),
    ("int8", 320, (64, 64), 16, Plan(1, 2, groups=2)),
    ("int8", 256, (192,), 8, Plan(2, 3, producer=True)),
    ("int4", 512, (128, 64, 192), 8, Plan(2, 2, groups=2, producer=True)),
]


@pytest.mark.parametrize(("form", "num_inputs", "outputs", "num_rows", "plan"), INPUT_STAGES)
def test_input_stage(form, num_inputs, outputs, num_rows, plan):
    products = input_stage(form, num_inputs, outputs, num_rows)
    with interpreted():
        made = jax.block_until_ready(project_mosaic(products, plan=plan))
    plain = project(products, implementation="xla")
    for some, other, product in zip(made, plain, products, strict=True):
        require_close(some, other, product_reference(product))


@pytest.mark.parametrize("form", ["int8", *thorough(["native", "int4"])])
def test_a_product_in_float32_is_not_rounded(form):
    product = Product(normal(0, 8, 256), weight(1, 256, 192, form), 192, dtype="float32")
    with interpreted():
        [made] = jax.block_until_ready(project_mosaic([product], plan=Plan(2, 2)))
    assert made.dtype == jnp.float32
    exact = product_reference(product)
    tolerance = 1e-2 if form == "int4" else 1e-5  # of which weights are rounded to x's dtype
    np.testing.assert_allclose(made, exact, rtol=0, atol=tolerance * float(jnp.abs(exact).max()))


# Form, inputs of each product, width, rows, norms, biases, blocks that run at once, plan.
OUTPUT_STAGES = [
    ("native", (128, 256), 128, 8, 2, 0, 2, Plan(2, 2)),
    ("native", (256,), 128, 8, 1, 1, 4, Plan(2, 2, splits=2)),
    ("int8", (256,), 192, 16, 1, 1, 2, Plan(1, 2, width=2)),
    ("int8", (640,), 256, 8, 1, 0, 2, Plan(3, 2, width=4)),
    ("int4", (256, 512), 256, 8, 1, 0, 4, Plan(2, 2, groups=2, producer=True)),
    ("int4", (192, 320), 192, 8, 2, 0, 4, Plan(1, 3, width=2, splits=2, producer=True)),
]


@pytest.mark.parametrize(
    ("form", "sizes", "width", "num_rows", "num_norms", "num_biases", "num_sms", "plan"), OUTPUT_STAGES
)
def test_output_stage(monkeypatch, form, sizes, width, num_rows, num_norms, num_biases, num_sms, plan):
    monkeypatch.setattr(compat, "num_sms", lambda mesh=None: num_sms)
    xs = [normal(i, num_rows, size) for i, size in enumerate(sizes)]
    weights = [weight(10 + i, size, width, form) for i, size in enumerate(sizes)]
    biases = [normal(20 + i, width) for i in range(num_biases)]
    # Rows far from zero: a variance that cancels would show.
    residual = normal(30, num_rows, width) + jnp.arange(num_rows, dtype=jnp.bfloat16)[:, None] * 8
    norms = [(normal(40 + i, width), normal(50 + i, width)) for i in range(num_norms)]
    with interpreted():
        out, normed, _ = attention_norm_mosaic(
            xs, weights, biases, residual, norms, new_meeting(num_rows, width), epsilon=1e-5, plan=plan
        )
        jax.block_until_ready(normed)
    arguments = (xs, weights, biases, residual, norms, 1e-5)
    plain_out, plain_normed = attention_norm_xla(*arguments)
    in_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), (xs, biases, residual, norms))
    exact_out, exact_normed = attention_norm_reference(
        in_float32[0], weights, in_float32[1], in_float32[2], in_float32[3], 1e-5
    )
    require_close(out, plain_out, exact_out)
    for some, other, exact in zip(normed, plain_normed, exact_normed, strict=True):
        require_close(some, other, exact)


@pytest.mark.parametrize(("form", "num_rows"), [("int4", 4), *thorough([("native", 2), ("int8", 3), ("int4", 5)])])
def test_rows_that_mean_nothing_are_not_read(monkeypatch, form, num_rows):
    monkeypatch.setattr(compat, "num_sms", lambda mesh=None: 2)
    read = next(rows for rows in (2, 4, 8) if rows >= num_rows)

    def holey(seed: int, width: int) -> jax.Array:
        return normal(seed, 8, width).at[read:].set(jnp.nan)

    xs, weights = (
        [holey(i, size) for i, size in enumerate((128, 256))],
        [weight(2, 128, 128, form), weight(3, 256, 128, form)],
    )
    residual, norms = normal(4, 8, 128), [(normal(5, 128), normal(6, 128))]
    with interpreted():
        out, normed, _ = attention_norm_mosaic(
            xs, weights, [], residual, norms, new_meeting(8, 128), epsilon=1e-5, plan=Plan(2, 2), num_rows=num_rows
        )
        [made] = project_mosaic([Product(xs[0], weights[0], 128)], plan=Plan(2, 2), num_rows=num_rows)
        jax.block_until_ready((normed, made))
    whole = [jnp.nan_to_num(x) for x in xs]
    plain_out, plain_normed = attention_norm_xla(whole, weights, [], residual, norms, 1e-5)
    in_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), (whole, residual, norms))
    exact_out, exact_normed = attention_norm_reference(in_float32[0], weights, [], in_float32[1], in_float32[2], 1e-5)
    require_close(out[:num_rows], plain_out[:num_rows], exact_out[:num_rows])
    require_close(normed[0][:num_rows], plain_normed[0][:num_rows], exact_normed[0][:num_rows])
    product = Product(whole[0], weights[0], 128)
    [plain] = project([product], implementation="xla")
    require_close(made[:num_rows], plain[:num_rows], product_reference(product)[:num_rows])


# The same without residual and norms: one device's part of a mesh's.
PARTS = [
    ("native", (128, 256), 128, 8, 2, Plan(2, 2)),
    ("native", (256,), 128, 8, 4, Plan(2, 2, splits=2)),
    ("int8", (256,), 192, 16, 2, Plan(1, 2, width=2)),
    ("int4", (256, 512), 256, 8, 4, Plan(2, 2, groups=2, producer=True)),
]


@pytest.mark.parametrize(("form", "sizes", "width", "num_rows", "num_sms", "plan"), PARTS)
def test_a_devices_part_of_the_output_stage(monkeypatch, form, sizes, width, num_rows, num_sms, plan):
    monkeypatch.setattr(compat, "num_sms", lambda mesh=None: num_sms)
    xs = [normal(i, num_rows, size) for i, size in enumerate(sizes)]
    weights = [weight(10 + i, size, width, form) for i, size in enumerate(sizes)]
    with interpreted():
        made = jax.block_until_ready(add_mosaic(xs, weights, width, plan=plan))
    plain = add_xla([Product(x, w, width) for x, w in zip(xs, weights, strict=True)])
    in_float32 = [x.astype(jnp.float32) for x in xs]
    exact, _ = attention_norm_reference(in_float32, weights, [], jnp.zeros((num_rows, width)), [], 1e-5)
    require_close(made, plain, exact)


@pytest.mark.parametrize("form", FORMS)
def test_input_stage_rotates_heads_and_writes_slots(form):
    x, num_tokens = normal(0, 8, 256), 6
    angles = np.random.default_rng(1).uniform(0, 6, (8, 32)).astype(np.float32)
    rotary = jnp.cos(angles).astype(jnp.bfloat16), jnp.sin(angles).astype(jnp.bfloat16)
    places = jnp.asarray([3, 19, 0, 20, 7, 8], jnp.int32)  # the fourth has none

    def products() -> list[Product]:
        slots = [normal(10 + i, 20, 128) for i in range(2)]
        return [
            Product(x, weight(2, 256, 192, form), 192, normal(5, 192), rotary=rotary),
            Product(x, weight(3, 256, 128, form), 128, rotary=rotary, slots=(slots[0], places)),
            Product(x, weight(4, 256, 128, form), 128, slots=(slots[1], places)),
        ]

    with interpreted():
        made = jax.block_until_ready(project_mosaic(products(), plan=Plan(2, 2)))
    plain = project(products(), implementation="xla")
    without_slots = [dataclasses.replace(product, slots=None) for product in products()]
    for i, (some, other, product) in enumerate(zip(made, plain, without_slots, strict=True)):
        exact = product_reference(product)
        if product.rotary is not None:
            cos, sin = (jnp.tile(part.astype(jnp.float32), 2) for part in rotary)
            exact = rotate(exact.reshape(8, -1, 64), cos, sin).reshape(exact.shape)
        if i > 0:
            written = np.asarray([place for place in places.tolist() if place < 20])
            untouched = np.setdiff1d(np.arange(20), written)
            np.testing.assert_array_equal(some[untouched], normal(10 + i - 1, 20, 128)[untouched])
            kept = np.asarray([0, 1, 2, 4, 5])
            some, other, exact = some[written], other[written], exact[:num_tokens][kept]
        require_close(some, other, exact)


def test_calls_of_any_rows_go_through_eights():
    x, w = normal(0, 3, 1, 128), weight(1, 128, 64, "int4")
    with interpreted():
        made = jax.block_until_ready(quantized_matmul(x, w, 64, implementation="mosaic"))
        out, normed, _ = attention_norm(
            [x], [w], normal(2, 3, 1, 64), [(normal(3, 64), normal(4, 64))], epsilon=1e-5, implementation="mosaic"
        )
        jax.block_until_ready(normed)
    assert made.shape == out.shape == normed[0].shape == (3, 1, 64)
    require_close(made, quantized_matmul(x, w, 64), matmul_reference(x.astype(jnp.float32), w, 64))


def test_gelu_is_exact():
    x = jnp.linspace(-12, 12, 10001, dtype=jnp.float32)
    np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6)


@pytest.mark.parametrize("num_rows", [8, 16, 32, 64])
@pytest.mark.parametrize("form", FORMS)
def test_default_plans_fit_the_hardware(form, num_rows):
    """Of the output stage, for the widths of all models: shared memory of all blocks that have to run at once."""
    for width in (384, 2048, 4096, 4544, 8192, 14848):
        weight = jax.ShapeDtypeStruct((512, width), jnp.bfloat16) if form == "native" else storage(form, 512, width)
        launch = output_launch([weight], width, num_rows, num_norms=2, num_sms=compat.NUM_SMS)
        check_all_run_at_once(launch, num_rows, 2, compat.NUM_SMS)
        plan = launch.plan
        assert plan.stages >= 2 and plan.splits <= 8
    with pytest.raises(ValueError, match="do not fit 1000 bytes"):
        fitting_plan(form, num_rows, 1000)


def test_a_plan_whose_blocks_would_wait_for_others_without_end_is_refused():
    column, rows = normal(0, 4544), normal(1, 8, 4544)
    arguments = [rows], [normal(2, 4544, 4544)], [], rows, [(column, column)], new_meeting(8, 4544)
    with compat.assume_capability(compat.HOPPER):
        attended = functools.partial(attention_norm_mosaic, *arguments, epsilon=1e-5)
        jax.eval_shape(attended)
        with pytest.raises(ValueError, match=r"Plan\(warpgroups=3, .*splits=2.* makes 142 blocks, and 132 of them run"):
            jax.eval_shape(functools.partial(attended, plan=Plan(3, 3, splits=2)))


def test_what_does_not_fit_is_refused():
    x, w = normal(0, 8, 128), weight(1, 128, 64, "native")
    norm = (normal(3, 64), normal(4, 64))
    call = functools.partial(attention_norm, [x], [w], normal(2, 8, 64), epsilon=1e-5)
    with pytest.raises(NotImplementedError, match="it needs a Hopper GPU"):
        call([norm], implementation="mosaic")
    with pytest.raises(ValueError, match="at least one norm"):
        call([])
    with pytest.raises(ValueError, match="`meeting` holds 2051 numbers; so many rows and outputs take 2052"):
        call([norm], meeting=new_meeting(8, 64)[:-1])
    for changes, message in [
        ({"weights": [normal(1, 128, 128)]}, r"a weight \(128, 128\) does not fit x \(8, 128\) and 64 outputs"),
        ({"weights": [quantize(normal(1, 300, 64), "int4")]}, "int4 values"),
        ({"xs": [normal(0, 16, 128)]}, "differ from the residual's"),
        ({"norms": [(normal(3, 65), normal(4, 65))]}, r"are not all \(64,\)"),
        ({"biases": [normal(3, 65)]}, r"a bias \(65,\) does not fit 64 outputs"),
    ]:
        arguments = {"xs": [x], "weights": [w], "biases": [], "residual": normal(2, 8, 64), "norms": [norm]} | changes
        # Under tests the annotations of `attention_norm` itself find some of these first.
        with pytest.raises(ValueError, match=message):
            checked_products(**arguments)
    with pytest.raises(ValueError, match=r"a weight \(128, 64\) does not fit x \(8, 128\) and 65 outputs"):
        project([Product(x, w, 65)])
    with compat.assume_capability(compat.HOPPER):
        for product, reason in [
            (Product(x.astype(jnp.float32), w.astype(jnp.float32), 64), "it takes bfloat16"),
            (
                Product(normal(0, 72, 128), w, 64, rotary=(normal(2, 72, 32), normal(3, 72, 32))),
                "it rotates .* with up to 64",
            ),
            (Product(normal(0, 8, 100), normal(1, 100, 64), 64), "multiples of 64 inputs"),
        ]:
            with pytest.raises(NotImplementedError, match=reason):
                project([product], implementation="mosaic")
        with pytest.raises(NotImplementedError, match="one form, not int8 and native"):
            project([Product(x, w, 64), Product(x, quantize(w, "int8"), 64)], implementation="mosaic")
