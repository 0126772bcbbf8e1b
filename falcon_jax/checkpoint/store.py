"""Arrays on disk: the one module that knows orbax.

Owns two things. A folder of parameters that is filled a few arrays at a time and read a few at a time, whole or
sharded (an ordinary orbax checkpoint: any orbax reads it). And the checkpoints of a training run. Knows nothing of
Hugging Face, of configurations or of manifests.

The trap: orbax restores a flipped bit without a word, so whoever writes here keeps a checksum of each array, and
whoever reads compares it.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from falcon_jax.checkpoint import checksum
from falcon_jax.errors import CheckpointError

# A restore that orbax runs as one piece keeps this much in flight beside what it has delivered.
_IN_FLIGHT_GB = 2
_DELETED = ".deleted"  # ends the name of a checkpoint that is being deleted


class ArrayFolder:
    """An orbax checkpoint of nested dicts, addressed by dotted path ("layers.0.mlp.up.weight").

    One uncompressed file an array (zarr, one chunk): random weights do not compress, and one file reads at the
    disk's speed and appears by one rename.
    """

    def __init__(self, folder: Path):
        self._folder = folder.absolute()
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_zarr3=False, use_compression=False, restore_concurrent_gb=_IN_FLIGHT_GB
        )
        self._checkpointer = ocp.Checkpointer(handler)

    def create(self, paths: Iterable[str]) -> None:
        """Makes the checkpoint with a one-byte placeholder under each path, for `put` to replace.

        So orbax itself writes the tree's description, once. Whoever calls must see to it that no placeholder is
        left in a folder that counts as complete.
        """
        placeholder = np.zeros(1, np.int8)
        self._save(self._folder, _nest(dict.fromkeys(paths, placeholder)))

    def put(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes arrays under their paths. Each appears whole or not at all; peak memory is one copy of them."""
        incoming = self._folder.with_name(f"{self._folder.name}.incoming")
        # Keys with dots make the same file names as nested ones.
        self._save(incoming, dict(arrays))
        for path in arrays:
            if (self._folder / path).exists():  # not where a process was killed right here
                shutil.rmtree(self._folder / path)
            os.rename(incoming / path, self._folder / path)
        shutil.rmtree(incoming)

    def read_host(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
        """The arrays in host memory.

        Args:
          targets: shape and stored dtype by path.

        Raises:
          CheckpointError: an array is missing or damaged, or of another shape or dtype.
        """
        return self._restore(targets, dict.fromkeys(targets, ocp.RestoreArgs(restore_type=np.ndarray)))

    def read_device(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The arrays on device, each laid out by its target's sharding; every device's part is read for itself.

        Args:
          targets: shape, stored dtype and sharding by path.

        Raises:
          CheckpointError: an array is missing or damaged, or of another shape or dtype.
        """
        return self._restore(targets, {path: _restore_args(target) for path, target in targets.items()})

    def _save(self, folder: Path, tree: Mapping[str, Any]) -> None:
        with _quiet_about_ocdbt():
            self._checkpointer.save(folder, args=ocp.args.PyTreeSave(tree), force=True)

    def _restore(self, targets: Mapping[str, jax.ShapeDtypeStruct], arguments: Mapping[str, Any]) -> dict[str, Any]:
        for path, target in targets.items():
            self._check(path, target)
        request = ocp.args.PyTreeRestore(item=_nest(targets), restore_args=_nest(arguments), partial_restore=True)
        try:
            restored = self._checkpointer.restore(self._folder, args=request)
        except Exception as error:  # orbax raises ValueError, KeyError and more
            names = ", ".join(list(targets)[:3]) + (", ..." if len(targets) > 3 else "")
            raise CheckpointError(
                f"{self._folder}: cannot read {names}: {_first_line(error)}: convert the checkpoint again"
            ) from error
        return {path: _walk_to(restored, path) for path in targets}

    def _check(self, path: str, target: jax.ShapeDtypeStruct) -> None:
        """Finds a damaged array before orbax does, which would name none but the whole folder."""
        folder = self._folder / path
        data = folder / ".".join("0" * max(len(target.shape), 1))
        try:
            described = json.loads((folder / ".zarray").read_text())
            found = (tuple(described["shape"]), described["dtype"].lstrip("<|"))
            size = data.stat().st_size
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder} is missing or damaged ({error}): convert again") from error
        # numpy has no code of its own for bfloat16.
        expected = (target.shape, target.dtype.name if target.dtype.kind == "V" else target.dtype.str.lstrip("<|"))
        if found != expected or size != target.size * target.dtype.itemsize:
            raise CheckpointError(
                f"{folder} holds {size} bytes as {found[1]}{list(found[0])}, expected "
                f"{target.size * target.dtype.itemsize} as {expected[1]}{list(expected[0])}: convert again"
            )


class DamagedCheckpointError(CheckpointError):
    """A training checkpoint whose files are not as they were written. The message says no way out: see the caller's."""


class TrainCheckpoints:
    """The checkpoints of a training run in one folder: numbered by step, the last few kept, each checked on restore.

    Saving copies the state off the device and returns; the writing goes on in the background, so the state may be
    donated at once. A process killed in the midst leaves the checkpoints before it intact.

    Args:
      folder: made if need be.
      max_to_keep: older checkpoints are deleted; None keeps all that `delete` is not asked to.
    """

    def __init__(self, folder: str | os.PathLike[str], *, max_to_keep: int | None = 2):
        self._folder = Path(folder).absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        # Two folders are written at the same time: processes that wait for each other must do so for the same one.
        alone = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=self._folder.name)
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, create=True, multiprocessing_options=alone)
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=("state", "about"))
        self._deleted: set[int] = set()

    @property
    def folder(self) -> Path:
        return self._folder

    def save(self, step: int, state: Any, metadata: Mapping[str, Any] | None = None) -> None:
        """Saves a pytree of arrays, and a JSON-able dict beside it, as checkpoint `step`.

        Raises:
          CheckpointError: there is a checkpoint of that step already, or the disk refuses.
        """
        leaves = _named_leaves(state)
        arrays = {name: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for name, leaf in leaves.items()}
        about = {"metadata": dict(metadata or {}), "arrays": _describe(arrays)}
        about["sha256"] = _digest(about)
        if step in self.all_steps():
            raise CheckpointError(f"{self._folder} has a checkpoint of step {step} already")
        request = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), about=ocp.args.JsonSave(about))
        self._manager.save(step, args=request, force=True)

    def all_steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        return sorted(set(self._manager.all_steps()) - self._deleted)

    def latest_step(self) -> int | None:
        """The last complete checkpoint's step, or None."""
        return max(self.all_steps(), default=None)

    def delete(self, step: int) -> None:
        """Deletes a checkpoint that is on disk. A process killed in the midst leaves none that counts.

        Of several processes one may do so alone; the others go on listing it.
        """
        deleted = self._folder / f"{step}{_DELETED}"
        os.rename(self._folder / str(step), deleted)
        shutil.rmtree(deleted)
        self._deleted.add(step)

    def sweep(self) -> None:
        """Removes what processes killed in `delete` left. Of several processes one may do so alone."""
        for left in self._folder.glob(f"*{_DELETED}"):
            shutil.rmtree(left)

    def restore(self, abstract_state: Any, *, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """The state of checkpoint `step` (the latest if None), and the metadata saved with it.

        Args:
          abstract_state: a tree of arrays or ShapeDtypeStructs; its structure, shapes, dtypes and shardings are
            what is returned. A leaf without a sharding goes to JAX's default device.

        Raises:
          CheckpointError: there is none, it holds another state than that, or cannot be read; of these
            DamagedCheckpointError where its bits have changed.
        """
        step = self._existing(step)
        where, about = str(self._folder / str(step)), self._about(step)
        stored = about["arrays"]
        targets = {name: _target(leaf) for name, leaf in _named_leaves(abstract_state).items()}
        _compare_states(where, targets, stored)
        arguments = {name: _restore_args(target) for name, target in targets.items()}
        request = ocp.args.Composite(state=ocp.args.PyTreeRestore(item=targets, restore_args=arguments))
        try:
            restored = self._manager.restore(step, args=request)["state"]
        except Exception as error:
            lacks_memory = isinstance(error, MemoryError | jax.errors.JaxRuntimeError)
            kind = CheckpointError if lacks_memory else DamagedCheckpointError
            raise kind(f"{where}: cannot read its arrays: {_first_line(error)}") from error
        for name, text in checksum.checksums(restored).items():
            if text != stored[name]["checksum"]:
                raise DamagedCheckpointError(f"{where}: {name} has changed since it was saved")
        leaves = [restored[name] for name in targets]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), about["metadata"]

    def metadata(self, *, step: int | None = None) -> dict[str, Any]:
        """The metadata saved with checkpoint `step` (the latest if None), without reading its state.

        Raises:
          CheckpointError: there is none; DamagedCheckpointError: its description cannot be read.
        """
        return self._about(self._existing(step))["metadata"]

    def _existing(self, step: int | None) -> int:
        step = self.latest_step() if step is None else step
        if step is not None and step not in self.all_steps():
            self._manager.reload()  # another process may have seen it sooner, on a disk of the network
        if step is None or step not in self.all_steps():
            wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise CheckpointError(f"{self._folder} holds {wanted}; there are {self.all_steps() or 'none'}")
        return step

    def _about(self, step: int) -> dict[str, Any]:
        """Keys "metadata" and, for each array, shape, dtype and checksum under "arrays"."""
        try:
            about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
            recorded = about.pop("sha256")
        except Exception as error:  # orbax and json raise many types for damaged files
            where = self._folder / str(step)
            raise DamagedCheckpointError(f"{where}: cannot read its description: {_first_line(error)}") from error
        if _digest(about) != recorded:
            raise DamagedCheckpointError(f"{self._folder / str(step)}: its description has changed since it was saved")
        return about

    def wait(self) -> None:
        """Returns when every save so far is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the saves and ends the background threads."""
        self._manager.close()

    def __enter__(self) -> "TrainCheckpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextlib.contextmanager
