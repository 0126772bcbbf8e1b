"""What the commands in scripts/ share at their start and at their end. Not for programs that use the library.

Owns the settings of JAX that hold for a whole process, which a library must leave to its caller: nothing else in
falcon_jax sets one, or imports this. The trap: JAX looks at them when it first compiles, so they come before that.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from falcon_jax.checkpoint import manifest
from falcon_jax.config import FalconConfig
from falcon_jax.errors import USER_ERRORS, RequestError, exit_code, one_line
from falcon_jax.generate.engine import Engine
from falcon_jax.generate.sampling import Sampling
from falcon_jax.model import params
from falcon_jax.model.params import Params
from falcon_jax.model.step import ForwardOptions
from falcon_jax.tokenizer import Tokenizer

# Entries that were not read for longest go first. falcon-nano's seven programs take 0.2 MB on a CPU.
# With a limit JAX also locks the folder to read and to write, so that no process reads what another has half written.
MAX_CACHE_BYTES = 2 * 2**30


def finish(work: Callable[[], int | None], *, known: type[Exception] | tuple[()] = (), less: str) -> int:
    """`errors.exit_code` of a command that runs a model over data.

    Args:
      known: what else is told in one line, besides files that cannot be read or written.
      less: what to do where the device's memory runs out.
    """

    def told() -> int | None:
        try:
            return work()
        except (ValueError, NotImplementedError) as error:
            # An attention that is unknown, or that cannot run here, is found when the model runs.
            if isinstance(error, USER_ERRORS) or "attention: implementation=" not in str(error):
                raise
            raise RequestError(one_line(error)) from error
        except BrokenPipeError:
            raise
        except OSError as error:
            raise RequestError(one_line(error)) from error
        except known as error:
            raise RequestError(one_line(error)) from error
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise RequestError(f"the device's memory ran out; {less}") from error

    return exit_code(told)


def use_compilation_cache(choice: str | None = None) -> None:
    """Keeps compiled programs, and on a GPU what XLA found by autotuning, for the next process.

    A folder that cannot be written is one warning on stderr, and everything is compiled as without a cache.

    Args:
      choice: a folder, or "off"; None: falcon_jax/xla in the user's cache folder, unless JAX has been given one by
        JAX_COMPILATION_CACHE_DIR, whose settings stand.
    """
    if choice == "off":
        jax.config.update("jax_compilation_cache_dir", None)
        return
    if choice is None and jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        folder = default_folder() if choice is None else Path(choice).expanduser().absolute()
        _require_writable(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        print(f"warning: compiled programs are not kept for the next run: {error}", file=sys.stderr)
        jax.config.update("jax_compilation_cache_dir", None)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_CACHE_BYTES)
    # JAX keeps by default what took a second. A start of falcon-nano compiles seven, each in less than that.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # What XLA found by autotuning on a GPU, which otherwise differs from run to run. It has no effect on a CPU.
    # Not "all": the kernel cache is one file, which processes would write at the same time.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "xla_gpu_per_fusion_autotune_cache_dir")


def default_folder() -> Path:
    """Where compiled programs are kept unless the user says otherwise.

    Raises:
      RuntimeError: there is no XDG_CACHE_HOME, and the user has no home.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The specification of these variables has programs pass over a relative path.
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "falcon_jax" / "xla"


def _require_writable(folder: Path) -> None:
    # Private: who can write here can have this user's processes run anything.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Permissions alone do not tell of a read-only disk, and say nothing to root.
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextlib.contextmanager
def compile_ahead(programs: Callable[[], Iterable[jax.stages.Lowered]]) -> Iterator[None]:
    """Compiles programs in threads while the body runs, such as to read weights.

    The end of the body waits for what has begun and gives up the rest: a small model is read before its programs are
    there, and its first token must not wait for those that make the others.

    Args:
      programs: called in a thread; makes what is to be compiled, in the order of its use. A user's error in it, or an
        error of a compilation, is not raised here: it comes again when the caller does the same in earnest.

    Raises:
      Exception: whatever else `programs` raises, which is ours, once the body has ended.
    """
    # One thread traces, which Python allows to one at a time; a generation has two programs that take long.
    pool = ThreadPoolExecutor(max_workers=3)

    def lower() -> None:
        for program in programs():
            try:
                pool.submit(program.compile)
            except RuntimeError:  # the body has ended, and the pool takes no more
                return

    lowering = pool.submit(lower)
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)  # what is wrong is said at once
        raise
    pool.shutdown(wait=True, cancel_futures=True)
    if not lowering.cancelled():
        with contextlib.suppress(*USER_ERRORS, OSError):
            lowering.result()


def described(folder: Path, dtype: str, weights: str = "native") -> tuple[FalconConfig, Params]:
    """A folder's configuration, and the shapes of what loading will put on one device; reads small files alone.

    Raises:
      CheckpointError, ConfigError: as loading.
    """
    config = manifest.Manifest.read(folder).config if manifest.is_converted(folder) else FalconConfig.from_hf(folder)
    layout = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = params.abstract(config, dtype, weights)
    return config, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), shapes)


def generation_programs(
    folder: Path,
    prompt: str,
    *,
    dtype: str,
    alibi: str,
    cuda_graphs: bool,
    max_cache_tokens: int | None,
    streamed: bool,
    **request: Any,
) -> Iterator[jax.stages.Lowered]:
    """What continues `prompt` with the model in `folder` on one device, from the folder's small files alone.

    Args:
      dtype, alibi, cuda_graphs, max_cache_tokens: as for Falcon.from_checkpoint.
      streamed: by Falcon.stream, not by Falcon.generate.
      request: max_new_tokens and whatever else either is given.
    """
    config, shapes = described(folder, dtype)
    options = ForwardOptions(alibi=alibi)
    engine = Engine(config, shapes, options, max_cache_tokens=max_cache_tokens, cuda_graphs=cuda_graphs)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    sampling = Sampling(**{name: request[name] for name in names if name in request})
    num_samples, stop = request.get("num_samples", 1), request.get("stop")
    yield from engine.lower_ahead(
        len(Tokenizer.from_folder(folder).encode(prompt)),
        request["max_new_tokens"],
        sampling,
        num_samples,
        request.get("speculate", 0),
        ahead=not stop,  # as both do
        asks_anew=streamed or bool(stop and num_samples > 1),  # a stop string ends a row, and others go on
    )
