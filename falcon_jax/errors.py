"""The errors a user can cause, each a ValueError whose one line says what was wrong and what would be right."""


def one_line(error: BaseException) -> str:
    """An error's message on one line, as the commands print it."""
    return " ".join(str(error).split())


class ConfigError(ValueError):
    """A model configuration that contradicts itself, lacks a key or names something unknown."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: names the file and the tensor, and what was expected there."""


class RequestError(ValueError):
    """A generation request that cannot be served: an empty prompt, a sampling value out of range, too many tokens."""


# What a command answers with one line and exit code 2; any other error is ours, and keeps its traceback.
USER_ERRORS = (CheckpointError, ConfigError, RequestError)