def _quiet_about_ocdbt() -> Iterator[None]:
    """Keeps back orbax's warning, on stderr at each save, that there is no OCDBT database to merge: by choice."""

    def says_something_else(record: logging.LogRecord) -> bool:
        return "Skipping merge of OCDBT" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(says_something_else)
    try:
        yield
    finally:
        logger.removeFilter(says_something_else)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by a name made of their keys, in the tree's order; flat, so that any container restores as itself."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise CheckpointError("two leaves of the state have the same path when written with dots: rename a key")
    return named


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _describe(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    texts = checksum.checksums(arrays)
    return {
        name: {"shape": list(array.shape), "dtype": np.dtype(array.dtype).name, "checksum": texts[name]}
        for name, array in arrays.items()
    }


def _restore_args(target: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
    return ocp.ArrayRestoreArgs(sharding=target.sharding, global_shape=target.shape, dtype=target.dtype)


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        default = jax.config.jax_default_device or jax.local_devices()[0]
        device = jax.devices(default)[0] if isinstance(default, str) else default
        sharding = jax.sharding.SingleDeviceSharding(device)
    return jax.ShapeDtypeStruct(np.shape(leaf), np.dtype(leaf.dtype), sharding=sharding)


def _compare_states(where: str, targets: Mapping[str, jax.ShapeDtypeStruct], stored: Mapping[str, Any]) -> None:
    lacking = [name for name in targets if name not in stored]
    surplus = [name for name in stored if name not in targets]
    if lacking or surplus:
        raise CheckpointError(
            f"{where} holds another state: it lacks {lacking[:3] or 'nothing'} ({len(lacking)}) and has in excess "
            f"{surplus[:3] or 'nothing'} ({len(surplus)}): resume with the settings that it was saved with"
        )
    for name, target in targets.items():
        shape, dtype = tuple(stored[name]["shape"]), stored[name]["dtype"]
        if (shape, dtype) != (target.shape, target.dtype.name):
            raise CheckpointError(
                f"{where}: {name} is {dtype}{list(shape)}, expected {target.dtype.name}{list(target.shape)}: "
                "resume with the settings that it was saved with"
            )


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts with string keys of dotted paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _walk_to(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree[key]
    return tree


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
