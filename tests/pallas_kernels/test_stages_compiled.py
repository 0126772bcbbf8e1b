"""Ways of running the stages that are not the default, compiled for an H100: what the machine code does, and when."""

import re

import jax
import pytest

from pallas_kernels.attention_norm import new_meeting
from pallas_kernels.attention_norm.mosaic import attention_norm_mosaic
from pallas_kernels.decode_attention.mosaic import decode_mosaic
from pallas_kernels.quantized_matmul import Product
from pallas_kernels.quantized_matmul.mosaic import project_mosaic
from tests.pallas_kernels.test_compiled import array, few_bits, require_no_problems
from tests.thorough import thorough

WIDTH, MLP_WIDTH = 1024, 4096
EVENT = re.compile(r"griddepcontrol\.(launch_dependents|wait)|cp\.async\.bulk\.(?:tensor\S*\.)?shared")


def input_stage(form: str, num_rows: int = 8) -> list[Product]:
    x = array((num_rows, WIDTH), "bfloat16")
    return [Product(x, few_bits(form, WIDTH, MLP_WIDTH), MLP_WIDTH, None, "gelu")]


def output_stage(form: str, num_rows: int = 8) -> tuple:
    column = array((WIDTH,), "bfloat16")
    x, weight = array((num_rows, MLP_WIDTH), "bfloat16"), few_bits(form, MLP_WIDTH, WIDTH)
    residual, meeting = array((num_rows, WIDTH), "bfloat16"), jax.eval_shape(lambda: new_meeting(num_rows, WIDTH))
    return [x], [weight], [], residual, [(column, column)], meeting


def events(ptx: str) -> list[str]:
    """What of these a kernel does, in the order of its code: let the next launch begin, wait for one before, copy."""
    return [match.group(1) or "copy" for match in EVENT.finditer(ptx)]


@pytest.mark.parametrize("form", ["int4", *thorough(["native", "int8"])])
def test_launches_that_overlap_read_weights_before_they_wait_and_x_after(compiler, form):
    for overlaps in (False, True):
        for report in (
            compiler.compile(project_mosaic, input_stage(form), overlaps=overlaps, dump=["ptx"]),
            compiler.compile(attention_norm_mosaic, *output_stage(form), epsilon=1e-5, overlaps=overlaps, dump=["ptx"]),
        ):
            require_no_problems(report)
            found = events(report.log)
            if not overlaps:
                assert set(found) == {"copy"}
                continue
            assert found[0] == "launch_dependents" and found.count("launch_dependents") == 1
            # A producer waits as well as those for whom it copies.
            last_wait = len(found) - 1 - found[::-1].index("wait")
            first_copy = found.index("copy")
            assert first_copy < last_wait < len(found) - 1
            assert found[first_copy:last_wait].count("copy") >= 2  # weights, of each stage


def test_decoding_that_overlaps_waits_before_it_reads_anything(compiler):
    q, cache = array((8, 64, 128), "bfloat16"), array((1, 4096, 1, 128), "bfloat16")
    arguments = (q, cache, cache, array((1,), "int32"), array((64,)), "float32", 0.1, None)
    report = compiler.compile(decode_mosaic, *arguments, overlaps=True, dump=["ptx"])
    require_no_problems(report)
    assert events(report.log)[:3] == ["wait", "launch_dependents", "copy"]


@pytest.mark.parametrize("form", ["int4", *thorough(["native", "int8"])])
def test_an_output_stage_makes_products_of_what_is_there_early_before_it_waits(compiler, form):
    x, attended = array((8, MLP_WIDTH), "bfloat16"), array((8, WIDTH), "bfloat16")
    _, [weight], biases, residual, norms, meeting = output_stage(form)
    weights = [weight, few_bits(form, WIDTH, WIDTH)]
    arguments = [x, attended], weights, biases, residual, norms, meeting
    late, early = (
        compiler.compile(
            attention_norm_mosaic, *arguments, epsilon=1e-5, overlaps=True, num_early=num_early, dump=["ptx"]
        )
        for num_early in (0, 1)
    )
    product, wait, tile = "wgmma.mma_async", "griddepcontrol.wait", "cp.async.bulk.tensor"
    for report in (late, early):
        require_no_problems(report)
        assert events(report.log)[:2] == ["launch_dependents", "copy"]
    assert late.log.index(wait) < late.log.index(product)
    if form != "native":  # whose weights come as tiles too; of few bits only x does, at first
        assert late.log.index(wait) < late.log.index(tile)
        assert early.log.index(tile) < early.log.index(wait)
    # All threads wait in the end, also those that had nothing to copy of what the launch before makes.
    assert early.log.rindex(wait) > early.log.rindex(product)
    assert early.log.count(wait) > late.log.count(wait)
