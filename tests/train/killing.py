"""Training runs that lose processes: each is a child that says where it is, and is killed there. Run by the tests, and
by hand for kills at random moments:

    OPENBLAS_NUM_THREADS=1 .venv/bin/python -m tests.train.killing --folder FOLDER --scenario random --kills 20

Children are forked before JAX has made a device or a thread, so that none imports everything anew; numpy's threads are
what the variable is against.
"""

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
import tyro

from falcon_jax.checkpoint.store import TrainCheckpoints
from falcon_jax.train import loop, saving, trainee
from falcon_jax.train import step as train_step
from falcon_jax.train.metrics import read_records
from falcon_jax.train.settings import TrainConfig
from tests.train import toys

KILLED = -signal.SIGKILL
NUM_PROCESSES, NUM_DEVICES = 4, 4  # devices of each
# In seconds. Processes that share two cores may take longer for a step's compilation than XLA waits by default.
PATIENCE = " ".join(f"--xla_cpu_{name}_timeout_seconds=300" for name in ("collective", "collective_call_terminate"))


@dataclasses.dataclass
class Child:
    """A forked process, and the phases that it says it enters, as lines."""

    pid: int
    lines: Any
    code: int | None = None

    def phases(self) -> Iterator[str]:
        for line in self.lines:
            yield line.rstrip("\n")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """The exit code; minus the signal that ended it."""
        if self.code is None:
            for _ in self.lines:
                pass
            _, status = os.waitpid(self.pid, 0)
            self.code = os.waitstatus_to_exitcode(status)
            self.lines.close()
        return self.code


def fork(work: Callable[[Callable[[str], None]], None], log: Path) -> Child:
    """Runs `work(say)` in a child, whose stdout and stderr go to `log`. `say` hands the parent a line."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(writer)
        return Child(pid, os.fdopen(reader))
    code = 1
    try:
        os.close(reader)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        work(lambda phase: void(os.write(writer, f"{phase}\n".encode())))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def void(_: object) -> None:
    pass


def training(
    *configs: TrainConfig,
    die_at: str = "",
    stop_at: str = "",
    process: tuple[int, int] | None = None,
    cache: Path | None = None,
) -> Callable[[Callable[[str], None]], None]:
    """What a child does: trains one after the other, and says which phase it enters and how each ended.

    die_at, stop_at: the phase of the last in which it sends itself a SIGKILL, a SIGTERM. process: the first's port and
    its own number, where it is one of several. cache: for compiled programs, to be sooner with the next child.
    """

    def work(say: Callable[[str], None]) -> None:
        jax.config.update("jax_disable_most_optimizations", True)
        jax.config.update("jax_platforms", "cpu")
        if process is not None:
            os.environ["XLA_FLAGS"] = PATIENCE
            port, number = process
            jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
            jax.config.update("jax_enable_preemption_service", False)
            jax.distributed.initialize(f"127.0.0.1:{port}", NUM_PROCESSES, number, heartbeat_timeout_seconds=10)
        if cache is not None:
            jax.config.update("jax_compilation_cache_dir", str(cache))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        is_last = False

        def enter(phase: str) -> None:
            say(phase)
            if is_last and phase == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if is_last and phase == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        _announce_phases(enter)
        for config in configs:
            is_last = config is configs[-1]
            if process is None:
                _load_all(config, say)
            result = loop.Trainer(config).run()
            how = "stopped" if result.was_signalled else "complete" if result.is_complete else "out of time"
            enter(f"{how} at {result.step}")
        if process is not None:
            jax.distributed.shutdown()

    return work


def _announce_phases(enter: Callable[[str], None]) -> None:
    def before(owner: Any, name: str, phase: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            enter(phase(*args, **kwargs))
            return original(*args, **kwargs)

        setattr(owner, name, replacement)

    def once_lowered(event: str, duration_secs: float, **about: Any) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration" and about.get("fun_name") == "jit(train_step)":
            enter("compile")

    jax.monitoring.register_event_duration_secs_listener(once_lowered)
    before(loop.Trainer, "_advance", lambda self, _: f"step {self.step + 1}")
    before(loop.Trainer, "validation_nats", lambda self, _: f"evaluation {self.step}")
    before(saving.RunCheckpoints, "save", lambda self, step, *_: f"save {step}")
    before(loop.Trainer, "_export", lambda self: "finalise")
    before(trainee, "write_model", lambda *_: "model")
    # In a thread, when all files of a checkpoint are written and its folder still has another name.
    finalize = ocp.path.atomicity.AtomicRenameTemporaryPath.finalize

    async def finalize_announced(self: Any, *args: Any, **kwargs: Any) -> Any:
        enter(f"commit {self.get_final().name} in {self.get_final().parent.name}")
        return await finalize(self, *args, **kwargs)

    ocp.path.atomicity.AtomicRenameTemporaryPath.finalize = finalize_announced  # type: ignore[method-assign]


# What a run leaves.


def curve(config: TrainConfig) -> list[tuple[Any, ...]]:
    """Every number of a run's metrics that does not measure time."""
    names = (
        "kind",
        "step",
        "loss",
        "z_loss",
        "grad_norm",
        "learning_rate",
        "tokens",
        "nats_per_token",
        "bits_per_byte",
        "is_best",
    )
    records = read_records(config.output / "metrics.jsonl")
    return [tuple(record.get(name) for name in names) for record in records]


