"""Options that more than one command in scripts/ has. Imports nothing that takes long: --help does not wait for JAX."""

from typing import Annotated, Literal

import tyro

CompilationCache = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="PATH|off",
        help="Folder that keeps compiled programs for the next run; falcon_jax/xla in the user's cache folder if left "
        "out.",
    ),
]
CudaGraphs = Annotated[
    Literal["on", "off"],
    tyro.conf.arg(
        help="off launches each kernel by itself on a GPU, to look for a driver's fault or at single kernels; decoding "
        "may be slower."
    ),
]
