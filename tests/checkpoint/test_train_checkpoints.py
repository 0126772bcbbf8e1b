import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from falcon_jax import sharding
from falcon_jax.checkpoint.store import DamagedCheckpointError, TrainCheckpoints
from falcon_jax.errors import CheckpointError


def make_state(scale=1.0):
    params = {"embed": {"weight": jnp.arange(64.0).reshape(8, 8) * scale}, "layers": {0: {"b": jnp.ones(8) * scale}}}
    return {"params": params, "optimizer": optax.adamw(1e-3).init(params), "step": jnp.zeros((), jnp.int32)}


def equal(left, right):
    return jax.tree.structure(left) == jax.tree.structure(right) and all(
        np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right))
    )


def test_a_state_comes_back_with_its_structure_and_metadata(tmp_path):
    state = make_state()
    with TrainCheckpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(3, state, {"tokens": 12, "data": {"epoch": 1}})
        checkpoints.wait()
        restored, metadata = checkpoints.restore(jax.eval_shape(lambda: state))
    assert equal(state, restored)
    assert metadata == {"tokens": 12, "data": {"epoch": 1}}


def test_a_state_may_be_donated_right_after_the_save(tmp_path):
    state = make_state()
    expected = jax.tree.map(np.array, state)
    double = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2 + 1, tree), donate_argnums=0)
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        for _ in range(5):
            state = double(state)
        checkpoints.wait()
        assert equal(expected, checkpoints.restore(state)[0])


def test_only_the_last_checkpoints_are_kept_and_the_latest_is_restored(tmp_path):
    with TrainCheckpoints(tmp_path, max_to_keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(float(step)))
        checkpoints.wait()
        assert checkpoints.all_steps() == [2, 3]
    with TrainCheckpoints(tmp_path) as again:
        assert again.latest_step() == 3
        assert equal(again.restore(make_state())[0], make_state(3.0))
        assert equal(again.restore(make_state(), step=2)[0], make_state(2.0))
        with pytest.raises(CheckpointError, match="step 3 already"):
            again.save(3, make_state())
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 1; there are \[2, 3\]"):
            again.restore(make_state(), step=1)


def test_a_deleted_checkpoint_is_gone_and_what_is_left_of_it_counts_for_nothing(tmp_path, monkeypatch):
    with TrainCheckpoints(tmp_path, max_to_keep=None) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(float(step)))
        checkpoints.wait()
        checkpoints.delete(2)
        assert checkpoints.all_steps() == [1, 3]
        with monkeypatch.context() as context:
            context.setattr("shutil.rmtree", lambda path: None)  # killed before it
            checkpoints.delete(3)
    with TrainCheckpoints(tmp_path, max_to_keep=None) as again:
        assert again.all_steps() == [1]
        again.sweep()
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
        assert equal(again.restore(make_state())[0], make_state(1.0))


def test_a_checkpoint_that_another_process_wrote_since_is_found(tmp_path):
    with TrainCheckpoints(tmp_path) as here:
        with TrainCheckpoints(tmp_path) as there:
            there.save(5, make_state())
        assert equal(here.restore(make_state(), step=5)[0], make_state())


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch):
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(3)})
        checkpoints.wait()
        restore = checkpoints._manager.restore

        def full(step, args):
            if "state" in args.keys():  # noqa: SIM118
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
            return restore(step, args=args)

        monkeypatch.setattr(checkpoints._manager, "restore", full)
        with pytest.raises(CheckpointError, match="RESOURCE_EXHAUSTED") as raised:
            checkpoints.restore({"w": jnp.zeros(3)})
        assert not isinstance(raised.value, DamagedCheckpointError)


def test_a_state_saved_on_one_mesh_restores_onto_another(tmp_path, cpu_devices):
    mesh = sharding.make_mesh(fsdp=4, tensor=2, devices=cpu_devices)
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    state = {"w": jax.device_put(jnp.arange(64.0).reshape(8, 8), spec)}
    other = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        target = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=other)}
        restored = checkpoints.restore(target)[0]["w"]
    assert restored.sharding == other
    assert np.array_equal(restored, state["w"])


def test_another_state_is_refused_by_name(tmp_path):
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state())
        checkpoints.wait()
        state = make_state()
        with pytest.raises(CheckpointError, match=r"lacks \['ema'\] \(1\)"):
            checkpoints.restore({**state, "ema": jnp.zeros(2)})
        state["params"]["embed"]["weight"] = jnp.zeros((8, 4))
        with pytest.raises(CheckpointError, match=r"params.embed.weight is float32\[8, 8\], expected float32\[8, 4\]"):
            checkpoints.restore(state)


def test_a_flipped_bit_in_any_file_is_noticed_or_is_of_nothing_that_is_read(tmp_path):
    generator = np.random.default_rng(0)
    state = {name: jnp.asarray(generator.normal(size=4096), jnp.float32) for name in "ab"} | {"step": jnp.zeros(())}
    metadata = {"seconds": 12.5}
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, metadata)
        checkpoints.wait()
        refused_bytes = 0
        for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
            content = path.read_bytes()
            outcomes = set()
            for place in {len(content) // 3, len(content) // 2}:
                path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
                try:
                    restored, found = checkpoints.restore(state)
                except DamagedCheckpointError:
                    outcomes.add("refused")
                else:
                    assert equal(state, restored) and found == metadata, path
                    outcomes.add("read")
            path.write_bytes(content)
            if outcomes == {"refused"}:
                refused_bytes += len(content)
        # Random bits take their room in whatever file they are: so none of those let a flip pass.
        assert refused_bytes > 2 * 4096 * 4 * 0.9
        assert checkpoints.metadata() == metadata
        assert equal(state, checkpoints.restore(state)[0])


@pytest.mark.parametrize(("old", "new"), [(b"12.5", b"13.5"), (b"float32", b"float31"), (b"seconds", b"secunds")])
def test_a_description_that_was_changed_is_refused(tmp_path, old, new):
    state = {"w": jnp.ones(3)}
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"seconds": 12.5})
        checkpoints.wait()
        path = tmp_path / "1" / "about" / "metadata"
        path.write_bytes(path.read_bytes().replace(old, new))
        for read in (checkpoints.metadata, lambda: checkpoints.restore(state)):
            with pytest.raises(DamagedCheckpointError, match="its description has changed"):
                read()


def test_a_process_killed_in_a_save_leaves_the_checkpoint_before(tmp_path):
    program = textwrap.dedent("""
        import sys, jax.numpy as jnp
        from falcon_jax.checkpoint.store import TrainCheckpoints
        checkpoints = TrainCheckpoints(sys.argv[1])
        checkpoints.save(1, {"w": jnp.ones(1000)})
        checkpoints.wait()
        checkpoints.save(2, {"w": jnp.ones(1000)})
        print("saving", flush=True)
        checkpoints.wait()
        for step in range(3, 1000):
            checkpoints.save(step, {"w": jnp.ones(1000)})
    """)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == b"saving\n"
        process.send_signal(signal.SIGKILL)
    with TrainCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is not None
        restored, _ = checkpoints.restore({"w": jnp.zeros(1000)})
    assert np.array_equal(restored["w"], np.ones(1000))
