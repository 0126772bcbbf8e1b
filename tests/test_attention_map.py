"""The attention map: the model's own probabilities, for one prompt and one layer."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import FalconForCausalLM

from falcon_jax import Falcon, RequestError
from tests import hf_models, models

TOKENS = [5, 17, 23, 23, 96, 0, 41]


@pytest.fixture(scope="module")
def model() -> Falcon:
    config = models.tiny("falcon-rw-7b")
    return Falcon(config, models.random_params(config))


@pytest.mark.parametrize("variant", ["falcon-40b", "falcon2-11b"])
def test_maps_equal_those_of_transformers(variant, tmp_path):
    # RoPE alone: eager attention, the one that returns its weights, adds ALiBi twice in transformers.
    hf_models.save_model(hf_models.make_model(hf_models.tiny_config(variant)), tmp_path)
    reference = FalconForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        expected = reference(torch.tensor([TOKENS]), output_attentions=True).attentions
    model = Falcon.from_checkpoint(tmp_path, dtype="float32")
    for layer, weights in enumerate(expected):
        np.testing.assert_allclose(model.attention_map(TOKENS, layer), weights[0].numpy(), atol=1e-5)


def test_rows_sum_to_one_and_see_no_later_token(model):
    for layer in range(model.config.num_layers):
        weights = model.attention_map(TOKENS, layer)
        assert weights.shape == (6, 7, 7) and weights.dtype == jnp.float32
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
        assert not np.triu(weights, k=1).any()


@pytest.mark.parametrize(
    ("prompt", "layer", "said"),
    [(TOKENS, 2, "from 0 to 1"), (TOKENS, -1, "from 0 to 1"), ([TOKENS, TOKENS], 0, "got 2"), ([[]], 0, "is empty")],
)
def test_a_map_of_no_layer_or_not_one_prompt_is_refused(model, prompt, layer, said):
    with pytest.raises(RequestError, match=said):
        model.attention_map(prompt, layer)
