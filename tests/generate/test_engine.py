"""The engine against the plain forward pass: cache, raggedness, chunks, samples, sharding, compilations."""

import dataclasses

import jax
import numpy as np
import pytest

from falcon_jax import sharding
from falcon_jax.config import PRESETS, Rope
from falcon_jax.errors import RequestError
from falcon_jax.generate import batching
from falcon_jax.generate import engine as engines
from falcon_jax.generate.engine import CHUNK, Engine
from falcon_jax.generate.sampling import Sampling
from falcon_jax.model import params as model_params
from falcon_jax.model import stages
from pallas_kernels import compat
from pallas_kernels.quantized_matmul import deferred
from tests import models
from tests.compilations import count_compilations
from tests.generate.runs import drain
from tests.thorough import thorough

NO_EOS = {"eos_token_ids": ()}
PROMPTS = [[5, 17, 3, 90, 41], [8] * 17 + [2, 31], [60]]
GREEDY = Sampling()
DRAWN = Sampling(temperature=1.0, top_k=40, top_p=0.95)


def make_engine(name: str = "falcon-7b", **changes) -> Engine:
    config = models.tiny(name, **(NO_EOS | changes))
    return Engine(config, models.random_params(config))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


def run(
    engine: Engine, prompts, max_new_tokens: int = 20, sampling: Sampling = GREEDY, chunk: int = CHUNK, **options
) -> tuple[list[list[int]], list[list[float]]]:
    generation = engine.start(prompts, max_new_tokens=max_new_tokens, sampling=sampling, **options)
    return drain(generation, chunk)


