"""Plans as text."""

from collections.abc import Sequence

from falcon_jax.train.planning import plan as planning
from falcon_jax.train.planning.devices import EXAMPLE_SHARE, JAX_SHARE, MEMORY_VARIABLE, Device
from falcon_jax.train.planning.plan import Plan
from falcon_jax.train.planning.serving import ServingPlan

GB, GIB = 1e9, 2**30
MUCH_SHARE = 0.25  # of the usable memory: so much left over could buy speed


def size(num_bytes: int | float) -> str:
    """In both units, since devices are sold by one and reported in the other."""
    return f"{num_bytes / GB:.2f} GB ({num_bytes / GIB:.2f} GiB)"


def verdict(plan: Plan) -> str:
    return _verdict(plan.job.device, plan.spare_bytes)


def _verdict(device: Device, spare_bytes: int) -> str:
    usable = f"{size(device.usable_bytes)} usable of {size(device.memory_bytes)}, {device.name}"
    if spare_bytes < 0:
        return f"does not fit: {size(-spare_bytes)} a GPU too much ({usable})"
    fits = f"fits: {size(spare_bytes)} a GPU to spare ({usable})"
    needed = (device.usable_bytes - spare_bytes) / device.memory_bytes
    if needed <= JAX_SHARE:
        return fits
    share = max(EXAMPLE_SHARE, device.usable_share)
    return f"{fits}; it takes {needed:.2f} of it and JAX by itself {JAX_SHARE}: set {MEMORY_VARIABLE}={share:g}"


def lines(plan: Plan, *, is_chosen: bool = False) -> list[str]:
    """The whole plan, the verdict last. is_chosen: by a search, which has tried what could be faster."""
    job, state, program, times = plan.job, plan.state, plan.compiled.program, plan.times
    device = job.device
    out = [
        f"{job.num_devices} x {device.name}: {job.layout}",
        f"{job.rows} rows of {job.length} tokens a step, {job.rows_a_device} of a micro-batch on each GPU; "
        f"compiled in {plan.compiled.seconds:.0f} s",
        "",
        f"memory of a GPU      {size(plan.peak_bytes)} at the peak",
        f"  parameters         {size(state.parameters)}",
        f"  optimizer          {size(state.optimizer)}",
        f"  state not split    {_unsplit(plan)}",
        f"  gradients and all  {size(plan.working_bytes)}, of which the largest values are",
        *(f"    {size(number)}  {type}  {_place(place)}" for number, type, place in program.largest),
        "",
        "collectives of a step       over axes          times      sent by a GPU",
    ]
    for kind, axes, count, sent, within in planning.by_kind_and_axes(program.collectives):
        where = "" if within else "  between machines"
        out.append(f"  {kind:24}  {', '.join(axes):17}  {count:5}  {size(sent):>24}{where}")
    if not program.collectives:
        out.append("  none")
    out += _rematerializations(plan)
    if program.num_unknown_loops:
        out.append(f"loops whose trip count is unknown, counted once: {program.num_unknown_loops}")
    out += [
        "",
        f"estimated step       {times.step_s:.2f} s: products {times.products_s:.2f}, "
        f"attention {times.attention_s:.2f}, memory {times.memory_s:.2f}, collectives {times.exchange_s:.2f} "
        f"and {times.hidden_s:.2f} behind computation",
        f"                     {plan.tokens_per_s:,.0f} tokens/s, {plan.tokens_per_s / job.num_devices:,.0f} a GPU; "
        f"MFU {plan.mfu:.1%}" + (f"; a pipeline idle for {plan.idle_share:.1%}" if job.layout.stage > 1 else ""),
        "",
    ]
    out += [] if is_chosen else _what_could_be_faster(plan)
    return [*out, verdict(plan)]


def _unsplit(plan: Plan) -> str:
    """What of the state an axis was meant to split and does not."""
    sizes = plan.job.layout.sizes
    shares = plan.unsplit_shares.items()
    found = [f"{share:.1%} over {axis} {sizes[axis]}, which does not divide it" for axis, share in shares]
    return "; ".join(found) or "nothing that the mesh is meant to split"


def _what_could_be_faster(plan: Plan) -> list[str]:
    layout, memory = plan.job.layout, plan.job.device.usable_bytes
    fewer = ["fewer --micro-batches"] if layout.stage == 1 and layout.num_micro_batches > 1 else []
    less = ["less --remat"] if layout.remat != "none" else []
    if plan.spare_bytes < MUCH_SHARE * memory or not fewer + less:
        return []
    return [f"{plan.spare_bytes / memory:.0%} of the memory is left: {' or '.join(fewer + less)} could be faster"]


def _rematerializations(plan: Plan) -> list[str]:
    found = plan.compiled.rematerializations
    if not found:
        return ["involuntary rematerializations: none"]
    return [
        f"involuntary rematerializations: {len(found)}",
        *(f"  {each.operation} from {each.shardings}, {each.name or 'nowhere in the source'}" for each in found),
    ]


def _place(name: str) -> str:
    """The end of a long path."""
    return name if len(name) <= 70 else f"...{name[-67:]}"


def table(plans: Sequence[Plan]) -> list[str]:
    """One line each, in the order given."""
    head = f"{'data':>5}{'fsdp':>5}{'tensor':>7}{'stage':>6}{'micro':>7}{'rounds':>7}  {'remat':9}{'split':6}"
    out = [f"{head}{'peak GB':>9}{'step s':>8}{'MFU':>7}{'remats':>7}  verdict"]
    for plan in plans:
        layout = plan.job.layout
        out.append(
            f"{layout.data:5}{layout.fsdp:5}{layout.tensor:7}{layout.stage:6}{layout.num_micro_batches:7}"
            f"{layout.pipeline_rounds:7}  {layout.remat:9}{'tokens' if layout.splits_sequence else '-':6}"
            f"{plan.peak_bytes / GB:9.2f}{plan.times.step_s:8.2f}{plan.mfu:7.1%}"
            f"{len(plan.compiled.rematerializations):7}  "
            + (
                f"fits, {plan.spare_bytes / GB:.1f} GB to spare"
                if plan.fits
                else f"{-plan.spare_bytes / GB:.1f} GB over"
            )
        )
    return out


def serving_lines(plan: ServingPlan) -> list[str]:
    return [
        f"{plan.tensor} x {plan.device.name}, {plan.rows} rows of {plan.length} tokens",
        f"  weights of a GPU   {size(plan.weight_bytes)}",
        f"  cache of a GPU     {size(plan.cache_bytes)}",
        "only training is compiled so far: what a prompt takes while it is read is in what is left free",
        _verdict(plan.device, plan.spare_bytes),
    ]
