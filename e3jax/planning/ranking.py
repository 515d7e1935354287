"""Which mesh, micro-batch and recomputation: all estimated, the best three compiled."""

import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from e3jax import config, job, mesh
from e3jax.distill import freezing
from e3jax.errors import UserError
from e3jax.models import cudnn, decoder
from e3jax.models.attention import see_all
from e3jax.models.config import ModelConfig
from e3jax.models.params import layer_table
from e3jax.planning import compile, cost
from e3jax.planning.chips import Topology

COMPILED = 3  # choices compiled at a time
SECONDS = 300  # after which no three more are begun, where none of those before fits
LARGEST_MODEL = 16  # tensor parallelism beyond a few chips sends more than it saves
REMATS = ("none", "elementwise", "selective", "layer")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A mesh, micro-batch and recomputation, and what they are estimated to take."""

    replica: int
    data: int
    model: int
    microbatch: int  # windows
    remat: str
    seconds: float  # of a distillation step, roofline
    memory: int  # bytes a device, estimated from the shapes
    compiled: tuple[compile.Memory, ...] | None = None  # of `compile.steps`

    @property
    def overrides(self) -> str:
        """As they are given on the command line."""
        return (
            f"mesh.replica={self.replica} mesh.data={self.data} mesh.model={self.model} "
            f"distill.microbatch={self.microbatch} model.remat={self.remat}"
        )

    def apply(self, run: config.Run) -> config.Run:
        """The configuration with these overrides."""
        return dataclasses.replace(
            run,
            mesh=dataclasses.replace(
                run.mesh, replica=self.replica, data=self.data, model=self.model
            ),
            model=dataclasses.replace(run.model, remat=self.remat),
            distill=dataclasses.replace(run.distill, microbatch=self.microbatch),
        )


def rank(run: config.Run, cfg: ModelConfig, source_dtype: str, topology: Topology) -> list[Choice]:
    """All sensible choices, fastest first by the roofline; memory estimated.

    Raises UserError when no mesh of the topology can share the batch.
    """
    found = [
        choice
        for sizes in _meshes(cfg, topology)
        if run.search.together % sizes.shards == 0  # and so the batch
        for choice in _choices(run, cfg, source_dtype, topology, sizes)
    ]
    if not found:
        raise UserError(
            f"distill.batch={run.distill.batch}: no mesh of {topology.text} ({topology.devices} "
            f"devices) can share its windows and the {run.search.together} of search.microbatch, "
            f"or search.batch={run.search.batch}, evenly; make both multiples of the devices"
        )
    return sorted(found, key=lambda c: (c.seconds, c.memory))


def _meshes(cfg: ModelConfig, topology: Topology) -> Iterator[cost.Mesh]:
    """Replicas between slices, where the network is slow, or within the only one; heads that the
    model axis divides."""
    a_slice = topology.devices // topology.slices
    model = 1
    while model <= min(LARGEST_MODEL, a_slice):
        if a_slice % model == 0 and 0 in (cfg.num_kv_heads % model, cfg.num_groups % model):
            yield cost.Mesh(topology.slices, a_slice // model, model)
            replica = 2
            while topology.slices == 1 and a_slice // model % replica == 0:
                yield cost.Mesh(replica, a_slice // model // replica, model)
                replica *= 2
        model *= 2


def _choices(
    run: config.Run, cfg: ModelConfig, source_dtype: str, topology: Topology, sizes: cost.Mesh
) -> Iterator[Choice]:
    batch, rows = run.distill.batch, 1
    while batch % (rows * sizes.shards) == 0:
        for remat in REMATS:
            choice = Choice(
                sizes.replica, sizes.data, sizes.model, rows * sizes.shards, remat, 0.0, 0
            )
            changed = choice.apply(run)
            roofline = cost.train_roofline(changed, cfg, topology, sizes)
            yield dataclasses.replace(
                choice,
                # What is hidden behind the bound is never hidden whole.
                seconds=roofline.seconds + 0.1 * sum(roofline.bounds().values()),
                memory=estimate(changed, cfg, source_dtype, topology, sizes),
            )
        rows *= 2


def estimate(
    run: config.Run,
    cfg: ModelConfig,
    source_dtype: str,
    topology: Topology,
    sizes: cost.Mesh,
) -> int:
    """Bytes a device of the step that needs more of them: arrays by their shards, work space by its
    greatest parts. Within 1.5 of the compiler's (tests/test_planning.py)."""
    recipe = run.distill
    keep, frozen = cost.student_layers(run, cfg)
    student = cfg.take_layers(keep)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh(sizes.replica, sizes.data, sizes.model)):
        own = compile.local_bytes(freezing.abstract_trained(student, frozen))
        every = compile.local_bytes(decoder.abstract_params(cfg))
        dense = compile.local_bytes(decoder.abstract_params(cfg, jnp.dtype(source_dtype)))
    micro = recipe.together
    rows = -(-micro // sizes.shards)
    work = _work_space(run, cfg, topology, rows, sizes.model)

    def training(wide: int, trained: ModelConfig) -> int:
        """wide: bytes of the float32 masters."""
        gradients = wide * (1 if micro == recipe.batch else 2)
        kept = cost.activation_bytes(run, trained, rows, sizes.model, trained=True)
        return 3 * wide + gradients + kept

    distill = training(own, cost.trained_config(run, cfg)) + work
    distill += 0 if recipe.teacher == "cache" else dense
    adapt = training(every, cfg) + work + dense if run.adapts else 0
    rows, search = -(-cost.searched_rows(run) // sizes.shards), dense
    if run.search.estimator != "score":
        search += cost.activation_bytes(run, cfg, rows, sizes.model, trained=False)
    search += _work_space(run, cfg, topology, rows, sizes.model)
    return int(max(distill, adapt, search))


def _work_space(
    run: config.Run, cfg: ModelConfig, topology: Topology, rows: int, model: int
) -> float:
    """Bytes of the greatest of a layer and a chunk's logits, and of gathered weights."""
    time, tokens = run.data.window, rows * run.data.window
    size = job.DTYPES[run.model.dtype](0).itemsize
    heads, mlp = cfg.num_heads * cfg.head_dim / model, cost.feed_forward_width(cfg) / model
    layer = tokens * (8 * cfg.width + 4 * heads + 6 * mlp) * size
    if cfg.experts is not None:  # a token once for each expert that it is sent to, on any device
        layer += tokens * cfg.experts.per_token * (4 * cfg.width + 6 * cfg.experts.width) * size
    kernel = topology.is_tpu or (
        cudnn.takes(time, cfg.head_dim, job.DTYPES[run.model.dtype], 1)
        and see_all(cfg.windows, time)
        and cfg.attention_cap is None
        and not cfg.sinks
    )
    if not kernel:  # scores of every query and key
        layer += rows * cfg.num_heads / model * time**2 * 12
    logits = 4 * 4 * min(run.distill.chunk, tokens) * cfg.vocab_size / model
    last = layer_table(cfg, sparse=cfg.is_sparse(cfg.num_layers - 1))
    per_layer = sum(math.prod(leaf.shape) for leaf in last.values())
    gathered = 2 * size * per_layer / model + 4 * size * cfg.width * cfg.vocab_size / model
    return max(layer, logits) + gathered


def search_mesh(
    run: config.Run,
    cfg: ModelConfig,
    source_dtype: str,
    topology: Topology,
    say: Callable[[str], None],
) -> Choice:
    """The fastest choice of which all stages' steps fit by the compiler's word. Where none of the
    best three does, the next three are compiled if that is over in five minutes; if none of those
    compiled fits, the one that lacks least. `say` is told of each."""
    ranked = rank(run, cfg, source_dtype, topology)
    room = (1 - compile.MARGIN) * topology.memory
    likely = [c for c in ranked if c.memory <= room]
    say(f"{len(ranked)} choices, {len(likely)} of them estimated to fit")
    likely = likely or sorted(ranked, key=lambda c: c.memory)[:COMPILED]

    def measure(choice: Choice) -> Choice:
        changed = choice.apply(run)
        with jax.set_mesh(compile.open_mesh(topology, changed.mesh)):
            found = [step(changed, cfg, source_dtype, topology) for step in compile.steps(changed)]
        verdict = "fits" if all(memory.fits for memory in found) else "does not fit"
        names = ("search", "distillation", "adaptation")
        peaks = ", ".join(f"{n} {m.peak / 2**30:.1f}" for n, m in zip(names, found, strict=False))
        say(
            f"{choice.overrides}: {peaks} GiB (estimated {choice.memory / 2**30:.1f}), {verdict}, "
            f"compiled in {sum(memory.seconds for memory in found):.0f} s"
        )
        return dataclasses.replace(choice, compiled=tuple(found))

    compile.open_mesh(topology, likely[0].apply(run).mesh)  # libtpu cannot be started twice at once
    measured: list[Choice] = []
    begun = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        while len(measured) < len(likely):
            rounds = len(measured) // COMPILED
            if rounds and (time.monotonic() - begun) * (rounds + 1) / rounds > SECONDS:
                break
            measured += pool.map(measure, likely[len(measured) : len(measured) + COMPILED])
            if fitting := [c for c in measured if all(m.fits for m in c.compiled or ())]:
                return fitting[0]
    return min(measured, key=lambda c: max(m.peak for m in c.compiled or ()))
