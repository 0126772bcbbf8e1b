"""benchmarks/kernels.py: who gets a figure and who does not, what is counted, and the document without a GPU.

How fast anything is stays out of tests.
"""

import contextlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import (
    kernel_decode,
    kernel_memory,
    kernel_prefill,
    kernel_report,
    kernel_torch,
    kernel_torch_worker,
    kernel_turns,
    kernels,
)
from benchmarks.kernel_turns import Entry, Group, Program
from pallas_kernels import shapes
from pallas_kernels.flash_attention import attention
from tests import benchmarking


@pytest.fixture
def call(monkeypatch, tmp_path, capfd):
    """Runs the command in this process on small measurements; returns its exit code, stdout and stderr."""
    monkeypatch.setattr(kernels, "READ_BYTES", {"cpu": 2**20, "gpu": 2**20})
    monkeypatch.setattr(kernels, "NUM_QUICK_TURNS", 2)
    monkeypatch.setattr(kernel_turns, "TURN_S", 0.0)
    monkeypatch.setattr(kernel_decode, "NUM_CACHES", 2)
    return benchmarking.caller(kernels.run, monkeypatch, capfd, tmp_path / "results")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="on a GPU this would measure at length")
def test_without_a_gpu_xla_has_figures_and_the_others_say_why_not(call, tmp_path):
    code, text, _ = call("--quick", "--models", "falcon-40b-alibi", "--tokens", "16", "--save", "tiny")
    assert code == 0
    lines = text.splitlines()
    assert lines[0].startswith("limit: this device reads")
    document = json.loads(lines[-1])
    assert json.loads((tmp_path / "results" / "tiny.json").read_text()) == document
    assert [(case["case"], case["kind"]) for case in document["cases"]] == [
        ("falcon-40b-alibi T=16", "forward"),
        ("falcon-40b-alibi T=16", "forward + backward"),
        ("falcon-40b-alibi S=16 B=1", "decode"),
    ]
    for case in document["cases"][:2]:
        names = [found["name"] for found in case["contestants"]]
        assert {"falcon_jax", "falcon_jax, without ALiBi", "XLA", "XLA, without ALiBi", "cuDNN"} <= set(names)
    for case in document["cases"]:
        for found in case["contestants"]:
            if found["name"].startswith("XLA"):
                assert found["us"] > 0 and len(found["turns_us"]) == 2 and found["error"] == pytest.approx(0.5, rel=0.1)
            else:
                assert "GPU" in found["reason"] and not found["failed"] and "us" not in found
    assert all("Hopper" in found["reason"] for found in document["memory"])
    assert document["ratios"] == {} and document["limit"]["read_bytes_per_s"] > 0
    assert document["versions"]["jax"] and document["device"] and "benchmarks/kernels.py" in document["command"]
    assert any("not here: it needs a Hopper GPU" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--models", "falcon-9b"], "--models falcon-9b is unknown; known are falcon-rw-1b"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--save", "../x"], "--save is '../x'"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_code_2(call, arguments, said):
    code, text, errors = call(*arguments)
    assert (code, text) == (2, "") and errors.count("\n") == 1 and said in errors


def test_a_wrong_kernel_of_ours_gets_no_figure_and_a_peers_error_is_said():
    x = jax.random.normal(jax.random.key(0), (64, 64), jnp.bfloat16)

    def product(x):
        return (x @ x,)

    def raises(x):
        raise NotImplementedError("not for these shapes")

    programs = [
        Program("ours", product, (x,), ours=True, num_checked=1),
        Program("ours, wrong", lambda x: (x @ x + 1,), (x,), ours=True, num_checked=1),
        Program("plain", product, (x,), num_checked=1),
        Program("peer, coarse", lambda x: (x @ x + 1,), (x,), num_checked=1),
        Program("peer, NaN", lambda x: (x @ x * jnp.nan,), (x,)),
        Program("peer, another function", lambda x: (x,), (x,)),
        Program("peer that raises", raises, (x,)),
        Program("peer of elsewhere", product, (x,), reason="it needs a TPU"),
    ]
    exact = Program("float32", lambda x: (x.astype(jnp.float32) @ x.astype(jnp.float32),), (x,))
    entries = kernel_turns.prepare(Group(programs, exact, "plain"))
    ours, wrong, plain, coarse, nan, other, raising, elsewhere = entries
    assert ours.error == pytest.approx(0.5, rel=0.01) and plain.error == ours.error
    assert wrong.runner is None and wrong.failed and "wrong: its error is" in str(wrong.reason)
    assert coarse.runner is not None and coarse.error is not None and coarse.error > 1
    assert nan.runner is None and "not finite" in str(nan.reason)
    assert other.runner is not None and other.error is None
    assert raising.failed and raising.reason == "NotImplementedError: not for these shapes"
    assert not elsewhere.failed and elsewhere.reason == "it needs a TPU"
    kernel_turns.take_turns(entries, 2)
    assert [entry.name for entry in entries if entry.times_s] == [
        "ours", "plain", "peer, coarse", "peer, another function",
    ]  # fmt: skip


