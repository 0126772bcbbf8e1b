"""A toy corpus, a vocabulary learned from it, and a model small enough to train in a second."""

import dataclasses
import json
import random
from pathlib import Path

import jax
import numpy as np

from falcon_jax.config import PRESETS, FalconConfig
from falcon_jax.model import params as model_params
from falcon_jax.model.decoder import ForwardOptions
from falcon_jax.train.settings import TrainConfig
from falcon_jax.train.shards import Split
from falcon_jax.train.step import StepOptions
from falcon_jax.train.vocabulary import save_tokenizer, train_tokenizer

WORDS = ["the", "a", "old", "sea", "keeper’s", "light", "naïve", "don't", "ship", "went", "home", "—", "said", "over"]
WORDS += ["quietly", "and"]
VOCAB_SIZE = 290
MODEL = dataclasses.replace(
    PRESETS["falcon-nano"], vocab_size=296, width=32, num_layers=2, num_heads=4, mlp_width=64, max_tokens=64
)
# One for all runs, by hand and by command: a process compiles its step once.
STEP = StepOptions(compute_dtype="float32", loss_chunk_tokens=12, dropout=0.05)


def sentences(seed: int, num_words: int) -> str:
    generator = random.Random(seed)
    text = " ".join(generator.choices(WORDS, range(len(WORDS), 0, -1), k=num_words))
    return text.replace(" and ", ".\n\n")


def write_corpus(folder: Path) -> Path:
    """train/ and valid/, two documents each."""
    for split, sizes in (("train", (700, 900)), ("valid", (150, 70))):
        (folder / split).mkdir(parents=True)
        for number, size in enumerate(sizes):
            (folder / split / f"{number}.txt").write_bytes(sentences(size, size).encode())
    return folder


def write_tokenizer(folder: Path, corpus: Path) -> Path:
    texts = (path.read_bytes().decode() for path in sorted((corpus / "train").glob("*.txt")))
    save_tokenizer(train_tokenizer(texts, VOCAB_SIZE), folder, max_tokens=MODEL.max_tokens)
    return folder


def run_config(folder: Path, corpus: Path, tokenizer_folder: Path) -> TrainConfig:
    """A run of 20 steps in `folder`/run, which validates and saves twice."""
    path = folder / "config.json"
    path.write_text(json.dumps(MODEL.to_hf()))
    return TrainConfig(
        data=corpus,
        output=folder / "run",
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
        step=STEP,
    )


def numpy_nats(config: FalconConfig, params: model_params.Params, split: Split, length: int, stride: int) -> float:
    """Each target by itself: the inputs of the window that counts it, whole logits, float64."""

    @jax.jit
    def logits_of(ids):  # [1, T] padded on the right, which causality hides
        decoder = model_params.bind(config, params, ForwardOptions())
        return decoder.logits(decoder(ids)[0])[0]

    total = 0.0
    for document in split.documents():
        done = 0
        for begin in range(0, len(document), stride):
            inputs = document[begin : begin + length]
            targets = document[begin + 1 : begin + length + 1]
            padded = np.pad(inputs, (0, length - len(inputs))).astype(np.int32)
            logits = np.asarray(logits_of(padded[None]), np.float64)
            for column in range(len(targets)):
                if begin + column >= done:
                    row = logits[column]
                    total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[targets[column]]
            done = max(done, begin + len(targets))
        assert done == len(document) - 1
    return float(total)
