"""Each step's rows on the devices: a function of the step's number, and of what data and ramp say of it.

The one place that knows the data's order and its reader. Every process makes its own devices' rows and no others, by
the same code for one process and many.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding
from jaxtyping import Integer

from falcon_jax import sharding
from falcon_jax.train import order
from falcon_jax.train.schedule import BatchRamp
from falcon_jax.train.shards import Tokens


class Batches:
    """Tokens as `step.make_train_step` takes them: A micro-batches of R rows."""

    def __init__(self, tokens: Tokens, ramp: BatchRamp, num_micro_batches: int, seed: int, mesh: Mesh | None) -> None:
        """tokens: of the train split, one after the other. The rows of a full batch fall into `num_micro_batches`."""
        self._order = order.RowOrder(tokens, ramp.length, seed)
        self._ramp, self._mesh = ramp, mesh
        self._micro_rows = ramp.full_rows // num_micro_batches

    def rows(self, step: int) -> Integer[np.ndarray, "B columns"]:
        """The rows that a step trains on, `length + 1` tokens each, all of them and on the host."""
        return self._order.rows(self._ramp.rows_before(step), self._ramp.rows(step))

    def placed(self, step: int) -> tuple[Any, ...]:
        """What the step's function takes besides state and rate.

        Tokens [A, R, length + 1]. Under a ramp then num_used: how many of the A count, and the rest is 0. But in a
        pipeline A itself grows, since there a micro-batch that does not count would take as long as one that does.
        """
        first, num_rows = self._ramp.rows_before(step), self._ramp.rows(step)
        R, columns = self._micro_rows, self._ramp.length + 1
        num_used = num_rows // R
        has_fixed_shape = self._mesh is None or self._mesh.shape[sharding.STAGE_AXIS] == 1
        A = self._ramp.full_rows // R if has_fixed_shape else num_used

        def part(index: tuple[slice, ...]) -> np.ndarray:
            numbers, rows = range(A)[index[0]], range(R)[index[1]]
            made = [self._order.rows(first + number * R + rows.start, len(rows)) for number in numbers[:num_used]]
            part = np.stack(made)
            return np.pad(part, ((0, len(numbers) - len(made)), (0, 0), (0, 0)))[:, :, index[2]]

        tokens = make_array((A, R, columns), self._sharding, part)
        if not self._ramp.ramp_tokens or not has_fixed_shape:
            return (tokens,)
        return tokens, np.int32(num_used)

    @contextmanager
    def stream(self, first_step: int) -> Iterator[Iterator[tuple[Any, ...]]]:
        """`placed` of first_step, first_step + 1, ..., without end, made ahead of the reader."""
        with order.batches(self.placed, first_step) as ahead:
            yield ahead

    def epochs(self, step: int) -> float:
        """How often the data was seen when so many steps were done."""
        return self._ramp.rows_before(step) / self._order.num_windows

    def save(self, step: int, path: Path, **values: Any) -> None:
        """Writes a step's rows and some values as .npz, whole or not at all: what is needed to look into the step."""
        incoming = path.with_name(f"{path.name}.incoming.npz")
        np.savez(incoming, tokens=self.rows(step), step=step, **values)
        incoming.replace(path)

    @property
    def _sharding(self) -> Sharding | None:
        return None if self._mesh is None else sharding.micro_batches_sharding(self._mesh)


def make_array(
    shape: tuple[int, ...], where: Sharding | None, part: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """`part(index)` for each different index of this process's devices, on those devices; None: on the default one.

    A part that several devices hold, such as those of one tensor group, is made once.
    """
    if where is None:  # not bound to the device, as the state of a single one is not, or the step would compile twice
        return jax.device_put(part(tuple(slice(0, size) for size in shape)))
    made: dict[Any, np.ndarray] = {}

    def once(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        key = tuple(number.indices(size) for number, size in zip(index, shape))
        if key not in made:
            made[key] = part(index)
        return made[key]

    return jax.make_array_from_callback(shape, where, once)


def place_rows(rows: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """A host array that every process has, with its rows over the mesh's devices."""
    if mesh is None:
        return jax.device_put(rows)
    return make_array(rows.shape, sharding.batch_sharding(rows.shape, mesh), lambda index: rows[index])
