import numpy as np
import pytest

from falcon_jax import sharding
from falcon_jax.train.batches import Batches, make_array, place_rows
from falcon_jax.train.schedule import BatchRamp
from falcon_jax.train.shards import Split

LENGTH = 6
TOKENS = Split.of(np.arange(1000, dtype=np.uint16), np.zeros(1, np.int64), 1000).tokens
RAMP = BatchRamp(full_rows=16, length=LENGTH, start_rows=4, quantum=4, ramp_tokens=400)
PLAIN = BatchRamp(full_rows=16, length=LENGTH)


@pytest.fixture(params=["one device", "a mesh", "a pipeline"])
def mesh(request, cpu_devices):
    sizes = {"a mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "a pipeline": {"data": 4, "stage": 2}}
    if request.param == "one device":
        return None
    return sharding.make_mesh(**sizes[request.param], devices=cpu_devices)


def test_a_step_has_the_rows_that_come_next(mesh) -> None:
    one_by_one = Batches(TOKENS, BatchRamp(full_rows=1, length=LENGTH), 1, seed=3, mesh=None)
    batches = Batches(TOKENS, PLAIN, 4, seed=3, mesh=mesh)
    for step in (0, 1, 7):
        [placed] = batches.placed(step)
        assert placed.shape == (4, 4, LENGTH + 1)
        expected = np.concatenate([one_by_one.rows(16 * step + row) for row in range(16)])
        np.testing.assert_array_equal(np.asarray(placed).reshape(16, -1), expected)
        np.testing.assert_array_equal(batches.rows(step), expected)


def test_a_ramp_uses_each_row_once_in_arrays_of_one_shape(mesh) -> None:
    batches = Batches(TOKENS, RAMP, 4, seed=3, mesh=mesh)
    plain = Batches(TOKENS, PLAIN, 4, seed=3, mesh=None)
    used, shapes, counts = [], set(), []
    for step in range(12):
        tokens, *num_used = batches.placed(step)
        count = num_used[0] if num_used else tokens.shape[0]
        shapes.add(tokens.shape)
        counts.append(int(count) * 4)
        used.append(np.asarray(tokens)[:count].reshape(-1, LENGTH + 1))
        np.testing.assert_array_equal(used[-1], batches.rows(step))
    assert counts == [RAMP.rows(step) for step in range(12)] and set(counts) == {4, 8, 12, 16}
    together = np.concatenate(used)
    expected = np.concatenate([plain.rows(step) for step in range(12)])
    np.testing.assert_array_equal(together, expected[: len(together)])
    # A pipeline is compiled for each size of the ramp, all else once.
    is_pipeline = mesh is not None and mesh.shape["stage"] > 1
    assert len(shapes) == (4 if is_pipeline else 1)


def test_the_stream_begins_at_any_step() -> None:
    batches = Batches(TOKENS, PLAIN, 1, seed=0, mesh=None)
    with batches.stream(5) as stream:
        for step in (5, 6, 7):
            [tokens] = next(stream)
            np.testing.assert_array_equal(tokens[0], batches.rows(step))


def test_devices_that_hold_the_same_rows_share_the_making_of_them(cpu_devices) -> None:
    mesh = sharding.make_mesh(data=2, tensor=4, devices=cpu_devices)
    asked = []

    def part(index: tuple[slice, ...]) -> np.ndarray:
        asked.append(index)
        return np.zeros((1, 2, 3))

    made = make_array((1, 4, 3), sharding.micro_batches_sharding(mesh), part)
    assert len(made.addressable_shards) == 8 and len(asked) == 2
    rows = np.arange(8).reshape(4, 2)
    np.testing.assert_array_equal(place_rows(rows, mesh), rows)


def test_a_saved_batch_holds_the_step_and_leaves_no_half_file(tmp_path) -> None:
    batches = Batches(TOKENS, RAMP, 4, seed=3, mesh=None)
    batches.save(2, tmp_path / "batch.npz", learning_rate=0.5)
    saved = np.load(tmp_path / "batch.npz")
    np.testing.assert_array_equal(saved["tokens"], batches.rows(2))
    assert (int(saved["step"]), float(saved["learning_rate"])) == (2, 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["batch.npz"]
