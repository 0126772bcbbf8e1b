"""What a plan is made of: reading compiled programs, the estimate, the arithmetic before it. Nothing here compiles."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from falcon_jax import sharding
from falcon_jax.config import PRESETS
from falcon_jax.errors import ConfigError
from falcon_jax.train.planning import compiler, cost, devices, hlo, report, search, serving
from falcon_jax.train.planning.job import Job, Layout, StateBytes, mesh_of_nothing, state_bytes, unsplit_shares
from falcon_jax.train.planning.plan import Plan

# data 2 x fsdp 2 x tensor 4 over two machines; sharding.make_mesh puts neighbours of the topology on "tensor" first.
PLACES = hlo.Places((("data", 2), ("fsdp", 2), ("tensor", 4), ("stage", 1)), tuple(range(16)))
A100 = devices.named("a100-40")

# A step of our own making with one of everything: a loop of six, a fused product, attention, each kind of groups.
PROGRAM = Path(__file__).with_name("program.hlo").read_text()


@pytest.fixture(scope="module")
def program() -> hlo.Program:
    return hlo.read(PROGRAM, PLACES, length=128)


def test_collectives_count_as_often_as_they_run_and_name_their_axes(program):
    found = {(each.kind, each.axes): each for each in program.collectives}
    assert len(found) == len(program.collectives) == 4  # a group of one exchanges nothing
    gathered = found["all-gather", ("tensor",)]
    assert (gathered.size, gathered.count, gathered.sent_bytes) == (4, 6, 6 * 3 * 64 * 8 * 2)
    assert gathered.synchronous and gathered.within_machine
    summed = found["all-reduce", ("data", "fsdp")]
    assert (summed.size, summed.count, summed.sent_bytes) == (4, 1, 2 * 3 / 4 * 8 * 32 * 2)
    assert not summed.synchronous and summed.members_a_machine == 2
    moved = found["collective-permute", ("data",)]
    assert (moved.count, moved.sent_bytes, moved.members_a_machine) == (1, 8 * 32 * 2, 1)
    scattered = found["reduce-scatter", ("data", "fsdp", "tensor")]
    assert (scattered.size, scattered.sent_bytes, scattered.synchronous) == (16, 15 / 16 * 64 * 16 * 2, False)


def test_products_attention_and_memory_are_told_apart_and_counted(program):
    work = {(each.kind, each.flops): each for each in program.work}
    assert work["product", 2 * 8 * 32 * 64].count == 6
    assert work["product", 2 * 8 * 32 * 64].bytes == 2 * (8 * 64 + 64 * 32 + 8 * 32)
    assert work["product", 2 * 8 * 8 * 64].count == 1  # cuBLAS
    pairs = 2 * 4 * 128 * 128 / 2  # rows, heads, half of the pairs
    assert [work["attention", products * 2 * 16 * pairs].count for products in (2, 5)] == [1, 1]
    assert program.flops == pytest.approx(6 * 32768 + 8192 + 14 * 16 * pairs)


def test_an_update_in_place_moves_what_it_puts_alone(program):
    (update,) = [each for each in program.work if each.kind == "memory" and each.bytes]
    assert update.bytes == 8 * 32 * 2 + 4 + 8 * 32 * 4
    assert update.count == 2  # once asynchronously


def test_values_and_loops_without_a_count_are_reported(program):
    assert program.num_unknown_loops == 1
    assert program.largest[0] == (100 * 8 * 32 * 4, "f32[100,8,32]", "put.1")
    assert (8 * 32 * 2, "bf16[8,32]", "step/up") in hlo.read(PROGRAM, PLACES, 128, num_largest=50).largest


@pytest.mark.parametrize(
    ("notation", "groups"),
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['x'=2,'y'=2] {'x'}", [[0, 2], [1, 3]]),
        ("mesh['x'=2,'y'=2] {'x','y'}", [[0, 1, 2, 3]]),
        ("mesh['x'=8] {'x':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['x'=2,'y'=4] {'y':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ],
)
def test_every_notation_of_groups_is_read(notation, groups):
    np.testing.assert_array_equal(hlo.groups_of(notation), groups)


def test_groups_in_a_notation_unknown_to_us_are_never_guessed():
    with pytest.raises(ValueError, match="unknown notation: 'everybody'"):
        hlo.groups_of("everybody")


def test_bytes_of_types():
    assert hlo.num_bytes("(bf16[8,64]{1,0}, /*index=1*/s32[], (pred[3], s4[6]{0}), token[])") == 1024 + 4 + 3 + 3
    assert hlo.num_bytes("f8e4m3fn[5,2]") == 10
    with pytest.raises(ValueError, match="unknown type 'odd'"):
        hlo.num_bytes("odd[2]")


def test_involuntary_rematerializations_are_read_from_the_log():
    line = (
        "W1125 02:50:32.04 1 spmd_partitioner.cc:661] [SPMD] Involuntary full rematerialization. The compiler cannot "
        "go from sharding {devices=[8,1]<=[8]} to {devices=[1,4,2]<=[2,2,2]T(1,0,2) last_tile_dim_replicate} "
        "efficiently for HLO operation %copy.0 = f32[8,64]{1,0} copy(%sin.0), sharding={devices=[8,1]<=[8]}, "
        'metadata={op_name="jit(f)/sharding_constraint" stack_frame_id=4}. As the last resort, SPMD will replicate\n'
    )
    (found,) = compiler.rematerializations("something else\n" + line + line)
    assert found.name == "jit(f)/sharding_constraint"
    assert found.operation == "f32[8,64]{1,0} copy"
    assert found.shardings.startswith("{devices=[8,1]<=[8]} to {devices=[1,4,2]")
    assert compiler.rematerializations("W1125 all is well\n") == ()


def test_time_is_the_longer_of_flops_and_bytes_and_what_is_synchronous_adds_up():
    work = (
        hlo.Work(kind="product", flops=A100.product_share * A100.peak_flops, bytes=1, count=2),
        hlo.Work(kind="attention", flops=A100.attention_share * A100.peak_flops, bytes=1, count=1),
        hlo.Work(kind="memory", flops=0.0, bytes=int(A100.memory_share * A100.memory_bytes_per_s), count=3),
    )
    exchange = hlo.Collective(
        kind="all-reduce",
        axes=("tensor",),
        size=8,
        members_a_machine=8,
        synchronous=True,
        count=1,
        sent_bytes=A100.link_bytes_per_s,
    )
    hidden = dataclasses.replace(exchange, synchronous=False, sent_bytes=9 * A100.link_bytes_per_s)
    times = cost.times(hlo.Program(collectives=(exchange, hidden), work=work, largest=(), num_unknown_loops=0), A100)
    assert (times.products_s, times.attention_s, times.memory_s) == pytest.approx((2, 1, 3))
    assert (times.exchange_s, times.hidden_s) == pytest.approx((1, 9), rel=1e-4)
    assert times.step_s == pytest.approx(1 + 9, rel=1e-4)  # of which 6 s of computation hide nothing more


def test_between_machines_a_ring_has_the_ports_of_its_members_in_one():
    assert cost.bytes_per_s(8, 8, A100) == A100.link_bytes_per_s
    assert cost.bytes_per_s(16, 1, A100) == A100.network_bytes_per_s
    assert cost.bytes_per_s(16, 4, A100) == 4 * A100.network_bytes_per_s
    assert cost.bytes_per_s(64, 8, dataclasses.replace(A100, network_bytes_per_s=1e12)) == A100.link_bytes_per_s


def test_devices_are_the_four_and_leave_a_fifth_of_their_memory():
    assert list(devices.DEVICES) == ["a100-40", "a100-80", "h100", "h200"]
    assert A100.usable_bytes == pytest.approx(33.84e9, rel=1e-4)
    assert [device.peak_flops for device in devices.DEVICES.values()] == [312e12, 312e12, 989e12, 989e12]
    for device in devices.DEVICES.values():
        assert f"device_memory_size: {device.memory_bytes}\n" in device.description()
    with pytest.raises(ConfigError, match="device is 'v100'; known are a100-40"):
        devices.named("v100")


def job(**changes: object) -> Job:
    layout = Layout(**changes)  # pyright: ignore[reportArgumentType]
    return Job(config=PRESETS["falcon-rw-1b"], device=A100, layout=layout, rows=96)


def test_state_bytes_are_twelve_a_parameter_split_as_the_mesh_does():
    config = PRESETS["falcon-rw-1b"]
    matrices = config.num_layers * 12 * config.width**2 + config.vocab_size * config.width
    alone, split = state_bytes(job()), state_bytes(job(fsdp=4, tensor=2))
    assert alone.optimizer == pytest.approx(2 * alone.parameters)
    assert alone.parameters == pytest.approx(4 * matrices, rel=2e-3)  # norms and biases besides
    assert split.total == pytest.approx(alone.total / 8, rel=1e-2)


@pytest.mark.parametrize(
    ("mesh", "lost"),
    [
        ({"data": 64}, {}),
        ({"data": 2, "fsdp": 32, "stage": 2}, {}),
        ({"data": 192, "stage": 2}, {"data": 1}),  # 192 does not divide 4544 = 64 * 71
        ({"data": 3, "fsdp": 64}, {"data": 1}),
        ({"data": 64, "fsdp": 3}, {"data": 1, "fsdp": 1}),  # what is outside of it goes along
        ({"data": 3, "tensor": 8}, {"data": 1, "tensor": 0.1936}),  # nor does 8 divide 71 heads
    ],
)
def test_what_an_axis_fails_to_split_of_the_state_is_told_as_a_share(mesh, lost):
    layout = Layout(**mesh, num_micro_batches=2)
    found = unsplit_shares(Job(config=PRESETS["falcon-7b"], device=A100, layout=layout, rows=2 * 192))
    assert found == {axis: pytest.approx(share, abs=1e-3) for axis, share in lost.items()}


def test_what_the_table_leaves_whole_is_not_lost():
    leaves = {"final_norm.weight": np.zeros(9), "layers.0.mlp.up.weight": np.zeros((9, 9))}
    assert sharding.unsplit_shares(leaves, mesh_of_nothing(data=3, tensor=3)) == {}
    assert sharding.unsplit_shares(leaves, mesh_of_nothing(data=2)) == {"data": 81 / 90}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": 12}, "beyond 8 they come in machines of as many"),
        ({"data": 8, "num_micro_batches": 5}, "= 8 * 5 = 40 must divide it"),
        ({"data": 0}, "data is 0; it must be at least 1"),
        ({"stage": 5, "num_micro_batches": 96}, "24 layers do not fall into 5 stages"),
        ({"stage": 4, "num_micro_batches": 6}, "a multiple of its 4 stages"),
        ({"remat": "stage"}, "take 'block'"),
        ({"pipeline_rounds": 2}, "rounds is 2, which a pipeline alone has"),
        ({"splits_sequence": True}, "split over tensor, which is 1"),
    ],
)
def test_a_layout_that_does_not_come_out_is_refused(changes, said):
    with pytest.raises(ConfigError, match="(?s).*" + said.replace("*", r"\*")):
        job(**changes)


def test_the_arithmetic_before_a_compilation_counts_the_state_exactly_and_keeps_to_its_rules():
    num_devices = 16
    found = list(search.candidates(job(), num_devices))
    assert len({each.layout for each in found}) == len(found) > 100
    for each in found:
        layout = each.layout
        assert math.prod(layout.sizes.values()) == num_devices
        assert layout.tensor <= 8 and layout.num_micro_batches % layout.stage == 0
    for changes in ({}, {"fsdp": 4, "tensor": 2}, {"data": 2, "stage": 4, "num_micro_batches": 4}):
        exact = state_bytes(job(**changes)).total
        sizes = search._sizes(PRESETS["falcon-rw-1b"], tuple(job(**changes).layout.sizes.values()))
        assert search.STATE_BYTES * sizes.state == pytest.approx(exact, rel=1e-5)
    # What computes again keeps less and takes longer.
    kept, again = (search.guess(job(data=8, num_micro_batches=4, remat=remat)) for remat in ("none", "block"))
    assert kept.peak_bytes > again.peak_bytes and kept.step_s < again.step_s


def test_a_serving_plan_is_weights_and_cache():
    config = PRESETS["falcon-40b"]
    whole, halves, few = (
        serving.serve(config, A100, rows=2, length=1000, tensor=tensor, dtype="bfloat16", weights=weights)
        for tensor, weights in ((1, "native"), (2, "native"), (1, "int4"))
    )
    assert whole.cache_bytes == 2 * config.num_layers * 2 * 1000 * config.num_kv_heads * config.head_dim * 2
    assert halves.cache_bytes * 2 == whole.cache_bytes
    assert halves.weight_bytes == pytest.approx(whole.weight_bytes / 2, rel=1e-3)
    assert few.weight_bytes < 0.3 * whole.weight_bytes
    assert not whole.fits and whole.spare_bytes == A100.usable_bytes - whole.weight_bytes - whole.cache_bytes
    assert few.fits


def test_a_verdict_says_by_how_much_in_both_units(program):
    compiled = compiler.Compiled(
        peak_bytes=A100.usable_bytes + 2 * 2**30, argument_bytes=0, program=program, rematerializations=(), seconds=1.0
    )
    plan = Plan(job=job(), state=StateBytes(10**9, 2 * 10**9), compiled=compiled, times=cost.times(program, A100))
    assert not plan.fits
    assert report.lines(plan)[-1].startswith("does not fit: 2.15 GB (2.00 GiB) a GPU too much (33.84 GB")
    roomy = dataclasses.replace(plan, compiled=dataclasses.replace(compiled, peak_bytes=A100.usable_bytes - 2**30))
    assert report.lines(roomy)[-1].startswith("fits: 1.07 GB (1.00 GiB) a GPU to spare")
    assert plan.working_bytes == plan.peak_bytes - 3 * 10**9


def test_a_plan_says_what_jax_must_be_told_what_is_not_split_and_what_could_be_faster(program):
    times = cost.times(program, A100)

    def lines_of(peak_share: float, layout: Layout, *, is_chosen: bool = False) -> list[str]:
        asked = Job(config=PRESETS["falcon-rw-1b"], device=A100, layout=layout, rows=96)
        compiled = compiler.Compiled(
            peak_bytes=round(peak_share * A100.memory_bytes),
            argument_bytes=0,
            program=program,
            rematerializations=(),
            seconds=1.0,
        )
        plan = Plan(job=asked, state=StateBytes(10**9, 2 * 10**9), compiled=compiled, times=times)
        return report.lines(plan, is_chosen=is_chosen)

    whole, thirds = Layout(data=4, remat="none"), Layout(data=3, tensor=8, num_micro_batches=8)
    told = "; it takes 0.78 of it and JAX by itself 0.75: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.9"
    assert lines_of(0.78, whole)[-1].endswith(told)
    for share in (0.74, 0.85):
        assert "MEM_FRACTION" not in lines_of(share, whole)[-1]
    assert "  state not split    nothing that the mesh is meant to split" in lines_of(0.5, whole)
    assert "  state not split    100.0% over data 3, which does not divide it" in lines_of(0.5, thirds)
    faster = "50% of the memory is left: fewer --micro-batches or less --remat could be faster"
    assert lines_of(0.4, thirds)[-2] == faster
    assert faster not in lines_of(0.4, thirds, is_chosen=True)
    assert lines_of(0.7, thirds)[-2] == lines_of(0.4, whole)[-2] == lines_of(0.9, thirds)[-2] == ""
    in_pipeline = dataclasses.replace(thirds, tensor=2, stage=4)  # fewer would leave it idle for longer
    assert lines_of(0.4, in_pipeline)[-2].endswith("is left: less --remat could be faster")


def test_a_search_compiles_the_best_of_each_mesh_and_then_further_variants():
    alone = Job(config=PRESETS["falcon-rw-1b"], device=devices.named("h200"), layout=Layout(), rows=16)
    chosen, num_meshes = search._promising([(search.guess(each), each) for each in search.candidates(alone, 1)], 4)
    layouts = [each.layout for _, each in chosen]
    assert num_meshes == 1 and len(set(layouts)) == 4
    assert (layouts[0].remat, layouts[0].num_micro_batches) == ("none", 1)  # there is room
    several = [(search.guess(each), each) for each in search.candidates(job(), 8)]
    chosen, num_meshes = search._promising(several, 6)
    assert num_meshes > 6 and len({tuple(each.layout.sizes.values()) for _, each in chosen}) == 6
