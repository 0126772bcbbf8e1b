"""How the stages' kernels meet, by the machine code that they become for an H100."""

import jax
import pytest

from pallas_kernels.attention_norm import new_meeting
from pallas_kernels.attention_norm.mosaic import attention_norm_mosaic
from tests.pallas_kernels.test_compiled import array, few_bits, require_no_problems
from tests.thorough import thorough


@pytest.mark.parametrize(("num_rows", "sends"), [(8, True), *thorough([(16, False)])])
@pytest.mark.parametrize("form", ["int4", *thorough(["native", "int8"])])
def test_blocks_that_share_a_tile_send_their_parts_of_few_rows_without_a_fence(compiler, form, num_rows, sends):
    width, num_inputs = 2048, 8192  # 32 tiles for 132 multiprocessors: four blocks each
    column, rows = array((width,), "bfloat16"), array((num_rows, width), "bfloat16")
    meeting = jax.eval_shape(lambda: new_meeting(num_rows, width))
    weight, x = few_bits(form, num_inputs, width), array((num_rows, num_inputs), "bfloat16")
    report = compiler.compile(
        attention_norm_mosaic, [x], [weight], [], rows, [(column, column)], meeting, epsilon=1e-5, dump=["ptx"]
    )
    require_no_problems(report)
    assert ("st.async" in report.log) == sends and ("fence.acq_rel.gpu" in report.log) != sends
