"""How the engine's functions are compiled: with CUDA graphs by default, without them where the model says so."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from falcon_jax import Falcon
from falcon_jax.generate import programs
from falcon_jax.generate.engine import Engine
from falcon_jax.generate.sampling import Sampling
from falcon_jax.generate.state import Model
from falcon_jax.model.peers import Peers
from falcon_jax.model.step import ForwardOptions
from pallas_kernels.peers import Addresses
from tests import models
from tests.compilations import count_compilations
from tests.generate.runs import drain
from tests.pallas_kernels import hopper

CONFIG = models.tiny("falcon-40b-alibi", eos_token_ids=())
CAPTURED, NOT_CAPTURED = (Model(CONFIG, ForwardOptions(), None, cuda_graphs) for cuda_graphs in (True, False))


NO_PEERS = Peers(*[Addresses(jnp.zeros((1, 4), jnp.int32), 8, 64)] * 2)


def scale(array: jax.Array, *, factor: int, model: Model, peers: Peers | None = None) -> jax.Array:
    assert model.config == CONFIG
    return array * factor


def test_the_option_reaches_xla_only_where_graphs_are_off(monkeypatch):
    monkeypatch.setattr(programs, "WITHOUT_CUDA_GRAPHS", {"xla_gpu_no_such_option": ""})
    program = programs.Program(scale, static_argnames="factor")
    assert program(jnp.ones(3), factor=2, model=CAPTURED).tolist() == [2, 2, 2]
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_option"):
        program(jnp.ones(3), factor=2, model=NOT_CAPTURED)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_option"):
        program.lower(jnp.ones(3), factor=2, model=NOT_CAPTURED).compile()


def test_loops_are_captured_whole_on_one_device_and_in_parts_over_a_mesh(monkeypatch, cpu_devices):
    monkeypatch.setattr(programs, "WITH_LOOPS_IN_CUDA_GRAPHS", {"xla_gpu_no_such_option": ""})
    monkeypatch.setattr(programs, "WITH_SMALL_CUDA_GRAPHS", {"xla_gpu_nor_this": ""})
    loop, other = (programs.Program(scale, static_argnames="factor", loops=loops) for loops in (True, False))
    over_a_mesh = CAPTURED._replace(mesh=jax.make_mesh((1,), ("tensor",), devices=cpu_devices[:1]))
    for program, model in ((other, CAPTURED), (other, over_a_mesh), (loop, NOT_CAPTURED)):
        assert program(jnp.ones(3), factor=2, model=model).tolist() == [2, 2, 2]
    for model, option in ((CAPTURED, "xla_gpu_no_such_option"), (over_a_mesh, "xla_gpu_nor_this")):
        with pytest.raises(jax.errors.JaxRuntimeError, match=option):
            loop(jnp.ones(3), factor=2, model=model)
    # Where kernels reach the other devices' memory nothing of a loop is XLA's to send, and it is one graph.
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_option"):
        loop(jnp.ones(3), factor=2, model=over_a_mesh, peers=NO_PEERS)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_no_such_option=x --xla_gpu_nor_this=5")
    chosen = programs.Program(scale, static_argnames="factor", loops=True)
    for model in (CAPTURED, over_a_mesh):
        assert chosen(jnp.ones(3), factor=2, model=model).tolist() == [2, 2, 2]


def test_only_a_concurrent_loop_s_parts_run_at_the_same_time(monkeypatch):
    monkeypatch.setattr(programs, "AT_THE_SAME_TIME", {"xla_gpu_no_such_option": ""})
    one_by_one, concurrent = (
        programs.Program(scale, static_argnames="factor", loops=True, concurrent=concurrent)
        for concurrent in (False, True)
    )
    assert one_by_one(jnp.ones(3), factor=2, model=CAPTURED).tolist() == [2, 2, 2]
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_option"):
        concurrent(jnp.ones(3), factor=2, model=CAPTURED)
    assert concurrent.is_concurrent(CAPTURED) and not one_by_one.is_concurrent(CAPTURED)
    assert not concurrent.is_concurrent(NOT_CAPTURED)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_no_such_option=x")
    assert not programs.Program(scale, loops=True, concurrent=True).is_concurrent(CAPTURED)


def test_decoding_without_drafts_is_traced_as_it_is_compiled(monkeypatch):
    asked, bind = [], programs.bind

    def noted(config, params, options, mesh):
        asked.append(options.concurrent)
        return bind(config, params, options, mesh)

    monkeypatch.setattr(programs, "bind", noted)
    config = models.tiny("falcon-7b", num_layers=1, max_tokens=47)  # no other test's, whose traces would be taken
    engine = Engine(config, models.random_params(config))
    drain(engine.start([[1, 2, 3]], max_new_tokens=3, sampling=Sampling()))
    assert asked == [False, False, bool(programs.AT_THE_SAME_TIME)]  # prompt, first token, the others
    drain(engine.start([[1, 2, 3]], max_new_tokens=3, sampling=Sampling(), num_drafted=2))
    assert not any(asked[3:]) and len(asked) > 3


def test_the_default_options_are_known_to_xla():
    for options in (
        programs.WITH_LOOPS_IN_CUDA_GRAPHS, programs.WITH_LOOPS_IN_CUDA_GRAPHS | programs.AT_THE_SAME_TIME,
        programs.WITH_SMALL_CUDA_GRAPHS, programs.WITHOUT_CUDA_GRAPHS,
    ):  # fmt: skip
        assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2


@pytest.mark.parametrize("model", [CAPTURED, NOT_CAPTURED], ids=["captured", "not captured"])
def test_what_is_compiled_ahead_is_what_runs(model):
    program = programs.Program(scale, static_argnames="factor", donate_argnames="array")
    program.lower(jax.ShapeDtypeStruct((3,), jnp.float32), factor=2, model=model).compile()
    array = jnp.ones(3)
    with count_compilations() as compiled:
        assert program(array, factor=2, model=model).shape == (3,)
    assert compiled == [] and array.is_deleted()


def test_without_a_gpu_the_switch_changes_nothing(cpu_devices):
    params = jax.device_put(models.random_params(CONFIG), cpu_devices[0])
    drained = []
    for cuda_graphs in (True, False):
        engine = Engine(CONFIG, params, cuda_graphs=cuda_graphs)
        with count_compilations() as compiled:
            drained.append(drain(engine.start([[5, 17, 3]], max_new_tokens=8, sampling=Sampling())))
    assert compiled == [] and drained[0] == drained[1]


# What a GPU would be given, in a process that sees the compiler for one. A captured run shows in XLA's dump alone.
COMPILED_FOR_A_GPU = r"""
import dataclasses, re, sys
from pathlib import Path
import jax
from jax.experimental import topologies
from falcon_jax.config import PRESETS
from falcon_jax.generate.engine import Engine
from falcon_jax.generate.sampling import Sampling
from falcon_jax.model import params
from pallas_kernels import compat
from tests import models
from tests.pallas_kernels import hopper

