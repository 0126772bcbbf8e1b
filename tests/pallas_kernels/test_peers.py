"""Devices that write each other's memory: what can be seen of it without GPUs. test_peers_on_gpu.py runs it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax import sharding
from pallas_kernels import compat, peers
from pallas_kernels.attention_norm import attention_norm
from pallas_kernels.attention_norm.meeting import meeting_size
from pallas_kernels.attention_norm.mosaic import attention_norm_mosaic, defer_norm_mosaic
from pallas_kernels.peers import Addresses, memory
from pallas_kernels.peers.exchange import Exchange
from pallas_kernels.peers.kernels import add_kernel, gather_kernel
from tests.pallas_kernels.test_compiled import array, few_bits, require_no_problems
from tests.thorough import thorough


def test_a_table_tells_each_device_its_place_and_all_addresses():
    known = [0x7F12_3456_789A_BC00, 0x1_0000_0010, 0xFFFF_FFFF_0000]
    table = memory.table_of(known)
    assert table.dtype == np.int32 and table.shape == (3, 8)
    assert table[:, 0].tolist() == [0, 1, 2] and not table[:, 1].any()
    # As a kernel reads them: 64 bits from byte 8 on, which the array's beginning lets lie where 8 bytes begin.
    for row in table:
        assert np.frombuffer(row.tobytes()[8:], np.uint64).tolist() == known


@pytest.mark.parametrize(("count", "num_rows", "width"), [(2, 8, 4544), (8, 64, 14848), (4, 16, 64)])
def test_words_begin_where_16_bytes_do_and_fit_the_kernels_numbers(count, num_rows, width):
    begin, end = memory.words_begin(num_rows, width), memory.num_bytes(count, num_rows, width)
    assert begin % 16 == 0 and begin >= 4 * (num_rows // 8 * width // 64 + memory.MOST_PAST_END)
    assert end - begin == 2 * count * num_rows * width * 8
    assert (end - begin) // 8 < 2**31  # places are counted in int32


def test_who_has_no_mailboxes_is_told_why(cpu_devices, monkeypatch):
    two = sharding.make_mesh(tensor=2, devices=cpu_devices)

    def reason():
        return str(peers.reason_against(two))

    assert "it needs a Hopper GPU" in reason()
    mixed = sharding.make_mesh(data=2, tensor=2, devices=cpu_devices)
    wanted = r"mailboxes: they take a mesh of several devices of the axis 'tensor' alone, not data 2, tensor 2"
    with pytest.raises(NotImplementedError, match=wanted):
        peers.Mailboxes(mixed, 8, 128)
    with monkeypatch.context() as patch:
        patch.setattr(compat, "interpreting", lambda: True)
        assert "interpreted" in reason()
    monkeypatch.setattr(memory, "_all_reach_each_other", lambda ordinals: False)
    with monkeypatch.context() as patch, compat.assume_capability(compat.HOPPER):
        patch.setattr(jax, "__version_info__", (0, 12, 0))
        assert "jax 0.12" in reason()
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    with compat.assume_capability(compat.HOPPER):
        monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
        assert peers.reason_against(two) == "these GPUs do not reach each other's memory"
        monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", "cuda_async")
        assert "allocator 'cuda_async'" in reason()
        monkeypatch.delenv("XLA_PYTHON_CLIENT_ALLOCATOR")
        monkeypatch.setattr(memory, "_all_reach_each_other", lambda ordinals: True)
        assert peers.reason_against(two) is None
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        assert "processes" in reason()


def test_what_has_no_room_is_refused(cpu_devices):
    room = Addresses(jnp.zeros((2, 6), jnp.int32), 8, 128)
    with pytest.raises(ValueError, match="add_rows: mailboxes of 8 rows of 128 have no room for 9 of 128"):
        peers.add_rows(jnp.zeros((9, 128)), room.table[0], room)
    with pytest.raises(ValueError, match="gather_columns: mailboxes of 8 rows of 128 have no room for 2 of 256"):
        peers.gather_columns(jnp.zeros((2, 256)), room.table[0], room)
    x, w, norm = jnp.zeros((16, 128), jnp.bfloat16), jnp.zeros((128, 128), jnp.bfloat16), jnp.zeros(128, jnp.bfloat16)
    mesh = sharding.make_mesh(tensor=2, devices=cpu_devices)
    with pytest.raises(ValueError, match="mailboxes of 8 rows of 128 on 2 devices do not fit 16 of 128 on 2"):
        attention_norm([x], [w], x, [(norm, norm)], epsilon=1e-5, mesh=mesh, are_split=[True], peers=room)
    some = [x[:8]], [w], x[:8], [(norm, norm)]
    with pytest.raises(NotImplementedError, match="with `peers` kernels add up"):
        options = {"mesh": mesh, "are_split": [True], "peers": room, "implementation": "xla"}
        jax.eval_shape(lambda *given: attention_norm(*given, epsilon=1e-5, **options)[0], *some)


# Devices, rows, rows that mean something, width, inputs, form.
STAGES = [
    (2, 8, 1, 8192, 4096, "native"),
    (8, 16, 16, 4544, 2304, "int4"),
    *thorough([(8, 64, 64, 8192, 1024, "native"), (4, 8, 6, 14848, 3712, "int8"), (2, 8, 3, 2048, 1024, "native")]),
]


@pytest.mark.parametrize(("count", "rows", "num_rows", "width", "inputs", "form"), STAGES)
def test_an_output_stage_that_adds_up_over_devices_is_one_launch(compiler, count, rows, num_rows, width, inputs, form):
    exchange, table = Exchange(count, num_rows, rows, width), array((2 + 2 * count,), "int32")
    x, residual, column = (array(shape, "bfloat16") for shape in ((rows, inputs), (rows, width), (width,)))
    arguments = [x], [few_bits(form, inputs, width)], [column], residual, [(column, column)]
    options = {"epsilon": 1e-5, "exchange": exchange, "table": table}
    meeting = array((meeting_size(rows, width),), "int32")
    report = compiler.compile(attention_norm_mosaic, *arguments, meeting, **options)
    require_no_problems(report)
    assert report.launches == ("copy", "mosaic_gpu_v2")  # the meeting, which the caller keeps here
    if rows == 8:
        report = compiler.compile(defer_norm_mosaic, *arguments, **options)
        require_no_problems(report)
        assert report.launches == ("mosaic_gpu_v2",)


def add(*arguments):
    return add_kernel(*arguments)


def gather(*arguments):
    return gather_kernel(*arguments)


@pytest.mark.parametrize(("count", "rows", "width"), [(2, 1, 32512), *thorough([(8, 16, 8128)])])
def test_rows_and_logits_are_one_launch_each(compiler, count, rows, width):
    R, table = rows + -rows % 8, array((2 + 2 * count,), "int32")
    for kernel, dtype in ((add, "bfloat16"), (gather, "float32")):
        report = compiler.compile(kernel, array((R, width), dtype), table, Exchange(count, rows, R, width))
        require_no_problems(report)
        assert report.launches == ("mosaic_gpu_v2",)
