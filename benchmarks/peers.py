"""The peers: what a user could run instead. They are measured by measure.py like falcon_jax itself.

transformers runs as its documentation says: the model in evaluation mode, PyTorch's scaled-dot-product attention, its
own `generate` with its own cache; and once more compiled, which it does for a cache of a fixed length. It gets as many
threads as falcon_jax, and no end-of-text token, so that it never stops early and runs no processor that masks one.
"""

import contextlib
import dataclasses
import gc
import importlib.util
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Int

from benchmarks import hardware
from benchmarks.measure import Contestant, Peak, Times
from falcon_jax.config import FalconConfig
from falcon_jax.errors import RequestError

PLAIN, COMPILED = "transformers", "transformers compiled"
# By the value of --peer.
CHOICES: dict[str, tuple[str, ...]] = {
    "hf": (PLAIN, COMPILED),
    "hf-plain": (PLAIN,),
    "hf-compiled": (COMPILED,),
    "none": (),
}
# transformers' own choice, said aloud so that a CPU gets it too.
COMPILE: dict[str, Any] = {"backend": "inductor", "mode": "reduce-overhead"}


def transformers(
    config: FalconConfig, folder: Path | None, dtype: str, names: Sequence[str] = (PLAIN,)
) -> list[Contestant]:
    """transformers on the same folder's weights, or on random ones of the same shape.

    In the dtype that the folder names (with random weights: `dtype`), and on a CPU in float32 too, which is often the
    faster one there.

    Raises:
      RequestError: torch or transformers is not installed, or the folder is none of Hugging Face's.
    """
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(
            f"--peer hf needs {' and '.join(missing)}, not installed here: install falcon-jax[test], or use --peer none"
        )
    if folder is not None and not (folder / "config.json").is_file():
        raise RequestError(f"--peer hf needs a Hugging Face folder, and {folder} has no config.json; or --peer none")
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not _torch_has_cuda():
        raise RequestError("--peer hf on a GPU needs a torch with CUDA, and this one has none; or --peer none")
    stored = dtype if folder is None else _stored_dtype(folder)
    dtypes = [stored] if on_gpu else sorted({stored, "float32"})
    device = "cuda" if on_gpu else "cpu"
    return [Transformers(name, config, folder, one, device) for name in names for one in dtypes]


@dataclasses.dataclass(frozen=True)
class Transformers(Contestant):
    """transformers' FalconForCausalLM. device: PyTorch's name; which one JAX has is not asked where it is loaded."""

    name: str
    config: FalconConfig
    folder: Path | None
    dtype: str
    device: str
    weights: ClassVar[str] = "native"

    def load(self) -> "TransformersRunner":
        import torch
        from transformers.utils import logging

        # One warning a run that a prompt is longer than the trained context is not ours to repeat.
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(hardware.num_cores())
        memory = _Memory(self.device)
        with memory.counted():
            if self.folder is None:
                model = random_model(self.config, self.dtype, self.device)
            else:
                model = _stored_model(self.folder, self.dtype).to(self.device)
        model.eval().generation_config.eos_token_id = None
        return TransformersRunner(model, memory, compiled=self.name == COMPILED)


class TransformersRunner:
    """`generate` of a model on its device; compiled: with a static cache, and each decoding step compiled."""

    def __init__(self, model: Any, memory: "_Memory", *, compiled: bool):
        self.model = model
        self.memory = memory
        self.device = memory.device
        self.options = _compiled_options() if compiled else {}

    def begin(self) -> None:
        with self.memory.counted():
            # What the workload before left would make this one's cache as long, and its code of varying shapes.
            for name in ("_compiled_call", "_last_compile_config", "_previous_max_cache_length"):
                vars(self.model).pop(name, None)
            self._give_back()
        self.memory.most_bytes = self.memory.held_bytes

    def run(self, prompts: Int[np.ndarray, "B T"], new_tokens: int) -> Times:
        import torch
        from transformers import StoppingCriteriaList

        clock = _FirstToken(self.device)
        options = dict(self.options)
        if options and new_tokens == 1:
            # For one token its cache would be as long as the prompt, which hides that models with ALiBi can make no
            # second one.
            options["max_cache_len"] = prompts.shape[1] + 1
        with self.memory.counted(), torch.inference_mode():
            begin = time.perf_counter()
            token_ids = torch.from_numpy(prompts.astype(np.int64)).to(self.device)
            made = self.model.generate(
                token_ids,
                attention_mask=torch.ones_like(token_ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]),
                **options,
            ).cpu()
            end = time.perf_counter()
        if made.shape[1] != prompts.shape[1] + new_tokens or clock.first is None:
            raise RuntimeError(f"transformers made {made.shape[1] - prompts.shape[1]} tokens and not {new_tokens}")
        return Times(clock.first - begin, end - begin)

    def peak(self) -> Peak | None:
        return Peak(self.memory.most_bytes) if self.device == "cuda" else None

    def close(self) -> None:
        del self.model
        self._give_back()

    def _give_back(self) -> None:
        import torch

        if self.options:
            torch.compiler.reset()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


class _Memory:
    """Bytes that one model holds, and has held at most, of a device where PyTorch may hold others as well."""

    def __init__(self, device: str):
        self.device = device
        self.held_bytes = 0
        self.most_bytes = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """What changes inside is this model's."""
        import torch

        if self.device != "cuda":
            yield
            return
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            yield
        finally:
            self.most_bytes = max(self.most_bytes, self.held_bytes + torch.cuda.max_memory_allocated() - before)
            self.held_bytes += torch.cuda.memory_allocated() - before


class _FirstToken:
    """A stopping criterion that never stops and notes when the first token was there."""

    def __init__(self, device: str):
        self.device = device
        self.first: float | None = None
        self.never: Any = None

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if self.first is None:
            import torch

            if self.device == "cuda":
                torch.cuda.synchronize()
            self.first = time.perf_counter()
            self.never = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        return self.never


def random_model(config: FalconConfig, dtype: str, device: str) -> Any:
    """Made on its device in its dtype, initialised there by transformers: nothing of it is ever on the host."""
    import torch
    import transformers as hf

    keys: dict[str, Any] = config.to_hf() | {"attn_implementation": "sdpa"}
    settings = hf.FalconConfig(**keys)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return hf.FalconForCausalLM(settings)
    finally:
        torch.set_default_dtype(before)


def _compiled_options() -> dict[str, Any]:
    from transformers import CompileConfig

    settings: Any = CompileConfig(**COMPILE)
    settings._compile_all_devices = True  # by itself it compiles on GPUs alone
    return {"cache_implementation": "static", "compile_config": settings}


def _torch_has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _stored_dtype(folder: Path) -> str:
    """The dtype that transformers' dtype="auto" takes from the folder."""
    import torch
    from transformers import AutoConfig

    named = AutoConfig.from_pretrained(folder).dtype
    return str(named or torch.float32).removeprefix("torch.")


def _stored_model(folder: Path, dtype: str) -> Any:
    from transformers import FalconForCausalLM

    return FalconForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
