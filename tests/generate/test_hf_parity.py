"""Greedy text is that of transformers' own generate, token for token, in float32, for every variant."""

import numpy as np
import pytest
import torch

from falcon_jax import Falcon
from tests import hf_models

PROMPTS = [[5, 17, 3, 90, 41], [8] * 17 + [2, 31], [60]]
MAX_NEW_TOKENS = 24


@pytest.fixture(params=hf_models.VARIANTS)
def pair(request, tmp_path_factory):
    """A model of transformers, and ours loaded from its folder."""
    theirs = hf_models.make_model(hf_models.tiny_config(request.param))
    theirs.generation_config.eos_token_id = None
    folder = hf_models.save_model(theirs, tmp_path_factory.mktemp(request.param))
    return theirs, Falcon.from_checkpoint(folder, dtype="float32", alibi="hf_bf16")


def generate_theirs(model, prompts: list[list[int]], **options) -> list[list[int]]:
    """Padded on the left, as transformers wants it."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()


def test_greedy_batch_equals_transformers_and_the_uncached_forward(pair):
    theirs, ours = pair
    completions = ours.generate(PROMPTS, max_new_tokens=MAX_NEW_TOKENS, logprobs=True)
    for prompt, completion, expected in zip(PROMPTS, completions, generate_theirs(theirs, PROMPTS)):
        eos = ours.config.eos_token_ids
        end = next((index + 1 for index, token in enumerate(expected) if token in eos), len(expected))
        assert completion.token_ids == expected[:end]
        assert completion.finish_reason == ("stop" if expected[end - 1] in eos else "length")

        logits = np.asarray(ours.logits([prompt + completion.token_ids]))[0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(torch.tensor(logits), dim=-1).numpy()
        steps = np.arange(end)
        np.testing.assert_allclose(completion.logprobs, logprobs[steps, completion.token_ids], atol=1e-4)


@pytest.mark.parametrize("pair", ["falcon-rw-1b", "falcon-7b"], indirect=True)
def test_greedy_with_a_repetition_penalty_equals_transformers(pair):
    theirs, ours = pair
    expected = generate_theirs(theirs, PROMPTS[1:2], repetition_penalty=1.3)[0]
    completion = ours.generate(PROMPTS[1], max_new_tokens=MAX_NEW_TOKENS, repetition_penalty=1.3)[0]
    assert completion.token_ids == expected[: len(completion.token_ids)]
    assert len(completion.token_ids) == MAX_NEW_TOKENS or completion.finish_reason == "stop"