# Every variant, against transformers too: test_hf_parity.py. There ALiBi is rounded, here it is not.
@pytest.mark.parametrize("name", ["falcon-rw-1b", "falcon-40b-alibi"])
def test_cached_decoding_of_a_ragged_batch_equals_the_full_forward(name):
    engine = make_engine(name)
    tokens, logprobs = run(engine, PROMPTS)
    for prompt, new, new_logprobs in zip(PROMPTS, tokens, logprobs):
        assert len(new) == 20
        ids = np.array([prompt + new], np.int32)
        logits = np.asarray(engine.logits(ids, np.array([ids.size], np.int32)))[0, len(prompt) - 1 : -1]
        # Each step chose the likeliest token of the uncached distribution, or one that ties with it.
        chosen = np.take_along_axis(logits, np.array(new)[:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(chosen, logits.max(axis=-1), atol=1e-4)
        expected = chosen - jax.scipy.special.logsumexp(logits, axis=-1)
        np.testing.assert_allclose(new_logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, Sampling(temperature=0.9, repetition_penalty=1.4)])
def test_a_ragged_batch_equals_each_row_alone(engine, sampling):
    together, _ = run(engine, PROMPTS[:2], sampling=sampling, seed=3)
    alone, _ = run(engine, PROMPTS[:1], sampling=sampling, seed=3)
    assert together[:1] == alone
    if sampling is GREEDY:  # the second prompt's key is that of index 1, in a batch only
        assert together[1:] == run(engine, PROMPTS[1:2])[0]


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_never_change_samples(engine, chunk):
    assert run(engine, PROMPTS, sampling=DRAWN, chunk=chunk) == run(engine, PROMPTS, sampling=DRAWN)


def test_seeds_reproduce_and_differ(engine):
    first, again, other = (run(engine, PROMPTS, sampling=DRAWN, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again != other


def test_samples_of_a_prompt_differ_and_depend_on_their_index_alone(engine):
    three, _ = run(engine, PROMPTS[:2], sampling=DRAWN, num_samples=3)
    assert len(three) == 6 and len({tuple(row) for row in three}) == 6
    one, _ = run(engine, PROMPTS[:1], sampling=DRAWN)
    assert three[:1] == one


def test_eos_ends_its_row_alone_and_is_its_last_token(engine):
    free, _ = run(engine, PROMPTS)
    eos = free[0][6]
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in free]
    assert len(expected[0]) <= 7 and any(len(row) == 20 for row in expected)
    stopping = Engine(dataclasses.replace(engine.model.config, eos_token_ids=(96, eos)), engine.params)
    tokens, logprobs = run(stopping, PROMPTS)
    assert tokens == expected
    assert [len(row) for row in logprobs] == [len(row) for row in tokens]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_batch_whose_rows_all_end_stops_at_once(engine, ahead):
    free, _ = run(engine, PROMPTS[:1])
    stopping = Engine(engine.model.config, engine.params)
    stopping.eos_token_ids = np.array([free[0][2]], np.int32)
    generation = stopping.start(PROMPTS[:1], max_new_tokens=64, sampling=GREEDY, ahead=ahead)
    while not generation.finished:
        generation.next_chunk(1)  # where it goes ahead a call begins that has nothing to do
    assert generation._state.cache.lengths.tolist() == [len(PROMPTS[0]) + free[0].index(free[0][2])]


def test_eos_is_likely_when_the_model_says_so():
    # The end-of-text token may be the padding token too (falcon-7b): no logit is masked for it.
    config = models.tiny("falcon-7b", eos_token_ids=(11,), pad_token_id=11)
    params = models.random_params(config)
    flat = model_params.flatten(params)
    state = np.asarray(flat["final_norm.bias"]) + 10  # a direction that every final state has
    flat["final_norm.bias"] = jax.numpy.asarray(state)
    flat["embed.weight"] = flat["embed.weight"].at[11].set(state)
    tokens, _ = run(Engine(config, model_params.unflatten(flat)), PROMPTS)
    assert tokens == [[11]] * 3


@pytest.mark.parametrize("ahead", [False, True])
def test_a_stopped_row_gets_no_more_tokens(engine, ahead):
    free, _ = run(engine, PROMPTS[:2], max_new_tokens=9)
    generation = engine.start(PROMPTS[:2], max_new_tokens=9, sampling=GREEDY, ahead=ahead)
    rows: list[list[int]] = [[], []]
    while not generation.finished:
        for row, new in enumerate(generation.next_chunk(2)[0]):
            rows[row] += new
        generation.stop(0)
    assert rows == [free[0][:1], free[1]]


def test_max_new_tokens_is_exact(engine):
    for count in (1, 2, CHUNK + 1, CHUNK + 2):
        assert len(run(engine, PROMPTS[:1], max_new_tokens=count)[0][0]) == count


def test_prefill_in_chunks_equals_prefill_at_once(engine, monkeypatch):
    prompts = [np.random.default_rng(0).integers(0, 97, length).tolist() for length in (100, 33, 7)]
    at_once = run(engine, prompts)
    monkeypatch.setattr(batching, "MAX_CHUNK", 32)
    assert batching.prefill_sizes(100, 3) == [32, 32, 32, 32]
    in_chunks = run(engine, prompts)
    assert in_chunks[0] == at_once[0]
    np.testing.assert_allclose(in_chunks[1], at_once[1], atol=1e-4)


def test_dynamic_rope_past_its_window_starts_from_the_full_forward():
    rope = Rope(scaling="dynamic", factor=2.0, original_max_tokens=16)
    engine = make_engine(rope=rope, max_tokens=16)
    prompt = list(range(40))
    tokens, _ = run(engine, [prompt, [3]], max_new_tokens=1)
    logits = engine.logits(np.array([prompt], np.int32), np.array([40], np.int32))
    assert tokens[0] == [int(logits[0, -1].argmax())]


@pytest.mark.parametrize(
    "sampling", [*thorough([GREEDY]), Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.2)]
)
def test_eight_devices_generate_what_one_does(cpu_devices, sampling):
    config = models.tiny("falcon-40b", **NO_EOS)
    params = models.random_params(config)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=cpu_devices)
    flat = model_params.flatten(params)
    layouts = sharding.params_sharding(flat, mesh)
    spread = model_params.unflatten({path: jax.device_put(flat[path], layouts[path]) for path in flat})
    prompts = [*PROMPTS, [7, 7]]
    one = run(Engine(config, params), prompts, sampling=sampling)
    sharded = Engine(config, spread, mesh=mesh)
    eight = run(sharded, prompts, max_new_tokens=CHUNK + 1, sampling=sampling)
    assert [row[:20] for row in eight[0]] == one[0]
    with count_compilations() as compiled:  # the second call of decode takes what the first one gave
        longer = run(sharded, prompts, max_new_tokens=2 * CHUNK, sampling=sampling)
    assert compiled == []
    assert [row[: CHUNK + 1] for row in longer[0]] == eight[0]


def test_calls_within_a_bucket_compile_nothing():
    engine = make_engine("falcon-40b-alibi")
    run(engine, [[1, 2, 3], [4]], sampling=DRAWN, max_new_tokens=40, chunk=CHUNK - 1)  # not what each run begins with
    with count_compilations() as compiled:
        # Other prompts, lengths, seeds, counts, values and chunk sizes.
        other = Sampling(temperature=0.7, top_k=3, top_p=0.5)
        run(engine, [list(range(30)), [9, 9]], sampling=other, max_new_tokens=70, seed=5)
        run(engine, [[4] * 11, [2] * 31], sampling=DRAWN, max_new_tokens=7, chunk=3)
        assert compiled == []
        run(engine, [[1]], sampling=DRAWN, max_new_tokens=40)  # another batch size: the count does count
        assert compiled != []


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("num_drafted", [0, 2])
def test_calls_write_over_what_they_read_and_nothing_moves(engine, num_drafted, ahead):
    """To where arrays lie a CUDA graph is tied."""
    options = {"max_new_tokens": 60, "sampling": DRAWN, "num_drafted": num_drafted, "ahead": ahead}
    generation = engine.start(PROMPTS, **options)
    generation.next_chunk(1)

    def arrays() -> list[jax.Array]:
        # On a CPU what the host has read it reads in place, so that nothing is written there; a copy is read ahead.
        state = generation._state
        return jax.tree.leaves((state, generation._request) if ahead else state.cache)

    before = arrays()
    addresses = [array.unsafe_buffer_pointer() for array in before]
    assert len(set(addresses)) == len(addresses)
    for num_steps in (3, 3, 5):
        generation.next_chunk(num_steps)
        assert [array.unsafe_buffer_pointer() for array in arrays()] == addresses
    assert all(array.is_deleted() for array in before)


