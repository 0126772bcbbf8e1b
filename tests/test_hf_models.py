"""The reference models of the parity tests are what those tests take them for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, FalconForCausalLM

from tests.hf_models import END_OF_TEXT, VARIANTS, make_model, save_model, tiny_config, tiny_tokenizer


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_random_and_logits_spread(variant: str):
    model = make_model(tiny_config(variant))
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0.05, name
    token_ids = torch.randint(0, 97, (1, 24), generator=torch.Generator().manual_seed(0))
    assert 1.0 < model(token_ids, use_cache=False).logits.std() < 3.0


def test_a_seed_makes_one_model():
    weights = [make_model(tiny_config("falcon-7b"), seed).state_dict()["lm_head.weight"] for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("variant", ["falcon-40b", "falcon2-11b"])  # tied and untied
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"max_shard_size": 20_000},
        {"strip_prefix": True},
        {"store_tied_head": True},
        {"pickle": True},
        {"pickle": True, "max_shard_size": 20_000},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_saved_folder_is_one_that_transformers_loads(variant: str, form: dict[str, Any], tmp_path: Path):
    model = make_model(tiny_config(variant))
    save_model(model, tmp_path, **form)
    assert (len(list(tmp_path.glob("*.index.json"))) == 1) == ("max_shard_size" in form)
    loaded = FalconForCausalLM.from_pretrained(tmp_path)
    dtype = getattr(torch, form.get("dtype", "float32"))
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name].to(dtype)), name


def test_extra_vocabulary_rows_are_stored_and_not_counted(tmp_path: Path):
    save_model(make_model(tiny_config("falcon-7b")), tmp_path, extra_vocab_rows=3, strip_prefix=True, pickle=True)
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert tensors["word_embeddings.weight"].shape[0] == 100
    assert '"vocab_size": 97' in (tmp_path / "config.json").read_text()


def test_the_tiny_tokenizer_keeps_any_text_and_loads_in_transformers(tmp_path: Path):
    tokenizer = tiny_tokenizer(tmp_path)
    assert tokenizer.get_vocab_size() == 320
    text = "The keeper, 1987: naïve 東京 🦅\n\tüß"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(text) == ids
    assert (loaded.eos_token, loaded.eos_token_id) == (END_OF_TEXT, 0)
