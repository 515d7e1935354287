"""The `plan` command: memory, time and money of a run on a topology that need not be there."""

import concurrent.futures
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from e3jax import config, job
from e3jax.models.config import ModelConfig
from e3jax.planning import budget, compile, cost
from e3jax.planning.budget import Budget
from e3jax.planning.chips import Topology
from e3jax.planning.compile import Memory
from e3jax.planning.cost import Roofline

PROBLEMS = 500  # to decode, where evaluate.rows does not tell: as many as MATH-500 has
SHARE = 0.5  # of the roofline, that a run is taken to reach: an assumption, to be measured


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run by the roofline."""

    name: str
    tokens: int  # of windows, each counted once a pass of a masked or student model
    hours: float

    def chip_hours(self, chips: int) -> float:
        return self.hours * chips


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes on a topology."""

    topology: Topology
    mesh: cost.Mesh
    remat: str
    microbatch: int
    budget: Budget
    search_memory: Memory
    adapt_memory: Memory | None  # None = nothing is adapted
    distill_memory: Memory
    decode_memory: Memory | None  # None = no test problems
    forward_flops: float  # a token of the dense model
    search_flops: float  # a token of a search step, recomputation included
    distill_flops: float
    search_step: Roofline
    distill_step: Roofline
    decode_step: Roofline  # of the dense model
    decode_tokens: int  # of the longest answers
    decode_problems: int  # answered together
    decode_samples: int  # answers to each
    search_tokens: int  # a step
    distill_tokens: int
    stages: tuple[Stage, ...]

    @property
    def fits(self) -> bool:
        return all(memory.fits for memory in self.memory.values())

    @property
    def memory(self) -> dict[str, Memory]:
        """By what is done; None left out."""
        found = {
            "search": self.search_memory,
            "adapt": self.adapt_memory,
            "distill": self.distill_memory,
            "decode": self.decode_memory,
        }
        return {name: memory for name, memory in found.items() if memory is not None}

    @property
    def hours(self) -> float:
        return sum(stage.hours for stage in self.stages)


def make_plan(
    run: config.Run,
    cfg: ModelConfig,
    source_dtype: str,
    topology: Topology,
    measured: Sequence[Memory] | None = None,
) -> Plan:
    """Compiles the steps for the topology, unless their memory is given (search, distillation and,
    where there is one, adaptation), and decoding, and counts.

    Raises UserError where the configuration, the topology and the compiler do not go together.
    """
    counted = budget.make_budget(run, cfg, source_dtype)
    devices = compile.open_mesh(topology, run.mesh)
    mesh = cost.Mesh(**devices.shape)

    with jax.set_mesh(devices):
        job.check_batches(run, search=run.distill.mask is None, distill=True)

    def measure(step: Any) -> Memory:
        with jax.set_mesh(devices):  # of this thread
            return step(run, cfg, source_dtype, topology)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        steps = compile.steps(run) if measured is None else ()
        found = [pool.submit(measure, step) for step in steps]
        decode = pool.submit(measure, compile.decode_step) if run.data.test else None
        search, distill, *adapt = measured or [future.result() for future in found]
    micro = run.distill.together
    return Plan(
        topology=topology,
        mesh=mesh,
        remat=run.model.remat,
        microbatch=micro,
        budget=counted,
        search_memory=search,
        adapt_memory=adapt[0] if adapt else None,
        distill_memory=distill,
        decode_memory=decode and decode.result(),
        forward_flops=cost.body_flops(cfg, run.data.window) + cost.head_flops(cfg),
        search_flops=cost.search_flops(run, cfg),
        distill_flops=cost.train_flops(run, cfg),
        search_step=cost.search_roofline(run, cfg, topology, mesh),
        distill_step=cost.train_roofline(run, cfg, topology, mesh),
        decode_step=cost.decode_roofline(run, cfg, topology, mesh),
        decode_tokens=cost.decoded(run, cfg)[1],
        decode_problems=run.evaluate.batch,
        decode_samples=run.evaluate.samples,
        search_tokens=run.search.batch * run.search.masks_per_window * run.data.window,
        distill_tokens=run.distill.batch * run.data.window,
        stages=tuple(_stages(run, cfg, topology, mesh, counted)),
    )


