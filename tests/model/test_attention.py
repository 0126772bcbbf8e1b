"""Which kernel the model calls for what, and that the caller's options and mesh reach it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax import sharding
from falcon_jax.generate.engine import Engine
from falcon_jax.generate.sampling import Sampling
from falcon_jax.model import attention
from falcon_jax.model import params as model_params
from falcon_jax.model.cache import KVCache
from falcon_jax.model.step import ForwardOptions
from falcon_jax.train import step as train_step
from tests.models import random_params, tiny

B, S = 2, 16


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, tuple[int, ...], dict]]:
    """Kernel calls, as they are traced: name, shape of the queries, keyword arguments."""
    seen = []

    def watch(module, name):
        kernel = getattr(module, name)

        def watched(q, *arrays, **options):
            seen.append((name, q.shape, options))
            return kernel(q, *arrays, **options)

        monkeypatch.setattr(module, name, watched)

    watch(attention.flash_attention, "attention")
    watch(attention.decode_attention, "decode_attention_in_chain")
    return seen


def forward(num_columns, *, cached=True, is_first=False, num_tokens=None, options=None, mesh=None):
    config = tiny("falcon-rw-1b", num_layers=1)
    cache = KVCache.create(config, B, S, jnp.float32) if cached else None
    if cache is not None and not is_first:
        cache.lengths = jnp.asarray([3, 5], jnp.int32)
    decoder = model_params.bind(config, random_params(config), options, mesh)
    ids = jnp.zeros((B, num_columns), jnp.int32)
    return decoder(ids, cache=cache, num_tokens=num_tokens, cache_is_empty=is_first)[0]


@pytest.mark.parametrize(("cached", "is_first"), [(False, False), (True, True)])
def test_whole_sequences_say_so(cached, is_first, calls):
    """cuDNN takes no others, and every kernel does less work where no offset comes in."""
    forward(4, cached=cached, is_first=is_first)
    ((name, shape, options),) = calls
    assert name == "attention" and shape[:2] == (B, 4)
    assert options.get("query_offset") is None and options.get("lengths") is None


def test_chunks_of_a_prompt_start_where_the_cache_ends(calls):
    forward(4)
    ((name, _, options),) = calls
    assert name == "attention"
    assert options["query_offset"].tolist() == [3, 5]


@pytest.mark.parametrize(("num_tokens", "lengths"), [(None, [4, 6]), ([1, 0], [4, 0]), ([0, 1], [0, 6])])
def test_single_tokens_read_what_their_row_holds_and_rows_that_ended_nothing(num_tokens, lengths, calls):
    hidden = forward(1, num_tokens=None if num_tokens is None else jnp.asarray(num_tokens))
    ((name, shape, options),) = calls
    assert name == "decode_attention_in_chain" and len(shape) == 3
    assert options["lengths"].tolist() == lengths
    assert np.all(np.isfinite(hidden))


@pytest.mark.parametrize("num_columns", [1, 4])
def test_options_reach_the_kernel(num_columns, calls):
    forward(num_columns, options=ForwardOptions(alibi="hf_bf16", attention="xla"))
    ((_, _, options),) = calls
    assert options["alibi"] == "hf_bf16" and options["implementation"] == "xla"
    assert options["slopes"] is not None and options["mesh"] is None


def test_the_mesh_of_an_engine_reaches_its_kernels(calls, cpu_devices):
    config = tiny("falcon-7b", num_layers=1, eos_token_ids=())
    mesh = sharding.make_mesh(data=2, tensor=2, devices=cpu_devices)
    with jax.default_device(cpu_devices[0]):
        params = model_params.init(config, jax.random.key(0), "float32", mesh)
        generation = Engine(config, params, mesh=mesh).start([[1, 2], [3]], max_new_tokens=3, sampling=Sampling())
        while not generation.finished:
            generation.next_chunk()
    assert {name for name, _, _ in calls} == {"attention", "decode_attention_in_chain"}
    assert all(options["mesh"] == mesh for _, _, options in calls)


def test_the_mesh_of_training_reaches_its_kernels(calls, cpu_devices):
    config = tiny("falcon-7b", num_layers=1)
    mesh = sharding.make_mesh(data=2, tensor=2, devices=cpu_devices)
    options = train_step.StepOptions(compute_dtype="float32")
    tokens = jnp.zeros((2, 5), jnp.int32)
    with jax.default_device(cpu_devices[0]):
        state = train_step.abstract_state(config, options, mesh)
        train_step.make_train_step(config, options, ForwardOptions(), mesh).trace(state, tokens, jnp.float32(0))
        evaluate = train_step.make_eval_step(config, options, ForwardOptions(), mesh)
        evaluate.trace(state["params"], tokens, jnp.ones(2, jnp.int32))
    assert len(calls) == 2
    assert all(options["mesh"] == mesh for _, _, options in calls)
