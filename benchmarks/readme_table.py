"""Writes README's table of measured figures from the files in benchmarks/results/, so that neither can go its own way.

A row is text with figures in braces: `{path}`, `{path:format}` with Python's format, or `{path*100:.0f}` and
`{path/1e9:.1f}` for another unit. A path is the keys on the way through the row's file, joined by dots; an item of a
list is named by its number, its "name", or its "case, kind".

python benchmarks/readme_table.py
python benchmarks/readme_table.py --check
"""

import dataclasses
import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

import tyro

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
README = REPOSITORY / "README.md"
BEGIN = "<!-- benchmarks/readme_table.py writes what follows; edit its rows instead -->"
END = "<!-- benchmarks/readme_table.py ends here -->"
FIGURE = re.compile(r"\{(?P<path>[^{}:*/]+)(?:(?P<operation>[*/])(?P<factor>[0-9.e]+))?(?::(?P<format>[^{}]*))?\}")


class ResultError(ValueError):
    """A figure that its file does not hold, or a README without the place for the table."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; `file` names the document that its figures come from."""

    what: str
    ours: str
    beside: str
    file: str


NANO = "falcon-nano-cpu.json"
FALCON_7B = "falcon-7b-h100.json"
CONVERT = "convert-falcon-7b.json"
PREFILL = "kernels-prefill-h100.json"
DECODE = "kernels-decode-h100.json"

STEPS = "decode-h200.json"
TRAINING_RW_1B, TRAINING_7B = "training-rw-1b-h200.json", "training-7b-h200.json"

# Whole models, in one run: falcon-40b-alibi by form of its weights, falcon-7b.
INT4, INT8, BF16, BF16_ROWS = (f"runs.1.results.{i}" for i in (0, 2, 4, 6))
BF16_SHORT, LONG, LONGEST, BF16_7B = (f"runs.1.results.{i}" for i in (5, 7, 8, 9))
RW_1B, WIDTH_7B, LORA = "cases.rw-1b.bars.0.best", "cases.7b-width.bars.0.best", "cases.7b-lora.bars"
SEED_SHORT, SEED, SEED_PEAK, SEED_LONG = (
    f"models.0.rows.{row}.results" for row in ("first_token", "decode", "peak", "long")
)
COMPILED = "transformers compiled"
PEAK_INT8, PEAK_INT4 = (f"runs.{i}.models.0.rows.peak.results.falcon_jax.peak_gib" for i in (0, 1))
# Where a case of the kernels' files ends and its contestants begin.
ALIBI = "cases.falcon-40b-alibi T=4096, forward.contestants"
ALIBI_GRADIENTS = "cases.falcon-40b-alibi T=4096, forward + backward.contestants"
ROPE = "cases.falcon-7b T=4096, forward.contestants"
ROPE_GRADIENTS = "cases.falcon-7b T=4096, forward + backward.contestants"
ALIBI_TOKEN = "cases.falcon-40b-alibi S=4096 B=1, decode.contestants"
ROPE_TOKEN = "cases.falcon-7b S=4096 B=1, decode.contestants"
GROUPED_ROWS = "cases.falcon-40b S=4096 B=16, decode.contestants"
MULTI_HEAD_ROWS = "cases.falcon-rw-1b S=4096 B=16, decode.contestants"
WITH_BIAS = "cuDNN, ALiBi as a bias of T x T"

