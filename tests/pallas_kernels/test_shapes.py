"""The cases: the models' true head layouts, and inputs that are what a call's arguments say."""

import jax.numpy as jnp
import numpy as np

from falcon_jax.config import PRESETS
from pallas_kernels import shapes


def test_head_layouts_are_those_of_the_presets():
    presets = {name: config for name, config in PRESETS.items() if name != "falcon-nano"}
    assert shapes.HEADS.keys() == presets.keys()
    for name, config in presets.items():
        alibi = "float32" if config.positions == "alibi" else None
        assert shapes.HEADS[name] == (config.num_heads, config.num_kv_heads, config.head_dim, alibi)


def test_names_are_unique_and_toys_cover_every_kind_of_head_sharing():
    for cases in (shapes.TOY_ATTENTION, shapes.TOY_DECODE, shapes.GPU_ATTENTION, shapes.GPU_DECODE):
        assert len({case.name for case in cases}) == len(cases)
    for cases in (shapes.TOY_ATTENTION, shapes.TOY_DECODE):
        kinds = {"shared" if case.K == 1 else "multi" if case.K == case.N else "grouped" for case in cases}
        assert kinds == {"shared", "multi", "grouped"}
        assert {case.H for case in cases} == {64, 128}
        assert {case.alibi for case in cases} == {None, "float32", "hf_bf16"}
        assert any(case.lengths is not None and 0 in case.lengths for case in cases)


def test_pages_hold_the_cache_and_nothing_near_it():
    S = 150
    case = shapes.DecodeCase("paged", 3, S, 4, 2, 64, dtype="float32", paged=True)
    inputs, plain = case.draw(5), shapes.DecodeCase("plain", 3, S, 4, 2, 64, dtype="float32").draw(5)
    table = np.asarray(inputs["page_table"])
    assert table.shape == (3, 3) and len(set(table.flat)) == table.size
    for name in ("keys", "values"):
        pool = inputs[name]
        gathered = pool[table].reshape(3, -1, 2, 64)
        np.testing.assert_array_equal(gathered[:, :S], plain[name])
        spare = sorted(set(range(len(pool))) - set(table.flat))
        assert len(spare) == 3
        assert bool(jnp.all(gathered[:, S:] == shapes.SPARE)) and bool(jnp.all(pool[np.asarray(spare)] == shapes.SPARE))
