"""The benchmark of fused stages, on a CPU, where XLA's form alone runs."""

import json
import subprocess
import sys

import pytest

from benchmarks import kernel_stages, stages
from falcon_jax.config import PRESETS
from falcon_jax.errors import RequestError


def test_a_run_ends_with_a_document_and_says_why_ours_cannot_run():
    command = [sys.executable, "benchmarks/stages.py", "--models", "falcon-nano", "--weights", "int4", "--rows", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    [case] = document["cases"]
    rows = {row["name"]: row for row in case["results"]}
    assert case["case"] == "falcon-nano int4 R=8"
    assert rows["XLA, one layer"]["error"] <= 0.51  # half of what is allowed: it is the measure itself
    assert rows["XLA, both"]["us"] > 0 and "Hopper" in rows["ours, both"]["reason"]


@pytest.mark.parametrize("name", ["falcon-rw-1b", "falcon-7b"])
def test_a_layer_reads_all_of_its_projections(name):
    config = PRESETS[name]
    case = kernel_stages.StageCase(name, config, "native", 8)
    assert case.outputs["query"] == config.num_heads * config.head_dim
    arrays = {"output": 2, "down": 3, "up": 5}
    layer = {key: kernel_stages.jnp.zeros((size,), "int8") for key, size in arrays.items()}
    assert case.bytes_of(layer, "output") == 5 and case.bytes_of(layer, "both") == 10


def test_a_variant_is_called_by_what_it_changes():
    variant = kernel_stages.Variant.of({"cuda_graphs": False, "warpgroups": 6, "stages": 2})
    assert str(variant) == "ours no graphs warpgroups=6 stages=2" and variant.compiler_options
    assert str(kernel_stages.Variant()) == "ours" and kernel_stages.Variant().compiler_options is None
    arguments = stages.Arguments(variants=("cuda_graphs=false", "producer=true,warpgroups=6"))
    assert list(map(str, stages.variants_of(arguments))) == ["ours no graphs", "ours producer=True warpgroups=6"]
    with pytest.raises(RequestError, match="--variants speed is unknown; known are cuda_graphs, warpgroups"):
        stages.variants_of(stages.Arguments(variants=("speed=2",)))
    with pytest.raises(RequestError, match="--variants cuda_graphs is yes; it must be true or false"):
        stages.variants_of(stages.Arguments(variants=("cuda_graphs=yes",)))


def test_bad_arguments_are_named():
    for changes, message in [
        ({"models": ("falcon",)}, "--models falcon is unknown"),
        ({"weights": ("int3",)}, "--weights int3 is unknown"),
        ({"rows": (4097,)}, "from 1 to 4096"),
        ({"rows": (8, 512), "variants": ("group=4",)}, "group is not of plans for 8 rows, which have warpgroups"),
        ({"rows": (512,), "variants": ("groups=2",)}, "groups is not of plans for 512 rows, which have outputs"),
        ({"save": "a/b"}, "without a folder"),
    ]:
        with pytest.raises(RequestError, match=message):
            stages.check(stages.Arguments(**changes))
