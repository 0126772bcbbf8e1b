"""Where attention runs beside the MLP: by what was measured, and where it would be done in time."""

import math

import pytest

from falcon_jax.config import PRESETS
from falcon_jax.model.beside import attention_sms
from pallas_kernels.compat import NUM_SMS


@pytest.mark.parametrize(
    ("name", "weights", "batch", "capacity", "expected"),
    [
        ("falcon-7b", "native", 1, 2048, 4),
        ("falcon-7b", "native", 1, 4352, 8),
        ("falcon-7b", "native", 2, 4352, 12),
        ("falcon-40b-alibi", "native", 1, 4352, 4),
        ("falcon-40b-alibi", "int8", 1, 4352, 4),
        # Not done in time, or the product has no time to hide it.
        ("falcon-7b", "native", 1, 32768, 0),
        ("falcon-7b", "native", 4, 4352, 0),
        ("falcon-7b", "int8", 1, 4352, 0),
        ("falcon-nano", "native", 1, 512, 0),
        # Measured not to pay, or not measured; or one reads what the other makes.
        ("falcon-40b-alibi", "int4", 1, 4352, 0),
        ("falcon-40b", "native", 1, 512, 0),
        ("falcon-rw-1b", "native", 1, 512, 0),
    ],
)
def test_where_it_pays(name, weights, batch, capacity, expected):
    assert attention_sms(PRESETS[name], weights, batch, capacity, NUM_SMS) == expected


@pytest.mark.parametrize("num_sms", [2, 78, 114, NUM_SMS])
@pytest.mark.parametrize("name", ["falcon-7b", "falcon-40b-alibi"])
def test_the_product_takes_no_more_turns_than_on_the_whole_gpu(name, num_sms):
    tiles = PRESETS[name].mlp_width // 64
    taken = [attention_sms(PRESETS[name], "native", 1, capacity, num_sms) for capacity in range(256, 9000, 256)]
    assert all(math.ceil(tiles / (num_sms - sms)) == math.ceil(tiles / num_sms) for sms in taken)
    assert num_sms == 2 or any(taken)
