"""The public handle: text in, completions out."""

import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import falcon_jax
from falcon_jax import CheckpointError, Completion, Falcon, RequestError, sharding
from falcon_jax.errors import ConfigError
from falcon_jax.falcon import BUNDLED_MODEL, parse_bytes
from falcon_jax.model import params as model_params
from tests import hf_models, models

PROMPTS = ["The lighthouse", "In the village they counted", "é"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("falcon-40b")
    # <|endoftext|> is id 0 of the tiny tokenizer.
    hf_models.save_model(
        hf_models.make_model(hf_models.tiny_config("falcon-40b", vocab_size=320, eos_token_id=0)), folder
    )
    hf_models.tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> Falcon:
    return Falcon.from_checkpoint(folder, dtype="float32")


@pytest.fixture(scope="module")
def completions(model) -> list[Completion]:
    return model.generate(PROMPTS, max_new_tokens=40, logprobs=True)


def test_public_names_are_there():
    for name in falcon_jax.__all__:
        assert getattr(falcon_jax, name) is not None
    assert falcon_jax.__version__ == "0.1.0"
    assert set(falcon_jax.__all__) == set(dir(falcon_jax))
    with pytest.raises(AttributeError, match="no attribute 'Flacon'"):
        falcon_jax.Flacon  # noqa: B018
    assert issubclass(CheckpointError, ValueError) and issubclass(ConfigError, ValueError)


def test_importing_the_package_does_not_wait_for_jax():
    code = "import sys, falcon_jax; falcon_jax.__version__; print('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_a_completion_holds_text_ids_and_reason(model, completions):
    assert [completion.prompt_index for completion in completions] == [0, 1, 2]
    for completion in completions:
        ends = completion.token_ids[-1] == 0
        assert completion.finish_reason == ("stop" if ends else "length")
        assert len(completion.token_ids) == 40 or ends
        assert completion.text == model.tokenizer.decode(completion.token_ids)
        assert len(completion.logprobs) == len(completion.token_ids)
        assert max(completion.logprobs) <= 0


def test_one_prompt_its_ids_and_a_batch_give_the_same(model, completions):
    ids = model.tokenizer.encode(PROMPTS[0])
    for prompt in (PROMPTS[0], ids, [np.array(ids)], (PROMPTS[0],)):
        [alone] = model.generate(prompt, max_new_tokens=40, logprobs=True)
        assert (alone.text, alone.token_ids) == (completions[0].text, completions[0].token_ids)
        np.testing.assert_allclose(alone.logprobs, completions[0].logprobs, atol=1e-5)
    assert model.generate([ids, PROMPTS[1], PROMPTS[2]], max_new_tokens=40, logprobs=True) == completions


def test_log_probabilities_are_left_out_unless_asked_for(model, completions):
    plain = model.generate(PROMPTS, max_new_tokens=40)
    assert plain == [dataclasses.replace(completion, logprobs=None) for completion in completions]


def test_no_prompts_give_no_completions(model):
    assert model.generate([], max_new_tokens=5) == []


def test_full_text_begins_with_the_prompt(model, completions):
    full = model.generate(PROMPTS, max_new_tokens=40, return_full_text=True)
    assert [item.text for item in full] == [p + item.text for p, item in zip(PROMPTS, completions)]
    ids = model.tokenizer.encode(PROMPTS[0])
    assert model.generate(ids, max_new_tokens=40, return_full_text=True)[0].text == full[0].text
    assert "".join(model.stream(PROMPTS[0], max_new_tokens=40, return_full_text=True)) == full[0].text


@pytest.mark.parametrize("options", [{"repetition_penalty": 3.0}, {"temperature": 1.0, "seed": 4}])
def test_streamed_pieces_join_to_the_generated_text(model, options):
    for prompt in PROMPTS[:2]:
        pieces = list(model.stream(prompt, max_new_tokens=40, **options))
        assert "".join(pieces) == model.generate(prompt, max_new_tokens=40, **options)[0].text
        assert len(pieces) > 2 and "" not in pieces


def test_stop_string_across_token_borders_cuts_text_and_ids(model):
    drawn = {"max_new_tokens": 40, "temperature": 1.0}
    free = model.generate(PROMPTS, **drawn)
    row, at, stop = next(border_strings(model, free))
    stopped = model.generate(PROMPTS, stop=["never there", stop], **drawn)[row]
    assert stopped.finish_reason == "stop"
    assert stopped.text == free[row].text.split(stop)[0]
    assert stopped.token_ids == free[row].token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) <= at + 2
    assert stop in model.tokenizer.decode(stopped.token_ids)
    assert stop not in model.tokenizer.decode(stopped.token_ids[:-1])


