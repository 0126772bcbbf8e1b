from pathlib import Path

import pytest

from falcon_jax.config import FalconConfig
from falcon_jax.train.settings import TrainConfig
from tests.train import toys


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return toys.write_tokenizer(tmp_path_factory.mktemp("tokenizer"), corpus)


@pytest.fixture(scope="session")
def model_config() -> FalconConfig:
    return toys.MODEL


@pytest.fixture
def train_config(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> TrainConfig:
    return toys.run_config(tmp_path, corpus, tokenizer_folder)
