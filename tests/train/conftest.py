"""A toy corpus, a vocabulary learned from it, and a model small enough to train in a second."""

import dataclasses
import json
import random
from pathlib import Path

import pytest

from falcon_jax.config import PRESETS, FalconConfig
from falcon_jax.train.settings import TrainConfig
from falcon_jax.train.step import StepOptions
from falcon_jax.train.vocabulary import save_tokenizer, train_tokenizer

WORDS = [
    "the",
    "a",
    "old",
    "sea",
    "keeper’s",
    "light",
    "naïve",
    "don't",
    "ship",
    "went",
    "home",
    "—",
    "said",
    "quietly",
    "over",
    "and",
]


def sentences(seed: int, num_words: int) -> str:
    generator = random.Random(seed)
    text = " ".join(generator.choices(WORDS, range(len(WORDS), 0, -1), k=num_words))
    return text.replace(" and ", ".\n\n")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for split, sizes in (("train", (700, 900)), ("valid", (150, 70))):
        (folder / split).mkdir()
        for number, size in enumerate(sizes):
            path = folder / split / f"{number}.txt"
            path.write_bytes(sentences(size, size).encode())
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = (path.read_bytes().decode() for path in sorted((corpus / "train").glob("*.txt")))
    save_tokenizer(train_tokenizer(texts, 290), folder, max_tokens=64)
    return folder


@pytest.fixture(scope="session")
def model_config() -> FalconConfig:
    return dataclasses.replace(
        PRESETS["falcon-nano"],
        vocab_size=296,
        width=32,
        num_layers=2,
        num_heads=4,
        mlp_width=64,
        max_tokens=64,
    )


@pytest.fixture
def train_config(tmp_path: Path, corpus: Path, tokenizer_folder: Path, model_config: FalconConfig) -> TrainConfig:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(model_config.to_hf()))
    return TrainConfig(
        data=corpus,
        output=tmp_path / "run",
        model=str(path),
        tokenizer=tokenizer_folder,
        steps=20,
        batch_size=8,
        length=32,
        learning_rate=1e-2,
        warmup_steps=5,
        log_every=3,
        validate_every=10,
        checkpoint_every=10,
        step=StepOptions(compute_dtype="float32", loss_chunk_tokens=12),
    )
