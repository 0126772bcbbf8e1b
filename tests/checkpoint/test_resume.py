import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from falcon_jax.checkpoint import CheckpointError, convert, hf_files, load
from falcon_jax.checkpoint.convert import Conversion
from falcon_jax.checkpoint.store import ArrayFolder
from tests import hf_models

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("interrupted_conversions.py")


def run_python(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, env=environment, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return hf_models.save_model(hf_models.make_model(hf_models.tiny_config("falcon-40b")), folder / "hf")


@pytest.fixture(scope="module")
def outcomes(source, tmp_path_factory):
    return run_python(DRIVER, source, tmp_path_factory.mktemp("killed"))


def test_a_conversion_killed_at_any_moment_goes_on_without_redoing_finished_tensors(source, outcomes):
    names = set(hf_files.open_folder(source).tensors)
    for outcome in outcomes:
        if outcome["whole"]:
            continue
        assert not set(outcome["finished"]) & set(outcome["reads"]), outcome["moment"]
        assert set(outcome["finished"]) | set(outcome["reads"]) == names, outcome["moment"]
        assert len(outcome["reads"]) == len(set(outcome["reads"])), outcome["moment"]
        assert "unfinished" not in outcome["left"], outcome["moment"]


def test_the_moments_are_what_they_are_called(outcomes):
    chosen = [outcome for outcome in outcomes if not outcome["moment"].startswith("at random")]
    assert all(outcome["signal"] == 9 and not outcome["whole"] for outcome in chosen)
    finished = {outcome["moment"]: len(outcome["finished"]) for outcome in chosen}
    assert finished["before the first tensor"] == 0
    assert finished["in the midst"] == 8
    assert finished["in place but not in the journal"] == 7
    assert finished["in half a journal line"] == 8
    assert finished["moved, without a manifest"] == max(finished.values())


def test_what_a_killed_conversion_leaves_never_loads_half_made(outcomes):
    for outcome in outcomes:
        if outcome["whole"]:
            assert outcome["says"] == "loads", outcome["moment"]
        else:
            assert "was interrupted: run it again" in outcome["says"] or "does not exist" in outcome["says"], outcome


def test_what_comes_out_equals_the_source_whenever_it_was_killed(outcomes):
    assert all(outcome["same"] for outcome in outcomes)


def test_another_source_or_dtype_does_not_go_on_with_an_unfinished_conversion(source, tmp_path, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Conversion, "finish", fail)
        convert(source, tmp_path / "out", progress=False)
    with pytest.raises(CheckpointError, match="interrupted: run it again"):
        load(tmp_path / "out")
    with pytest.raises(CheckpointError, match="unfinished conversion with another dtype"):
        convert(source, tmp_path / "out", dtype="bfloat16", progress=False)
    model = hf_models.make_model(hf_models.tiny_config("falcon-40b"), seed=1)
    other = hf_models.save_model(model, tmp_path / "other")
    with pytest.raises(CheckpointError, match="unfinished conversion with another source"):
        convert(other, tmp_path / "out", progress=False)
    convert(source, tmp_path / "out", progress=False)
    load(tmp_path / "out")


def test_two_processes_do_not_convert_into_one_folder(source, tmp_path):
    settings = {"dtype": None}
    with Conversion(tmp_path, settings, ["a"]), pytest.raises(CheckpointError, match="another process"):
        Conversion(tmp_path, settings, ["a"])


def test_peak_memory_is_within_twice_the_largest_tensor_and_500_mb(tmp_path):
    """A sparse folder of 1.2 GB, its largest tensors 134 MB: holding half of the model would already show."""
    program = textwrap.dedent("""
        import json, re, sys
        from pathlib import Path
        from falcon_jax.checkpoint import convert, mapping
        from falcon_jax.config import FalconConfig, Rope
        import ml_dtypes

        def memory(key):
            return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

        source, destination = Path(sys.argv[1]), Path(sys.argv[2])
        source.mkdir()
        config = FalconConfig(vocab_size=65536, width=1024, num_layers=4, num_heads=16, num_kv_heads=4,
            mlp_width=65536, positions="rope", rope=Rope(),
            block="parallel", num_norms=2)
        header, start = {}, 0
        for entry in mapping.table(config):
            num_bytes = 2
            for size in entry.hf_shape:
                num_bytes *= size
            end = start + num_bytes
            header[entry.hf_name] = {"dtype": "BF16", "shape": entry.hf_shape, "data_offsets": [start, end]}
            start = end
        text = json.dumps(header).encode()
        with open(source / "model.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + start)
        (source / "config.json").write_text(json.dumps(config.to_hf()))
        largest = max(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = memory("VmRSS")
        convert(source, destination, progress=False)
        print(json.dumps({"base": before, "total": start, "largest": largest, "extra": memory("VmHWM") - before}))
    """)
    measured = run_python("-c", program, tmp_path / "hf", tmp_path / "out")
    assert measured["largest"] > 100e6
    assert measured["total"] > 1e9
    assert measured["extra"] <= 2 * measured["largest"] + 500e6, measured
    assert measured["extra"] >= measured["largest"], "the measurement itself is wrong"
    # What matters is that it does not grow with the model.
    assert measured["extra"] < measured["total"] / 2, measured


def test_an_array_is_put_where_a_killed_process_had_deleted_the_placeholder(tmp_path):
    folder = ArrayFolder(tmp_path / "params")
    folder.create(["a.weight", "b.weight"])
    shutil.rmtree(tmp_path / "params" / "a.weight")
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    folder.put({"a.weight": array, "b.weight": array})
    read = folder.read_host({"a.weight": jax.ShapeDtypeStruct(array.shape, array.dtype)})
    np.testing.assert_array_equal(read["a.weight"], array)
