"""A call over a mesh gives what it gives on one device, forwards and backwards, whatever divides."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import sharded
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.flash_attention import attention
from pallas_kernels.flash_attention.api import LETTERS
from pallas_kernels.flash_attention.reference import attention_one_token, attention_xla_with_lse
from tests.thorough import thorough

B, T, H = 4, 5, 8
RESULTS = ("B T N H", "B N T")
# data, tensor, N, K, and the heads N and K that each device then gets.
CASES = [
    (4, 2, 4, 2, 2, 1),
    (1, 8, 16, 8, 2, 1),
    (2, 4, 4, 1, 1, 1),
    (4, 2, 6, 1, 3, 1),
    (1, 8, 8, 2, 1, 1),  # four devices share a key/value head
    (2, 4, 6, 2, 6, 2),  # 6 heads do not split in 4
    (2, 4, 24, 6, 24, 6),  # they do, but a device's 6 would read two key/value heads of 4 each
    (1, 8, 71, 1, 71, 1),
    (4, 2, 71, 1, 71, 1),
]


def make_mesh(devices, data, tensor):
    return Mesh(np.asarray(devices).reshape(data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def draw(N, K, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (B, T, N, H))
    k, v = (jax.random.normal(key, (B, T + 2, K, H)) for key in keys[1:])
    offset = jnp.asarray([2, 1, 2, 0], jnp.int32)
    lengths = jnp.asarray([7, 4, 0, 2], jnp.int32)  # the third row sees no key
    return q, k, v, offset, lengths, jnp.linspace(0.1, 0.5, N)


def plain(q, k, v, offset, lengths, slopes):
    return attention_xla_with_lse(q, k, v, offset, lengths, slopes, "float32", H**-0.5)


def split(mesh, function=plain):
    return lambda *arguments: sharded.over_mesh(function, mesh, arguments, LETTERS, RESULTS)


def results_and_gradients(function):
    def run(q, k, v, *rest):
        (out, lse), backward = jax.vjp(lambda q, k, v: function(q, k, v, *rest), q, k, v)
        return out, lse, *backward((jnp.cos(out), jnp.where(jnp.isfinite(lse), jnp.sin(lse), 0.0)))

    return run


@pytest.mark.parametrize(("data", "tensor", "N", "K", "local_N", "local_K"), CASES)
def test_outputs_and_gradients_equal_those_of_one_device(data, tensor, N, K, local_N, local_K, cpu_devices):
    mesh, shares = make_mesh(cpu_devices, data, tensor), set()

    def watched(q, k, *rest):
        shares.add((q.shape[0], q.shape[2], k.shape[2]))
        return plain(q, k, *rest)

    arguments = jax.device_put(draw(N, K), cpu_devices[0])
    expected = jax.jit(results_and_gradients(plain))(*arguments)
    placed = jax.device_put(arguments, NamedSharding(mesh, PartitionSpec()))
    found = jax.jit(results_and_gradients(split(mesh, watched)))(*placed)
    assert shares == {(B // data, local_N, local_K)}
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)


def test_what_is_laid_out_right_stays_where_it_is(cpu_devices):
    mesh = make_mesh(cpu_devices, 2, 4)
    layout = sharded.layout(mesh.shape, {"B": B, "N": 8, "K": 1}, batch_axes=("data",), head_axis="tensor")
    specs = [NamedSharding(mesh, layout.spec(dimensions)) for dimensions in LETTERS]
    compiled = jax.jit(split(mesh), in_shardings=specs).lower(*draw(8, 1)).compile().as_text()
    assert compiled is not None
    assert not any(word in compiled for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


def test_rows_that_do_not_divide_are_replicated(cpu_devices):
    mesh = make_mesh(cpu_devices, 8, 1)
    layout = sharded.layout(mesh.shape, {"B": 4, "N": 4, "K": 1}, batch_axes=("data", "fsdp"), head_axis="tensor")
    assert layout.spec("B T N H") == PartitionSpec(None, None, None, None)


@pytest.mark.parametrize("paged", [False, True])
def test_single_tokens_and_pages_split_too(paged, cpu_devices):
    """The dimensions of decoding: q [B, N, H]; pages [num_pages, page, K, H] belong to no row."""
    mesh = make_mesh(cpu_devices, 2, 4)
    q, k, v, offset, _, slopes = draw(8, 2)
    q, table = q[:, 0], jnp.arange(B, dtype=jnp.int32)[::-1]

    def decode(q, k, v, offset, slopes, table):
        if table is not None:
            k, v = k[table], v[table]
        return attention_one_token(q[:, None], k, v, offset, None, slopes, "float32", H**-0.5)[:, 0]

    arguments = (q, k, v, offset, slopes, table if paged else None)
    cache = "P S K H" if paged else "B S K H"
    letters = ("B N H", cache, cache, "B", "N", "B")
    with jax.default_device(cpu_devices[0]):
        expected = jax.jit(decode)(*arguments)
        found = jax.jit(lambda *given: sharded.over_mesh(decode, mesh, given, letters, "B N H"))(*arguments)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_it_composes_with_vmap_and_remat(cpu_devices):
    mesh = make_mesh(cpu_devices, 2, 4)
    with jax.default_device(cpu_devices[0]):
        pairs = [draw(4, 1, seed) for seed in (0, 1)]
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *pairs)
        found = jax.jit(jax.vmap(results_and_gradients(jax.checkpoint(split(mesh)))))(*stacked)
        for i, pair in enumerate(pairs):
            expected = jax.jit(results_and_gradients(plain))(*pair)
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_allclose(ours[i], theirs, rtol=1e-5, atol=2e-6)


def test_xla_is_left_to_its_own_partitioner(cpu_devices):
    mesh = make_mesh(cpu_devices, 2, 4)
    q, k, v, *_ = draw(8, 1)
    traced = jax.make_jaxpr(lambda q, k, v: attention(q, k, v, mesh=mesh))(q, k, v)
    assert "shard_map" not in str(traced)


@pytest.fixture
def interpreted_on_each(monkeypatch, cpu_devices) -> Iterator[None]:
    """Interprets kernels on several devices side by side, which the interpreter was not made for.

    As one device finishes it wants no other to be at work, and it sees races between them: both are left out here.
    """
    monkeypatch.setattr(shared_memory.GPUSharedMemory, "assert_no_barriers_allocated", lambda self: None)
    gpu_callbacks.reset_gpu_interpret_mode_state()
    parameters = plgpu.InterpretGPUParams(uninitialized_memory="zero")
    with plgpu.force_gpu_interpret_mode(parameters), jax.default_device(cpu_devices[0]):
        yield


def widened(arrays, H=64):
    """Heads as wide as the kernels take them, in bfloat16."""
    return (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, H - x.shape[-1])]).astype(jnp.bfloat16) for x in arrays)


@pytest.mark.usefixtures("interpreted_on_each")
@pytest.mark.parametrize(("N", "K"), [(2, 2), *thorough([(4, 1)])])
def test_the_kernel_runs_on_each_device_of_a_mesh(N, K, cpu_devices):
    mesh = make_mesh(cpu_devices[:2], 1, 2)
    q, k, v = (x[:1, :T] for x in widened(draw(N, K)[:3]))
    slopes = jnp.linspace(0.1, 0.5, N)

    def run(implementation, mesh=None):
        def attend(q, k, v):
            options = {"slopes": slopes, "implementation": implementation, "mesh": mesh, "return_lse": True}
            return attention(q, k, v, **options)

        return jax.jit(results_and_gradients(attend))(q, k, v)

    for ours, theirs in zip(jax.block_until_ready(run("mosaic", mesh)), run("xla"), strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("interpreted_on_each")
@pytest.mark.parametrize(("data", "tensor", "N", "K"), [(1, 2, 4, 1), (2, 1, 4, 2)])
def test_the_decode_kernel_runs_on_each_device_of_a_mesh(data, tensor, N, K, cpu_devices):
    mesh = make_mesh(cpu_devices[:2], data, tensor)
    q, keys, values = widened(draw(N, K)[:3])
    slots = ((0, 0), (0, 1), (0, 0), (0, 0))
    q, keys, values = q[:2, 0], jnp.pad(keys[:2], slots), jnp.pad(values[:2], slots)

    def run(implementation, mesh=None):
        lengths, slopes = jnp.asarray([7, 3], jnp.int32), jnp.linspace(0.1, 0.5, N)
        options = {"slopes": slopes, "implementation": implementation, "mesh": mesh}
        return jax.jit(lambda *arrays: decode_attention(*arrays, lengths=lengths, **options))(q, keys, values)

    found, expected = jax.block_until_ready(run("mosaic", mesh)), run("xla")
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.02, atol=0.02)