def model_bytes(config: TrainConfig) -> bytes:
    return (config.output / "model" / "model.safetensors").read_bytes()


def _load_all(config: TrainConfig, say: Callable[[str], None]) -> None:
    """Restores each checkpoint that counts as whole, checksums and all, and says its step."""
    state = train_step.abstract_state(config.model_config(), config.step)
    for name, abstract in (("checkpoints", state), ("best", state["params"])):
        with TrainCheckpoints(config.output / name) as checkpoints:
            for step in checkpoints.all_steps():
                checkpoints.restore(abstract, step=step)
                say(f"loaded {step} of {name}")


def run_config(folder: Path, **changes: Any) -> TrainConfig:
    """Eight steps of the toy model, each of them in the metrics. The last checkpoint is older than the validation of
    its step, and the best weights of step 6 lie past a checkpoint to go on from."""

    def write_data(_: Any) -> None:
        toys.write_tokenizer(folder / "tokenizer", toys.write_corpus(folder / "corpus"))

    if not (folder / "corpus").exists():  # in a child, since learning a vocabulary leaves threads behind
        assert fork(write_data, folder / "data.log").wait() == 0
    config = toys.run_config(folder, folder / "corpus", folder / "tokenizer")
    settings = {"steps": 8, "warmup_steps": 3, "log_every": 1, "validate_every": 3, "checkpoint_every": 4}
    return dataclasses.replace(config, **(settings | changes))


# What happens to runs.


def chain(folder: Path) -> dict[str, Any]:
    """One run that is killed again and again and goes on each time, beside one that is not."""
    config = run_config(folder)
    whole = dataclasses.replace(config, output=folder / "whole")
    codes = [fork(training(whole, cache=folder / "cache"), folder / "whole.log").wait()]
    first_steps, loaded = [], []
    for moment in ("compile", "commit 8 in checkpoints", "evaluation 8", "model", ""):
        child = fork(training(config, die_at=moment, cache=folder / "cache"), folder / "killed.log")
        phases = list(child.phases())
        codes.append(child.wait())
        first_steps.append(next((int(phase.split()[1]) for phase in phases if phase.startswith("step ")), None))
        loaded.append([phase for phase in phases if phase.startswith("loaded ")])
    return {
        "codes": codes,
        "first_steps": first_steps,
        "loaded": loaded,
        "whole_curve": curve(whole),
        "curve": curve(config),
        "is_same_model": model_bytes(config) == model_bytes(whole),
    }


