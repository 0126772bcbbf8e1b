"""The `implementation=` contract: what runs where, and that what is named is used or refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from pallas_kernels import compat, dispatch
from pallas_kernels.flash_attention import api, attention, cudnn, mosaic

B, T, N, H = 2, 16, 4, 64
ROW_NUMBERS = jnp.zeros(B, jnp.int32)
SLOPES = jnp.linspace(0.1, 0.5, N)


def draw(*, dtype=jnp.bfloat16, head_dim=H, num_keys=T):
    return (jnp.ones((B, num, heads, head_dim), dtype) for num, heads in ((T, N), (num_keys, 1), (num_keys, 1)))


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Names of the implementations that calls reach, each replaced by one that returns its queries."""
    names = []

    def replace(module, function, name, lse_columns=None):
        def run(q, *rest):
            names.append(name)
            return q if lse_columns is None else (q, jnp.zeros((q.shape[0], q.shape[2], lse_columns)))

        monkeypatch.setattr(module, function, run)

    replace(mosaic, "attention_mosaic", "mosaic", lse_columns=128)
    replace(cudnn, "attention_cudnn", "cudnn")
    replace(api, "attention_xla", "xla")
    replace(api, "attention_xla_with_lse", "xla", lse_columns=T)
    return names


def test_the_first_that_works_is_chosen_and_the_named_one_never_replaced():
    candidates = {"fast": lambda: "too small", "floor": lambda: None}
    assert dispatch.choose("kernel", None, candidates) == "floor"
    assert dispatch.choose("kernel", "floor", candidates) == "floor"
    with pytest.raises(NotImplementedError, match="kernel: implementation='fast' cannot run here: too small"):
        dispatch.choose("kernel", "fast", candidates)
    with pytest.raises(NotImplementedError, match="no implementation can run here"):
        dispatch.choose("kernel", None, {"fast": lambda: "too small"})
    with pytest.raises(ValueError, match="'fats' is unknown; known are fast, floor"):
        dispatch.choose("kernel", "fats", candidates)


# What a GPU of some compute capability takes for which call.
CHOICES = [
    ("9.0", {}, {}, "mosaic"),
    ("9.0", {}, {"slopes": SLOPES, "alibi": "hf_bf16"}, "mosaic"),
    ("9.0", {}, {"query_offset": ROW_NUMBERS, "lengths": ROW_NUMBERS}, "mosaic"),
    ("9.0", {"num_keys": 40}, {"query_offset": ROW_NUMBERS}, "mosaic"),
    ("9.0", {"dtype": jnp.float16, "head_dim": 128}, {}, "mosaic"),
    ("9.0", {}, {"return_lse": True}, "mosaic"),
    ("9.0", {"head_dim": 96}, {}, "cudnn"),
    ("9.0", {"dtype": jnp.float32}, {}, "xla"),
    ("8.0", {}, {}, "cudnn"),
    ("8.0", {}, {"slopes": SLOPES}, "cudnn"),
    ("8.0", {}, {"slopes": SLOPES, "alibi": "hf_bf16"}, "xla"),
    ("8.0", {}, {"return_lse": True}, "xla"),
    ("8.0", {}, {"lengths": ROW_NUMBERS}, "xla"),
    ("8.0", {"num_keys": 40}, {"query_offset": ROW_NUMBERS}, "xla"),
    ("7.5", {}, {}, "xla"),
    ("10.0", {}, {}, "cudnn"),
]


@pytest.mark.parametrize(("capability", "arrays", "options", "expected"), CHOICES)
def test_the_default_is_the_best_that_the_gpu_and_the_call_allow(capability, arrays, options, expected, ran):
    with compat.assume_capability(capability):
        result = attention(*draw(**arrays), **options)
    assert ran == [expected]
    if options.get("return_lse"):
        assert result[1].shape == (B, N, T)


def test_the_default_on_a_cpu_is_xla(ran, cpu_devices):
    with jax.default_device(cpu_devices[0]):
        attention(*draw())
    assert ran == ["xla"]