def test_each_program_is_compared_within_its_group():
    x = jax.random.normal(jax.random.key(0), (64, 64), jnp.bfloat16)

    def group(factor, name):
        def product(x):
            return (factor * (x @ x),)

        programs = [Program(name, product, (x,), ours=True, num_checked=1), Program("plain", product, (x,))]
        return Group(programs, Program("float32", lambda x: product(x.astype(jnp.float32)), (x,)), "plain")

    entries = kernel_turns.prepare(group(1, "one"), group(4, "four"))
    assert [entry.name for entry in entries] == ["one", "plain", "four", "plain"]
    assert entries[0].error == pytest.approx(0.5, rel=0.01) and entries[2].error == pytest.approx(0.5, rel=0.01)


def test_memory_is_measured_on_tokens_that_repeat():
    q, k, v, slopes = kernel_memory.draw(shapes.attention_case(kernel_memory.MODEL, 5000))
    assert q.shape == (1, 5000, 64, 128) and k.shape == v.shape == (1, 5000, 1, 128) and slopes.shape == (64,)
    assert q.dtype == jnp.bfloat16 and (q[:, :904] == q[:, 4096:]).all()


def test_nothing_of_ours_is_timed_where_the_reference_fails():
    x = jnp.ones(4)

    def raises(x):
        raise RuntimeError("out of memory")

    programs = [Program("ours", lambda x: (x,), (x,), ours=True, num_checked=1), Program("plain", raises, (x,))]
    ours, plain = kernel_turns.prepare(Group(programs, Program("float32", lambda x: (x,), (x,)), "plain"))
    assert ours.failed and plain.failed and "nothing to compare it with" in str(ours.reason)


class Counting:
    """A runner that says who ran when."""

    def __init__(self, name: str, log: list[str], fails_at: int | None = None):
        self.name, self.log, self.fails_at = name, log, fails_at

    def seconds(self, num_calls: int) -> float:
        self.log.append(self.name)
        if self.log.count(self.name) == self.fails_at:
            raise MemoryError("no more")
        return 1.0


def test_contestants_follow_one_another_in_changing_order_and_one_that_fails_stops_nobody():
    log: list[str] = []
    entries = [Entry(name, runner=Counting(name, log, 3 if name == "b" else None)) for name in "abc"]
    kernel_turns.take_turns(entries, 3)
    assert "".join(log) == "abc" + "abc" + "bca" + "ac"  # "b" fails in the second turn; the first three are estimates
    assert [len(entry.times_s) for entry in entries] == [3, 0, 3]
    assert entries[1].failed and entries[1].reason == "MemoryError: no more"
    assert all(entry.runner is None for entry in entries)


def test_flops_are_those_of_the_keys_that_causality_shows():
    case = shapes.attention_case("falcon-7b", 5, batch=2)
    visible = np.tril(np.ones((5, 5))).sum()
    products = 2 * 2 * case.H * visible  # q . k and the sum over v, a multiplication and an addition each
    assert kernel_prefill.flops(case, kernel_prefill.FORWARD) == 2 * 71 * products
    assert kernel_prefill.flops(case, kernel_prefill.BACKWARD) == 3.5 * 2 * 71 * products


def test_decode_loop_is_a_chain_of_calls_over_all_caches():
    keys = jax.random.split(jax.random.key(0), 7)
    q = jax.random.normal(keys[0], (1, 2, 8))
    normal = [jax.random.normal(key, (1, 5, 1, 8)) for key in keys[1:]]
    caches = list(zip(normal[::2], normal[1::2]))
    lengths = jnp.asarray([4], jnp.int32)

    def attend(q, k, v, lengths):
        scores = jnp.einsum("bnh,bskh->bns", q, k) + jnp.where(jnp.arange(5) < lengths[0], 0.0, -1e9)
        return jnp.einsum("bns,bskh->bnh", jax.nn.softmax(scores), v)

    for filler in (None, jax.random.uniform(jax.random.key(1), (4, 1024))):
        first, last = jax.jit(kernel_decode._loop(attend, 3, num_rounds=2))(q, caches, filler, lengths)
        expected = [attend(q, *caches[0], lengths)]
        for _ in range(2):
            for cache in caches:
                expected.append(attend(expected[-1], *cache, lengths))
        assert len(expected) == 1 + 2 * len(caches)
        np.testing.assert_allclose(first, expected[0], rtol=1e-5)
        np.testing.assert_allclose(last, expected[-1], rtol=1e-4)


def test_decode_rotates_over_more_bytes_than_a_gpu_caches_and_no_more_than_fit(monkeypatch):
    monkeypatch.setattr(kernel_decode, "ROTATION_BYTES", {"cpu": 2**27, "gpu": 2**27})
    for case in (shapes.decode_case("falcon-7b", 512), shapes.decode_case("falcon-rw-7b", 131072)):
        caches = kernel_decode.num_caches(case) * case.cache_bytes
        assert caches + kernel_decode.filler_bytes(case) >= 2**27
        assert caches <= 2 * max(kernel_decode.MAX_CACHES_BYTES, case.cache_bytes)


