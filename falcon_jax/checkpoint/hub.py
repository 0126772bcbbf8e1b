"""From what a user names to a local folder: a path, or a model of the Hugging Face hub, fetched on demand.

Owns the rule of which is which. A path that is not there and does not read as "organisation/model" is an error, and
no network is touched for it.
"""

import os
import re
from pathlib import Path

from falcon_jax.errors import CheckpointError

FORMS = (
    "a folder made by falcon_jax.convert, a Hugging Face folder (config.json with safetensors), "
    "or a model on the hub such as tiiuae/falcon-7b"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ["*.safetensors", "*.json"]


def local_folder(source: str | os.PathLike[str], *, allow_pickle: bool = False) -> Path:
    """The folder that `source` names; a hub model is downloaded (or taken from the cache): its safetensors and JSON
    files, with `allow_pickle` its .bin files too.

    Raises:
      CheckpointError: there is no such folder, or the hub cannot be reached or refuses.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file: expected {FORMS}")
    if not _is_hub_id(source):
        raise CheckpointError(f"{path} does not exist: expected {FORMS}")
    return _download(str(source), _FILES + (["*.bin"] if allow_pickle else []))


def _is_hub_id(source: str | os.PathLike[str]) -> bool:
    # A Path is never a hub id, nor is what lies in a folder that exists here: that is a slip of the pen.
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        return False
    return not Path(source).parent.is_dir()


def _download(model: str, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{model} is no folder here, and the hub did not give it ({type(error).__name__}: {reason}): "
            f"expected {FORMS}"
        ) from error