def border_strings(model: Falcon, completions: list[Completion]) -> Iterator[tuple[int, int, str]]:
    """(row, index, text): two characters, the last of one token and the first of the next."""
    assert model.tokenizer is not None
    for row, completion in enumerate(completions):
        pieces = [model.tokenizer.decode([token]) for token in completion.token_ids]
        for at in range(5, len(pieces) - 1):
            if pieces[at].isascii() and pieces[at + 1].isascii() and pieces[at] and pieces[at + 1]:
                yield row, at, pieces[at][-1] + pieces[at + 1][0]


def test_streaming_stops_where_generating_does(model):
    drawn = {"max_new_tokens": 40, "temperature": 1.0}
    free = model.generate(PROMPTS[0], **drawn)
    _, _, stop = next(border_strings(model, free))
    [stopped] = model.generate(PROMPTS[0], stop=stop, logprobs=True, **drawn)
    assert "".join(model.stream(PROMPTS[0], stop=stop, **drawn)) == stopped.text == free[0].text.split(stop)[0]
    assert len(stopped.logprobs) == len(stopped.token_ids) < 40


def test_calls_begin_ahead_unless_a_stop_string_may_end_a_row(model, monkeypatch):
    start, began = model.engine.start, []
    monkeypatch.setattr(model.engine, "start", lambda *rows, **how: began.append(how["ahead"]) or start(*rows, **how))
    for stop in ((), ("x",)):
        [completion] = model.generate(PROMPTS[0], max_new_tokens=40, stop=stop)
        assert "".join(model.stream(PROMPTS[0], max_new_tokens=40, stop=stop)) == completion.text
    assert began == [True, True, False, False]


def test_a_stopped_row_leaves_the_others_alone(model, completions):
    stop = completions[0].text[3:6]
    stopped = model.generate(PROMPTS, max_new_tokens=40, stop=stop)
    assert stopped[0].text == completions[0].text[: completions[0].text.index(stop)]
    for ours, free in zip(stopped[1:], completions[1:]):
        assert ours.text == (free.text.split(stop)[0] if stop in free.text else free.text)


def test_several_samples_are_ordered_by_prompt_then_sample(model):
    samples = model.generate(PROMPTS[:2], max_new_tokens=8, temperature=1.0, num_samples=2, seed=1)
    assert [(item.prompt_index, item.sample_index) for item in samples] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({item.text for item in samples}) == 4
    assert model.generate(PROMPTS[:1], max_new_tokens=8, temperature=1.0, seed=1) == samples[:1]


def test_logits_of_ragged_rows_equal_each_row_alone(model):
    rows = [[5, 17, 204], [9], list(range(20))]
    logits = model.logits(rows)
    assert logits.shape == (3, 20, 320) and logits.dtype == jnp.float32
    for index, row in enumerate(rows):
        np.testing.assert_allclose(logits[index, : len(row)], model.logits([row])[0], atol=1e-5)
    padded = np.zeros((3, 20), np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    for given in (padded, jnp.asarray(padded, jnp.int32)):
        again = model.logits(given, lengths=[3, 1, 20])
        for index, row in enumerate(rows):
            np.testing.assert_array_equal(again[index, : len(row)], logits[index, : len(row)])


@pytest.mark.parametrize(
    ("rows", "lengths", "said"),
    [
        ([], None, "token_ids is empty"),
        ([[1], []], None, "row 1 is empty"),
        ([[320]], None, "row 0 has the token id 320: ids go from 0 to 319"),
        ([[1, 2], [3, 4]], [2], "lengths="),
        ([[1, 2], [3, 4]], [2, 3], "lengths="),
        ([[1, 2], [3, 4]], [0, 2], "lengths="),
    ],
)
def test_logits_refuse_rows_that_do_not_fit(model, rows, lengths, said):
    with pytest.raises(RequestError, match=said):
        model.logits(rows, lengths)


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        ("", {}, "prompt 0 is empty"),
        (["fine", ""], {}, "prompt 1 is empty"),
        ([[]], {}, "prompt 0 is empty"),
        ([[1, 2], [-1]], {}, "prompt 1 has the token id -1: ids go from 0 to 319"),
        ([[1, 320]], {}, "prompt 0 has the token id 320"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens=0 is out of range"),
        ("x", {"num_samples": 0}, "num_samples=0 is out of range"),
        ("x", {"seed": -1}, "seed=-1 is out of range"),
        ("x", {"temperature": -1.0}, "temperature=-1.0 is out of range"),
        ("x", {"top_p": 2.0}, "top_p=2.0 is out of range"),
        ("x", {"stop": [""]}, "stop='' is not a stop string"),
        ("x", {"max_new_tokens": 10**6}, "the cache cannot hold 100000. tokens a row"),
    ],
)
def test_bad_requests_are_named_by_generate_and_stream(model, prompts, options, said):
    options = {"max_new_tokens": 4} | options
    with pytest.raises(RequestError, match=said):
        model.generate(prompts, **options)
    if isinstance(prompts, str) and "num_samples" not in options:
        with pytest.raises(RequestError, match=said):
            model.stream(prompts, **options)  # before the first piece is asked for


