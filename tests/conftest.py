"""What every test runs under: eight simulated CPU devices, full float32 products, checked annotations.

All of it has to happen before the first import of torch, of the packages under test, and before JAX makes
its devices, so this file sets things up as it is imported. A test that starts a Python of its own starts
without, except for the environment variables.
"""

import gc
import importlib.util
import os
from pathlib import Path

# Two workers share two cores: with more threads than cores, torch's and BLAS's pools wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# On a GPU the workers share its memory, of which JAX otherwise takes three quarters at once and gives nothing back.
os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
# Simulated devices wait for one another; where the machine is busy, one that interprets a kernel may take long.
XLA_FLAGS = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
has_cuda = any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13))
if has_cuda:  # the same matrix products in every run, and no time spent on finding faster ones
    XLA_FLAGS += " --xla_gpu_autotune_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}"

from jaxtyping import install_import_hook

install_import_hook(["falcon_jax", "pallas_kernels"], "beartype.beartype")

import hypothesis
import jax
import pytest

NUM_CPU_DEVICES = 8
MAPPINGS = Path("/proc/self/maps")
MAX_MAPPINGS, TESTS_BETWEEN_LOOKS = 30_000, 10
num_tests_since_look = 0

# Traces are many objects that live long, and looking through them for cycles as often as by default takes a twentieth
# of the time.
gc.set_threshold(20_000, 20, 50)

jax.config.update("jax_num_cpu_devices", NUM_CPU_DEVICES)
# GPUs otherwise multiply float32 in tf32, three digits short of what parity asks for.
jax.config.update("jax_default_matmul_precision", "highest")
# Nearly all of a CPU test's time is LLVM's; without its optimizations the whole takes two thirds of that. XLA's own
# passes (fusion, aliasing, partitioning) run as ever. Not on a GPU, whose kernels are to be the real ones.
if not has_cuda:
    jax.config.update("jax_disable_most_optimizations", True)

# The first call of anything compiles, which no deadline allows for; the same examples every time, so that a
# red run is red again.
hypothesis.settings.register_profile(
    "falcon_jax",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.differing_executors],
)
hypothesis.settings.load_profile("falcon_jax")


def has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="also the cases that not every run needs (thorough.py)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Long ones first: begun last, one of them would leave the other worker without work.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if config.getoption("--thorough"):
        return
    left_out = [item for item in items if item.get_closest_marker("thorough") is not None]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item.get_closest_marker("thorough") is None]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not has_gpu():
        pytest.skip("needs an NVIDIA GPU")


def pytest_runtest_logfinish() -> None:
    """Forgets compiled programs before there are too many: each takes some mappings of memory, of which Linux gives a
    process 65,530, and where there are no more the compiler crashes."""
    global num_tests_since_look
    num_tests_since_look += 1
    if num_tests_since_look < TESTS_BETWEEN_LOOKS or not MAPPINGS.exists():
        return
    num_tests_since_look = 0
    with MAPPINGS.open("rb") as mappings:
        if sum(1 for _ in mappings) > MAX_MAPPINGS:
            jax.clear_caches()
            gc.collect()


@pytest.fixture(scope="session")
def cpu_devices() -> list:
    """The eight simulated devices, also on a machine whose default device is a GPU."""
    devices = jax.devices("cpu")
    assert len(devices) == NUM_CPU_DEVICES, f"JAX had made {len(devices)} CPU devices before conftest.py ran"
    return devices


@pytest.fixture
def strict_numerics():
    """Makes JAX refuse what it would promote in silence: mixed dtypes, and arrays of different rank."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
