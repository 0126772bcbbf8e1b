"""The kernels as they run in production, compiled for an H100: registers, launches and memory. No GPU is needed."""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from falcon_jax.config import PRESETS
from falcon_jax.model import params as model_params
from falcon_jax.model.cache import KVCache
from falcon_jax.model.step import ForwardOptions
from pallas_kernels import compat, shapes
from pallas_kernels.attention_norm import attention_norm, new_meeting
from pallas_kernels.attention_norm.mosaic import add_mosaic
from pallas_kernels.decode_attention import decode_attention, decode_attention_in_chain
from pallas_kernels.decode_attention.mosaic import decode_mosaic
from pallas_kernels.decode_attention.plan import Plan, Shape, default_plan
from pallas_kernels.flash_attention import attention
from pallas_kernels.flash_attention.backward import backward
from pallas_kernels.flash_attention.reference import attention_reference
from pallas_kernels.flash_attention.tiles import padded_length
from pallas_kernels.quantized_matmul import Product, deferred, project, storage
from tests.pallas_kernels import hopper
from tests.thorough import thorough


def array(shape: tuple[int, ...], dtype: Any = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def require_no_problems(report: hopper.Report) -> None:
    if report.problems():
        pytest.fail(str(report), pytrace=False)


# Buffers are laid out in multiples of some hundred bytes.
SLACK_BYTES = 4096


def query_bytes(case: shapes.AttentionCase) -> int:
    return 2 * case.B * case.T * case.N * case.H


def log_sum_exp_bytes(case: shapes.AttentionCase) -> int:
    return 4 * case.B * case.N * padded_length(case.T)


def renamed(case: shapes.AttentionCase, name: str, **changes: Any) -> shapes.AttentionCase:
    return dataclasses.replace(case, name=f"{case.name}, {name}", **changes)


def attention_arguments(case: shapes.AttentionCase) -> dict[str, Any]:
    rows = array((case.B,), "int32")
    return {
        "q": array((case.B, case.T, case.N, case.H), case.dtype),
        "k": array((case.B, case.S, case.K, case.H), case.dtype),
        "v": array((case.B, case.S, case.K, case.H), case.dtype),
        "query_offset": None if case.offsets is None else rows,
        "lengths": None if case.lengths is None else rows,
        "slopes": None if case.alibi is None else array((case.N,)),
        "alibi": case.alibi or "float32",
        "scale": case.scale,
    }


# Heads of 64 and 128, alone, in groups and all with one; the others are like these.
MODELS = ["falcon-rw-1b", "falcon-7b", "falcon-40b", "falcon-40b-alibi"]
OTHER_MODELS = [model for model in shapes.HEADS if model not in MODELS]
PROMPTS = [shapes.attention_case(model, 4096) for model in MODELS]
OTHER_PROMPTS = [shapes.attention_case(model, 4096) for model in OTHER_MODELS]
WITHOUT_ALIBI = [renamed(case, "no alibi", alibi=None) for case in [*PROMPTS, *OTHER_PROMPTS] if case.alibi]
ROUNDED = [renamed(case, "hf_bf16", alibi="hf_bf16") for case in [*PROMPTS, *OTHER_PROMPTS] if case.alibi]
# Two rows of different length, each the middle of a longer prompt.
CHUNKS = [
    renamed(shapes.attention_case(model, 4096, batch=2), "chunk", T=512, offsets=(3501, 90), lengths=(4013, 602))
    for model in ("falcon-rw-1b", "falcon-40b", "falcon2-11b", "falcon-40b-alibi")
]
FLOAT16 = renamed(PROMPTS[-1], "float16", dtype="float16")


@pytest.mark.parametrize(
    "case",
    [
        *PROMPTS,
        *thorough([*OTHER_PROMPTS, *WITHOUT_ALIBI]),
        *ROUNDED[:1],
        *thorough(ROUNDED[1:]),
        *CHUNKS[:2],
        *thorough([*CHUNKS[2:], FLOAT16]),
    ],
    ids=str,
)
def test_attention_is_one_launch_without_spills_or_scores_in_memory(compiler, case):
    report = compiler.compile(attention, **attention_arguments(case))
    require_no_problems(report)
    assert report.launches == ("mosaic_gpu_v2",)
    assert [kernel.name for kernel in report.kernels] == ["flash_attention_forward_mosaic_gpu_kernel"]
    assert report.temp_bytes <= log_sum_exp_bytes(case) + SLACK_BYTES


@pytest.mark.parametrize("tokens", [12288, 65536])
def test_64_heads_over_many_tokens_need_one_number_a_query_and_head_beyond_their_output(compiler, tokens):
    case = shapes.attention_case("falcon-40b-alibi", tokens)
    report = compiler.compile(attention, **attention_arguments(case))
    assert report.output_bytes == query_bytes(case)
    assert report.temp_bytes <= log_sum_exp_bytes(case) + SLACK_BYTES


def backward_arguments(case: shapes.AttentionCase) -> dict[str, Any]:
    arguments = attention_arguments(case)
    lse = array((case.B, case.N, padded_length(case.T)))
    return arguments | {"out": arguments["q"], "lse": lse, "dout": arguments["q"]}


@pytest.mark.parametrize(
    "case",
    [*PROMPTS, ROUNDED[0], CHUNKS[2], *thorough([*OTHER_PROMPTS, *WITHOUT_ALIBI, ROUNDED[-1], CHUNKS[3]])],
    ids=str,
)
def test_backward_is_one_kernel_without_spills_or_scores_in_memory(compiler, case):
    report = compiler.compile(backward, **backward_arguments(case))
    require_no_problems(report)
    # Before the kernel: delta, where scores start from, counters at zero, lengths cut to size. After it, one for each
    # gradient: rounded, dK and dV also added up over chunks of heads.
    kernel = report.launches.index("mosaic_gpu_v2")
    before, after = report.launches[:kernel], report.launches[kernel + 1 :]
    assert set(before + after) == {"fusion"} and len(before) <= 4 and len(after) <= 3
    # dQ in float32, parts of dK and dV that are no larger, and a few numbers a query and head.
    assert report.temp_bytes <= 4 * query_bytes(case)


def gradients(q, k, v, dout, **options: Any):
    return jax.vjp(lambda q, k, v: attention(q, k, v, **options), q, k, v)[1](dout)


def test_gradients_of_64_heads_over_65536_tokens_need_memory_for_a_few_arrays_like_q(compiler):
    case = shapes.attention_case("falcon-40b-alibi", 65536)
    arguments = attention_arguments(case)
    report = compiler.compile(gradients, dout=arguments["q"], **arguments)
    assert report.launches.count("mosaic_gpu_v2") == 2
    assert report.temp_bytes <= 5 * query_bytes(case)


@pytest.mark.parametrize("model", ["falcon-rw-1b", "falcon-40b-alibi"])
def test_documents_back_to_back_cost_no_spills_and_no_scores_in_memory(compiler, model):
    """As training packs them: both kernels, of which the forward one has the fewest registers to spare."""
    case = shapes.attention_case(model, 4096)
    arguments = attention_arguments(case)
    starts = array((case.B, case.T), "int32")
    report = compiler.compile(gradients, dout=arguments["q"], starts=starts, **arguments)
    require_no_problems(report)
    assert sorted(kernel.name for kernel in report.kernels) == [
        "flash_attention_backward_mosaic_gpu_kernel",
        "flash_attention_forward_mosaic_gpu_kernel",
    ]
    others = [launch for launch in report.launches if launch != "mosaic_gpu_v2"]
    # Those without documents, one that fills starts up, and one that looks where tiles end.
    assert set(others) == {"fusion"} and len(others) <= 9
    assert report.temp_bytes <= 5 * query_bytes(case)


def decode_arguments(case: shapes.DecodeCase) -> dict[str, Any]:
    num_pages = -(-case.S // shapes.PAGE_SIZE)
    slots = (case.B * num_pages, shapes.PAGE_SIZE) if case.paged else (case.B, case.S)
    cache = array((*slots, case.K, case.H), case.dtype)
    return {
        "q": array((case.B, case.N, case.H), case.dtype),
        "keys": cache,
        "values": cache,
        "lengths": array((case.B,), "int32"),
        "slopes": None if case.alibi is None else array((case.N,)),
        "alibi": case.alibi or "float32",
        "scale": case.scale,
        "page_table": array((case.B, num_pages), "int32") if case.paged else None,
    }


# A float32 sum for each of at most two blocks a multiprocessor, 64 heads of 128 columns, and as many to fill up chunks.
# A number a key and head would be twice that with 131,072 keys.
PARTIAL_SUMS_BYTES = 2 * 2 * compat.NUM_SMS * 64 * 128 * 4
DECODE = [
    *(shapes.decode_case(model, 4096) for model in MODELS),
    shapes.decode_case("falcon-40b", 4096, paged=True),
    shapes.decode_case("falcon-rw-1b", 512, batch=16, paged=True),
    shapes.decode_case("falcon-7b", 32768, batch=4),
    shapes.decode_case("falcon-40b-alibi", 131072),
    dataclasses.replace(shapes.decode_case("falcon-40b-alibi", 4096), name="hf_bf16", alibi="hf_bf16"),
]
OTHER_DECODE = [shapes.decode_case(model, 4096) for model in OTHER_MODELS]
OTHER_DECODE += [shapes.decode_case(model, 4096, paged=True) for model in shapes.HEADS if model != "falcon-40b"]


@pytest.mark.parametrize("case", [*DECODE, *thorough(OTHER_DECODE)], ids=str)
def test_decode_is_one_kernel_without_spills_whose_memory_does_not_grow_with_the_cache(compiler, case):
    report = compiler.compile(decode_attention, **decode_arguments(case))
    require_no_problems(report)
    # Blocks of a cluster meet in the kernel alone; others at counters, which are set to zero before it.
    shape = Shape(case.B, case.K, case.N // case.K, case.H, -(-case.S // shapes.PAGE_SIZE) * shapes.PAGE_SIZE)
    plan = default_plan(shape, compat.NUM_SMS)
    by_cluster = not plan.through_memory
    assert report.launches[-1] == "mosaic_gpu_v2"
    assert len(report.launches) == (1 if by_cluster else 2)
    assert by_cluster or case.S > 4096 or case.B > 1, "a short row's attention is one launch"
    (kernel,) = report.kernels
    assert kernel.name == "decode_attention_mosaic_gpu_kernel"
    assert kernel.shared_memory_bytes <= shape.smem_bytes(plan)
    assert report.temp_bytes <= PARTIAL_SUMS_BYTES


# A copy to device memory of one stretch alone: it does not stop at the end of an array's row, as copies of tiles do.
STRETCH = "cp.async.bulk.global.shared"


def copies_a_stretch(report: hopper.Report) -> bool:
    assert "cp.async.bulk.tensor" in report.log, "a kernel compiled before is not printed again"
    return STRETCH in report.log


@pytest.mark.parametrize(
    ("model", "batch"), [("falcon-7b", 3), ("falcon-180b", 2), *thorough([("falcon-7b", 2), ("falcon-180b", 3)])]
)
def test_heads_that_fill_up_a_tile_are_not_written_into_the_next_row(compiler, model, batch):
    """71 and 29 heads, for whom blocks have room for 72 and 32."""
    for plan in (Plan(64, 1, 2, 1), Plan(64, 1, 2, 2, "grid"), Plan(64, 1, 2, 8, "grid")):
        arguments = decode_arguments(shapes.decode_case(model, 2048, batch))
        arrays = [arguments[name] for name in ("q", "keys", "values", "lengths")]
        report = compiler.compile(decode_mosaic, *arrays, None, "float32", 0.125, None, plan=plan, dump=["ptx"])
        assert not copies_a_stretch(report)


def test_copies_of_a_stretch_are_told_from_others(compiler):
    case = shapes.attention_case("falcon-rw-1b", 448)
    report = compiler.compile(attention, **attention_arguments(case), dump=["ptx"])
    assert copies_a_stretch(report), "the log-sum-exp"
    arguments = backward_arguments(case)
    assert not copies_a_stretch(compiler.compile(backward, **arguments, dump=["ptx"]))


def layers(q, caches, lengths):
    """Attention of one token in layer after layer, blocks meeting in the grid."""
    counters = jnp.zeros(q.shape[0] * q.shape[1], jnp.int32)
    for keys, values in caches:
        q, counters = decode_attention_in_chain(q, keys, values, lengths=lengths, counters=counters)
    return q


@pytest.mark.parametrize("model", ["falcon-40b", *thorough(["falcon-7b"])])
def test_one_launch_sets_the_counters_of_all_layers_to_zero(compiler, model):
    arguments = decode_arguments(shapes.decode_case(model, 32768))
    caches = [(arguments["keys"], arguments["values"])] * 3
    report = compiler.compile(layers, arguments["q"], caches, arguments["lengths"])
    require_no_problems(report)
    assert len(report.launches) == 4 and report.launches[1:] == ("mosaic_gpu_v2",) * 3


def test_a_kernel_compiled_before_is_described_again(compiler):
    arguments = decode_arguments(shapes.decode_case("falcon-rw-1b", 64))
    first, again = (compiler.compile(decode_attention, **arguments) for _ in range(2))
    assert first.kernels == again.kernels != ()


# That the checks above can fail.


def products(a, b, *, num_sums: int):
    """Sums of 128 registers a thread each, all in flight at once, of which a thread has 255 at most."""
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]

    def kernel(a_ref, b_ref, out_ref, a_smem, b_smem, full):
        plgpu.copy_gmem_to_smem(a_ref, a_smem, full)
        plgpu.copy_gmem_to_smem(b_ref, b_smem, full)
        plgpu.barrier_wait(full)

        def add_up(*sums):
            for sum_ref in sums:
                plgpu.wgmma(sum_ref, a_smem, b_smem)
            plgpu.wgmma_wait(0)
            total = sums[0][...]
            for weight, sum_ref in enumerate(sums[1:], start=2):
                total = jnp.maximum(total, sum_ref[...] * weight)
            out_ref[...] = total

        sum_type = plgpu.ACC(out_ref.shape, jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
        pl.run_scoped(add_up, *[sum_type] * num_sums)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((a.shape[0], b.shape[1]), jnp.float32),
        scratch_types=[
            plgpu.SMEM(a.shape, a.dtype, transforms=tiled),
            plgpu.SMEM(b.shape, b.dtype, transforms=tiled),
            plgpu.Barrier(num_arrivals=2),
        ],
        kernel_name="products",
    )(a, b)


def test_a_small_kernel_is_described_as_it_is_written(compiler):
    report = compiler.compile(products, array((64, 64), "bfloat16"), array((64, 256), "bfloat16"), num_sums=1)
    (kernel,) = report.kernels
    assert (kernel.name, kernel.num_blocks, kernel.num_threads) == ("products_mosaic_gpu_kernel", 1, 128)
    tile_bytes = 2 * (64 * 64 + 64 * 256)
    assert tile_bytes <= kernel.shared_memory_bytes <= tile_bytes + 1024
    assert 128 < kernel.registers <= 255
    assert report.launches == ("mosaic_gpu_v2",)
    assert (report.output_bytes, report.temp_bytes) == (4 * 64 * 256, 0)
    require_no_problems(report)


def test_a_kernel_that_wants_more_registers_than_there_are_is_found_out(compiler):
    report = compiler.compile(products, array((64, 64), "bfloat16"), array((64, 256), "bfloat16"), num_sums=3)
    (kernel,) = report.kernels
    assert min(kernel.stack_bytes, kernel.spill_store_bytes, kernel.spill_load_bytes) > 0
    # Products that should overlap then run one after another, which ptxas says by the way only.
    assert any("wgmma.mma_async instructions are serialized" in problem for problem in report.problems())


def test_the_plain_formula_is_seen_to_make_several_launches_and_hold_all_scores(compiler):
    case = dataclasses.replace(shapes.attention_case("falcon-rw-1b", 1024), offsets=(0,))
    report = compiler.compile(attention_reference, **attention_arguments(case))
    assert len(report.launches) > 2
    assert report.temp_bytes >= 2 * case.N * case.T * case.S
    assert report.kernels == ()


def twice_in_a_loop(x):
    return jax.lax.fori_loop(0, 2, lambda _, y: jnp.sin(y) @ y, x)


def test_launches_inside_a_loop_are_seen(compiler):
    launches = compiler.compile(twice_in_a_loop, array((256, 256))).launches
    assert "while" in launches
    assert launches.count("fusion") >= 1


def doubled(x):
    return 2 * x


def refuses(x):
    raise ValueError(f"no such shape: {x.shape}")


def dies(x):
    print("about to end", flush=True)
    sys.exit(7)


def test_what_fails_is_reported_and_the_next_one_still_compiles(compiler):
    with pytest.raises(hopper.CompileError, match=r"no such shape: \(3,\)"):
        compiler.compile(refuses, array((3,)))
    with pytest.raises(hopper.CompileError, match=r"ended with 7:\n(?s:.*)about to end"):
        compiler.compile(dies, array((3,)))
    assert compiler.compile(doubled, array((3,))).output_bytes == 12


def few_bits(form: str, num_inputs: int, num_outputs: int) -> Any:
    if form == "native":
        return array((num_inputs, num_outputs), "bfloat16")
    return storage(form, num_inputs, num_outputs)


WIDTHS = {"falcon-40b-alibi": (8192, (8192, 128, 128), 32768), "falcon-7b": (4544, (4544, 64, 64), 18176)}


@pytest.mark.parametrize(
    ("name", "form", "num_rows"),
    [
        ("falcon-40b-alibi", "int8", 8),
        ("falcon-40b-alibi", "int4", 8),
        ("falcon-7b", "native", 16),
        ("falcon-7b", "int4", 64),
    ],
)
def test_stages_of_a_layer_are_one_launch_each_without_spills(compiler, name, form, num_rows):
    width, heads, mlp_width = WIDTHS[name]
    x, hidden = array((num_rows, width), "bfloat16"), array((num_rows, mlp_width), "bfloat16")
    outputs = (*heads, mlp_width)
    products = [Product(x, few_bits(form, width, size), size) for size in outputs[:-1]]
    products.append(Product(x, few_bits(form, width, mlp_width), mlp_width, None, "gelu"))
    report = compiler.compile(project, products)
    require_no_problems(report)
    assert report.launches == ("mosaic_gpu_v2",) and report.temp_bytes <= SLACK_BYTES

    weights = [few_bits(form, heads[0], width), few_bits(form, mlp_width, width)]
    column, meeting = array((width,), "bfloat16"), jax.eval_shape(lambda: new_meeting(num_rows, width))
    report = compiler.compile(
        attention_norm,
        [array((num_rows, heads[0]), "bfloat16"), hidden],
        weights,
        x,
        [(column, column)],
        epsilon=1e-5,
        meeting=meeting,
    )
    require_no_problems(report)
    # What blocks meet through is the caller's, who keeps it here, and so is copied.
    assert report.launches == ("copy", "mosaic_gpu_v2")
    # Parts of sums of blocks that share out a tile, and the copy.
    assert report.temp_bytes <= 4 * num_rows * width * 4 + SLACK_BYTES * num_rows
    require_that_all_blocks_run_at_once(report.kernels[0])

    report = compiler.compile(add_mosaic, [array((num_rows, heads[0]), "bfloat16"), hidden], weights, width)
    require_no_problems(report)
    assert report.launches == ("mosaic_gpu_v2",)


def require_that_all_blocks_run_at_once(kernel: hopper.Kernel) -> None:
    """Blocks wait for one another: where one had to wait for a place, all would for ever."""
    assert kernel.num_blocks <= blocks_of_a_multiprocessor(kernel) * compat.NUM_SMS


def blocks_of_a_multiprocessor(kernel: hopper.Kernel) -> int:
    registers = -(-kernel.registers // 8) * 8 * kernel.num_threads
    return min(
        hopper.REGISTERS_PER_BLOCK // registers,
        (compat.MAX_SMEM_BYTES + 1024) // (kernel.shared_memory_bytes + 1024),
        2048 // kernel.num_threads,
    )


@pytest.mark.parametrize(
    ("width", "form", "num_rows"),
    [(4544, "int4", 8), (4544, "int4", 32), (2048, "native", 16), *thorough([(4544, "native", 8), (4544, "int8", 8)])],
)
def test_all_blocks_of_narrow_output_stages_run_at_once(compiler, width, form, num_rows):
    report = compiler.compile(
        attention_norm,
        [array((num_rows, width), "bfloat16")],
        [few_bits(form, width, width)],
        array((num_rows, width), "bfloat16"),
        [(array((width,), "bfloat16"), array((width,), "bfloat16"))],
        epsilon=1e-5,
        meeting=jax.eval_shape(lambda: new_meeting(num_rows, width)),
    )
    require_no_problems(report)
    require_that_all_blocks_run_at_once(report.kernels[0])


def prompt_through_layers(params, ids, keys, values, config, stages):
    decoder = model_params.bind(config, params, ForwardOptions(stages=stages))
    hidden, cache = decoder(ids, cache=KVCache(keys, values, jnp.zeros(1, jnp.int32)), cache_is_empty=True)
    return hidden[:, -1], cache


def test_prompts_unpack_one_weight_at_a_time_or_none(compiler):
    config = dataclasses.replace(PRESETS["falcon-40b-alibi"], num_layers=6)
    params = model_params.abstract(config, jnp.bfloat16, "int8")
    slots = cache_slots(config, 640)
    arguments = params, array((1, 512), "int32"), slots, slots, config
    largest_weight = 2 * config.width * config.mlp_width
    # Left to itself XLA unpacks weights layers ahead: 4 and more at once.
    assert compiler.compile(prompt_through_layers, *arguments, "xla").temp_bytes <= 2 * largest_weight
    report = compiler.compile(prompt_through_layers, *arguments, None)
    require_no_problems(report)
    assert report.launches.count("mosaic_gpu_v2") == 3 * config.num_layers
    assert report.temp_bytes <= largest_weight // 4


def cache_slots(config, capacity: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    one = array((1, capacity, config.num_kv_heads, config.head_dim), "bfloat16")
    return (one,) * config.num_layers


def two_tokens(params, ids, keys, values, config):
    decoder = model_params.bind(config, params)

    def decode(_, carry):
        ids, cache = carry
        hidden, cache = decoder(ids, cache=cache)
        return jnp.argmax(decoder.logits(hidden[:, -1]), axis=-1)[:, None].astype(jnp.int32), cache

    return jax.lax.fori_loop(0, 2, decode, (ids, KVCache(keys, values, jnp.full(1, 1000, jnp.int32))))


@pytest.mark.parametrize(
    ("name", "weights", "num_slots", "launches"),
    [
        ("falcon-rw-1b", "native", 4352, 4 if deferred.reason_against_kernel() is None else 5),
        *thorough(
            [
                ("falcon-rw-1b", "native", 16384, 5),
                ("falcon-7b", "native", 16384, 3),
                ("falcon-7b", "int4", 4352, 3),
                ("falcon-40b", "int4", 4352, 3),
            ]
        ),
    ],
)
def test_a_layer_of_a_step_is_few_launches_and_copies_no_cache(compiler, name, weights, num_slots, launches):
    def step(num_layers: int) -> tuple[list[str], int]:
        config = dataclasses.replace(PRESETS[name], num_layers=num_layers, vocab_size=512)
        params, slots = model_params.abstract(config, jnp.bfloat16, weights), cache_slots(config, num_slots)
        report = compiler.compile(two_tokens, params, array((1, 1), "int32"), slots, slots, config)
        require_no_problems(report)
        in_loop = list(report.launches)
        return in_loop[in_loop.index("while") + 1 :], report.temp_bytes

    (one, bytes_of_one), (two, bytes_of_two) = step(1), step(2)
    assert two.count("mosaic_gpu_v2") - one.count("mosaic_gpu_v2") == launches
    assert bytes_of_two - bytes_of_one < 2**16, "no cache is copied"
    # Some attention kernels meet at semaphores, of which each layer gets its own zeros.
    assert len(two) - len(one) <= launches + 1
