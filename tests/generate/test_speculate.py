"""Speculation gives what plain decoding gives, token for token and draw for draw, in fewer steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_jax import Falcon, RequestError, sharding
from falcon_jax.config import Rope
from falcon_jax.generate import speculate
from falcon_jax.generate.engine import CHUNK, Engine, Generation
from falcon_jax.generate.sampling import Sampling, row_keys, sample_at
from falcon_jax.model import params as model_params
from tests import models
from tests.compilations import count_compilations
from tests.generate.runs import drain
from tests.thorough import thorough

VARIANTS = ["falcon-7b", "falcon-rw-1b", "falcon-40b"]  # RoPE multi-query; ALiBi multi-head, sequential; grouped
# One that repeats itself, one that does not, and one shorter than any n-gram.
PROMPTS = [[5, 17, 3, 90] * 5 + [5, 17], [8, 2, 31, 44, 60, 71], [60]]
GREEDY = Sampling()
PENALISED = Sampling(repetition_penalty=1.2)
DRAWN = Sampling(temperature=0.3)
FILTERED = Sampling(temperature=0.5, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.05)
# More than one call of 32 steps, and no multiple of anything.
MAX_NEW_TOKENS = 45
NANO_PROMPT = "the ship and the sea and the sky, the ship and the sea and the sky, the ship and"


def make_engine(name: str, **changes) -> Engine:
    config = models.tiny(name, **({"eos_token_ids": ()} | changes))
    return Engine(config, models.random_params(config))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine("falcon-7b")


@pytest.fixture(scope="module")
def nano() -> Falcon:
    return Falcon.from_checkpoint(dtype="float32")


def run(
    engine: Engine, prompts, max_new_tokens: int = MAX_NEW_TOKENS, sampling: Sampling = GREEDY, chunk=CHUNK, **options
) -> tuple[list[list[int]], list[list[float]], Generation]:
    generation = engine.start(prompts, max_new_tokens=max_new_tokens, sampling=sampling, **options)
    return *drain(generation, chunk), generation


def check_equal(engine: Engine, prompts=PROMPTS, *, num_drafted: int = 4, **options) -> tuple[Generation, Generation]:
    """Runs both ways and compares everything; returns the plain run and the other."""
    tokens, logprobs, plain = run(engine, prompts, **options)
    drafted_tokens, drafted_logprobs, drafted = run(engine, prompts, num_drafted=num_drafted, **options)
    assert drafted_tokens == tokens
    for ours, expected in zip(drafted_logprobs, logprobs, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert plain.num_steps.tolist() == [len(row) - 1 for row in tokens]
    assert (drafted.num_steps <= plain.num_steps).all()
    assert drafted._state.rows.done.all()  # on the device too: the last call made no step in vain
    return plain, drafted


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("falcon-rw-1b", FILTERED),
        ("falcon-7b", PENALISED),
        *thorough([("falcon-rw-1b", GREEDY), ("falcon-40b", GREEDY), ("falcon-40b", FILTERED)]),
        *thorough([("falcon-7b", sampling) for sampling in (GREEDY, FILTERED, DRAWN)]),
    ],
    ids=str,
)
def test_a_ragged_batch_is_that_of_plain_decoding(name, sampling):
    plain, drafted = check_equal(make_engine(name), sampling=sampling, seed=3)
    assert drafted.num_steps.sum() < plain.num_steps.sum()
    # The caches agree as far as the rows go; what was rejected lies past that.
    lengths = plain._state.cache.lengths
    np.testing.assert_array_equal(drafted._state.cache.lengths, lengths)
    held = np.arange(plain._state.cache.capacity)[None, :, None, None] < np.asarray(lengths)[:, None, None, None]
    for ours, expected in zip(drafted._state.cache.keys, plain._state.cache.keys, strict=True):
        np.testing.assert_allclose(np.where(held, ours, 0), np.where(held, expected, 0), atol=1e-4)


@pytest.mark.parametrize("num_drafted", [1, 16, *thorough([2])])
def test_any_number_of_drafts_gives_the_same(engine, num_drafted):
    check_equal(engine, num_drafted=num_drafted)


def test_several_samples_a_prompt_are_those_of_plain_decoding(engine):
    _, drafted = check_equal(engine, num_samples=3, sampling=DRAWN, seed=7)
    assert drafted.num_rows == 9


@pytest.mark.parametrize("seed", [0, *thorough([1, 2])])
def test_hot_samples_whose_drafts_nearly_all_fail_are_those_of_plain_decoding(engine, seed):
    check_equal(engine, sampling=Sampling(temperature=1.5), seed=seed)


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_never_change_samples(engine, chunk):
    expected, _, _ = run(engine, PROMPTS, sampling=DRAWN)
    assert run(engine, PROMPTS, sampling=DRAWN, num_drafted=4, chunk=chunk)[0] == expected


def test_max_new_tokens_is_exact(engine):
    for count in (1, 2, 3, 7, CHUNK + 2):
        tokens, _, _ = run(engine, PROMPTS, max_new_tokens=count, num_drafted=4)
        assert [len(row) for row in tokens] == [count] * 3


def test_eos_ends_its_row_alone(engine):
    free, _, _ = run(engine, PROMPTS)
    for eos in list(dict.fromkeys(free[0]))[:6]:
        stopping = Engine(engine.model.config, engine.params)
        stopping.eos_token_ids = np.array([eos], np.int32)
        _, drafted = check_equal(stopping)
        expected = [row.index(eos) + 1 if eos in row else MAX_NEW_TOKENS for row in free]
        assert (MAX_NEW_TOKENS - drafted.left).tolist() == expected


def test_eos_ends_its_row_in_the_middle_of_right_drafts(nano):
    # A row that goes round and holds the end of text already: only so can drafts hold it.
    [start] = nano.generate(NANO_PROMPT, max_new_tokens=30)
    assert start.text.count(", and the sea") > 5
    prompt = nano.tokenizer.encode(NANO_PROMPT) + start.token_ids
    [free], _, _ = run(nano.engine, [prompt], max_new_tokens=8)
    assert len(set(free[:4])) == 4 and set(free[:4]) <= set(prompt)
    for index, eos in enumerate(free[:4]):
        stopping = Engine(nano.config, nano.params)
        stopping.eos_token_ids = np.array([eos], np.int32)
        _, drafted = check_equal(stopping, [prompt], max_new_tokens=20, num_drafted=6)
        assert (20 - drafted.left).tolist() == [index + 1]
        assert drafted.num_steps.tolist() == [min(index, 1)]


def test_a_row_that_is_stopped_gets_no_more_tokens(engine):
    free, _, _ = run(engine, PROMPTS)
    generation = engine.start(PROMPTS, max_new_tokens=MAX_NEW_TOKENS, sampling=GREEDY, num_drafted=4)
    rows: list[list[int]] = [[], [], []]
    while not generation.finished:
        for row, new in enumerate(generation.next_chunk(2)[0]):
            rows[row] += new
        generation.stop(0)
    assert rows == [free[0][:1], *free[1:]]


@pytest.mark.parametrize("name", ["falcon-7b", *thorough(["falcon-rw-1b"])])
def test_a_row_may_fill_its_cache_to_the_last_slot(name):
    engine = make_engine(name)
    prompts = [PROMPTS[0], [9] * 30, [60]]  # the longest and 98 new tokens come to the capacity of 128
    _, drafted = check_equal(engine, prompts, max_new_tokens=98, num_drafted=16)
    assert drafted._state.cache.capacity == 128
    assert drafted._state.cache.lengths.tolist() == [22 + 97, 30 + 97, 1 + 97]
    limited = Engine(engine.model.config, engine.params, max_cache_tokens=128)
    limited.start(prompts, max_new_tokens=98, sampling=GREEDY, num_drafted=16)  # drafts need no room of their own


def test_dynamic_rope_speculates_within_its_window_and_is_refused_past_it():
    rope = Rope(scaling="dynamic", factor=2.0, original_max_tokens=64)
    engine = make_engine("falcon-7b", rope=rope, max_tokens=64)
    check_equal(engine, max_new_tokens=64 - len(PROMPTS[0]))
    with pytest.raises(RequestError, match=r"speculate=4 would not give .* come to 65 tokens, and past 64 .*dynamic"):
        engine.start(PROMPTS, max_new_tokens=65 - len(PROMPTS[0]), sampling=GREEDY, num_drafted=4)


def test_compilations_do_not_grow_with_what_is_accepted():
    engine = make_engine("falcon-40b")
    run(engine, PROMPTS, sampling=DRAWN, num_drafted=3, chunk=CHUNK - 1)  # not what each run begins with
    with count_compilations() as compiled:
        run(engine, [[1, 2] * 15, [9, 9], [3]], sampling=Sampling(temperature=1.2), num_drafted=3, seed=5)
        run(engine, PROMPTS, sampling=DRAWN, max_new_tokens=7, num_drafted=3, chunk=2)
        assert compiled == []
        run(engine, PROMPTS, sampling=DRAWN, num_drafted=2)  # another number of drafts: the count does count
        assert compiled != []


def test_decoding_is_compiled_once_where_parameters_are_tied_to_a_device():
    """As in a loaded checkpoint. An array that the host makes is tied to none, to JAX another argument."""
    config = models.tiny("falcon-7b", eos_token_ids=())
    engine = Engine(config, jax.device_put(models.random_params(config), jax.devices()[0]))
    generation = engine.start(PROMPTS, max_new_tokens=MAX_NEW_TOKENS, sampling=DRAWN, num_drafted=4)
    for _ in range(2):  # the prompts' tokens, then the first call that decodes
        generation.next_chunk(1)
    with count_compilations() as compiled:
        generation.next_chunk(1)
    assert compiled == [] and not generation.finished


def test_two_by_two_devices_speculate_as_one_does(cpu_devices, engine):
    config = engine.model.config
    prompts = [*PROMPTS, [7, 7, 7]]
    expected, _, alone = run(engine, prompts, sampling=FILTERED, num_drafted=4)
    mesh = sharding.make_mesh(data=2, tensor=2, devices=cpu_devices[:4])
    flat = model_params.flatten(engine.params)
    layouts = sharding.params_sharding(flat, mesh)
    spread = model_params.unflatten({path: jax.device_put(flat[path], layouts[path]) for path in flat})
    sharded = Engine(config, spread, mesh=mesh)
    tokens, _, spread_out = run(sharded, prompts, sampling=FILTERED, num_drafted=4)
    assert tokens == expected
    assert spread_out.num_steps.tolist() == alone.num_steps.tolist()
    with count_compilations() as compiled:  # the second call of a run takes what the first one gave
        run(sharded, prompts, sampling=FILTERED, num_drafted=4, max_new_tokens=60)
    assert compiled == []


@pytest.mark.parametrize(
    "sampling", [*thorough([{}]), {"temperature": 0.7, "min_p": 0.05, "seed": 2}], ids=["greedy", "drawn"]
)
def test_falcon_nano_writes_the_same_text_in_fewer_steps(nano, sampling):
    options = {"max_new_tokens": 75, "logprobs": True, **sampling}
    [plain] = nano.generate(NANO_PROMPT, **options)
    [drafted] = nano.generate(NANO_PROMPT, **options, speculate=6)
    assert (drafted.text, drafted.token_ids, drafted.finish_reason) == (
        plain.text,
        plain.token_ids,
        plain.finish_reason,
    )
    np.testing.assert_allclose(drafted.logprobs, plain.logprobs, atol=1e-4)
    assert drafted.num_steps < plain.num_steps

    stop = plain.text[20:24]
    [stopped] = nano.generate(NANO_PROMPT, **options, stop=stop)
    [drafted] = nano.generate(NANO_PROMPT, **options, stop=stop, speculate=6)
    assert (drafted.text, drafted.token_ids) == (stopped.text, stopped.token_ids)
    assert drafted.finish_reason == "stop" and len(drafted.logprobs) == len(drafted.token_ids)

    stream = nano.stream(NANO_PROMPT, max_new_tokens=75, speculate=6, **sampling)
    pieces = list(stream)
    assert "".join(pieces) == plain.text and "" not in pieces and len(pieces) > 5
    assert stream.num_tokens == 75 and 12 < stream.num_steps < 74


def test_a_text_that_goes_round_takes_a_fraction_of_the_steps(nano):
    [plain] = nano.generate(NANO_PROMPT, max_new_tokens=100)
    assert plain.text.count(", and the sea") > 20
    prompt = nano.tokenizer.encode(NANO_PROMPT) + plain.token_ids[:60]
    [drafted] = nano.generate(prompt, max_new_tokens=40, speculate=6)
    assert drafted.token_ids == plain.token_ids[60:]
    assert (plain.num_steps, drafted.num_steps) == (99, 6)  # 39 after the first, seven a step


@pytest.mark.parametrize("value", [-1, 17, True])
def test_numbers_of_drafts_out_of_range_are_named_before_anything_runs(nano, value):
    said = f"speculate={value} is out of range: it must be an integer from 0 \\(off\\) to 16"
    with pytest.raises(RequestError, match=said):
        nano.generate("x", max_new_tokens=4, speculate=value)
    with pytest.raises(RequestError, match=said):
        nano.generate([], max_new_tokens=4, speculate=value)
    with pytest.raises(RequestError, match=said):
        nano.stream("x", max_new_tokens=4, speculate=value)


def draft_in_plain(row: list[int], num_drafted: int) -> list[int] | None:
    """The rule, token by token; None where the row holds no such place."""
    for size in (3, 2, 1):
        for end in range(len(row) - 1, size - 1, -1):
            if len(row) > size and row[end - size : end] == row[-size:]:
                drafted = list(row)
                for _ in range(num_drafted):
                    drafted.append(drafted[end + len(drafted) - len(row)])
                return drafted[len(row) :]
    return None


# One shape for all examples: each compiles anew.
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=24), min_size=3, max_size=3))
def test_the_draft_is_what_followed_the_latest_longest_match(rows):
    history = np.full((3, 24), 2, np.int32)  # what lies past a row's end is never matched
    for index, row in enumerate(rows):
        history[index, : len(row)] = row
    lengths = np.array([len(row) for row in rows], np.int32)
    drafts = jax.jit(speculate.draft, static_argnums=2)(jnp.asarray(history), jnp.asarray(lengths), 5).tolist()
    for row, drafted in zip(rows, drafts, strict=True):
        expected = draft_in_plain(row, 5)
        assert drafted == expected if expected is not None else set(drafted) <= set(range(5))


def test_a_draft_near_the_end_goes_round():
    row = [4, 7, 8, 9, 7, 8, 9]
    [drafted] = speculate.draft(jnp.array([row + [0] * 5]), jnp.array([7]), 5).tolist()
    assert drafted == [7, 8, 9, 7, 8]


@pytest.mark.parametrize("sampling", [Sampling(repetition_penalty=9.0), FILTERED], ids=str)
def test_each_position_is_chosen_as_it_would_be_alone(sampling):
    B, M, V = 2, 3, 50
    generator = np.random.default_rng(0)
    # The same at each position: what a penalty makes of the tokens before decides.
    logits = np.repeat(generator.standard_normal((B, 1, V), np.float32), M + 1, axis=1)
    logits = jnp.asarray(logits + 3)
    keys = None if sampling.kind.greedy else row_keys(4, B, 1)
    positions = jnp.array([10, 3])
    seen = np.zeros((B, V), bool)
    seen[:, :7] = True

    expected = np.zeros((B, M + 1), np.int32)
    so_far = jnp.asarray(seen)
    for t in range(M + 1):
        tokens, _ = sample_at(logits[:, t], keys, positions + t, sampling.values, so_far, sampling.kind)
        expected[:, t] = tokens
        so_far = so_far.at[jnp.arange(B), tokens].set(True)
    drafted = expected[:, :-1].copy()
    drafted[1, 1] = (drafted[1, 1] + 1) % V
    tokens, _, num_right = speculate.verify(
        logits, jnp.asarray(drafted), keys, positions, jnp.asarray(seen), sampling.values, sampling.kind
    )
    assert num_right.tolist() == [3, 1]
    np.testing.assert_array_equal(tokens[0], expected[0])
    np.testing.assert_array_equal(tokens[1, :2], expected[1, :2])


def test_a_row_keeps_up_to_its_room_or_its_end_of_text():
    tokens = jnp.array([[1, 2, 3, 4], [1, 9, 3, 9], [1, 2, 3, 9], [9, 2, 3, 4], [1, 2, 9, 4], [9, 9, 9, 9]])
    num_right = jnp.array([3, 3, 1, 0, 3, 3])
    room = jnp.array([2, 8, 8, 8, 3, 0])
    counts, ended = speculate.count_kept(tokens, num_right, room, jnp.array([9, 30]))
    assert counts.tolist() == [2, 2, 2, 1, 3, 0]
    assert ended.tolist() == [False, True, False, True, True, False]


def test_only_what_counts_is_appended_and_nothing_past_the_last_column():
    held = jnp.zeros((3, 5), jnp.int32)
    new = jnp.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    appended = speculate.append(held, new, jnp.array([1, 4, 0]), jnp.array([2, 3, 0]))
    assert appended.tolist() == [[0, 1, 2, 0, 0], [0, 0, 0, 0, 4], [0, 0, 0, 0, 0]]
    marked = speculate.mark_seen(jnp.zeros((3, 10), bool), new, jnp.array([2, 3, 0]))
    assert [np.flatnonzero(row).tolist() for row in np.asarray(marked)] == [[1, 2], [4, 5, 6], []]
    assert speculate.mark_seen(None, new, jnp.array([2, 3, 0])) is None
