"""benchmarks/programs.py: what is compiled, what comes from the cache, and what is there already."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# In a process of its own, where the cache may be switched on.
COUNTED = """
import sys
import jax
from benchmarks.programs import count_programs
from falcon_jax import commands

commands.use_compilation_cache(sys.argv[1])
double = jax.jit(lambda x: 2 * x)
argument = jax.device_put(1.0)
for _ in range(2):
    for _ in range(2):
        with count_programs() as programs:
            double(argument)
        print(programs.compiled, programs.from_cache)
    jax.clear_caches()
"""


def test_programs_from_the_cache_are_told_from_those_that_are_compiled(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", COUNTED, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["1 0", "0 0", "0 1", "0 0"]
