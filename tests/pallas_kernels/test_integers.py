"""Products of x as integers with weights of few bits: what integers stand for, the kernel interpreted with race
detection, and the machine code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.attention_norm import attention_norm_deferred
from pallas_kernels.attention_norm.mosaic import defer_norm_mosaic
from pallas_kernels.quantized_matmul import Product, deferred, project
from pallas_kernels.quantized_matmul.integers import (
    ALL_ROWS,
    BLOCK,
    FEW_ROWS,
    TOKEN_ROWS,
    Integers,
    in_order,
    to_integers,
)
from pallas_kernels.quantized_matmul.mosaic import project_mosaic
from pallas_kernels.quantized_matmul.plan import Plan
from tests.pallas_kernels.interpreted import interpreted
from tests.pallas_kernels.stage_cases import normal, product_reference, weight
from tests.pallas_kernels.test_compiled import array, few_bits, require_no_problems
from tests.pallas_kernels.test_deferred import EPSILON, normalized, output_stage
from tests.pallas_kernels.tolerance import require_close
from tests.thorough import thorough

FORMS = ["int4", *thorough(["int8"])]


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_integers_stand_for_x_but_for_the_smallest_of_64_inputs(form):
    # Rows of all sizes, one of zeros, one with a number beside which others are small.
    x = normal(1, 8, 320) * jnp.array([1, 1e4, 1e-4, 0, 1, 1, 1, 1], jnp.bfloat16)[:, None]
    x = x.at[4, 70].set(500.0)
    rows = to_integers(x, form)
    assert (rows.shape, rows.values.dtype, rows.dtype) == (x.shape, jnp.int8, jnp.bfloat16)
    assert jax.tree.map(lambda leaf: leaf.shape, Integers(form).described(320, "bfloat16")) == jax.tree.map(
        lambda leaf: leaf.shape, rows
    )
    floats, exact = np.asarray(rows.floats()), np.asarray(x, np.float32)
    largest = np.repeat(np.abs(exact).reshape(8, -1, BLOCK).max(-1), BLOCK, axis=1)
    assert (np.abs(floats - exact) <= largest * 2.0**-14).all()
    kept = np.abs(exact) >= largest / 64
    np.testing.assert_array_equal(floats[kept], exact[kept])


def test_each_form_has_the_order_in_which_its_words_hold_codes():
    inputs = jnp.arange(32)[None]
    assert in_order(inputs, "int4")[0, :8].tolist() == [0, 8, 1, 9, 2, 10, 3, 11]
    assert in_order(inputs, "int8")[0, 16:24].tolist() == [16, 17, 24, 25, 18, 19, 26, 27]
    for form in ("int4", "int8"):
        assert in_order(in_order(inputs, form), form, back=True).tolist() == inputs.tolist()


@pytest.mark.parametrize(
    ("form", "plan"),
    [("int4", Plan(1, 2)), *thorough([("int8", Plan(2, 2)), ("int4", Plan(1, 3, groups=2, producer=True))])],
)
def test_products_of_integers(form, plan):
    x, weights = normal(1, 8, 320), [weight(2, 320, 192, form), weight(3, 320, 64, form)]

    def products(x):
        return [Product(x, weights[0], 192, normal(4, 192)), Product(x, weights[1], 64, None, "gelu")]

    with interpreted():
        made = jax.block_until_ready(project_mosaic(products(to_integers(x, form)), plan=plan))
    plain = project(products(x), implementation="xla")
    for some, others, product in zip(made, plain, products(x), strict=True):
        require_close(some, others, product_reference(product))
    by_xla = project(products(to_integers(x, form)), implementation="xla")
    for some, others in zip(by_xla, plain, strict=True):
        np.testing.assert_allclose(some.astype(np.float32), others.astype(np.float32), atol=0.04)


def test_integers_of_another_form_or_size_are_refused():
    x = normal(1, 8, 128)
    with pytest.raises(ValueError, match="x as integers for weights of 'int8' with one of 'int4'"):
        project([Product(to_integers(x, "int8"), weight(2, 128, 64, "int4"), 64)])
    for wrong in (x[:, :100], x[:7]):
        with pytest.raises(ValueError, match="as integers it is 8 rows of a multiple of 64"):
            to_integers(wrong, "int4")
    with pytest.raises(ValueError, match="'native'; known are"):
        to_integers(x, "native")


# Rows that are held, and how many of them are tokens'. Of those that lack scale and shift, what these come to is given.
HELD = [(FEW_ROWS, 2), (TOKEN_ROWS, 4)]


def affine_sums(norm, w, num_outputs):
    return project([Product(jnp.stack(norm), w, num_outputs, dtype="float32")])[0]


@pytest.mark.parametrize(("held", "num_tokens"), HELD)
@pytest.mark.parametrize("form", FORMS)
def test_a_deferred_norm_ends_in_products_of_four_rows(form, held, num_tokens):
    x, norm, weights = (
        normal(1, 8, 192),
        (normal(2, 192), normal(3, 192)),
        [weight(4 + i, 192, 128, form) for i in (0, 1)],
    )
    (rows,), moments = deferred.begin(x, [norm], EPSILON)
    few = to_integers(rows, form, held)
    assert few.num_held == 4 and few.shape == rows.shape
    assert all(few.floats()[row].any() == (row in held) for row in ALL_ROWS)

    def products(x):
        lacks = x is few and held == TOKEN_ROWS
        return [
            Product(x, w, 128, normal(7, 128), activation, affine=affine_sums(norm, w, 128) if lacks else None)
            for w, activation in zip(weights, (None, "gelu"), strict=True)
        ]

    with interpreted():
        made = jax.block_until_ready(project_mosaic(products(few), moments=moments, plan=Plan(2, 2)))
    by_xla = project(products(few), moments=moments, implementation="xla")
    plain = project(products(rows), moments=moments, implementation="xla")
    for some, others, same, product in zip(
        made, by_xla, plain, products(normalized(x.astype(jnp.float32), norm)), strict=True
    ):
        exact = product_reference(product)[:num_tokens]
        require_close(some[:num_tokens], same[:num_tokens], exact)
        require_close(others[:num_tokens], same[:num_tokens], exact)


def test_scale_and_shift_are_given_once():
    norm, w = (normal(2, 128), normal(3, 128)), weight(4, 128, 64, "int4")
    (rows,), moments = deferred.begin(normal(1, 8, 128), [norm], EPSILON)
    sums = affine_sums(norm, w, 64)
    for x, affine, found in (
        (rows, sums, "both in x and"),
        (to_integers(rows, "int4", FEW_ROWS), sums, "both in x and"),
        (to_integers(rows, "int4", TOKEN_ROWS), None, "neither in x nor"),
    ):
        with pytest.raises(ValueError, match=f"scale and shift of a deferred norm are {found} beside it"):
            project([Product(x, w, 64, affine=affine)], moments=moments)
    with pytest.raises(ValueError, match="is given without its moments"):
        project([Product(rows, w, 64, affine=sums)])
    with pytest.raises(ValueError, match=r"come to is float32\[1, 64\], not float32\[2, 64\]"):
        project([Product(rows, w, 64, affine=sums[:1])], moments=moments)


@pytest.mark.parametrize(
    ("form", "held"), [("int4", FEW_ROWS), ("int4", TOKEN_ROWS), *thorough([("int4", ALL_ROWS), ("int8", FEW_ROWS)])]
)
def test_products_of_integers_are_one_launch_without_spills(compiler, form, held):
    if held == TOKEN_ROWS and (reason := deferred.reason_against_kernel()) is not None:
        pytest.skip(reason)
    x, bias = Integers(form, held).described(8192, "bfloat16"), array((32768,), "bfloat16")
    sizes, moments = (32768, 128), None
    affine = [array((2, size)) for size in sizes] if held == TOKEN_ROWS else [None, None]
    if held == TOKEN_ROWS:
        moments = deferred.Moments(array((2, 8, deferred.padded_tiles(8192))), EPSILON)
    products = [
        Product(x, few_bits(form, 8192, 32768), 32768, bias, "gelu", affine=affine[0]),
        Product(x, few_bits(form, 8192, 128), 128, affine=affine[1]),
    ]
    report = compiler.compile(project, products, moments=moments, implementation="mosaic", dump=["sass"])
    require_no_problems(report)
    assert report.launches == ("mosaic_gpu_v2",)
    assert f"IGMMA.64x{2 * len(held)}x32.S8.S8" in report.log and "HGMMA" not in report.log


@pytest.mark.parametrize(("held",), [(FEW_ROWS,), *thorough([(TOKEN_ROWS,), (ALL_ROWS,)])])
@pytest.mark.parametrize("form", FORMS)
def test_an_output_stage_writes_its_rows_as_integers(monkeypatch, form, held):
    monkeypatch.setattr(compat, "num_sms", lambda mesh=None: 2)
    integers, stage = Integers(form, held), output_stage(form, (256,), 192, 2, 1)
    with interpreted():
        plan = Plan(2, 2, width=2)
        out, made, moments = jax.block_until_ready(
            defer_norm_mosaic(*stage, epsilon=EPSILON, plan=plan, integers=integers)
        )
        plain = jax.block_until_ready(defer_norm_mosaic(*stage, epsilon=EPSILON, plan=plan))
    np.testing.assert_array_equal(out, plain[0])
    np.testing.assert_array_equal(moments.tiles[..., :3], plain[2].tiles[..., :3])
    require_same_integers(made, [integers.of(floats) for floats in plain[1]])


def require_same_integers(made, expected):
    for rows, others in zip(made, expected, strict=True):
        np.testing.assert_array_equal(rows.values, others.values)
        np.testing.assert_array_equal(rows.blocks, others.blocks)


# What interpretation has array operations for: rows that become integers, their places, and the sums of products.
@pytest.mark.gpu
@pytest.mark.parametrize(("held", "num_tokens"), [*HELD, (ALL_ROWS, 6)])
@pytest.mark.parametrize("form", ["int4", "int8"])
def test_on_a_gpu_integers_are_those_of_xla_and_so_are_their_products(form, held, num_tokens):
    integers, stage = Integers(form, held), output_stage(form, (8192,), 2048, 2, 1)
    out, made, moments = defer_norm_mosaic(*stage, epsilon=EPSILON, integers=integers)
    plain_out, floats, _ = defer_norm_mosaic(*stage, epsilon=EPSILON)
    np.testing.assert_array_equal(out, plain_out)
    require_same_integers(made, [integers.of(rows) for rows in floats])

    w, norm = weight(1, 2048, 8192, form), stage[-1][0]
    affine = affine_sums(norm, w, 8192) if held == TOKEN_ROWS else None
    [found] = project([Product(made[0], w, 8192, affine=affine)], moments=moments, implementation="mosaic")
    [plain] = project([Product(floats[0], w, 8192)], moments=moments, implementation="xla")
    exact = product_reference(Product(normalized(out.astype(jnp.float32), norm), w, 8192))
    require_close(found[:num_tokens], plain[:num_tokens], exact[:num_tokens])

    @jax.jit
    def num_wrong_of_ten_thousand(stage, affine, found):
        def launch(_, num_wrong):
            # Each reads the count, which is never below zero: none of them can be left out.
            xs, weights, biases, residual, norms = stage
            residual = residual + jnp.minimum(num_wrong, 0).astype(residual.dtype)
            _, rows, moments = defer_norm_mosaic(
                xs, weights, biases, residual, norms, epsilon=EPSILON, num_rows=num_tokens, integers=integers
            )
            [y] = project([Product(rows[0], w, 8192, affine=affine)], moments=moments, implementation="mosaic")
            return num_wrong + jnp.any(y[:num_tokens] != found[:num_tokens])

        return jax.lax.fori_loop(0, 10_000, launch, jnp.int32(0))

    assert num_wrong_of_ten_thousand(stage, affine, found) == 0


def test_over_several_devices_no_integers_are_made(cpu_devices):
    xs, weights, _, residual, norms = output_stage("int4", (128,), 128, 1, 0)
    mesh = jax.make_mesh((2,), ("tensor",), devices=cpu_devices[:2])
    options = {"epsilon": EPSILON, "mesh": mesh, "integers": Integers("int4", FEW_ROWS)}
    with pytest.raises(NotImplementedError, match="integers are made on one device"):
        attention_norm_deferred(xs, weights, residual, norms, **options)


@pytest.mark.parametrize(("form", "held"), [("int4", TOKEN_ROWS), *thorough([("int4", FEW_ROWS), ("int8", ALL_ROWS)])])
def test_an_output_stage_with_integers_is_one_launch_without_spills(compiler, form, held):
    column, rows, hidden = array((8192,), "bfloat16"), array((8, 8192), "bfloat16"), array((8, 32768), "bfloat16")
    weights = [few_bits(form, 32768, 8192), few_bits(form, 8192, 8192)]
    arguments = [hidden, rows], weights, [], rows, [(column, column)]
    report = compiler.compile(defer_norm_mosaic, *arguments, epsilon=EPSILON, integers=Integers(form, held))
    require_no_problems(report)
    assert report.launches == ("mosaic_gpu_v2",)
