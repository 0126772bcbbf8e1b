import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_jax import sharding
from falcon_jax.checkpoint import checksum

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.uint32, np.bool_]
# The host sums blocks of 65,536; a scalar, an empty array, and odd sizes around that.
SHAPES = [(), (0, 4), (1,), (7, 5, 3), (65535,), (65537,), (3, 70001)]


def random_array(shape, dtype, seed=0):
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    content = np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)
    if dtype == np.bool_:
        content %= 2
    return content.view(dtype).reshape(shape)


def device_text(array):
    return checksum.finish_checksum(checksum.device_words(array))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_host_and_device_agree(dtype):
    for shape in SHAPES:
        array = random_array(shape, dtype)
        assert device_text(jnp.asarray(array)) == checksum.host_checksum(array), shape


def test_any_layout_gives_the_same_checksum(cpu_devices):
    array = random_array((64, 1024), ml_dtypes.bfloat16)
    expected = checksum.host_checksum(array)
    mesh = sharding.make_mesh(fsdp=2, tensor=4, devices=cpu_devices)
    for spec in (("fsdp", "tensor"), (None, "tensor"), ("tensor",), (("fsdp", "tensor"),), ()):
        layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        words = checksum.start_checksum(jax.device_put(array, layout))
        assert isinstance(words, jax.Array), "a sharded array must not be gathered on the host"
        assert checksum.finish_checksum(words) == expected


def test_many_arrays_are_summed_by_name():
    arrays = {"a": jnp.ones((3, 4), jnp.bfloat16), "b": jnp.arange(5)}
    expected = {name: checksum.host_checksum(np.asarray(array)) for name, array in arrays.items()}
    assert checksum.checksums(arrays) == expected


@given(bit=st.integers(0, 70_000 * 16 - 1))
def test_every_single_flipped_bit_changes_both_words(bit):
    array = random_array((70_000,), np.uint16)
    before = checksum.host_checksum(array)
    array[bit // 16] ^= np.uint16(1 << (bit % 16))
    after = checksum.host_checksum(array)
    assert before[:8] != after[:8]
    assert before[8:] != after[8:]


@pytest.mark.parametrize("stride", [1, 65536, 65537])
def test_swapped_and_moved_elements_change_it(stride):
    array = random_array((200_000,), np.uint16)
    swapped = array.copy()
    swapped[[100, 100 + stride]] = swapped[[100 + stride, 100]]
    assert checksum.host_checksum(swapped) != checksum.host_checksum(array)
    assert checksum.host_checksum(np.roll(array, stride)) != checksum.host_checksum(array)


def test_a_shape_is_not_part_of_it_but_the_order_is():
    array = random_array((6, 8), np.float32)
    assert checksum.host_checksum(array) == checksum.host_checksum(array.reshape(48))
    assert checksum.host_checksum(array) != checksum.host_checksum(array.T)


def test_eight_byte_elements_are_refused():
    with pytest.raises(ValueError, match="1, 2 or 4 bytes, got float64"):
        checksum.host_checksum(np.zeros(3))
