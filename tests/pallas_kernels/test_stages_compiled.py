"""How the stages' kernels meet, by the machine code that they become for an H100."""

import jax
import pytest

from pallas_kernels.attention_norm import new_meeting
from pallas_kernels.attention_norm.mosaic import attention_norm_mosaic
from pallas_kernels.quantized_matmul import Product, project
from tests.pallas_kernels.test_compiled import array, few_bits, require_no_problems
from tests.thorough import thorough


@pytest.mark.parametrize("num_rows", [1, *thorough([16])])
def test_a_head_of_8_bits_is_one_launch_without_spills(compiler, num_rows):
    product = Product(array((num_rows, 8192), "bfloat16"), few_bits("int8", 8192, 65024), 65024, dtype="float32")
    report = compiler.compile(project, [product], implementation="mosaic")
    require_no_problems(report)
    # Rows are filled up to eight before it, and what that makes is cut off after it.
    assert report.launches.count("mosaic_gpu_v2") == 1
    assert len(report.kernels) == 1 and report.output_bytes == 4 * num_rows * 65024


@pytest.mark.parametrize(("num_rows", "sends"), [(8, True), *thorough([(16, False)])])
@pytest.mark.parametrize("form", ["int4", *thorough(["native", "int8"])])
def test_blocks_that_share_a_tile_send_their_parts_of_few_rows_without_a_fence(compiler, form, num_rows, sends):
    width, num_inputs = 2048, 8192  # 32 tiles for 132 multiprocessors: four blocks each
    column, rows = array((width,), "bfloat16"), array((num_rows, width), "bfloat16")
    meeting = jax.eval_shape(lambda: new_meeting(num_rows, width))
    weight, x = few_bits(form, num_inputs, width), array((num_rows, num_inputs), "bfloat16")
    report = compiler.compile(
        attention_norm_mosaic, [x], [weight], [], rows, [(column, column)], meeting,
        epsilon=1e-5, num_rows=min(num_rows, 4), dump=["ptx"],
    )  # fmt: skip
    require_no_problems(report)
    assert ("st.async" in report.log) == sends and ("fence.acq_rel.gpu" in report.log) != sends
