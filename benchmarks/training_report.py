"""What people read of the training benchmark: the limits, a table a case, the bars, and what of ours failed."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import measure, training_profile
from benchmarks.limits import Rates
from benchmarks.measure import Result
from benchmarks.training_cases import FIGURES, Bar, Case
from benchmarks.training_measure import said


def limit_lines(case: Case, rates: Rates) -> list[str]:
    """What a reader should know of a case before it is measured."""
    work = case.work
    a_token = work.flops(1) / work.length
    made = [
        f"limit: {case.what}, a step takes {a_token / 1e9:.2f} GFLOP a token; this device multiplies at "
        f"{rates.flops_per_s / 1e12:.1f} TFLOP/s, so at most {rates.flops_per_s / a_token:,.0f} tokens/s"
    ]
    if work.update_bytes():
        made.append(
            f"limit: {case.what}, AdamW reads and writes {work.update_bytes() / 1e9:.1f} GB a step; at "
            f"{rates.memory_bytes_per_s / 1e12:.2f} TB/s that is {_update_ms(case, rates):.1f} ms, whatever the batch"
        )
    return made


def _update_ms(case: Case, rates: Rates) -> float:
    return 1e3 * case.work.update_bytes() / rates.memory_bytes_per_s


def with_limits(result: Result, case: Case, rates: Rates, peak_flops: float | None) -> Result:
    """A result with its step's least time, and its shares of what the device can do.

    peak_flops: what the device's maker promises a second; None: not known.
    """
    rows = result["settings"]["batch_size"]
    added: Result = {
        "flops_limit_ms": 1e3 * case.work.flops(rows) / rates.flops_per_s,
        "update_limit_ms": _update_ms(case, rates),
    }
    if "ms_per_step" in result:
        added["share_of_flops_limit"] = added["flops_limit_ms"] / result["ms_per_step"]
        if peak_flops is not None:
            added["mfu"] = 1e12 * result["model_tflops_per_s"] / peak_flops
    return result | added


# Bars.


def bars(case: Case, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Each bar with our best figure, the peers' best, and how many times better ours is."""
    return [_bar(bar, _over_rounds(results)) for bar in case.bars]


def _bar(bar: Bar, results: Sequence[Result]) -> dict[str, Any]:
    best: dict[str, tuple[float, Result]] = {}
    for result in results:
        value = FIGURES[bar.figure].of(result)
        is_other_form = result["ours"] and result["settings"].get("weights", "native") != bar.weights
        if value is None or is_other_form:
            continue
        if result["name"] not in best or bar.is_better(value, best[result["name"]][0]):
            best[result["name"]] = value, result
    found: dict[str, Any] = {"figure": bar.figure, "asked": bar.asked, "weights": bar.weights, "best": {}, "ratios": {}}
    for name, (value, result) in best.items():
        found["best"][name] = {"value": value, "settings": result["settings"]}
    ours = next((value for value, result in best.values() if result["ours"]), None)
    if ours is not None:
        found["reached"] = bar.is_reached(ours)
        for name, (value, result) in best.items():
            if not result["ours"]:
                found["ratios"][name] = value / ours if FIGURES[bar.figure].less_is_better else ours / value
    return found


def _over_rounds(results: Sequence[Result]) -> list[Result]:
    """One result for each contestant that has any: of figures over the rounds the median, of memory the most."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if "ms_per_step" in result:
            groups.setdefault(_label(result), []).append(result)
    merged = []
    for group in groups.values():
        found = dict(group[0])
        for key in ("ms_per_step", "tokens_per_s", "tflops_per_s", "model_tflops_per_s"):
            found[key] = statistics.median(result[key] for result in group)
        if found["peak_gib"] is not None:
            found["peak_gib"] = max(result["peak_gib"] for result in group)
        merged.append(found)
    return merged


def _label(result: Mapping[str, Any]) -> str:
    return f"{result['name']}, {said(result['settings'])}"


# Tables.


def case_lines(case: Mapping[str, Any], device: str) -> list[str]:
    """A case's results, a row each, with the reasons of failures below."""
    header = (
        f"{case['what']}, {device}",
        "ms a step",
        "tokens/s",
        "TFLOP/s",
        "of the limit",
        "peak GiB",
        "planned GiB",
        "first step s",
        "loss",
    )
    cells, notes = [list(header)], []
    has_rounds = any(result["round"] > 1 for result in case["results"])
    for result in case["results"]:
        label = _label(result) + (f", round {result['round']}" if has_rounds else "")
        cells.append([label, *_cells(result)])
        notes += [f"{label}: {result[key]}" for key in ("failed", "profile_failed") if key in result]
        notes += [f"left out: {result['left_out']}"] if "left_out" in result else []
    return ["", *_aligned(cells), *dict.fromkeys(notes)]