# What each refuses: capability, arrays, options, and the words of the refusal.
REFUSALS = [
    ("mosaic", None, {}, {}, "needs a Hopper GPU, and this would run on 'cpu'"),
    ("mosaic", "8.0", {}, {}, "compute capability 9.0 (Hopper), and this one's is 8.0"),
    ("mosaic", "9.0", {"dtype": jnp.float32}, {}, "float32"),
    ("mosaic", "9.0", {"head_dim": 96}, {}, "96"),
    ("cudnn", None, {}, {}, "needs an NVIDIA GPU, and this would run on 'cpu'"),
    ("cudnn", "7.5", {}, {}, "compute capability 8.0 or newer, and this one's is 7.5"),
    ("cudnn", "8.0", {"dtype": jnp.float32}, {}, "bfloat16 or float16, not float32"),
    ("cudnn", "8.0", {}, {"lengths": ROW_NUMBERS}, "one whole sequence"),
    ("cudnn", "8.0", {}, {"slopes": SLOPES, "alibi": "hf_bf16"}, "alibi='hf_bf16'"),
    ("cudnn", "8.0", {"head_dim": 128}, {"slopes": SLOPES}, "this call needs 136"),
    ("cudnn", "9.0", {}, {"return_lse": True}, "log-sum-exp"),
]


@pytest.mark.parametrize(("name", "capability", "arrays", "options", "reason"), REFUSALS)
def test_a_named_implementation_that_cannot_run_says_why(name, capability, arrays, options, reason, ran, cpu_devices):
    expected = re.escape(f"attention: implementation={name!r} cannot run here: ") + ".*" + re.escape(reason)
    with jax.default_device(cpu_devices[0]), pytest.raises(NotImplementedError, match=expected):
        if capability is None:
            attention(*draw(**arrays), **options, implementation=name)
        else:
            with compat.assume_capability(capability):
                attention(*draw(**arrays), **options, implementation=name)
    assert not ran


@pytest.mark.parametrize("name", ["mosaic", "cudnn", "xla"])
def test_a_named_implementation_that_can_run_does(name, ran):
    with compat.assume_capability("9.0"):
        attention(*draw(), implementation=name)
    assert ran == [name]


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="'cudn' is unknown; known are mosaic, cudnn, xla"):
        attention(*draw(), implementation="cudn")


def test_the_mesh_decides_over_the_default_device(ran, cpu_devices, monkeypatch):
    """As on a machine whose default device is a Hopper GPU and whose mesh is of simulated CPU devices."""
    mesh = Mesh(np.asarray(cpu_devices[2:4]), ("data",), axis_types=(AxisType.Auto,))
    with jax.default_device(cpu_devices[1]):
        assert compat.device() == cpu_devices[1] and compat.device(mesh) == cpu_devices[2]
    monkeypatch.setattr(compat, "capability", lambda mesh=None: "9.0" if mesh is None else None)
    attention(*draw())
    attention(*draw(), mesh=mesh)
    assert ran == ["mosaic", "xla"]


@pytest.mark.parametrize(("capability", "expected"), [("9.0", "mosaic"), ("8.0", "cudnn")])
def test_kernels_get_each_device_its_share_of_a_mesh(capability, expected, ran, cpu_devices):
    mesh = Mesh(np.asarray(cpu_devices[:4]).reshape(2, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)

    def run(q, k, v):
        return attention(q, k, v, mesh=mesh, batch_axes=("rows",), head_axis="heads")

    with compat.assume_capability(capability), jax.default_device(cpu_devices[0]):
        q, k, v = draw()
        traced = jax.make_jaxpr(run)(q, k, v)
    assert ran == [expected]
    (call,) = (equation for equation in traced.eqns if equation.primitive.name == "shard_map")
    assert call.params["jaxpr"].invars[0].aval.shape == (B // 2, T, N // 2, H)


def test_a_kernel_may_have_some_of_the_multiprocessors_and_no_more_than_there_are():
    with compat.assume_capability(compat.HOPPER):
        assert [compat.sms_of_a_kernel(count) for count in (None, 1, 500)] == [compat.NUM_SMS, 1, compat.NUM_SMS]
        with pytest.raises(ValueError, match="num_sms is 0; a kernel needs at least one"):
            compat.sms_of_a_kernel(0)
