"""ALiBi slopes and RoPE angles against transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import FalconConfig as HFConfig
from transformers.models.falcon.modeling_falcon import FalconRotaryEmbedding, build_alibi_tensor

from falcon_jax.config import FalconConfig
from falcon_jax.model import positions


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12, 64, 71, 128, 232])
def test_slopes_are_those_of_transformers(num_heads):
    theirs = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), num_heads, torch.float32)[:, 0, 1].numpy()
    ours = jnp.asarray(positions.alibi_slopes(num_heads)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(ours.astype(jnp.float32), theirs)


def test_slopes_of_a_power_of_two_are_the_papers():
    np.testing.assert_array_equal(positions.alibi_slopes(8), [2.0 ** -(n + 1) for n in range(8)])


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500042.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn with its own factors": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("length", [5, 100])
def test_angles_are_those_of_transformers(name, length):
    hf = HFConfig(
        hidden_size=128,
        num_attention_heads=4,
        num_hidden_layers=1,
        max_position_embeddings=40,
        rope_parameters=dict(ROPES[name]),
    )
    config = FalconConfig.from_hf(hf.to_dict())
    ids = torch.arange(length)[None]
    cos, sin = FalconRotaryEmbedding(hf)(torch.zeros(1, length, 1), ids)
    assert config.rope is not None
    ours = positions.rotary_angles(config.rope, 32, jnp.asarray(ids.numpy(), jnp.int32), jnp.asarray([length]))
    np.testing.assert_allclose(ours[0], cos.numpy(), atol=2e-5)
    np.testing.assert_allclose(ours[1], sin.numpy(), atol=2e-5)
