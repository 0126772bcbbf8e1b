"""The distribution drawn from is that of transformers, filter by filter and together; keys reproduce samples."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process

from falcon_jax.errors import RequestError
from falcon_jax.generate.sampling import Sampling, filter_logits, row_keys, sample

V = 67
PROMPT = [[3, 5, 5, 60], [0, 1, 2, 3], [66, 65, 9, 9]]


def some_logits(spread: float = 3.0) -> np.ndarray:
    return (spread * np.random.default_rng(0).standard_normal((len(PROMPT), V))).astype(np.float32)


def seen_mask() -> np.ndarray:
    seen = np.zeros((len(PROMPT), V), bool)
    for row, ids in enumerate(PROMPT):
        seen[row, ids] = True
    return seen


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Ours, in vocabulary order."""
    scores, token_ids = filter_logits(jnp.asarray(logits), sampling.values, jnp.asarray(seen_mask()), sampling.kind)
    sorted_probabilities = np.asarray(jax.nn.softmax(scores, axis=-1))
    if token_ids is None:
        return sorted_probabilities
    result = np.zeros_like(sorted_probabilities)
    np.put_along_axis(result, np.asarray(token_ids), sorted_probabilities, axis=-1)
    return result


def reference_probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Those of transformers, in the order in which its generate applies them."""
    steps = []
    if sampling.repetition_penalty != 1:
        steps.append(logits_process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1:
        steps.append(logits_process.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        steps.append(logits_process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1:
        steps.append(logits_process.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        steps.append(logits_process.MinPLogitsWarper(sampling.min_p))
    scores = logits_process.LogitsProcessorList(steps)(torch.LongTensor(PROMPT), torch.FloatTensor(logits))
    return torch.softmax(scores, dim=-1).numpy()


COMBINATIONS = [
    Sampling(temperature, top_k, top_p, min_p, penalty)
    for temperature, top_k, top_p, min_p, penalty in itertools.product(
        (0.7,), (None, 1, 12, 500), (None, 0.05, 0.9, 1.0), (None, 0.02, 0.4), (1.0, 1.3)
    )
]


def test_filtered_probabilities_equal_those_of_transformers():
    logits = some_logits()
    for sampling in COMBINATIONS:
        ours, theirs = probabilities(logits, sampling), reference_probabilities(logits, sampling)
        np.testing.assert_array_equal(ours > 0, theirs > 0, err_msg=str(sampling))
        np.testing.assert_allclose(ours, theirs, atol=2e-6, err_msg=str(sampling))


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.4}, {"top_k": 5, "top_p": 0.5}, {"min_p": 0.9}])
def test_of_equal_logits_as_many_are_kept_as_in_transformers(filters):
    logits = np.round(some_logits(1.0)).astype(np.float32)  # many ties, also at every edge
    sampling = Sampling(temperature=1.0, **filters)
    ours, theirs = probabilities(logits, sampling), reference_probabilities(logits, sampling)
    # Which of them top-p keeps depends on torch's sort, which is not stable; how many, and their weight, does not.
    np.testing.assert_allclose(np.sort(ours, axis=-1), np.sort(theirs, axis=-1), atol=1e-6)
    if "top_p" not in filters:
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e6])
def test_extreme_temperatures_stay_finite(temperature):
    logits = some_logits(100.0)
    result = probabilities(logits, Sampling(temperature=temperature, top_p=0.9))
    np.testing.assert_allclose(result.sum(axis=-1), 1.0, rtol=1e-5)


def test_values_may_differ_by_row():
    logits = some_logits()
    rows = [
        Sampling(0.5, 3, 0.9, 0.01, 1.2),
        Sampling(1.0, 40, 0.5, 0.3, 1.5),
        Sampling(2.0, 7, 0.8, 0.1, 0.9),
    ]
    values = jax.tree.map(lambda *column: np.stack(column), *[row.values for row in rows])
    seen = jnp.asarray(seen_mask())
    scores, _ = filter_logits(jnp.asarray(logits), values, seen, rows[0].kind)
    for index, row in enumerate(rows):
        alone, _ = filter_logits(jnp.asarray(logits[index : index + 1]), row.values, seen[index : index + 1], row.kind)
        np.testing.assert_allclose(scores[index], alone[0], rtol=1e-6)


def test_samples_follow_the_filtered_distribution():
    num_draws = 5_000
    logits = np.repeat(some_logits(1.0)[:1], num_draws, axis=0)
    keys = jax.random.split(jax.random.key(0), num_draws)
    for sampling in (Sampling(temperature=1.0), Sampling(temperature=0.8, top_k=8, top_p=0.9)):
        tokens, _ = sample(jnp.asarray(logits), keys, sampling.values, None, sampling.kind)
        frequencies = np.bincount(tokens, minlength=V) / num_draws
        expected = reference_probabilities(some_logits(1.0), sampling)[0]
        # Five standard errors of the likeliest token.
        assert np.abs(frequencies - expected).max() < 5 * np.sqrt(expected.max() / num_draws)
        assert not frequencies[expected == 0].any()


def test_greedy_takes_the_likeliest_and_ignores_the_filters():
    logits = some_logits()
    plain = Sampling()
    filtered = Sampling(temperature=0.0, top_k=5, top_p=0.5, min_p=0.5)
    assert plain.kind == filtered.kind
    keys = row_keys(0, len(PROMPT), 1)
    tokens, logprobs = sample(jnp.asarray(logits), keys, plain.values, None, plain.kind)
    np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))
    expected = torch.log_softmax(torch.tensor(logits), dim=-1).numpy().max(axis=-1)
    np.testing.assert_allclose(logprobs, expected, rtol=1e-5)


def test_greedy_compiles_no_sort():
    plain, top_k = Sampling(), Sampling(temperature=1.0, top_k=5)
    keys = row_keys(0, len(PROMPT), 1)

    def program(sampling: Sampling) -> str:
        step = jax.jit(lambda x, values: sample(x, keys, values, None, sampling.kind))
        return step.lower(jnp.asarray(some_logits()), sampling.values).as_text()

    assert "stablehlo.sort" not in program(plain)
    assert program(top_k).count('"stablehlo.sort"') == 1


def test_repetition_penalty_acts_on_greedy_choices():
    logits = np.zeros((1, V), np.float32)
    logits[0, 3], logits[0, 4] = 2.0, 1.9
    seen = np.zeros((1, V), bool)
    seen[0, 3] = True
    sampling = Sampling(repetition_penalty=1.2)
    tokens, logprobs = sample(jnp.asarray(logits), row_keys(0, 1, 1), sampling.values, jnp.asarray(seen), sampling.kind)
    assert tokens.tolist() == [4]
    # The log probability is the model's own, not the penalised one.
    np.testing.assert_allclose(logprobs, torch.log_softmax(torch.tensor(logits), -1)[0, 4].numpy(), rtol=1e-5)


def test_one_executable_serves_all_values_of_a_kind():
    traces = []

    def step(logits, keys, values):
        traces.append(1)
        return sample(logits, keys, values, None, Sampling(temperature=1.0, top_k=2, top_p=0.5).kind)

    compiled = jax.jit(step)
    for sampling in (Sampling(0.5, 3, 0.9), Sampling(1.5, 50, 0.1), Sampling(1.0, 1, 0.99)):
        compiled(jnp.asarray(some_logits()), row_keys(1, len(PROMPT), 1), sampling.values)
    assert len(traces) == 1


def test_row_keys_depend_on_seed_prompt_and_sample_alone():
    keys = jax.random.key_data(row_keys(7, 3, 2))
    assert len(np.unique(keys, axis=0)) == 6
    np.testing.assert_array_equal(keys[:2], jax.random.key_data(row_keys(7, 1, 2)))
    np.testing.assert_array_equal(keys[::2], jax.random.key_data(row_keys(7, 3, 1)))
    assert not np.array_equal(keys, jax.random.key_data(row_keys(8, 3, 2)))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("temperature", -0.1, "0 \\(greedy\\) or at least"),
        ("temperature", 1e-9, "at least 1e-06"),
        ("temperature", float("nan"), "at least"),
        ("temperature", float("inf"), "at least"),
        ("top_k", 0, "an integer of at least 1"),
        ("top_k", 2**31, "an integer of at least 1"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("min_p", -0.5, "from 0 to 1"),
        ("min_p", 1.5, "from 0 to 1"),
        ("repetition_penalty", 0.0, "above 0"),
        ("repetition_penalty", -1.0, "above 0"),
    ],
)
def test_values_out_of_range_are_named(name, value, said):
    with pytest.raises(RequestError, match=f"{name}={value!r} is out of range: it must be .*{said}"):
        Sampling(**{name: value})


@pytest.mark.parametrize("vocab_size", [1, 127, 300, 65024])
def test_the_first_of_equally_likely_tokens_is_greedy_s_and_its_probability_is_exact(vocab_size):
    logits = np.array(jax.random.normal(jax.random.key(vocab_size), (3, vocab_size)), np.float32) * 3
    logits[1, [0, vocab_size // 3, vocab_size - 1]] = 20.0  # equal, in several parts of the row
    logits[2, :-1] = -np.inf
    greedy = Sampling()
    tokens, logprobs = sample(jnp.asarray(logits), None, greedy.values, None, greedy.kind)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()[np.arange(3), tokens]
    np.testing.assert_allclose(logprobs, expected, rtol=1e-6, atol=1e-6)