def _stages(
    run: config.Run, cfg: ModelConfig, topology: Topology, mesh: cost.Mesh, counted: Budget
) -> list[Stage]:
    search, recipe = run.search, run.distill

    def forward(rows: int, passes: int) -> float:
        return cost.forward_roofline(run, cfg, topology, mesh, rows, passes).seconds / 3600

    def stage(name: str, tokens: int, each: float, times: float) -> Stage:
        return Stage(name, tokens, each * times)

    window = run.data.window
    micro = recipe.together
    importance = counted.importance_tokens / (search.together * window)
    scores = counted.scoring_tokens / (search.score_windows * window)
    distill = cost.train_roofline(run, cfg, topology, mesh).seconds / 3600
    found = [
        stage("importance", counted.importance_tokens, forward(search.together, 1), importance),
        stage(
            "search",
            counted.search_tokens,
            cost.search_roofline(run, cfg, topology, mesh).seconds / 3600,
            search.steps,
        ),
        stage("held-out scores", counted.scoring_tokens, forward(search.score_windows, 2), scores),
        stage("distillation", counted.distill_tokens, distill, recipe.steps),
    ]
    if counted.adapt_tokens:
        each = distill * counted.layers / counted.keep
        found.insert(3, stage("adaptation", counted.adapt_tokens, each, search.adapt_steps))
    if counted.candidate_tokens:
        steps = search.candidates * search.candidate_steps
        found.insert(3, stage("candidates", counted.candidate_tokens, distill, steps))
    if recipe.teacher == "cache":
        batches = counted.distill_tokens / (micro * window)
        found.insert(3, stage("teacher cache", counted.distill_tokens, forward(micro, 1), batches))
    for name in run.evaluate.baselines:
        found.append(stage(f"{name} recovery", counted.distill_tokens, distill, recipe.steps))
    if run.data.test:
        problems, (_, answer) = run.evaluate.rows or PROBLEMS, cost.decoded(run, cfg)
        asked = problems * run.evaluate.samples
        models = 3 + 2 * len(run.evaluate.baselines)  # dense, and raw and recovered ones
        each = cost.decode_roofline(run, cfg, topology, mesh).seconds / 3600
        times = models * math.ceil(asked / run.evaluate.batch) * answer
        found.append(stage("decoding, at most", models * asked * answer, each, times))
    return found


# ---------------------------------------------------------------- for people, and for programs


def as_json(plan: Plan) -> dict[str, Any]:
    """All of it as plain values: bytes, FLOPs, seconds, tokens, hours at the roofline."""
    chips = plan.topology.chips
    tree = dataclasses.asdict(plan)
    tree["topology"] = {
        "text": plan.topology.text,
        "chips": chips,
        "devices": plan.topology.devices,
        "chip": dataclasses.asdict(plan.topology.chip),
    }
    for name, memory in plan.memory.items():
        tree[f"{name}_memory"] |= {"peak": memory.peak, "fits": memory.fits}
    for shown, stage in zip(tree["stages"], plan.stages, strict=True):
        shown["chip_hours"] = stage.chip_hours(chips)
    return tree | {
        "fits": plan.fits,
        "margin": compile.MARGIN,
        "assumed_share_of_roofline": SHARE,
        "roofline_hours": plan.hours,
        "hours": plan.hours / SHARE,
        "chip_hours": plan.hours * chips / SHARE,
    }


