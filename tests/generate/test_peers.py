"""Decoding over devices whose kernels reach each other's memory: when it does, and what is compiled then."""

import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from falcon_jax import Falcon, sharding
from falcon_jax.config import PRESETS
from falcon_jax.errors import RequestError
from falcon_jax.generate import engine as engines
from falcon_jax.generate.engine import Engine
from falcon_jax.generate.sampling import Sampling
from falcon_jax.model import params as model_params
from falcon_jax.model import peers
from falcon_jax.model.peers import Peers
from falcon_jax.model.step import ForwardOptions
from pallas_kernels.peers import Addresses
from tests import models
from tests.generate.runs import drain
from tests.pallas_kernels import hopper

CONFIG = models.tiny("falcon-40b", eos_token_ids=())


def make_engine(devices, sums=None, **axes):
    mesh = sharding.make_mesh(**axes, devices=devices) if axes else None
    params = model_params.init(CONFIG, jax.random.key(0), jnp.float32, mesh)
    return Engine(CONFIG, params, ForwardOptions(sums=sums), mesh)


def test_without_gpus_xla_adds_up_and_what_cannot_be_had_is_refused(cpu_devices):
    plain, told, asked = (make_engine(cpu_devices, sums, tensor=2) for sums in (None, "xla", "peers"))
    assert plain.peers(1) is None and told.peers(1) is None
    with pytest.raises(RequestError, match="sums='peers' is not possible here: the kernels take bfloat16 and a width"):
        asked.peers(1)
    assert make_engine(cpu_devices).peers(1) is None
    with pytest.raises(ValueError, match="sums='nccl' is unknown; known are 'peers', 'xla' and None"):
        ForwardOptions(sums="nccl")
    with pytest.raises(ValueError, match="sums='nccl' is unknown"):
        Falcon.from_checkpoint(sums="nccl")
    assert Falcon.from_config(CONFIG, sums="xla").engine.model.options.sums == "xla"


def test_who_can_take_part_and_why_not(cpu_devices):
    mesh = sharding.make_mesh(tensor=2, devices=cpu_devices)
    wide = PRESETS["falcon-40b"]

    def reason(*given):
        return str(peers.reason_against(*given))

    assert "it needs a Hopper GPU" in reason(wide, jnp.dtype("bfloat16"), mesh, 1)
    assert "not float32 and" in reason(wide, jnp.dtype("float32"), mesh, 1)
    assert reason(wide, jnp.dtype("bfloat16"), mesh, 65) == "the kernels take up to 64 tokens a step, not 65"


def test_memory_is_made_once_for_every_eight_tokens_and_given_to_what_decodes(cpu_devices, monkeypatch):
    made, given = [], []

    def memory(config, mesh, num_rows):
        made.append((config.width, mesh.size, num_rows))
        table = jnp.zeros((2, 6), jnp.int32)
        return types.SimpleNamespace(peers=Peers(*[Addresses(table, num_rows, 64)] * 2))

    def decode(*args, peers, **options):
        given.append(peers.rows.num_rows)
        return plain(*args, **options)

    plain = engines.decode
    monkeypatch.setattr(peers, "reason_against", lambda *_: None)
    monkeypatch.setattr(peers, "Memory", memory)
    monkeypatch.setattr(engines, "decode", decode)
    engine = make_engine(cpu_devices, tensor=2)
    drain(engine.start([[1, 2], [6]], max_new_tokens=40, sampling=Sampling()))
    assert given == [8, 8] and made == [(CONFIG.width, 2, 8)]
    assert engine.peers(9) is engine.peers(16) and engine.peers(8) is engine.peers(1)
    assert made == [(CONFIG.width, 2, 8), (CONFIG.width, 2, 16)]


# What two GPUs would be given, in a process that sees the compiler for one. XLA's dump there shows no kernel of ours in
# a CUDA graph, which it does on a GPU.
COMPILED_FOR_TWO_GPUS = """
import dataclasses, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from falcon_jax import Falcon, sharding
from falcon_jax.config import PRESETS
from falcon_jax.generate import programs
from falcon_jax.generate.sampling import Sampling
from falcon_jax.generate.state import Chunk, DecodeState, Model, Request, Rows
from falcon_jax.model import params as model_params
from falcon_jax.model.cache import KVCache
from falcon_jax.model.peers import Peers
from falcon_jax.model.step import ForwardOptions
from pallas_kernels import compat
from pallas_kernels.peers import Addresses
from tests.pallas_kernels import hopper

name, weights, batch = sys.argv[2], sys.argv[3], int(sys.argv[4])
topology = topologies.get_topology_desc(platform="cuda", target_config=hopper.H100.read_text(), topology="1x1x2")
mesh = sharding.make_mesh(tensor=2, devices=topology.devices)
config = dataclasses.replace(PRESETS[name], num_layers=2, eos_token_ids=())

def placed(leaf, layout):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)

def rows(leaf):
    return placed(leaf, sharding.rows_sharding(leaf.shape, mesh))

layouts = model_params.layouts(config, mesh, weights)
leaves = model_params.flatten(model_params.abstract(config, jnp.bfloat16, weights))
params = model_params.unflatten({path: placed(leaf, layouts[path]) for path, leaf in leaves.items()})
cache = jax.eval_shape(lambda: KVCache.create(config, batch, 512, jnp.bfloat16))
tokens, done = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.bool)
chunk = jax.eval_shape(lambda: Chunk.empty(batch))
request = Request(jax.ShapeDtypeStruct((), jnp.int32), done)
state, request = jax.tree.map(rows, (DecodeState(cache, Rows(tokens, done, tokens), chunk), request))
table = jax.ShapeDtypeStruct((2, 6), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("tensor")))
given = Peers(*(Addresses(table, 64, width) for width in (config.width, config.vocab_size // 2)))
sampling = Sampling()
rest = None, sampling.values, np.array([-1], np.int32)
model = Model(config, ForwardOptions(), mesh)
for peers in (given, None):
    with compat.assume_capability(compat.HOPPER):
        programs.decode.lower(params, state, request, *rest, peers=peers, model=model, kind=sampling.kind).compile()
for path in sorted(Path(sys.argv[1]).glob("*jit_decode.thunk_sequence_after*")):
    body = path.read_text().partition("body:")[2]
    print(body.count(" kCustomCall "), any(word in body for word in ("kAllReduce", "kAllGather", "kCollective")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler runs on Linux")
def test_with_peers_a_step_is_the_launches_of_one_device_and_no_collective(tmp_path):
    environment = hopper._environment() | {"XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text"}
    command = [sys.executable, "-c", COMPILED_FOR_TWO_GPUS, str(tmp_path), "falcon-40b-alibi", "int8", "1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=hopper.ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    # Three launches a layer, one for the token's vector, the head's and one that gathers the logits.
    # The compiler tells of kernels before. Without peers the same search does find collectives.
    assert result.stdout.splitlines()[-2:] == ["9 False", "7 True"]
