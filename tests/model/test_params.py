"""The parameter tree: paths, shapes, order, and what `bind` refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax.config import PRESETS
from falcon_jax.model import params as model_params
from falcon_jax.model.step import ForwardOptions
from tests.models import VARIANTS, tiny


@pytest.mark.parametrize("name", VARIANTS)
def test_the_tree_has_as_many_parameters_as_the_config_counts(name):
    config = PRESETS[name]
    leaves = jax.tree.leaves(model_params.abstract(config, "bfloat16"))
    assert sum(np.prod(leaf.shape, dtype=int) for leaf in leaves) == config.num_parameters


def test_published_sizes():
    billions = {name: PRESETS[name].num_parameters / 1e9 for name in PRESETS}
    assert 1.2 < billions["falcon-rw-1b"] < 1.4
    assert 6.8 < billions["falcon-7b"] < 7.1
    assert 41 < billions["falcon-40b"] < 42
    assert 178 < billions["falcon-180b"] < 181
    assert 11 < billions["falcon2-11b"] < 11.3


def test_paths_follow_the_model_and_come_back_as_the_tree():
    params = model_params.abstract(tiny("falcon2-11b", num_layers=11), "float32")
    paths = list(model_params.flatten(params))
    assert paths[0] == "embed.weight" and paths[-1] == "lm_head.weight"
    layers = [int(path.split(".")[1]) for path in paths if path.startswith("layers.")]
    assert layers == sorted(layers)
    assert model_params.unflatten(model_params.flatten(params)) == params


def test_init_is_normal_in_the_weights_and_neutral_in_the_norms():
    config = tiny("falcon-rw-1b", width=64, num_heads=8, num_kv_heads=8, initializer_range=0.02)
    params = model_params.flatten(model_params.init(config, jax.random.key(0), "float32"))
    assert float(jnp.std(params["layers.0.mlp.up.weight"])) == pytest.approx(0.02, rel=0.05)
    assert np.all(params["layers.1.mlp_norm.scale"] == 1) and not np.any(params["layers.1.mlp.up.bias"])
    assert not np.array_equal(params["layers.0.mlp.up.weight"], params["layers.1.mlp.up.weight"])


def test_bind_names_parameters_that_do_not_fit():
    config = tiny("falcon-7b")
    params = model_params.flatten(model_params.abstract(config, "float32"))
    del params["final_norm.bias"]
    params["layers.0.mlp.up.weight"] = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    params["extra.weight"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    with pytest.raises(ValueError) as error:
        model_params.bind(config, model_params.unflatten(params))
    for path in ("final_norm.bias", "layers.0.mlp.up.weight", "extra.weight"):
        assert path in str(error.value)


def test_unknown_alibi_mode_is_refused():
    with pytest.raises(ValueError, match="alibi='exact' is unknown"):
        ForwardOptions(alibi="exact")


def test_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="remat='all' is unknown; known are 'none', 'block'"):
        ForwardOptions(remat="all")
