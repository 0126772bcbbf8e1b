"""The stages for many rows: kernels interpreted with race detection, and as they run, compiled for an H100."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compat
from pallas_kernels.attention_norm import new_meeting
from pallas_kernels.attention_norm.reference import attention_norm_reference, attention_norm_xla
from pallas_kernels.attention_norm.wide import attention_norm_wide
from pallas_kernels.quantized_matmul import Product, project, storage
from pallas_kernels.quantized_matmul.wide import project_wide
from pallas_kernels.quantized_matmul.wide_plan import WideLaunch, WidePlan, default_plan
from tests.pallas_kernels import hopper
from tests.pallas_kernels.interpreted import interpreted
from tests.pallas_kernels.stage_cases import FORMS, input_stage, normal, product_reference, weight
from tests.pallas_kernels.tolerance import require_close
from tests.thorough import thorough

# Form, inputs, outputs of each product, rows, plan: several turns of a block, chunks past the end, rows and outputs
# past the end, groups of rows.
INPUT_STAGES = [
    *thorough([("native", 192, (192, 64, 320), 100, WidePlan(128, 64, 3))]),
    ("native", 192, (128,), 200, WidePlan(64, 64, 3, chunk=128, group=2)),
    ("int8", 320, (192, 64), 72, WidePlan(128, 64, 3)),
    *thorough([("int8", 128, (320,), 96, WidePlan(64, 64, 4))]),
    ("int4", 320, (320, 64), 72, WidePlan(128, 64, 3)),
    ("int4", 256, (64,), 160, WidePlan(64, 64, 4, group=2)),
]


@pytest.mark.parametrize(("form", "num_inputs", "outputs", "num_rows", "plan"), INPUT_STAGES)
def test_input_stage(form, num_inputs, outputs, num_rows, plan):
    products = input_stage(form, num_inputs, outputs, num_rows)
    with interpreted():
        made = jax.block_until_ready(project_wide(products, plan=plan))
    plain = project(products, implementation="xla")
    for some, other, product in zip(made, plain, products, strict=True):
        assert some.shape == (num_rows, product.num_outputs)
        require_close(some, other, product_reference(product))


# Form, inputs of each product, width, rows, norms, biases, plan.
OUTPUT_STAGES = [
    ("native", (128, 192), 320, 100, 2, 0, WidePlan(128, 64, 3)),
    *thorough(
        [
            ("native", (128, 64), 128, 72, 1, 2, WidePlan(64, 64, 3, chunk=128)),
            ("int8", (192, 128), 192, 72, 1, 0, WidePlan(128, 64, 3)),
        ]
    ),
    ("int8", (192,), 1280, 72, 1, 1, WidePlan(128, 96, 3)),
    ("int4", (192, 256), 320, 136, 2, 0, WidePlan(64, 64, 4, group=2)),
]


@pytest.mark.parametrize(("form", "sizes", "width", "num_rows", "num_norms", "num_biases", "plan"), OUTPUT_STAGES)
def test_output_stage(form, sizes, width, num_rows, num_norms, num_biases, plan):
    xs = [normal(i, num_rows, size) for i, size in enumerate(sizes)]
    weights = [weight(10 + i, size, width, form) for i, size in enumerate(sizes)]
    biases = [normal(20 + i, width) for i in range(num_biases)]
    # Rows far from zero: a variance that cancels would show.
    residual = normal(30, num_rows, width) + jnp.arange(num_rows, dtype=jnp.bfloat16)[:, None]
    norms = [(normal(40 + i, width), normal(50 + i, width)) for i in range(num_norms)]
    with interpreted():
        out, normed, _ = attention_norm_wide(
            xs, weights, biases, residual, norms, new_meeting(num_rows, width), epsilon=1e-5, plan=plan
        )
        jax.block_until_ready(normed)
    plain_out, plain_normed = attention_norm_xla(xs, weights, biases, residual, norms, 1e-5)
    exact_xs, exact_biases, exact_residual, exact_norms = jax.tree.map(
        lambda x: x.astype(jnp.float32), (xs, biases, residual, norms)
    )
    exact_out, exact_normed = attention_norm_reference(
        exact_xs, weights, exact_biases, exact_residual, exact_norms, 1e-5
    )
    require_close(out, plain_out, exact_out)
    for some, other, exact in zip(normed, plain_normed, exact_normed, strict=True):
        assert some.shape == residual.shape
        require_close(some, other, exact)


def test_default_plans_of_both_stages_are_interpreted_too():
    x, w, column = normal(0, 65, 64), weight(1, 64, 128, "int4"), normal(2, 128)
    with interpreted():
        [made] = jax.block_until_ready(project_wide([Product(x, w, 128)]))
        out, normed, _ = attention_norm_wide(
            [x], [w], [], normal(3, 65, 128), [(column, column)], new_meeting(65, 128), epsilon=1e-5
        )
        jax.block_until_ready(normed)
    assert made.shape == out.shape == normed[0].shape == (65, 128)
    require_close(made, project([Product(x, w, 128)], implementation="xla")[0], product_reference(Product(x, w, 128)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_rows", [65, 128, 512, 1024, 4096, 32768])
def test_default_plans_fit_the_hardware_and_keep_all_of_it_at_work(form, num_rows):
    for outputs in [(8192, 128, 128, 32768), (8192,), (4544, 64, 64, 18176), (4544,), (2048,) * 3 + (8192,), (2048,)]:
        plan = default_plan(form, num_rows, outputs, compat.NUM_SMS)
        plan.check(form)
        launch = WideLaunch(form, num_rows, (8192,) * len(outputs), outputs, plan, compat.NUM_SMS)
        assert launch.num_blocks <= compat.NUM_SMS
        work = sum(outputs) * num_rows
        turns = -(-launch.num_positions // launch.num_clusters)
        done = turns * compat.NUM_SMS * plan.outputs * plan.rows
        assert work >= done / 2 or num_rows <= 512


def test_plans_that_do_not_suit_are_refused():
    product = Product(normal(0, 72, 128), weight(1, 128, 64, "int8"), 64)
    plans = (WidePlan(chunk=128), WidePlan(rows=320), WidePlan(rows=40), WidePlan(outputs=96), WidePlan(stages=1))
    with compat.assume_capability(compat.HOPPER):
        for plan in plans:
            with pytest.raises(ValueError, match="does not suit weights that are int8"):
                project_wide([product], plan=plan)
        with pytest.raises(ValueError, match="bytes of shared memory, of 232448"):
            project_wide([product], plan=WidePlan(stages=6))
    angles = jnp.zeros((72, 32))
    with pytest.raises(ValueError, match="neither rotates"):
        project_wide([Product(product.x, product.weight, 64, rotary=(angles, angles))])


# As compiled.


def array(*shape: int, dtype: Any = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def described(form: str, num_inputs: int, num_outputs: int) -> Any:
    return array(num_inputs, num_outputs) if form == "native" else storage(form, num_inputs, num_outputs)


# Width, outputs of the attention's products, of the MLP's; norms; whether there are biases.
MODELS = {
    "falcon-40b-alibi": (8192, (8192, 128, 128), 32768, 2, False),
    "falcon-7b": (4544, (4544, 64, 64), 18176, 1, False),
    "falcon-rw-1b": (2048, (2048, 2048, 2048), 8192, 1, True),
}
COMPILED = [
    *(("falcon-40b-alibi", form, 4096, None) for form in ("native", "int8")),
    ("falcon-7b", "int4", 512, None),
    *thorough(
        [
            ("falcon-40b-alibi", "int4", 4096, None),
            ("falcon-rw-1b", "native", 1024, None),
            ("falcon-40b-alibi", "int4", 1024, WidePlan(cluster=1)),
            ("falcon-40b-alibi", "native", 1024, WidePlan(rows=128, stages=3, chunk=128)),
            ("falcon-40b-alibi", "int8", 128, WidePlan(outputs=64, rows=128)),
        ]
    ),
]


@pytest.mark.parametrize(("model", "form", "num_rows", "plan"), COMPILED, ids=str)
def test_stages_are_one_launch_each_without_spills(compiler, model, form, num_rows, plan):
    width, heads, mlp_width, num_norms, has_biases = MODELS[model]
    x = array(num_rows, width)
    products = [
        Product(x, described(form, width, size), size, array(size) if has_biases else None, "gelu" if is_last else None)
        for size, is_last in [*((size, False) for size in heads), (mlp_width, True)]
    ]
    report = compiler.compile(project_wide, products, plan=plan)
    require_no_problems(report)
    assert report.launches == ("mosaic_gpu_v2",)

    sizes = heads[0], mlp_width
    report = compiler.compile(
        attention_norm_wide,
        [array(num_rows, size) for size in sizes],
        [described(form, size, width) for size in sizes],
        [array(width)] * (2 * has_biases),
        x,
        [(array(width), array(width))] * num_norms,
        array(4, dtype="int32"),
        epsilon=1e-5,
        plan=plan,
    )
    require_no_problems(report)
    # What blocks meet through is the caller's, who keeps it here, and so is copied.
    assert report.launches == ("copy", "mosaic_gpu_v2")
    assert report.kernels[0].num_blocks <= compat.NUM_SMS, "all of them run at once"


def require_no_problems(report: hopper.Report) -> None:
    if report.problems():
        pytest.fail(str(report), pytrace=False)
