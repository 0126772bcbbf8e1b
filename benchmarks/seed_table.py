"""The table of the 40B models: four rows a model, each contestant loaded once and all its rows measured meanwhile.

Rows are measured in the order of the tokens that they hold, since JAX's peak of memory only ever grows.
"""

import dataclasses
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import limits, measure, places
from benchmarks.limits import Workload
from benchmarks.measure import Case, Contestant, Ours, Result
from benchmarks.places import Say
from falcon_jax.config import FalconConfig

MODELS = ("falcon-40b-alibi", "falcon-40b")


@dataclasses.dataclass(frozen=True)
class Row:
    """A workload, and the text of its figure in a result that has not failed."""

    what: str  # with the number of tokens to be filled in
    workload: Workload
    repeats: int
    figure: Callable[[Result], str]


def _share(result: Result, key: str) -> str:
    return f" ({result[key]:.0%} of the limit)" if key in result else ""


def _first_token(result: Result) -> str:
    return f"{result['first_token_ms']:.1f} ms{_share(result, 'share_of_flops_limit')}"


def _decode(result: Result) -> str:
    return f"{result['decode_tokens_per_s']:.1f} tokens/s{_share(result, 'share_of_read_limit')}"


def _peak(result: Result) -> str:
    return "unknown" if result["peak_gib"] is None else measure.peak_text(result)


def _decode_and_peak(result: Result) -> str:
    return f"{_decode(result)}, {_peak(result)}"


ROWS = {
    "first_token": Row("first token, {} tokens", Workload(1, 512, 1), 7, _first_token),
    "decode": Row("decode, {} tokens", Workload(1, 4000, 64), 3, _decode),
    "peak": Row("peak memory, batch 4, {} tokens", Workload(4, 4000, 16), 3, _peak),
    "long": Row("decode and peak memory, {} tokens", Workload(1, 12_000, 16), 3, _decode_and_peak),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What of the table is to be measured, and how.

    dtype, weights: of ours. scale: of the rows' contexts. new_tokens, repeats: instead of the rows' own.
    """

    dtype: str
    weights: str
    rows: tuple[str, ...] = tuple(ROWS)
    scale: float = 1.0
    new_tokens: int | None = None
    repeats: int | None = None

    def cases(self) -> list[Case]:
        """In the table's order, whatever order was asked for."""
        return [self._case(name, row) for name, row in ROWS.items() if name in self.rows]

    def _case(self, name: str, row: Row) -> Case:
        context = max(1, round(self.scale * row.workload.context_tokens))
        decodes = row.workload.new_tokens > 1
        new_tokens = self.new_tokens if decodes and self.new_tokens is not None else row.workload.new_tokens
        workload = Workload(row.workload.batch_size, context, new_tokens)
        return Case(name, workload, self.repeats or row.repeats)


@dataclasses.dataclass(frozen=True)
class Model:
    """One model of the table and who runs it."""

    name: str
    config: FalconConfig
    folder: Path | None
    contestants: tuple[Contestant, ...]


def fill(
    document: dict[str, Any], models: Sequence[Model], plan: Plan, place: places.Place, say: Say
) -> Iterator[None]:
    """Measures the table into `document`, result by result: it is worth saving after each.

    One of ours that fails is a result as well, so that what others did is not lost with it; see `our_failures`.
    """
    cases = plan.cases()
    document["models"] = [_entry(model, cases) for model in models]
    jobs = [(model.config, case.workload) for model in models for case in cases]
    ((machine, found),) = place(limits.measured_limits, jobs, plan.dtype, plan.weights, say=say)
    document |= machine
    limit_of = dict(zip([(model.name, case.name) for model in models for case in cases], found))
    for model, entry in zip(models, document["models"]):
        rows = {row["name"]: row for row in entry["rows"]}
        for case in cases:
            limit = limit_of[model.name, case.name]
            rows[case.name]["limit"] = limit.record(case.workload.batch_size)
            say(f"{model.name}, {rows[case.name]['what']}")
            for line in limit.lines(case.workload.batch_size):
                say(f"  {line}")
        for name, result in _results(model, cases, place, say):
            if result["name"] == Ours.name:
                result |= limit_of[model.name, name].shares(result)
            rows[name]["results"].append(result)
            rows[name]["ratios"] = measure.ratios(rows[name]["results"])
            yield


def _entry(model: Model, cases: Sequence[Case]) -> dict[str, Any]:
    """What stands in the document before anything is measured."""
    rows = [
        {
            "name": case.name,
            "what": ROWS[case.name].what.format(f"{case.workload.context_tokens:,}"),
            **dataclasses.asdict(case.workload),
            "repeats": case.repeats,
            "results": [],
            "ratios": {},
        }
        for case in cases
    ]
    return {"name": model.name, "parameters": "random" if model.folder is None else "stored", "rows": rows}


def _results(model: Model, cases: Sequence[Case], place: places.Place, say: Say) -> Iterator[tuple[str, Result]]:
    """A row's name and its result, contestant by contestant."""

    def say_of(line: str) -> None:
        say(f"{model.name}, {line}")

    for contestant in model.contestants:
        left = sorted(cases, key=lambda case: case.workload.batch_size * case.workload.context_tokens)
        try:
            for name, results in measure.compete([[contestant]], list(left), place, say_of):
                left.pop(0)
                yield name, results[0]
        except Exception as error:  # ours: what a peer raised has become a result
            for line in traceback.format_exception(error):
                say(line.rstrip())
            for case in left:
                yield case.name, measure.failure(contestant, error, say_of)


def our_failures(document: dict[str, Any]) -> list[str]:
    """One line for each row that falcon_jax did not get through."""
    return [
        f"{model['name']}, {row['name']}: falcon_jax failed: {result['failed']}"
        for model in document["models"]
        for row in model["rows"]
        for result in row["results"]
        if result["name"] == Ours.name and "failed" in result
    ]


def text(document: dict[str, Any]) -> list[str]:
    """The table as people read it, a block a model, with the reasons of failures below."""
    lines = []
    for model in document["models"]:
        lines += _block(model, document["device"])
    return lines


def _block(model: dict[str, Any], device: str) -> list[str]:
    names = list(dict.fromkeys(_column(result) for row in model["rows"] for result in row["results"]))
    cells = [[f"{model['name']}, {device}", *names]]
    notes = []
    for row in model["rows"]:
        found = {_column(result): result for result in row["results"]}
        cells.append([row["what"], *(_cell(row["name"], found.get(name)) for name in names)])
        notes += [f"{name}, {row['what']}: {result['failed']}" for name, result in found.items() if "failed" in result]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return ["", lines[0], rule, *lines[1:], *notes]


def _column(result: Result) -> str:
    weights = "" if result["weights"] == "native" else f" {result['weights']}"
    return f"{result['name']} {result['dtype']}{weights}"


def _cell(row: str, result: Result | None) -> str:
    if result is None:
        return "not measured"
    if "failed" not in result:
        return ROWS[row].figure(result)
    lacks_memory = "out of memory" in result["failed"].lower() or "RESOURCE_EXHAUSTED" in result["failed"]
    return "out of memory" if lacks_memory else "failed"
