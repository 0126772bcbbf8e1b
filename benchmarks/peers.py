"""The peers: what a user could run instead. They are measured by measure.py like falcon_jax itself.

transformers runs as its documentation says: the model in evaluation mode, PyTorch's scaled-dot-product attention, its
own `generate` with its own cache. It gets as many threads as falcon_jax, and no end-of-text token, so that it never
stops early and runs no processor that masks one.
"""

import gc
import importlib.util
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from benchmarks import hardware
from benchmarks.measure import Contestant, Times
from falcon_jax.config import FalconConfig
from falcon_jax.errors import RequestError


def transformers(config: FalconConfig, folder: Path | None, dtype: str) -> list[Contestant]:
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
    if jax.default_backend() == "gpu" and not _torch_has_cuda():
        raise RequestError("--peer hf on a GPU needs a torch with CUDA, and this one has none; or --peer none")
    stored = dtype if folder is None else _stored_dtype(folder)
    dtypes = [stored] if jax.default_backend() == "gpu" else sorted({stored, "float32"})
    return [
        Contestant(
            "transformers",
            one,
            config.num_parameters * jnp.dtype(one).itemsize,
            lambda one=one: TransformersRunner(config, folder, one),
        )
        for one in dtypes
    ]


class TransformersRunner:
    """transformers' FalconForCausalLM on the GPU that torch sees, or on the CPU."""

    def __init__(self, config: FalconConfig, folder: Path | None, dtype: str):
        import torch

        torch.set_num_threads(hardware.num_cores())
        self.device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
        made = _random_model(config, dtype, self.device) if folder is None else _stored_model(folder, dtype)
        self.model = made.to(self.device).eval()
        self.model.generation_config.eos_token_id = None
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def run(self, prompts: Int[np.ndarray, "B T"], new_tokens: int) -> Times:
        import torch
        from transformers import StoppingCriteriaList

        clock = _FirstToken(self.device)
        begin = time.perf_counter()
        with torch.inference_mode():
            token_ids = torch.from_numpy(prompts.astype(np.int64)).to(self.device)
            made = self.model.generate(
                token_ids,
                attention_mask=torch.ones_like(token_ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]),
            ).cpu()
        end = time.perf_counter()
        if made.shape[1] != prompts.shape[1] + new_tokens or clock.first is None:
            raise RuntimeError(f"transformers made {made.shape[1] - prompts.shape[1]} tokens and not {new_tokens}")
        return Times(clock.first - begin, end - begin)

    def peak_bytes(self) -> int | None:
        import torch

        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None

    def close(self) -> None:
        import torch

        del self.model
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


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
    from transformers.utils import logging

    logging.disable_progress_bar()
    return FalconForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")


def _random_model(config: FalconConfig, dtype: str, device: str) -> Any:
    """Made on its device in its dtype, initialised by transformers."""
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
