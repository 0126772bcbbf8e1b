"""What the kernels' benchmark makes of times: the document's cases, the ratios, and the table that people read."""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import kernel_decode, kernel_prefill, kernel_torch_worker
from benchmarks.kernel_prefill import CUDNN, OURS, PLAIN
from benchmarks.kernel_turns import Entry
from pallas_kernels.shapes import AttentionCase, DecodeCase

FILLERS = (kernel_decode.FILLER, kernel_torch_worker.FILLER)
NAME_WIDTH = 44


def prefill(case: AttentionCase, kind: str, entries: Sequence[Entry]) -> dict[str, Any]:
    """Times of a call in us and TFLOP/s of causal work."""
    flops = kernel_prefill.flops(case, kind)
    contestants = [_contestant(entry, entry.times_s) for entry in entries]
    for contestant in contestants:
        if "us" in contestant:
            contestant["tflops"] = flops / contestant["us"] / 1e6
    return {"case": case.name, "kind": kind, "shape": dataclasses.asdict(case), "contestants": contestants}


def decode(case: DecodeCase, entries: Sequence[Entry], read_bytes_per_s: float) -> dict[str, Any]:
    """Times of a layer in us, the filler's taken off, and the rate at which K and V were read."""
    filled = kernel_decode.filler_bytes(case) > 0
    contestants = []
    for entry in entries:
        if entry.name in FILLERS:
            continue
        from_torch = entry.name.startswith("torch")
        calls = kernel_decode.num_caches(case) if from_torch else kernel_decode.num_calls(case)
        idle = 0.0
        if filled and entry.name != kernel_decode.HOT and entry.times_s:
            filler = next((other for other in entries if other.name == FILLERS[from_torch]), None)
            if filler is None or filler.seconds is None:
                entry.fail("the filler's own time is not known")
            else:
                idle = filler.seconds
        contestants.append(_contestant(entry, [(seconds - idle) / calls for seconds in entry.times_s]))
    for contestant in contestants:
        if "us" in contestant:
            bytes_per_s = case.cache_bytes / contestant["us"] * 1e6
            contestant |= {"tb_per_s": bytes_per_s / 1e12, "read_share": bytes_per_s / read_bytes_per_s}
    return {
        "case": case.name,
        "kind": "decode",
        "shape": dataclasses.asdict(case),
        "cache_bytes": case.cache_bytes,
        "num_caches": kernel_decode.num_caches(case),
        "filler_bytes": kernel_decode.filler_bytes(case),
        "contestants": contestants,
    }


def _contestant(entry: Entry, times_s: Sequence[float]) -> dict[str, Any]:
    """error: over what is allowed, null where the contestant computes something else or nothing was compared."""
    found: dict[str, Any] = {"name": entry.name, "ours": entry.ours, "error": entry.error}
    if not times_s:
        return found | {"reason": entry.reason, "failed": entry.failed}
    turns = [1e6 * seconds for seconds in times_s]
    return found | {"us": statistics.median(turns), "turns_us": [round(us, 3) for us in turns]}


def ratios(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Under the case's name: how many times faster than each peer ours is, and its share of the read limit."""
    times = {found["name"]: found["us"] for found in result["contestants"] if "us" in found}
    ours = next(found for found in result["contestants"] if found["name"] == OURS)
    if "us" not in ours:
        return {}
    mine = [found["name"] for found in result["contestants"] if found["ours"]]
    found = {f"over {name}": us / ours["us"] for name, us in times.items() if name not in mine}
    if "read_share" in ours:
        found["read share"] = ours["read_share"]
    return {f"{result['case']}, {result['kind']}": {name: round(ratio, 4) for name, ratio in found.items()}}


def table(result: dict[str, Any]) -> Iterator[str]:
    """One line a contestant."""
    decoding = result["kind"] == "decode"
    title = f"{result['case']}, {result['kind']}"
    columns = ("us a layer", "TB/s", "of read") if decoding else ("us", "TFLOP/s", "")
    yield ""
    us, rate, share = columns
    yield f"{title:{NAME_WIDTH}} {us:>10} {rate:>8} {share:>8} {'x cuDNN':>8} {'x XLA':>8} {'error':>7}"
    times = {found["name"]: found["us"] for found in result["contestants"] if "us" in found}
    for found in result["contestants"]:
        name = f"  {found['name']}"
        if "us" not in found:
            yield f"{name:{NAME_WIDTH}} {'failed' if found['failed'] else 'not here'}: {found['reason']}"
            continue
        rate = f"{found['tb_per_s']:8.3f} {found['read_share']:8.1%}" if decoding else f"{found['tflops']:8.1f} {'':8}"
        over = " ".join(
            f"{times[peer] / found['us']:8.3f}" if peer in times else f"{'-':>8}" for peer in (CUDNN, PLAIN)
        )
        error = "-" if found["error"] is None else f"{found['error']:.2f}"
        yield f"{name:{NAME_WIDTH}} {found['us']:10.2f} {rate} {over} {error:>7}"


def memory_lines(found: dict[str, Any]) -> Iterator[str]:
    title = f"memory beside arguments and result, {found['tokens']:,} tokens"
    if "reason" in found:
        yield f"{title}: {'failed' if found.get('failed') else 'not here'}: {found['reason']}"
        return
    peak = found["peak_extra_bytes"]
    yield (
        f"{title}: {found['temporary_bytes'] / 2**20:.1f} MiB planned, "
        f"{'peak unknown' if peak is None else f'{peak / 2**20:.1f} MiB at the peak'}, "
        f"{found['temporary_bytes_with_gradients'] / 2**20:.1f} MiB planned with gradients "
        f"(an array of scores: {found['score_array_bytes'] / 2**30:.1f} GiB)"
    )


def failures(document: dict[str, Any]) -> list[str]:
    """What of ours should have run and did not, or was wrong."""
    memory = [f"memory: {found['reason']}" for found in document["memory"] if found.get("failed")]
    return memory + [
        f"{result['case']}, {result['kind']}: {found['name']}: {found['reason']}"
        for result in document["cases"]
        for found in result["contestants"]
        if found["ours"] and found.get("failed")
    ]