def test_stream_takes_one_prompt(model):
    with pytest.raises(RequestError, match="stream takes one prompt and got 2"):
        model.stream([[1], [2]], max_new_tokens=4)


def test_prompts_past_the_trained_length_warn_with_rope(model):
    assert model.config.max_tokens == 64
    with pytest.warns(UserWarning, match=r"come to 72 tokens; this model's RoPE was trained on 64"):
        model.generate([1] * 70, max_new_tokens=2)


def test_prompts_past_the_trained_length_go_on_with_alibi():
    model = Falcon.from_config(models.tiny("falcon-40b-alibi", eos_token_ids=()))
    [completion] = model.generate([1] * 70, max_new_tokens=2)  # warnings are errors in tests
    assert len(completion.token_ids) == 2


def test_without_a_tokenizer_ids_work_and_text_is_refused():
    model = Falcon.from_config(models.tiny("falcon-7b"), key=3, dtype="float32")
    assert model.tokenizer is None
    [completion] = model.generate([5, 6], max_new_tokens=3)
    assert completion.text is None and completion.token_ids
    for call in (
        lambda: model.generate("text", max_new_tokens=3),
        lambda: model.generate([1], max_new_tokens=3, stop="x"),
        lambda: model.stream([1], max_new_tokens=3),
    ):
        with pytest.raises(RequestError, match=r"no tokenizer|needs a tokenizer"):
            call()


def test_random_weights_follow_their_key():
    config = models.tiny("falcon-7b")

    def embedding(key) -> np.ndarray:
        return np.asarray(Falcon.from_config(config, key=key, dtype="float32").params["embed"]["weight"])

    np.testing.assert_array_equal(embedding(3), embedding(jax.random.key(3)))
    assert not np.array_equal(embedding(3), embedding(4))
    assert Falcon.from_config(config).params["embed"]["weight"].dtype == jnp.bfloat16


@pytest.mark.parametrize("axes", [{"data": 3, "tensor": 2}, {"fsdp": 2}], ids=str)
def test_a_mesh_changes_no_text(folder, completions, cpu_devices, axes):
    mesh = sharding.make_mesh(**axes, devices=cpu_devices)
    sharded = Falcon.from_checkpoint(folder, dtype="float32", mesh=mesh)
    leaves = model_params.flatten(sharded.params)
    assert leaves["layers.0.mlp.up.weight"].sharding == sharding.param_sharding(
        "layers.0.mlp.up.weight", leaves["layers.0.mlp.up.weight"].shape, mesh
    )
    texts = [completion.text for completion in sharded.generate(PROMPTS, max_new_tokens=40)]
    assert texts == [completion.text for completion in completions]


def test_unknown_options_of_a_checkpoint_are_named(folder):
    with pytest.raises(ValueError, match="weights is 'int3'; supported"):
        Falcon.from_checkpoint(folder, weights="int3")
    with pytest.raises(ValueError, match="alibi='exact' is unknown"):
        Falcon.from_checkpoint(folder, alibi="exact")
    with pytest.raises(CheckpointError, match="no-such-folder"):
        Falcon.from_checkpoint("/no-such-folder")


def test_memory_budget_must_hold_weights_and_a_row(folder, cpu_devices):
    config = falcon_jax.FalconConfig.from_hf(folder)
    weights = 4 * config.num_parameters
    row = 2 * config.num_layers * config.num_kv_heads * config.head_dim * config.max_tokens * 4
    model = Falcon.from_checkpoint(folder, dtype="float32", memory_budget=weights + 2 * row)
    model.generate([[1]], max_new_tokens=1)
    with pytest.raises(RequestError, match="4 rows take"):
        model.generate([[1]] * 4, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"memory_budget of 0\.00 GiB is too small"):
        Falcon.from_checkpoint(folder, dtype="float32", memory_budget=weights)
    mesh = sharding.make_mesh(tensor=2, devices=cpu_devices)
    Falcon.from_checkpoint(folder, dtype="float32", memory_budget=weights, mesh=mesh)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("68GiB", 68 * 2**30), ("40 GB", 40 * 10**9), ("1.5e9", 1_500_000_000), (512, 512), ("0.5kib", 512)],
)
def test_sizes_are_read(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "12 parsecs", "-3GB", "1.2.3GB", 0])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.skipif(not (BUNDLED_MODEL / "model.safetensors").is_file(), reason="falcon-nano is not trained yet")
def test_bundled_model_is_the_default():
    model = Falcon.from_checkpoint()
    assert model.config.positions == "alibi" and model.config.num_kv_heads == 1
    [completion] = model.generate("The old man looked at the", max_new_tokens=12)
    assert completion.text and completion.text.isprintable()


def test_package_can_be_reloaded():
    assert importlib.reload(falcon_jax).Falcon is Falcon