topology = topologies.get_topology_desc(platform="cuda", target_config=hopper.H100.read_text(), topology="1x1x1")
layout = jax.sharding.SingleDeviceSharding(topology.devices[0])
config = models.tiny("falcon-40b-alibi", num_layers=1)

def is_in_a_graph(what, dtype, num_samples, **options):
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), params.abstract(config, dtype)
    )
    before = set(Path(sys.argv[1]).iterdir())
    with compat.assume_capability(compat.HOPPER):
        *_, decode = Engine(config, shapes, **options).lower_ahead(5, 8, Sampling(), num_samples)
        decode.compile()
    dumped = [path.read_text() for path in set(Path(sys.argv[1]).iterdir()) - before if "thunk_sequence" in path.name]
    return any("kCommandBuffer" in text.partition(what)[0] for text in dumped)

print(is_in_a_graph("end", "bfloat16", 1, cuda_graphs=False), is_in_a_graph("end", "bfloat16", 1))
# The loop as a whole, where no kernel is ours: those this compiler takes into none.
print(is_in_a_graph("kWhile", "float32", 4))

# The launches of a step of two layers, in order.
config = dataclasses.replace(PRESETS["falcon-7b"], num_layers=2)
shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), params.abstract(config, "bfloat16")
)
with compat.assume_capability(compat.HOPPER):
    *_, decode = Engine(config, shapes).lower_ahead(4000, 64, Sampling())
    text = decode.compile().as_text()
for line in text.splitlines():
    if found := re.search(r"(.*) custom-call[(].*/(project|attention_norm|decode_attention)/", line):
        print(found[2] + (" of the MLP" if f",{config.mlp_width}]" in found[1] else ""))
"""


@pytest.fixture(scope="module")
def compiled_for_a_gpu(tmp_path_factory) -> list[str]:
    """What COMPILED_FOR_A_GPU prints."""
    folder = tmp_path_factory.mktemp("dumped")
    environment = hopper._environment() | {"XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_as_text"}
    command = [sys.executable, "-c", COMPILED_FOR_A_GPU, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=hopper.ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler runs on Linux")
def test_xla_captures_the_decoding_for_a_gpu_unless_told_otherwise(compiled_for_a_gpu):
    assert compiled_for_a_gpu[:2] == ["False True", "True"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler runs on Linux")
@pytest.mark.skipif(not programs.AT_THE_SAME_TIME, reason="this JAX runs one after the other")
def test_queries_keys_and_values_are_begun_before_the_mlp_that_runs_beside_attention(compiled_for_a_gpu):
    """Begun behind it they would wait for the few multiprocessors that it leaves to attention."""
    launches = compiled_for_a_gpu[2:]
    of_mlp = [i for i, name in enumerate(launches) if name == "project of the MLP"]
    assert len(of_mlp) == 2 and [launches[i - 1] for i in of_mlp] == ["project"] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_switch_changes_no_text_on_a_gpu(dtype):
    loaded = [Falcon.from_checkpoint(dtype=dtype, cuda_graphs=cuda_graphs) for cuda_graphs in (True, False)]
    assert [model.engine.model.cuda_graphs for model in loaded] == [True, False]
    drawn: dict[str, Any] = {"temperature": 0.9, "seed": 3, "num_samples": 3}
    some: list[dict[str, Any]] = [
        {},
        {"speculate": 4},
        drawn,
        drawn | {"top_k": 50, "top_p": 0.9},
        drawn | {"min_p": 0.05, "repetition_penalty": 1.2, "speculate": 3},
        {"stop": ["."]},
    ]
    for options in some:
        # Rows that end sooner and later, and steps that are no multiple of what a call makes.
        prompts = ["The sea", "It was a dark night, and", "the lighthouse keeper the lighthouse keeper the"]
        captured, launched = (model.generate(prompts, max_new_tokens=75, **options) for model in loaded)
        assert captured == launched, options
