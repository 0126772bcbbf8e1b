"""What people read of the benchmark over several GPUs: its bars, and what of it failed."""

from collections.abc import Sequence
from typing import Any

from benchmarks.several_jobs import Result

# How many times as fast as one device decoding is asked to be over so many.
RATIOS = {2: 1.7, 4: 3.0, 8: 5.0}
TOKENS_PER_S_180B = 80.0  # falcon-180b in bfloat16, one row, over eight devices
MFU = 0.46  # six FLOPs a parameter and token, of what the device's maker promises
EFFICIENCY = 0.92  # of a device among several, beside a device alone


def bars(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Each figure with what is asked of it, as far as it has been measured."""
    return [*_decoding(results), *_largest(results), *_training(results)]


def _bar(what: str, value: float, asked: float | None) -> dict[str, Any]:
    return {"what": what, "value": value, "asked": asked, "reached": None if asked is None else value >= asked}


def _decoding(results: Sequence[Result]) -> list[dict[str, Any]]:
    measured = [result for result in results if result["part"] == "decode" and "decode_tokens_per_s" in result]
    same = ("model", "num_layers", "weights", "batch_size", "context_tokens")
    alone = {tuple(result[key] for key in same): result for result in measured if result["num_devices"] == 1}
    made = []
    for result in measured:
        one = alone.get(tuple(result[key] for key in same))
        if one is not None and one is not result:
            ratio = result["decode_tokens_per_s"] / one["decode_tokens_per_s"]
            what = f"decode {result['name']}, batch {result['batch_size']}: times as fast as 1 device"
            made.append(_bar(what, ratio, RATIOS.get(result["num_devices"])))
    return made


def _largest(results: Sequence[Result]) -> list[dict[str, Any]]:
    measured = [result for result in results if result["part"] == "decode" and "decode_tokens_per_s" in result]
    return [
        _bar(f"decode {result['name']}: tokens/s", result["decode_tokens_per_s"], TOKENS_PER_S_180B)
        for result in measured
        if (result["model"], result["weights"], result["batch_size"]) == ("falcon-180b", "native", 1)
    ]


def _training(results: Sequence[Result]) -> list[dict[str, Any]]:
    measured = [result for result in results if result["part"] == "train" and "tokens_per_s" in result]
    alone = {
        (result["model"], result["num_layers"]): result["tflops_per_s_a_device"]
        for result in measured
        if result["num_devices"] == 1
    }
    made = []
    for result in measured:
        if result["mfu"] is not None:
            made.append(_bar(f"train {result['name']}: MFU", result["mfu"], MFU))
        one = alone.get((result["model"], result["num_layers"]))
        if one is not None and result["num_devices"] > 1:
            efficiency = result["tflops_per_s_a_device"] / one
            made.append(_bar(f"train {result['name']}: efficiency", efficiency, EFFICIENCY))
    return made


def lines(document: dict[str, Any]) -> list[str]:
    """The bars, a line each, and a count of what was compared and right."""
    judged = [result["ok"] for result in document["results"] if "ok" in result]
    told = [f"{sum(judged)} of {len(judged)} comparisons are right"] if judged else []
    for bar in document["bars"]:
        answer = {True: "yes", False: "no", None: "not asked"}[bar["reached"]]
        asked = "" if bar["asked"] is None else f" (asked: {bar['asked']:g})"
        told.append(f"{bar['what']}: {bar['value']:.3g}{asked}: {answer}")
    return told


def failures(document: dict[str, Any]) -> list[str]:
    """What was wrong or failed. Lack of memory counts where nothing else of its part has a figure."""
    found = []
    results = document["results"]
    with_figures = {result["part"] for result in results if not {"failed", "left_out"} & result.keys()}
    for result in results:
        named = f"{result['part']}: {result['name']}"
        if result.get("ok") is False:
            found.append(f"{named} is wrong")
        elif "failed" in result and not (result["out_of_memory"] and result["part"] in with_figures):
            found.append(f"{named}: {result['failed']}")
    return found
