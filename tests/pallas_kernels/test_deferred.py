"""Norms that begin in an output stage and end in the input stage after it: kernels interpreted with race detection,
XLA's form, and the machine code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax import sharding
from pallas_kernels import compat
from pallas_kernels.attention_norm import attention_norm, attention_norm_deferred
from pallas_kernels.attention_norm.mosaic import defer_norm_mosaic
from pallas_kernels.quantized_matmul import Moments, Product, deferred, project
from pallas_kernels.quantized_matmul.mosaic import project_mosaic
from pallas_kernels.quantized_matmul.plan import Plan
from pallas_kernels.rotary import rotate
from tests.pallas_kernels.interpreted import interpreted
from tests.pallas_kernels.stage_cases import normal, product_reference, weight
from tests.pallas_kernels.test_compiled import WIDTHS, array, few_bits, require_no_problems
from tests.pallas_kernels.tolerance import require_close
from tests.thorough import thorough

EPSILON = 1e-5
TOKENS = 6

# Form, inputs of each product, width, norms, biases, blocks that run at once, plans of the output and the input stage.
CHAINS = [
    ("native", (256,), 192, 1, 1, 8, Plan(2, 2, splits=2), Plan(3, 2)),
    ("int4", (192, 320), 192, 2, 0, 4, Plan(1, 3, width=2, splits=2, producer=True), Plan(2, 2, groups=1)),
    *thorough(
        [
            ("native", (128, 256), 128, 2, 0, 2, Plan(2, 2), Plan(2, 2)),
            ("int8", (256,), 192, 1, 1, 2, Plan(1, 2, width=2), Plan(2, 3, producer=True)),
        ]
    ),
]


def output_stage(form, sizes, width, num_norms, num_biases):
    xs = [normal(i, 8, size) for i, size in enumerate(sizes)]
    weights = [weight(10 + i, size, width, form) for i, size in enumerate(sizes)]
    biases = [normal(20 + i, width) for i in range(num_biases)]
    # Rows further and further from zero.
    residual = normal(30, 8, width) + jnp.arange(8, dtype=jnp.bfloat16)[:, None] * 0.5
    norms = [(normal(40 + i, width), normal(50 + i, width)) for i in range(num_norms)]
    return xs, weights, biases, residual, norms


def input_stage(form, rows):
    """Of what two norms, or one, come to: a product with a bias, one that is rotated, and one with GELU."""
    width = rows[0].shape[1]
    angles = np.random.default_rng(1).uniform(0, 6, (8, 32)).astype(np.float32)
    rotary = jnp.cos(angles).astype(jnp.bfloat16), jnp.sin(angles).astype(jnp.bfloat16)
    return [
        Product(rows[0], weight(60, width, 192, form), 192, normal(61, 192)),
        Product(rows[0], weight(62, width, 128, form), 128, rotary=rotary),
        Product(rows[-1], weight(63, width, 128, form), 128, normal(64, 128), "gelu"),
    ]


@pytest.mark.parametrize(("form", "sizes", "width", "num_norms", "num_biases", "num_sms", "plan", "other"), CHAINS)
def test_a_norm_that_ends_where_it_is_read(
    monkeypatch, form, sizes, width, num_norms, num_biases, num_sms, plan, other
):
    monkeypatch.setattr(compat, "num_sms", lambda mesh=None: num_sms)
    xs, weights, biases, residual, norms = output_stage(form, sizes, width, num_norms, num_biases)
    with interpreted():
        out, rows, moments = defer_norm_mosaic(xs, weights, biases, residual, norms, epsilon=EPSILON, plan=plan)
        made = jax.block_until_ready(project_mosaic(input_stage(form, rows), moments=moments, plan=other))

    # XLA's form from the same residual: how the sums before it are rounded is test_stages.py's.
    plain_rows, plain_moments = deferred.begin(out, norms, EPSILON)
    for some, others in zip(rows, plain_rows, strict=True):
        np.testing.assert_array_equal(some, others)
    tiles = width // 64
    np.testing.assert_allclose(moments.tiles[..., :tiles], plain_moments.tiles[..., :tiles], rtol=1e-5, atol=1e-5)
    plain = project(input_stage(form, plain_rows), moments=plain_moments, implementation="xla")

    exact_rows = [normalized(out.astype(jnp.float32), norm) for norm in norms]
    for some, others, product in zip(made, plain, input_stage(form, exact_rows), strict=True):
        exact = product_reference(product)
        if product.rotary is not None:
            cos, sin = (jnp.tile(part.astype(jnp.float32), 2) for part in product.rotary)
            exact = rotate(exact.reshape(8, -1, 64), cos, sin).reshape(exact.shape)
        require_close(some[:TOKENS], others[:TOKENS], exact[:TOKENS])


def normalized(x, norm):
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + EPSILON)
    return x * norm[0].astype(jnp.float32) + norm[1].astype(jnp.float32)


@pytest.mark.parametrize("mean", [0.0, 1.0, 8.0])
def test_rows_far_from_zero_lose_no_more_than_the_residual_has_lost(mean):
    """Beside the product of a norm that is rounded, from a residual of bfloat16, against an exact one of float32."""
    x = jax.random.normal(jax.random.key(0), (8, 2048)) + mean
    norm = normal(1, 2048), normal(2, 2048)
    w = weight(3, 2048, 512, "native")
    exact = (normalized(x, norm) @ w.astype(jnp.float32))[:TOKENS]
    rounded = x.astype(jnp.bfloat16)
    rows, moments = deferred.begin(rounded, [norm], EPSILON)
    made = project([Product(rows[0], w, 512)], moments=moments, implementation="xla")[0][:TOKENS]
    usual = project([Product(normalized(rounded.astype(jnp.float32), norm).astype(jnp.bfloat16), w, 512)])[0][:TOKENS]

    def off(y):
        return float(jnp.sqrt(jnp.mean((y.astype(jnp.float32) - exact) ** 2)))

    assert off(made) <= 1.5 * off(usual)


def test_both_ways_to_a_norm_agree():
    xs, weights, biases, residual, norms = output_stage("native", (128, 256), 128, 2, 2)
    options = {"biases": biases, "epsilon": EPSILON, "implementation": "xla"}
    out, rows, moments = attention_norm_deferred(xs, weights, residual, norms, **options)
    plain, normed, _ = attention_norm(xs, weights, residual, norms, **options)
    np.testing.assert_array_equal(out, plain)
    for some, others in zip(rows, normed, strict=True):
        finished = deferred.finish(some, moments)[:TOKENS].astype(jnp.float32)
        np.testing.assert_allclose(finished, others[:TOKENS].astype(jnp.float32), atol=0.1)


def test_what_is_no_deferred_norm_is_refused(cpu_devices):
    xs, weights, _, residual, norms = output_stage("native", (128,), 128, 1, 0)
    _, (rows,), moments = attention_norm_deferred(xs, weights, residual, norms, epsilon=EPSILON)
    w = weight(1, 128, 64, "native")
    with pytest.raises(ValueError, match=r"moments \(2, 8, 64\) do not fit rows \(16, 128\); .* 8 rows, the last two"):
        project([Product(jnp.tile(rows, (2, 1)), w, 64)], moments=moments)
    short = Moments(moments.tiles[..., :-1], EPSILON)
    with pytest.raises(ValueError, match=r"moments \(2, 8, 63\) do not fit rows \(8, 128\)"):
        project([Product(rows, w, 64)], moments=short)
    with pytest.raises(ValueError, match=r"a residual \(7, 128\) should be 8 rows of a multiple of 64"):
        attention_norm_deferred([xs[0][:7]], weights, residual[:7], norms, epsilon=EPSILON)
    with pytest.raises(NotImplementedError, match="it needs a Hopper GPU"):
        attention_norm_deferred(xs, weights, residual, norms, epsilon=EPSILON, implementation="mosaic")
    mesh = jax.make_mesh((2,), ("tensor",), devices=cpu_devices[:2])
    with pytest.raises(NotImplementedError, match="over 2 devices it takes `peers`"):
        attention_norm_deferred(xs, weights, residual, norms, epsilon=EPSILON, mesh=mesh)


def test_a_norm_ends_on_each_device_of_a_mesh_in_its_part_of_the_outputs(cpu_devices):
    xs, weights, _, residual, norms = output_stage("native", (128,), 128, 1, 0)
    _, (rows,), moments = attention_norm_deferred(xs, weights, residual, norms, epsilon=EPSILON, implementation="xla")
    mesh = sharding.make_mesh(tensor=2, devices=cpu_devices)
    product = Product(rows, weight(1, 128, 256, "native"), 256, normal(2, 256), "gelu", is_split=True)
    expected = project([product], moments=moments, implementation="xla")[0]
    found = jax.jit(lambda *given: project([given[0]], moments=given[1], mesh=mesh, implementation="xla")[0])(
        product, moments
    )
    assert found.sharding.spec == jax.sharding.PartitionSpec(None, "tensor")
    np.testing.assert_allclose(found[:TOKENS].astype(np.float32), expected[:TOKENS].astype(np.float32), atol=0.02)


def test_where_no_kernel_can_end_a_norm_none_is_deferred(monkeypatch):
    xs, weights, _, residual, norms = output_stage("native", (128,), 128, 1, 0)
    _, (rows,), moments = attention_norm_deferred(xs, weights, residual, norms, epsilon=EPSILON)
    assert deferred.fits(6, 128) and not deferred.fits(7, 128) and not deferred.fits(6, 100)
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    assert not deferred.fits(6, 128)
    with compat.assume_capability(compat.HOPPER), pytest.raises(NotImplementedError, match="finds no layouts for"):
        project([Product(rows, weight(1, 128, 64, "native"), 64)], moments=moments, implementation="mosaic")


@pytest.mark.parametrize(("name", "form"), [("falcon-40b-alibi", "int4"), *thorough([("falcon-7b", "native")])])
def test_both_stages_of_a_deferred_norm_are_one_launch_each_without_spills(compiler, name, form):
    width, heads, mlp_width = WIDTHS[name]
    rows, column = array((8, width), "bfloat16"), array((width,), "bfloat16")
    inputs = [array((8, size), "bfloat16") for size in (heads[0], mlp_width)]
    weights = [few_bits(form, size, width) for size in (heads[0], mlp_width)]
    report = compiler.compile(
        attention_norm_deferred, inputs, weights, rows, [(column, column)] * 2, epsilon=EPSILON, implementation="mosaic"
    )
    require_no_problems(report)
    # No blocks meet, so nothing is handed from launch to launch.
    assert report.launches == ("mosaic_gpu_v2",)

    moments = Moments(array((2, 8, deferred.padded_tiles(width)), "float32"), EPSILON)
    outputs = (*heads, mlp_width)
    products = [Product(rows, few_bits(form, width, size), size) for size in outputs]
    report = compiler.compile(project, products, moments=moments, implementation="mosaic")
    require_no_problems(report)
    assert report.launches == ("mosaic_gpu_v2",)