ROWS = (
    Row(
        "falcon-nano, {num_cores} CPU cores, {context_tokens} + {new_tokens} tokens, decode",
        "{results.falcon_jax.decode_tokens_per_s:.0f} tokens/s",
        "transformers {results.1.decode_tokens_per_s:.0f} (bf16), {results.2.decode_tokens_per_s:.0f} (f32)",
        NANO,
    ),
    Row(
        "falcon-7b shape, bf16, one H100, {context_tokens} + {new_tokens} tokens, decode",
        "{results.falcon_jax.decode_tokens_per_s:.0f} tokens/s",
        "transformers {results.transformers.decode_tokens_per_s:.0f}",
        FALCON_7B,
    ),
    Row(
        "the same, first token",
        "{results.falcon_jax.first_token_ms:.0f} ms",
        "transformers {results.transformers.first_token_ms:.0f} ms",
        FALCON_7B,
    ),
    Row(
        "converting falcon-7b's shape, {total_bytes/1e9:.1f} GB, {machine.cores} cores",
        "{convert_s:.0f} s, {convert_peak_extra_bytes/1e9:.2f} GB of memory beyond the start",
        "bound {convert_peak_extra_bound_bytes/1e9:.2f} GB",
        CONVERT,
    ),
    Row(
        "loading it, checksums verified, to CPU memory",
        "{load_s:.0f} s",
        "{rounds.1.read-kept.seconds:.0f} s to read the files into memory, {rounds.1.read.seconds:.1f} s to read and "
        "drop them",
        CONVERT,
    ),
    Row(
        "attention of 4,096 tokens, falcon-40b-alibi's heads with ALiBi, one H100",
        f"{{{ALIBI}.falcon_jax.us:.0f}} us ({{{ALIBI}.falcon_jax.tflops:.0f}} TFLOP/s)",
        f"cuDNN {{{ALIBI}.cuDNN.us:.0f}} us without ALiBi, {{{ALIBI}.{WITH_BIAS}.us:.0f}} us with",
        PREFILL,
    ),
    Row(
        "the same with gradients",
        f"{{{ALIBI_GRADIENTS}.falcon_jax.us:,.0f}} us",
        f"cuDNN {{{ALIBI_GRADIENTS}.cuDNN.us:,.0f}} us without ALiBi, "
        f"{{{ALIBI_GRADIENTS}.{WITH_BIAS}.us:,.0f}} us with",
        PREFILL,
    ),
    Row(
        "falcon-7b's heads (RoPE), 4,096 tokens, forward; with gradients",
        f"{{{ROPE}.falcon_jax.us:.0f}} us; {{{ROPE_GRADIENTS}.falcon_jax.us:,.0f}} us",
        f"cuDNN {{{ROPE}.cuDNN.us:.0f}} us; {{{ROPE_GRADIENTS}.cuDNN.us:,.0f}} us",
        PREFILL,
    ),
    Row(
        "attention of one new token after 4,096, one layer, falcon-40b-alibi; falcon-7b",
        f"{{{ALIBI_TOKEN}.falcon_jax.us:.1f}} us; {{{ROPE_TOKEN}.falcon_jax.us:.1f}} us",
        f"XLA {{{ALIBI_TOKEN}.XLA.us:.0f}} us; {{{ROPE_TOKEN}.XLA.us:.0f}} us, "
        f"cuDNN {{{ALIBI_TOKEN}.cuDNN.us:.1f}} us (without ALiBi); {{{ROPE_TOKEN}.cuDNN.us:.1f}} us",
        DECODE,
    ),
    Row(
        "the same, 16 rows, falcon-40b; falcon-rw-1b: share of the read limit of {limit.read_bytes_per_s/1e12:.1f} "
        "TB/s",
        f"{{{GROUPED_ROWS}.falcon_jax.read_share*100:.0f}} %; {{{MULTI_HEAD_ROWS}.falcon_jax.read_share*100:.0f}} %",
        f"XLA {{{GROUPED_ROWS}.XLA.read_share*100:.0f}} %; {{{MULTI_HEAD_ROWS}.XLA.read_share*100:.0f}} %, "
        f"cuDNN {{{GROUPED_ROWS}.cuDNN.read_share*100:.0f}} %; {{{MULTI_HEAD_ROWS}.cuDNN.read_share*100:.0f}} %",
        DECODE,
    ),
    Row(
        "falcon-40b-alibi's shape in bf16, one H200, 4,000 tokens before: decode, one row; four rows",
        f"{{{BF16}.decode_tokens_per_s:.1f}} tokens/s, {{{BF16}.share_of_read_limit*100:.1f}} % of the read limit; "
        f"{{{BF16_ROWS}.decode_tokens_per_s:.0f}}, {{{BF16_ROWS}.share_of_read_limit*100:.0f}} %",
        "",
        STEPS,
    ),
    Row(
        "the same, one row, weights of 8 bits; 4 bits",
        f"{{{INT8}.decode_tokens_per_s:.1f}}, {{{INT8}.share_of_read_limit*100:.0f}} %; "
        f"{{{INT4}.decode_tokens_per_s:.0f}}, {{{INT4}.share_of_read_limit*100:.0f}} %",
        "",
        STEPS,
    ),
    Row(
        "its first token after 4,000 tokens, bf16; 8 bits; 4 bits",
        f"{{{BF16}.first_token_ms:.0f}}; {{{INT8}.first_token_ms:.0f}}; {{{INT4}.first_token_ms:.0f}} ms",
        "",
        STEPS,
    ),
    Row(
        "in bf16 after 512; 12,000; 60,000 tokens, and decode after the longest",
        f"{{{BF16_SHORT}.first_token_ms:.0f}} ms; {{{LONG}.first_token_ms/1000:.2f}} s; "
        f"{{{LONGEST}.first_token_ms/1000:.1f}} s, {{{LONGEST}.decode_tokens_per_s:.1f}} tokens/s",
        "",
        STEPS,
    ),
    Row(
        "falcon-7b's shape in bf16, one H200, 4,000 tokens: decode, first token",
        f"{{{BF16_7B}.decode_tokens_per_s:.0f}} tokens/s, {{{BF16_7B}.first_token_ms:.0f}} ms",
        "",
        STEPS,
    ),
    Row(
        "steps alone after 4,000 tokens, falcon-7b's shape in bf16; falcon-rw-1b's",
        "{runs.20.cases.1.decode_tokens_per_s:.0f} tokens/s, {runs.20.cases.1.share_of_read_limit*100:.0f} % of the "
        "read limit; {runs.20.cases.0.decode_tokens_per_s:.0f}, {runs.20.cases.0.share_of_read_limit*100:.0f} %",
        "",
        "decoding-h200.json",
    ),
    Row(
        "falcon-40b-alibi's with one; four; sixteen rows, weights of 8 bits, and of 4 bits",
        "{runs.22.cases.3.decode_tokens_per_s:.0f}; {runs.22.cases.4.decode_tokens_per_s:.0f}; "
        "{runs.22.cases.5.decode_tokens_per_s:,.0f} tokens/s, and {runs.22.cases.0.decode_tokens_per_s:.0f}; "
        "{runs.22.cases.1.decode_tokens_per_s:.0f}; {runs.22.cases.2.decode_tokens_per_s:,.0f}",
        "",
        "decoding-h200.json",
    ),
    Row(
        "falcon-40b-alibi's shape in bf16, one H200: first token of 512; 4,000 tokens; decode after those",
        f"{{{SEED_SHORT}.falcon_jax.first_token_ms:.0f}} ms; {{{SEED}.falcon_jax.first_token_ms:.0f}} ms; "
        f"{{{SEED}.falcon_jax.decode_tokens_per_s:.0f}} tokens/s",
        f"transformers {{{SEED_SHORT}.transformers.first_token_ms:.0f}} ms; "
        f"{{{SEED}.transformers.first_token_ms:,.0f}} ms; {{{SEED}.transformers.decode_tokens_per_s:.0f}}",
        "seed-alibi-h200.json",
    ),
    Row(
        "the same, four rows of 4,000 tokens: peak memory; one of 12,000: decode, peak memory",
        f"{{{SEED_PEAK}.falcon_jax.peak_gib:.1f}} GiB; {{{SEED_LONG}.falcon_jax.decode_tokens_per_s:.0f}} tokens/s, "
        f"{{{SEED_LONG}.falcon_jax.peak_gib:.1f}} GiB",
        f"transformers {{{SEED_PEAK}.transformers.peak_gib:.1f}} GiB; out of memory",
        "seed-alibi-h200.json",
    ),
    Row(
        "the same, one of 60,000 tokens: first token; decode; peak memory",
        "{results.falcon_jax.first_token_ms/1000:.1f} s; {results.falcon_jax.decode_tokens_per_s:.0f} tokens/s; "
        "{results.falcon_jax.peak_gib:.1f} GiB",
        "",
        "long-60000-h200.json",
    ),
    Row(
        "the same, four rows of 4,000 tokens with weights of 8; 4 bits, embedding and head in bfloat16: peak memory",
        f"{{{PEAK_INT8}:.1f}}; {{{PEAK_INT4}:.1f}} GiB",
        "",
        "peaks-quantized-h200.json",
    ),
    Row(
        "falcon-40b's shape in bf16, the same: first token of 512; 4,000 tokens; decode after those",
        f"{{{SEED_SHORT}.falcon_jax.first_token_ms:.0f}} ms; {{{SEED}.falcon_jax.first_token_ms:.0f}} ms; "
        f"{{{SEED}.falcon_jax.decode_tokens_per_s:.0f}} tokens/s",
        f"transformers, compiled {{{SEED_SHORT}.{COMPILED}.first_token_ms:.0f}} ms; "
        f"{{{SEED}.{COMPILED}.first_token_ms:.0f}} ms; {{{SEED}.{COMPILED}.decode_tokens_per_s:.0f}}",
        "seed-40b-h200.json",
    ),
    Row(
        "falcon-7b from process start to its first text, one H200, programs compiled before; not",
        "{results.warm.first_token_s:.1f} s; {results.cold.first_token_s:.1f} s",
        "{read_s:.0f} s to read its files",
        "start-up-falcon-7b-h200.json",
    ),
    Row(
        "falcon-40b-alibi's over two H200: one row; sixteen, bf16; 8 bits",
        "{runs.13.cases.0.decode_tokens_per_s:.0f}; {runs.13.cases.1.decode_tokens_per_s:,.0f} tokens/s; "
        "{runs.13.cases.2.decode_tokens_per_s:.0f}; {runs.13.cases.3.decode_tokens_per_s:,.0f}",
        "one of them {runs.11.cases.0.decode_tokens_per_s:.0f}; {runs.11.cases.1.decode_tokens_per_s:,.0f}; "
        "{runs.12.cases.0.decode_tokens_per_s:.0f}; {runs.12.cases.1.decode_tokens_per_s:,.0f}",
        "decoding-h200.json",
    ),
    Row(
        "training all of falcon-7b over two H200, 2,048 tokens: by 6 N and a GPU's 989 TFLOP/s",
        "{runs.14.results.0.tokens_per_s:,.0f} tokens/s, {runs.14.results.0.mfu*100:.0f} %",
        "",
        "several-2-h200.json",
    ),
    Row(
        "falcon-40b-alibi's fused output stage with the norm, up to 8 rows, bf16; int8; int4: share of the read limit",
        "{runs.0.results.16.share_of_read_limit*100:.0f} %; {runs.1.results.7.share_of_read_limit*100:.0f} %; "
        "{runs.1.results.0.share_of_read_limit*100:.0f} %",
        "",
        "stages-h200.json",
    ),
    Row(
        "training falcon-rw-1b from end to end, 2,048 tokens, one H200",
        f"{{{RW_1B}.falcon_jax.value:,.0f}} tokens/s",
        f"transformers, compiled {{{RW_1B}.transformers compiled.value:,.0f}}",
        TRAINING_RW_1B,
    ),
    Row(
        "8 layers of falcon-7b's width, the same",
        f"{{{WIDTH_7B}.falcon_jax.value:.0f}} TFLOP/s",
        f"transformers, compiled {{{WIDTH_7B}.transformers compiled.value:.0f}}, "
        f"plain {{{WIDTH_7B}.transformers.value:.0f}}",
        TRAINING_7B,
    ),
    Row(
        "LoRA on falcon-7b, 512 tokens, peak memory with weights of 16; 8; 4 bits, embedding and head in bfloat16",
        f"{{{LORA}.0.best.falcon_jax.value:.1f}}; {{{LORA}.1.best.falcon_jax.value:.1f}}; "
        f"{{{LORA}.2.best.falcon_jax.value:.1f}} GB",
        "",
        TRAINING_7B,
    ),
    Row(
        "falcon-nano on ten unseen books, by `scripts/evaluate.py`",
        "{results.0.bits_per_byte:.3f} bits per byte",
        "",
        "falcon-nano-validation.json",
    ),
    Row(
        "the same on three of them, 512 tokens at a time, weights of 16; 8; 4 bits",
        "{results.bfloat16.bits_per_byte:.4f}; {results.int8.bits_per_byte:.4f}; "
        "{results.int4, calibrated on 512 rows.bits_per_byte:.4f} calibrated",
        "4 bits without calibration {results.int4, nearest.bits_per_byte:.4f}",
        "falcon-nano-quantized.json",
    ),
    Row(
        "a model of 178 million parameters on ten, 2,048 tokens at a time, the same; embedding and head in bfloat16",
        "{results.bfloat16.length_2048.bits_per_byte:.4f}; {results.int8.length_2048.bits_per_byte:.4f}; "
        "{results.int4, calibrated.length_2048.bits_per_byte:.4f} calibrated",
        "4 bits without calibration {results.int4, nearest.length_2048.bits_per_byte:.4f}",
        "178m-quantized.json",
    ),
)


