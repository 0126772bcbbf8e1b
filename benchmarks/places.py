"""Where something is measured: in this process, or in one of its own that leaves nothing behind.

On a GPU what does not fit there together is measured one after the other, each in a process of its own. In one process
the device's memory would not come back: JAX's allocator keeps what it took, PyTorch's what CUDA graphs hold, and a
crash would take everybody along. (`XLA_PYTHON_CLIENT_ALLOCATOR=platform` returns memory, but then each buffer is a
cudaMalloc and a cudaFree, which waits for the device: 120 of them for the cache of a 60-layer model, before its first
token.) The price is that each process imports anew. The calling process keeps no more on the device than its CUDA
context.

Functions to be called are generators of picklable values that take `say`, at a module's top level.
"""

import contextlib
import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from typing import Any, Protocol

Say = Callable[[str], None]
# Of a process that has nothing left to do, or was told to end.
END_S = 10.0


class ProcessDiedError(RuntimeError):
    """A process ended before it was done."""


class Place(Protocol):
    def __call__(self, function: Callable[..., Iterator[Any]], *arguments: Any, say: Say) -> Iterator[Any]:
        """What `function(*arguments, say=say)` yields, one by one, as it comes."""
        ...


def here(function: Callable[..., Iterator[Any]], *arguments: Any, say: Say) -> Iterator[Any]:
    """In this process."""
    yield from function(*arguments, say=say)


def in_own_process(
    function: Callable[..., Iterator[Any]], *arguments: Any, say: Say, prepare: Callable[[], None] | None = None
) -> Generator[Any, None, None]:
    """In a fresh process, which is gone when the last value is there.

    Args:
      prepare: called there before anything else, to settle what holds for a whole process.

    Raises:
      ProcessDiedError: it ended without a word, as when the system kills it for its memory.
      Exception: what the function raised, with the traceback of there as a note.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process that runs JAX may hang
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, prepare, function, arguments))
    process.start()
    sender.close()  # so that the pipe ends with the process
    try:
        while True:
            try:
                kind, value = receiver.recv()
            except EOFError:
                process.join(END_S)
                raise ProcessDiedError(f"its process ended with exit code {process.exitcode}") from None
            if kind == "line":
                say(value)
            elif kind == "value":
                yield value
            elif kind == "error":
                raise value
            else:
                process.join(END_S)
                return
    finally:
        receiver.close()
        _end(process)


def _end(process: Any) -> None:
    for stop in (process.terminate, process.kill):
        if process.is_alive():
            stop()
            process.join(END_S)


def _serve(
    sender: Connection,
    prepare: Callable[[], None] | None,
    function: Callable[..., Iterator[Any]],
    arguments: tuple[Any, ...],
) -> None:
    """The other end of the pipe: lines and values while they come, then how it ended."""
    # Interrupted, or the reader is gone: the calling process says what there is to say.
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        try:
            if prepare is not None:
                prepare()
            for value in function(*arguments, say=lambda line: sender.send(("line", line))):
                sender.send(("value", value))
            sender.send(("done", None))
        except Exception as error:
            sender.send(("error", _sendable(error)))


def _sendable(error: Exception) -> Exception:
    """The error itself where it survives the pipe, with its traceback as a note."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except (
        pickle.PickleError,
        TypeError,
        AttributeError,
    ):  # it holds what cannot travel, or is made of other arguments
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note("".join(traceback.format_exception(error)))
    return copy