def test_a_layers_time_is_without_the_filler(monkeypatch):
    monkeypatch.setattr(kernel_decode, "ROTATION_BYTES", {"cpu": 2**27, "gpu": 2**27})
    case = shapes.decode_case("falcon-7b", 4096)
    calls, caches = kernel_decode.num_calls(case), kernel_decode.num_caches(case)
    assert (calls, caches) == (1 + 32 * 16, 16)
    entries = [
        Entry("falcon_jax", ours=True, times_s=[400e-6 + 5e-6 * calls] * 3),
        Entry(kernel_decode.HOT, ours=True, times_s=[4e-6 * calls]),
        Entry("XLA", times_s=[400e-6 + 10e-6 * calls]),
        Entry("torch SDPA", times_s=[50e-6 + 8e-6 * caches]),
        Entry(kernel_decode.FILLER, times_s=[400e-6]),
        Entry("torch filler", times_s=[50e-6]),
    ]
    result = kernel_report.decode(case, entries, read_bytes_per_s=1e12)
    found = {contestant["name"]: contestant for contestant in result["contestants"]}
    expected = {"falcon_jax": 5.0, kernel_decode.HOT: 4.0, "XLA": 10.0, "torch SDPA": 8.0}
    assert {name: contestant["us"] for name, contestant in found.items()} == pytest.approx(expected)
    assert found["falcon_jax"]["read_share"] == pytest.approx(2 * 4096 * 64 * 2 / 5e-6 / 1e12)
    ratios = kernel_report.ratios(result)["falcon-7b S=4096 B=1, decode"]
    assert ratios["over XLA"] == pytest.approx(2.0) and ratios["over torch SDPA"] == pytest.approx(1.6)
    assert f"over {kernel_decode.HOT}" not in ratios
    assert any("5.00" in line and "falcon_jax" in line for line in kernel_report.table(result))


def test_a_filler_without_a_time_leaves_no_figure(monkeypatch):
    monkeypatch.setattr(kernel_decode, "ROTATION_BYTES", {"cpu": 2**27, "gpu": 2**27})
    case = shapes.decode_case("falcon-7b", 4096)
    entries = [Entry("falcon_jax", ours=True, times_s=[1e-3]), Entry(kernel_decode.FILLER, failed=True)]
    result = kernel_report.decode(case, entries, read_bytes_per_s=1e12)
    assert result["contestants"][0]["reason"] == "the filler's own time is not known"
    document = {"memory": [], "cases": [result]}
    assert kernel_report.failures(document) == [
        "falcon-7b S=4096 B=1, decode: falcon_jax: the filler's own time is not known"
    ]


WORKER = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if "time" in request and request["num_calls"] > 9:
        sys.exit(3)
    elif "time" in request:
        print(json.dumps({"seconds": 0.5}), flush=True)
    else:
        good, bad = {"name": request["kind"], "error": 0.5}, {"name": "bad", "reason": "no kernel"}
        print(json.dumps({"contestants": [good, bad]}), flush=True)
"""


def test_torchs_process_takes_its_turns_and_its_death_is_a_reason(monkeypatch):
    monkeypatch.setattr(kernel_torch, "reason_against", lambda: None)
    monkeypatch.setattr(kernel_torch, "WORKER", (sys.executable, "-c", WORKER))
    with contextlib.closing(kernel_torch.TorchProcess()) as process:
        case = shapes.attention_case("falcon-7b", 16)
        process.begin("forward", case)
        good, bad = process.entries()
        assert (good.name, good.error, bad.reason, bad.failed) == ("forward", 0.5, "no kernel", True)
        assert good.runner is not None and good.runner.seconds(2) == 0.5 and bad.runner is None
        with pytest.raises(RuntimeError, match="exit code 3"):
            good.runner.seconds(10)
        process.begin("forward", case)
        (entry,) = process.entries()
        assert entry.failed and "exit code 3" in str(entry.reason)


@pytest.mark.parametrize("alibi", [None, "float32"])
def test_what_torch_computes_is_the_same_attention(monkeypatch, alibi):
    monkeypatch.setattr(kernel_torch_worker, "DEVICE", "cpu")
    shape = {"B": 1, "T": 70, "S": 70, "N": 4, "K": 2, "H": 64, "dtype": "bfloat16", "alibi": alibi}
    case = kernel_torch_worker.Case("forward", shape, num_caches=1, filler_bytes=0)
    assert (case.error(case.flash()()) <= 1) == (alibi is None)
    if alibi:
        assert case.error(case.masked()()) <= 1
        q, k, v = (jnp.asarray(x.float().numpy()).swapaxes(1, 2) for x in (case.q, *case.caches[0]))
        ours = attention(q, k, v, slopes=shapes.geometric_slopes(4), implementation="xla")
        assert case.error(torch.from_numpy(np.array(ours.swapaxes(1, 2)))) <= 1
    one = kernel_torch_worker.Case("decode", shape, num_caches=1, filler_bytes=0)
    assert (one.error(one.grouped(one.q, *one.caches[0])) <= 1) == (alibi is None)
