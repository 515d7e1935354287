"""The steps of both stages compiled ahead of time for a topology: no device, no weights.

A TPU's compiler comes with libtpu and runs on any machine; what it reports is what the chip would
use. For GPUs the steps are compiled for as many CPU devices, whose memory is an estimate: another
compiler fuses and schedules otherwise.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from e3jax import config, devices, job, mesh
from e3jax.distill import distill, losses
from e3jax.errors import UserError
from e3jax.models import decoder, generate
from e3jax.models.config import ModelConfig
from e3jax.planning.chips import Topology
from e3jax.planning.cost import (
    activation_bytes,
    decoded,
    searched_rows,
    student_config,
    student_layers,
)
from e3jax.search import search
from e3jax.training.optim import make_optimizer

# The compiler's peak leaves out what the runtime keeps for itself, and fragmentation.
MARGIN = 0.10
# What a TPU's compiler says when it runs out: of all memory, or of that for temporaries alone.
USED = re.compile(r"Used ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)i?B? hbm")
TEMPORARIES = re.compile(r"required for HLO temporaries \(([\d.]+)([KMGT]?)i?B?\) exceeds")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a device while a step runs; the parts add up to `peak`."""

    parameters: int  # of the student, float32; in the search there is none
    optimiser: int
    teacher: int  # the dense model as stored; with a cached teacher it is not there
    activations: int  # what the forward pass keeps for the backward one; of decoding, the cache
    temporaries: int  # gradients, logits, gathered weights, work space, inputs
    capacity: int
    compiled: bool  # the compiler finished; if not, what it said it needed
    seconds: float  # of compilation

    @property
    def peak(self) -> int:
        return self.parameters + self.optimiser + self.teacher + self.activations + self.temporaries

    @property
    def fits(self) -> bool:
        return self.compiled and self.peak <= (1 - MARGIN) * self.capacity


def open_mesh(topology: Topology, spec: config.Mesh) -> jax.sharding.Mesh:
    """The mesh of a configuration over the devices of a topology, which need not be there.

    Raises UserError where libtpu is missing or refuses the topology, and where the sizes of the
    mesh do not multiply to its devices.
    """
    if not topology.is_tpu:
        devices = jax.devices("cpu")
        if len(devices) < topology.devices:
            raise UserError(
                f"{topology.text}: stood for by {topology.devices} CPU devices, and there are "
                f"{len(devices)}; set XLA_FLAGS=--xla_force_host_platform_device_count="
                f"{topology.devices} before jax starts"
            )
        devices = devices[: topology.devices]
    else:
        devices = _tpu_devices(topology)
    return mesh.make_mesh(spec.replica, spec.data, spec.model, devices=devices)


@functools.cache
def _tpu_devices(topology: Topology) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"{topology.text}: compiling for a TPU needs its compiler, on any machine: "
            "pip install libtpu"
        )
    more: dict[str, Any] = {} if topology.slices == 1 else {"num_slices": topology.slices}
    if topology.name == "v4":  # the two cores of a chip are one device, as JAX has them on a v4
        more["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.slice_name, **more
        )
    except Exception as error:  # what the plugin raises differs between versions
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{topology.text}: libtpu refuses this topology: {reason}") from error
    return sorted(found.devices, key=lambda device: getattr(device, "slice_index", 0))


def search_inputs(run: config.Run, cfg: ModelConfig, source_dtype: str) -> tuple[Any, tuple]:
    """The jitted search step and its abstract arguments, under the mesh that is set."""
    spec = run.search
    step = search.make_search_step(
        cfg,
        spec,
        dtype=job.DTYPES[run.model.dtype],
        remat=run.model.remat,
        chunk=run.distill.chunk,
    )
    state = search.abstract_state(cfg, spec)
    params = decoder.abstract_params(cfg, jnp.dtype(source_dtype))
    return step, (state, params, decoder.abstract_batch(spec.batch, run.data.window))