def _cells(result: Result) -> list[str]:
    planned = f"{result['planned_gib']:.1f}" if result.get("planned_gib") else ""
    if "ms_per_step" not in result:
        why = "left out" if "left_out" in result else "out of memory" if result["out_of_memory"] else "failed"
        return [why, "", "", "", "", planned, "", ""]
    first, last = result["losses"]
    return [
        f"{result['ms_per_step']:.1f}",
        f"{result['tokens_per_s']:,.0f}",
        f"{result['tflops_per_s']:.1f}",
        f"{result['share_of_flops_limit']:.1%}",
        "" if result["peak_gib"] is None else measure.peak_text(result).removesuffix(" GiB"),
        planned,
        f"{result['first_step_s']:.1f}{_cached(result)}",
        f"{first:.2f} to {last:.2f}",
    ]


def _cached(result: Result) -> str:
    programs = result.get("first_step_programs", {})
    return ", from the cache" if programs.get("from_cache") and not programs["compiled"] else ""


def bar_lines(document: Mapping[str, Any]) -> list[str]:
    """All bars, each with what is asked beside what was reached."""
    found = [(case, bar) for case in document["cases"] for bar in case["bars"]]
    if not found:
        return []
    peers = list(dict.fromkeys(name for _, bar in found for name in bar["ratios"]))
    cells = [["bar", "asked", measure.Ours.name, "reached", *(f"times better than {name}" for name in peers)]]
    for case, bar in found:
        figure = FIGURES[bar["figure"]]
        weights = "" if bar["weights"] == "native" else f", {bar['weights']}"
        row = [f"{case['what']}{weights}", "-"]
        if bar["asked"] is not None:
            row[1] = f"{'at most' if figure.less_is_better else 'at least'} {figure.text.format(bar['asked'])}"
        ours = bar["best"].get(measure.Ours.name)
        row.append("not measured" if ours is None else f"{_told(figure.text, ours)}")
        row.append({True: "yes", False: "no", None: ""}[bar.get("reached")])
        for name in peers:
            ratio = bar["ratios"].get(name)
            row.append("" if ratio is None else f"{_told(figure.text, bar['best'][name])}: x {ratio:.2f}")
        cells.append(row)
    return ["", *_aligned(cells)]


def _told(text: str, best: Mapping[str, Any]) -> str:
    return f"{text.format(best['value'])} ({said(best['settings'])})"


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def take_profile(result: Result, what: str) -> list[str]:
    """The tables of a profile, which leave the result: they would outnumber all else in the document."""
    profile = result.get("profile")
    if profile is None:
        return []
    lines = training_profile.lines(f"{what}, {_label(result)}", profile)
    for rows in ("by_kernel", "by_place"):
        del profile[rows]
    return lines


def failures(document: Mapping[str, Any]) -> list[str]:
    """What of ours failed, but for want of memory where another variant of the case had enough."""
    found = []
    for case in document["cases"]:
        ours = [result for result in case["results"] if result["ours"] and "left_out" not in result]
        has_figure = any("failed" not in result for result in ours)
        for result in ours:
            if "failed" in result and not (result["out_of_memory"] and has_figure):
                found.append(f"{case['name']}: {_label(result)}: {result['failed']}")
    return found