def describe(plan: Plan) -> str:
    """The plan in words."""
    t, mesh = plan.topology, plan.mesh
    capacity = t.memory / 2**30
    each = "" if t.chip.devices == 1 else f" ({t.chip.devices} devices a chip)"
    lines = [
        f"{t.text}: {t.chips} chips{each}, {capacity:.0f} GiB a device; mesh replica={mesh.replica}"
        f" data={mesh.data} model={mesh.model}, {plan.microbatch} windows a forward pass, "
        f"remat {plan.remat}",
        "",
        f"{'memory, GiB a device':<22}" + "".join(f"{name:>9}" for name in plan.memory),
    ]
    parts = ("parameters", "optimiser", "teacher", "activations", "temporaries")
    for part in (*parts, "peak"):
        each_gib = [getattr(memory, part) / 2**30 for memory in plan.memory.values()]
        lines.append(f"  {part:<20}" + "".join(f"{x:9.1f}" for x in each_gib))
    lines += [f"  {_verdict(name, memory)}" for name, memory in plan.memory.items()]
    trained = filter(None, (plan.adapt_memory, plan.distill_memory))
    saved = max(memory.parameters + memory.optimiser for memory in trained) / 2**30
    lines.append(f"  a save copies {saved:.1f} GiB of each device to its host's memory")
    if not t.is_tpu:
        lines.append("  an estimate: compiled for as many CPU devices, not by the GPU's compiler")
    lines += ["", f"{'a step, at the roofline':<22}{'search':>9}{'distill':>9}"]
    steps = (plan.search_step, plan.distill_step)
    for name in plan.distill_step.bounds():
        both = [step.bounds()[name] for step in steps]
        lines.append(f"  {name + ', s':<20}" + "".join(f"{x:9.2f}" for x in both))
    tokens = (plan.search_tokens, plan.distill_tokens)
    rates = [n / step.seconds for n, step in zip(tokens, steps, strict=True)]
    lines.append(f"  {'bound by':<20}" + "".join(f" {step.bound[:8]:>8}" for step in steps))
    lines.append(f"  {'k tokens/s':<20}" + "".join(f"{x / 1e3:9.1f}" for x in rates))
    if t.slices > 1 and mesh.replica % t.slices:
        lines.append(
            f"  weights cross the network between slices; mesh.replica={t.slices} keeps them in one"
        )
    flops = (plan.search_flops, plan.distill_flops)
    lines.append(f"  {'GFLOP a token':<20}" + "".join(f"{x / 1e9:9.1f}" for x in flops))
    lines += [
        "",
        f"{'stage':<20}{'M tokens':>10}{'hours':>9}{f'at {SHARE:.0%}':>9}{'chip-hours':>12}",
    ]
    total = Stage("in all", sum(s.tokens for s in plan.stages), plan.hours)
    for s in (*plan.stages, total):
        lines.append(
            f"  {s.name:<18}{s.tokens / 1e6:10.1f}{s.hours:9.2f}{s.hours / SHARE:9.2f}"
            f"{s.chip_hours(t.chips) / SHARE:12.1f}"
        )
    lines += [
        f"  hours: at the roofline, and at the {SHARE:.0%} of it that is assumed (not measured), as"
        " chip-hours are",
        "  not counted: loading, tokenising, figures on data.held_out and data.measure, export",
    ]
    if plan.decode_memory is not None:
        lines.append(
            f"  decoding: {plan.decode_problems} at a time of {PROBLEMS} problems unless "
            f"evaluate.rows says another number, {plan.decode_samples} times each, all answers "
            f"{plan.decode_tokens} tokens long"
        )
    lines += [
        "",
        budget.describe(plan.budget),
        "",
        "fits: " + ("yes" if plan.fits else "NO"),
    ]
    return "\n".join(lines)


NAMES = {
    "search": "search",
    "adapt": "adaptation",
    "distill": "distillation",
    "decode": "decoding",
}
LESS = {
    "search": "a lower search.microbatch or search.masks_per_window",
    "adapt": "search.adapt_steps=0, or a lower distill.microbatch,",
    "distill": "a lower distill.microbatch",
    "decode": "a lower evaluate.batch or evaluate.max_new_tokens",
}


def _verdict(name: str, memory: Memory) -> str:
    room, capacity = memory.peak / 2**30, memory.capacity / 2**30
    margin = f"margin {compile.MARGIN:.0%}"
    if memory.fits:
        return f"{NAMES[name]} fits: {room:.1f} of {capacity:.0f} GiB, {margin}"
    why = "" if memory.compiled else ", says the compiler"
    return (
        f"{NAMES[name]} does not fit: needs {room:.1f} of {capacity:.0f} GiB{why} ({margin}); "
        f"{LESS[name]} needs less"
    )
