"""Over every kind of mesh a step has the loss and the gradients of one device. All 70 of them: meshes.py, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax import sharding
from falcon_jax.errors import ConfigError
from falcon_jax.model.step import ForwardOptions
from falcon_jax.train import pipeline
from falcon_jax.train import step as train_step
from tests import models
from tests.thorough import thorough_but
from tests.train import meshes

# (data, fsdp, tensor, stage), and what else of a step a mesh bears upon.
CASES = {
    "data": ("falcon-7b", (4, 1, 1, 1), {}),
    "fsdp": ("falcon-40b", (1, 8, 1, 1), {"remat": "block"}),
    "tensor, the tokens split between blocks": ("falcon-rw-7b", (1, 1, 4, 1), {"splits_sequence": True}),
    "stage": ("falcon-40b-alibi", (1, 1, 1, 4), {}),
    "rounds": ("falcon-7b", (1, 1, 1, 2), {"rounds": 2, "remat": "stage"}),
    "data, fsdp and tensor": ("falcon-rw-1b", (2, 2, 2, 1), {"remat": "products", "dropout": 0.3}),
    "fsdp, tensor and stage": ("falcon2-11b", (1, 2, 2, 2), {"remat": "block", "dropout": 0.3}),
    "heads that do not divide": ("falcon-7b", (1, 2, 2, 1), {"remat": "block"}),
    "data, tensor and stage": ("falcon-180b", (2, 1, 2, 2), {"remat": "stage"}),
}
# In these each axis is split, alone or beside others.
USUAL = [name for name in CASES if name not in ("data", "fsdp", "stage", "data, tensor and stage")]


@pytest.mark.parametrize("name", thorough_but(CASES, *USUAL))
@pytest.mark.usefixtures("cpu_devices")
def test_a_mesh_has_the_gradients_of_one_device(name: str) -> None:
    variant, shape, options = CASES[name]
    assert meshes.compare(variant, shape, **options) < 3e-5


def test_a_pipeline_evaluates_as_one_device_does(cpu_devices: list) -> None:
    config = meshes.config_of("falcon-7b", 2, 1)
    mesh = sharding.make_mesh(data=2, stage=2, devices=cpu_devices)
    tokens, counts = meshes.tokens_of(config, 1, 3)[0], np.asarray([12, 5, 0], np.int32)
    nats = []
    for where in (None, mesh):
        state = train_step.init_state(config, meshes.OPTIONS, 0, where, models.random_params(config))
        evaluate = train_step.make_eval_step(config, meshes.OPTIONS, ForwardOptions(), where)
        nats.append(np.asarray(evaluate(state["params"], tokens, counts)))
    assert (nats[0][1, 5:] == 0).all()
    np.testing.assert_allclose(nats[1], nats[0], atol=1e-5)


def test_unstacking_gives_back_what_was_stacked() -> None:
    params = models.random_params(models.tiny("falcon-7b", num_layers=12))
    stacked = pipeline.stack(params, num_stages=3, num_rounds=2)
    assert list(stacked["layers"]) == [0, 1]
    # The second stage holds, for the first round, layers 2 and 3, and for the second 8 and 9.
    scales = [stacked["layers"][1]["attention_norm"]["scale"][1, turn] for turn in (0, 1)]
    for found, number in zip(scales, (3, 9), strict=True):
        np.testing.assert_array_equal(found, params["layers"][number]["attention_norm"]["scale"])
    jax.tree.map(np.testing.assert_array_equal, pipeline.unstack(stacked), params)


def test_what_does_not_fall_evenly_over_the_mesh_is_refused(cpu_devices: list) -> None:
    config = models.tiny("falcon-7b", num_layers=3)
    mesh = sharding.make_mesh(data=2, stage=2, devices=cpu_devices)
    with pytest.raises(ConfigError, match="3 layers do not fall into 2 stages of 1 rounds"):
        train_step.abstract_state(config, meshes.OPTIONS, mesh)

    config = models.tiny("falcon-7b", num_layers=2)
    state = train_step.abstract_state(config, meshes.OPTIONS, mesh)
    step = train_step.make_train_step(config, meshes.OPTIONS, ForwardOptions(), mesh)
    for rows, message in (((2, 3), "3 rows; data . fsdp = 2 must divide"), ((3, 2), "a multiple of 2 .these are 3")):
        with pytest.raises(ConfigError, match=message):
            step.trace(state, jnp.zeros((*rows, 5), jnp.int32), jnp.float32(0))
    alone = train_step.make_train_step(config, meshes.OPTIONS, ForwardOptions(remat="stage"), None)
    with pytest.raises(ConfigError, match="remat 'stage' is for a pipeline"):
        alone.trace(train_step.abstract_state(config, meshes.OPTIONS), jnp.zeros((1, 2, 5), jnp.int32), jnp.float32(0))