def train_inputs(run: config.Run, cfg: ModelConfig, source_dtype: str) -> tuple[Any, tuple]:
    """The jitted distillation step and its abstract arguments, under the mesh that is set."""
    return _train_inputs(run, cfg, source_dtype, run.distill, *student_layers(run, cfg))


def _train_inputs(
    run: config.Run,
    cfg: ModelConfig,
    source_dtype: str,
    recipe: config.Distill,
    keep: Sequence[int],
    frozen: int,
) -> tuple[Any, tuple]:
    student = cfg.take_layers(keep)
    optimizer = make_optimizer(recipe.optimizer, recipe.steps)
    step = distill.make_train_step(
        student,
        recipe,
        optimizer,
        teacher_cfg=cfg,
        keep=keep,
        frozen=frozen,
        dtype=job.DTYPES[run.model.dtype],
        remat=run.model.remat,
    )
    state = distill.abstract_state(student, optimizer, frozen)
    rows, window = recipe.batch, run.data.window
    teacher = stored = None
    if recipe.teacher == "online":
        teacher = decoder.abstract_params(cfg, jnp.dtype(source_dtype))
    elif recipe.teacher == "cache":
        stored = losses.abstract_topk(rows, window, recipe.top_k)
    return step, (state, teacher, decoder.abstract_batch(rows, window), stored)


def search_step(run: config.Run, cfg: ModelConfig, source_dtype: str, topology: Topology) -> Memory:
    """Memory of a search step, under the mesh that is set."""
    step, arguments = search_inputs(run, cfg, source_dtype)
    _, params, _ = arguments
    kept = 0
    if run.search.estimator != "score":
        rows = rows_here(searched_rows(run))
        kept = activation_bytes(run, cfg, rows, model_size(), trained=False)
    with _as_there(topology):
        traced = step.trace(*arguments)
    return _compile(traced, topology, teacher=local_bytes(params), activations=kept)


def train_step(run: config.Run, cfg: ModelConfig, source_dtype: str, topology: Topology) -> Memory:
    """Memory of a distillation step, under the mesh that is set."""
    students = student_layers(run, cfg)
    return _train_step(run, cfg, source_dtype, topology, run.distill, *students)


def steps(run: config.Run) -> list[Callable[..., Memory]]:
    """Those of a run: search, distillation and, where there is one, adaptation."""
    return [search_step, train_step, *([adapt_step] if run.adapts else [])]


def adapt_step(run: config.Run, cfg: ModelConfig, source_dtype: str, topology: Topology) -> Memory:
    """Memory of a step of `search.adapt_steps`, which trains all layers."""
    return _train_step(run, cfg, source_dtype, topology, run.adaptation, range(cfg.num_layers), 0)


def _train_step(
    run: config.Run,
    cfg: ModelConfig,
    source_dtype: str,
    topology: Topology,
    recipe: config.Distill,
    keep: Sequence[int],
    frozen: int,
) -> Memory:
    step, arguments = _train_inputs(run, cfg, source_dtype, recipe, keep, frozen)
    state, online, *_ = arguments
    dense = local_bytes(decoder.abstract_params(cfg, jnp.dtype(source_dtype)))
    teacher = 0 if recipe.teacher == "cache" else dense  # without one it measures the student
    with _as_there(topology):
        traced = step.trace(*arguments)
    rows, trained = rows_here(recipe.together), cfg.take_layers(keep[frozen:])
    return _compile(
        traced,
        topology,
        parameters=local_bytes(state.params),
        optimiser=local_bytes(state.opt_state),
        teacher=teacher,
        idle=teacher if online is None else 0,
        activations=activation_bytes(run, trained, rows, model_size(), trained=True),
    )