def table() -> str:
    """The table in Markdown, without a line's end after it."""
    lines = ["| what | falcon_jax | beside it | file in `benchmarks/results/` |", "|---|---|---|---|"]
    for row in ROWS:
        cells = [filled(cell, row.file) for cell in (row.what, row.ours, row.beside)] + [f"`{row.file}`"]
        lines.append("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|")
    return "\n".join(lines)


def filled(text: str, file: str) -> str:
    """`text` with each figure in braces taken from the file."""
    return FIGURE.sub(lambda figure: _formatted(figure, file), text)


def _formatted(figure: re.Match[str], file: str) -> str:
    value = _value(_read(RESULTS / file), figure["path"].split("."), f"{figure['path']} in {file}")
    factor = float(figure["factor"] or 1)
    if figure["operation"]:
        value = value / factor if figure["operation"] == "/" else value * factor
    return format(value, figure["format"] or "")


def _value(node: Any, keys: list[str], said: str) -> Any:
    for key in keys:
        if isinstance(node, list):
            found = [node[int(key)]] if key.isdigit() and int(key) < len(node) else _labelled(node, key)
        else:
            found = [node[key]] if isinstance(node, dict) and key in node else []
        if len(found) != 1:
            raise ResultError(f"{said}: {'no' if not found else 'more than one'} {key!r} there")
        node = found[0]
    if isinstance(node, (dict, list)) or node is None:
        raise ResultError(f"{said}: that is {'null' if node is None else 'no single figure'}")
    return node


def _labelled(items: list[Any], key: str) -> list[Any]:
    return [item for item in items if key in (item.get("name"), f"{item.get('case')}, {item.get('kind')}")]


@functools.lru_cache(maxsize=64)
def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResultError(f"{path.name} in benchmarks/results/ cannot be read: {error}") from None


def rewritten(readme: str) -> str:
    """The README's text with today's table between the two comments."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ResultError(f"{README.name} lacks the line {(END if begin else BEGIN)!r}")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main(check: bool = False) -> int:
    """Writes README's table of measured figures from benchmarks/results/.

    Args:
      check: writes nothing; the exit code is 1 if the table is out of date.
    """
    try:
        old = README.read_text()
        new = rewritten(old)
    except (ResultError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if check and new != old:
        print(f"{README.name} is out of date: run python benchmarks/readme_table.py", file=sys.stderr)
        return 1
    if new != old:
        README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