def several(folder: Path) -> dict[str, Any]:
    """Four processes: a whole run; one that loses a process; and its continuation, which one process is told to end,
    first while it trains and then in the last validation."""
    config = run_config(folder, fsdp=NUM_DEVICES * NUM_PROCESSES // 2, tensor=2, validate_every=8, checkpoint_every=3)
    model = dataclasses.replace(toys.MODEL, num_layers=1)
    (folder / "config.json").write_text(json.dumps(model.to_hf()))
    whole = dataclasses.replace(config, output=folder / "whole")

    def launch(name: str, *configs: TrainConfig, **of_one: dict[str, Any]) -> tuple[list[int], list[list[str]]]:
        port, cache, log = free_port(), folder / "cache", folder / name
        children = [
            fork(training(*configs, process=(port, number), cache=cache, **of_one.get(f"process_{number}", {})), log)
            for number in range(NUM_PROCESSES)
        ]
        phases = [list(child.phases()) for child in children]
        return [child.wait() for child in children], phases

    lost_codes, lost = launch("lost.log", whole, config, process_2={"die_at": "step 6"})
    lost_curve = curve(config)
    resumed_codes, resumed = launch("resumed.log", config, process_1={"stop_at": "step 5"})
    resumed_curve = curve(config)
    paused_codes, paused = launch("paused.log", config, process_3={"stop_at": "evaluation 8"})
    return {
        "lost_codes": lost_codes,
        "lost_phases": lost,
        "resumed_codes": resumed_codes,
        "resumed_phases": resumed,
        "whole_curve": curve(whole),
        "lost_curve": lost_curve,
        "resumed_curve": resumed_curve,
        "paused_codes": paused_codes,
        "paused_phases": paused,
        "paused_curve": curve(config),
        "files": sorted(path.name for path in whole.output.iterdir()),
    }


def at_random(folder: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """Kills that many runs at random, in each kind of phase as often, and lets each go on once."""
    config = run_config(folder)
    whole = dataclasses.replace(config, output=folder / "whole")
    began, times = time.monotonic(), []
    child = fork(training(whole), folder / "whole.log")
    for phase in child.phases():
        times.append((phase, time.monotonic() - began))
    assert child.wait() == 0
    spans = [(name, end - begin) for (name, begin), (_, end) in itertools.pairwise(times)]

    generator, outcomes = random.Random(seed), []
    while len(outcomes) < kills:
        number = len(outcomes)
        kind = KINDS[number % len(KINDS)]
        phase, span_s = generator.choice([(name, span) for name, span in spans if name.startswith(kind)])
        wait_s = generator.uniform(0, span_s)
        lossy = dataclasses.replace(config, output=folder / f"run-{number}")
        child = fork(training(lossy), folder / f"run-{number}.log")
        reached = []
        for said in child.phases():
            reached.append(said)
            if said == phase:
                time.sleep(wait_s)
                child.kill()
        if child.wait() != KILLED:  # this run was faster than the first, and is over: another one
            shutil.rmtree(lossy.output)
            continue
        child = fork(training(lossy), folder / f"run-{number}.log")
        loaded = [phase for phase in child.phases() if phase.startswith("loaded ")]
        resumed = child.wait()
        outcome = {
            "killed": f"{wait_s * 1e3:.0f} ms after '{phase}', in '{reached[-1]}'",
            "loaded": loaded,
            "resumed": resumed,
            "same_curve": resumed == 0 and curve(lossy) == curve(whole),
            "same_model": resumed == 0 and model_bytes(lossy) == model_bytes(whole),
        }
        print(json.dumps(outcome), flush=True)
        outcomes.append(outcome)
        shutil.rmtree(lossy.output)
    return outcomes


# Of phases: what they begin with.
KINDS = ("compile", "step", "evaluation", "save", "commit", "finalise", "model")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(folder: Path, scenario: Literal["chain", "several", "random"], kills: int = 20, seed: int = 0) -> int:
    """Prints what happened as JSON; for "random" a line a kill. The exit code tells of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    if scenario == "random":
        outcomes = at_random(folder, kills, seed)
        good = [outcome for outcome in outcomes if outcome["same_curve"] and outcome["same_model"]]
        print(f"{len(good)} of {len(outcomes)} as if nothing had happened", file=sys.stderr)
        return int(len(good) < len(outcomes))
    print(json.dumps({"chain": chain, "several": several}[scenario](folder)))
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