def decode_step(run: config.Run, cfg: ModelConfig, source_dtype: str, topology: Topology) -> Memory:
    """Memory while problems are decoded, evaluate.batch at a time and as long as answers may be,
    under the mesh that is set: by the dense model alone or, where that takes more, by the student
    beside it.
    """
    dense, student = decoder.abstract_params(cfg, jnp.dtype(source_dtype)), student_config(run, cfg)
    teacher, wide = local_bytes(dense), decoder.abstract_params(student)
    parameters = local_bytes(wide)
    with _as_there(topology):
        first, second = _decoding(run, cfg, dense), _decoding(run, student, wide)
    # What lies there of what decoding reads and writes, and of what it is made of.
    if first.bytes + first.idle > second.bytes + second.idle + teacher:
        worse, parameters, idle = first, 0, first.idle
    else:
        worse, idle = second, second.idle + teacher
    return _compile(
        worse.traced,
        topology,
        parameters=parameters,
        teacher=teacher,
        idle=idle,
        activations=worse.cache,
    )


@dataclasses.dataclass(frozen=True)
class _Decoding:
    traced: Any
    bytes: int  # of its arguments, a device
    cache: int  # of them keys and values
    idle: int  # parameters that what it reads was made of, and that stay


def _decoding(run: config.Run, cfg: ModelConfig, params: Any) -> _Decoding:
    """The jitted function that decodes, traced."""
    prompt, answer = decoded(run, cfg)
    dtype = job.DTYPES[run.model.dtype]
    generator = generate.make_generator(cfg, dtype=dtype, eos=(0,))
    rows = job.rows_per_batch(run.evaluate.batch)
    weights = generator.prepare(params)
    read = set(map(id, jax.tree.leaves(weights)))
    sampled = run.evaluate.temperature > 0
    arguments = generate.abstract_arguments(
        generator, weights, rows, prompt + answer, sampled=sampled
    )
    return _Decoding(
        traced=generator.go_on.trace(*arguments),
        bytes=local_bytes(arguments),
        cache=local_bytes(arguments[1].cache),
        idle=local_bytes([x for x in jax.tree.leaves(params) if id(x) not in read]),
    )


def _as_there(topology: Topology) -> contextlib.AbstractContextManager[None]:
    """Where CPU devices stand for GPUs, what is traced within is what GPUs would run."""
    return contextlib.nullcontext() if topology.is_tpu else devices.standing_for("gpu")


def _compile(
    traced: Any,
    topology: Topology,
    *,
    activations: int,
    parameters: int = 0,
    optimiser: int = 0,
    teacher: int = 0,
    idle: int = 0,
) -> Memory:
    """`idle`: bytes a device of arrays that stay there and are no arguments of the step."""
    begun, compiled = time.monotonic(), True
    known = parameters + optimiser + teacher
    try:
        found = traced.lower().compile().memory_analysis()
        # A CPU's compiler leaves its work space out of the peak.
        peak = (
            found.argument_size_in_bytes
            + found.output_size_in_bytes
            - found.alias_size_in_bytes
            + found.temp_size_in_bytes
        )
        if topology.is_tpu and found.peak_memory_in_bytes:
            peak = found.peak_memory_in_bytes
    except jax.errors.JaxRuntimeError as error:
        peak, compiled = needed(str(error), arguments=known - idle), False
        if peak is None:
            raise
    rest = max(peak + idle - known, 0)
    activations = min(activations, rest)
    return Memory(
        parameters=parameters,
        optimiser=optimiser,
        teacher=teacher,
        activations=activations,
        temporaries=rest - activations,
        capacity=topology.memory,
        compiled=compiled,
        seconds=time.monotonic() - begun,
    )


def needed(message: str, arguments: int = 0) -> int | None:
    """Bytes a device that a program with so many bytes of arguments needs by the compiler's own
    out-of-memory error, or None where it is another error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    more = 0
    if (found := USED.search(message)) is None:
        found, more = TEMPORARIES.search(message), arguments
    return found and int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) + more


def local_bytes(tree: Any) -> int:
    """Bytes of abstract arrays on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _shards() -> int:
    found = mesh.current()
    return 1 if found is None else mesh.axis_size(found, mesh.BATCH)


def model_size() -> int:
    """Size of the tensor-parallel axis of the mesh that is set."""
    found = mesh.current()
    return 1 if found is None else found.shape["model"]


def rows_here(batch: int) -> int:
    """Rows of a batch on one device."""
    return -(-batch // _shards())