@pytest.mark.parametrize("chunk", [3, CHUNK, *thorough([1])])
@pytest.mark.parametrize("num_drafted", [0, 3])
def test_a_run_that_goes_ahead_makes_the_same(engine, num_drafted, chunk):
    free, _ = run(engine, PROMPTS)
    stopping = Engine(engine.model.config, engine.params)
    stopping.eos_token_ids = np.array([free[1][9]], np.int32)
    for sampling in (GREEDY, Sampling(temperature=0.9, repetition_penalty=1.4)):
        options = {"max_new_tokens": 70, "sampling": sampling, "num_drafted": num_drafted, "chunk": chunk}
        waiting = run(stopping, PROMPTS, **options)
        assert run(stopping, PROMPTS, **options, ahead=True) == waiting


def test_going_ahead_begins_a_call_before_the_last_is_read_but_for_the_first_token(engine):
    generation = engine.start(PROMPTS, max_new_tokens=9, sampling=GREEDY, ahead=True)
    for wanted, made, under_way in [(1, 1, None), (2, 2, 2), (4, 2, 4), (4, 4, None)]:
        assert {len(row) for row in generation.next_chunk(wanted)[0]} == {made}
        assert (None if generation._begun is None else generation._begun[1]) == under_way
    assert generation.finished
    whole = engine.start(PROMPTS, max_new_tokens=9, sampling=GREEDY, ahead=True)
    assert {len(row) for row in whole.next_chunk()[0]} == {1} and whole._begun is not None


def test_logits_of_any_length_share_an_executable(engine):
    whole = engine.logits(np.array([PROMPTS[1]], np.int32), np.array([19], np.int32))
    assert whole.shape == (1, 19, 97) and whole.dtype == np.float32
    part = engine.logits(np.array([PROMPTS[1][:7]], np.int32), np.array([7], np.int32))
    np.testing.assert_allclose(part, whole[:, :7], atol=1e-5)


def test_more_tokens_than_the_cache_may_hold_are_refused_before_anything_runs(engine):
    limited = Engine(engine.model.config, engine.params, max_cache_tokens=100)
    limited.start([[1] * 60], max_new_tokens=40, sampling=GREEDY)
    with pytest.raises(RequestError, match=r"cannot hold 101 tokens a row.*max_cache_tokens is 100"):
        limited.start([[1] * 61], max_new_tokens=40, sampling=GREEDY)


def test_what_norms_come_to_is_made_once_and_for_steps_that_read_it(monkeypatch):
    config = models.tiny("falcon-40b", **NO_EOS)
    params = model_params.init(config, jax.random.key(0), "bfloat16", weights="int4")
    engine, plain, given = Engine(config, params), engines.decode, []

    def decode(*args, norm_sums, **options):
        given.append(norm_sums)
        return plain(*args, norm_sums=norm_sums, **options)

    monkeypatch.setattr(engines, "decode", decode)
    monkeypatch.setattr(stages, "reads_norm_sums", lambda *arguments: 2 < arguments[3] <= 4)
    run(engine, PROMPTS, 3)
    run(engine, PROMPTS[:2], 3)
    assert given[1] is None and len(given[0]) == config.num_layers
    assert engine.norm_sums(4) is given[0] and engine.norm_sums(5) is None
    native = model_params.bind_block(config, models.native_again(params, config)["layers"][1])
    norms = {"attention.query": native.attention_norm, "mlp.up": native.mlp_norm}
    for name, norm in norms.items():
        part, projection = name.split(".")
        expected = np.stack(norm.affine()).astype(np.float32) @ getattr(getattr(native, part), projection).matrix()
        np.testing.assert_allclose(given[0][1][name], expected, atol=0.02 * np.abs(expected).max())


def test_which_steps_read_what_norms_come_to():
    config = PRESETS["falcon-40b-alibi"]
    with compat.assume_capability(compat.HOPPER):
        reads = [stages.reads_norm_sums(config, "int4", "bfloat16", tokens, None) for tokens in range(1, 8)]
        assert reads == [False, False, *[deferred.fits(1, config.width)] * 2, False, False, False]
        assert not stages.reads_norm_sums(config, "int8", "bfloat16", 4, None)
        assert not stages.reads_norm_sums(config, "int4", "float16", 4, None)
        assert not stages.reads_norm_sums(PRESETS["falcon-rw-1b"], "int4", "bfloat16", 4, None)
    assert not stages.reads_norm_sums(config, "int4", "bfloat16", 4, None)
