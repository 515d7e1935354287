"""Operations and bytes of a step from the shapes, and the least time a chip needs for them.

XLA's own count is no help: it takes the body of a scan, and so a model's layers, once. A step's
roofline is the greatest of three times, as if each of the others were hidden behind it: matrix
products at the chip's peak, traffic with its memory, and what the mesh makes chips send.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

from e3jax import config
from e3jax.distill import freezing
from e3jax.mask import read_mask
from e3jax.models.config import ModelConfig
from e3jax.models.params import (
    active_params,
    count_params,
    is_expert,
    is_feed_forward,
    layer_table,
)
from e3jax.planning.chips import Topology
from e3jax.search.search import resolve_keep

WIDE = 4  # bytes of float32


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Sizes of the mesh axes, none of them left open."""

    replica: int
    data: int
    model: int

    @property
    def shards(self) -> int:
        """Devices that share the rows of a batch."""
        return self.replica * self.data

    @property
    def devices(self) -> int:
        return self.shards * self.model


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step on the devices of a topology, by what bounds it."""

    compute: float
    memory: float
    interconnect: float  # within a slice
    network: float  # between slices

    @property
    def seconds(self) -> float:
        return max(self.bounds().values())

    @property
    def bound(self) -> str:
        return max(self.bounds(), key=lambda name: self.bounds()[name])

    def bounds(self) -> dict[str, float]:
        return dataclasses.asdict(self)


# ---------------------------------------------------------------- operations


def keys_seen(time: int, window: int | None, *, dense: bool = False) -> float:
    """Keys a query of a row of `time` tokens sees, on average; all of them where masks are dense.

    One document a row: packed ones see fewer, so this is an upper bound.
    """
    if dense:
        return time
    width = time if window is None else min(window, time)
    return (width * (width + 1) / 2 + (time - width) * width) / time


def layer_flops(
    cfg: ModelConfig, time: int, layer: int, *, dense: bool = False
) -> tuple[float, float, float]:
    """Floating-point operations a token of one layer forward: projections, attention, and mlp or
    the experts that it is sent to."""
    products, experts = [0.0, 0.0], cfg.experts
    taken = 1.0 if experts is None else experts.per_token / experts.count
    for name, leaf in layer_table(cfg, sparse=cfg.is_sparse(layer)).items():
        if len(leaf.shape) > 1 and not name.endswith(("norm", "bias")):
            share = taken if is_expert(name) else 1.0
            products[is_feed_forward(name)] += 2 * share * math.prod(leaf.shape)
    values = cfg.latent.value_dim if cfg.latent else cfg.head_dim
    seen = keys_seen(time, cfg.windows[layer], dense=dense)
    attention = 2 * cfg.num_heads * (cfg.head_dim + values) * seen
    return products[0], attention, products[1]


def body_flops(cfg: ModelConfig, time: int, *, dense: bool = False) -> float:
    """Of all layers, a token, forward."""
    return sum(sum(layer_flops(cfg, time, i, dense=dense)) for i in range(cfg.num_layers))


def feed_forward_width(cfg: ModelConfig) -> float:
    """F of the mlp, or of the experts that a token is sent to: the mean of the layers."""
    experts, sparse = cfg.experts, cfg.num_layers - len(cfg.dense)
    if experts is None:
        return cfg.mlp_width
    of_sparse = experts.per_token * experts.width + experts.shared_width
    return (sparse * of_sparse + len(cfg.dense) * cfg.mlp_width) / cfg.num_layers


def head_flops(cfg: ModelConfig) -> float:
    """Of the logits of a token."""
    return 2 * cfg.width * cfg.vocab_size


def recomputed(cfg: ModelConfig, time: int, remat: str, *, gated: bool) -> float:
    """Operations a token that backward repeats of the layers' forward pass (recompute.py).

    gated: it asks for what comes out of a layer, else the last product of each is not repeated.
    """
    product = 2 * cfg.num_layers * cfg.width * feed_forward_width(cfg)
    again = {
        "none": 0.0,
        "elementwise": 0.0,
        "selective": 2 * product,
        "layer": body_flops(cfg, time) - (0 if gated else product),
    }
    return again[remat]


def train_flops(run: config.Run, cfg: ModelConfig) -> float:
    """A token of a distillation step: teacher forward, student forward, backward, recomputation.
    What is frozen is run by the teacher; a head tied to frozen embeddings has no gradient."""
    trained, time = trained_config(run, cfg), run.data.window
    body, head = body_flops(trained, time), head_flops(trained)
    total = 3 * (body + head) + recomputed(trained, time, run.model.remat, gated=False)
    if cfg.tied and student_layers(run, cfg)[1]:
        total -= head
    if run.distill.teacher == "online":
        total += body_flops(cfg, time) + head_flops(cfg)
    return total


def search_flops(run: config.Run, cfg: ModelConfig) -> float:
    """A token of a masked model: its forward pass, its share of the dense one's and of layer 0's,
    which is run once for both, backward to the gates alone."""
    rest, time, head = cfg.take_layers(range(1, cfg.num_layers)), run.data.window, head_flops(cfg)
    body = body_flops(rest, time)
    shared = body_flops(cfg, time) - body
    if run.search.loss == "kl":
        shared += body + head
    total = body + head + shared / run.search.masks_per_window
    if run.search.estimator != "score":  # weights are frozen: no products for their gradients
        total += body + head + recomputed(rest, time, run.model.remat, gated=True)
    return total


def searched_rows(run: config.Run) -> int:
    """Masked models that run together in a search."""
    return run.search.together * run.search.masks_per_window


def student_layers(run: config.Run, cfg: ModelConfig) -> tuple[Sequence[int], int]:
    """The layers of a run's student, and how many of the first ones are frozen: by its mask. Where
    it has none yet, the first ones, all trained; layers may differ in their window. Baselines have
    masks of their own, which may freeze nothing."""
    if run.distill.mask is None:
        return range(resolve_keep(run.search.keep, cfg.num_layers)), 0
    mask = read_mask(pathlib.Path(run.distill.mask).expanduser(), cfg.num_layers)
    freezes = run.distill.freeze and not run.evaluate.baselines
    return mask.keep, freezing.frozen_layers(mask.keep, mask.merges) if freezes else 0


def student_config(run: config.Run, cfg: ModelConfig) -> ModelConfig:
    """A student of a run."""
    return cfg.take_layers(student_layers(run, cfg)[0])


def trained_config(run: config.Run, cfg: ModelConfig) -> ModelConfig:
    """Of its layers those that are trained."""
    keep, frozen = student_layers(run, cfg)
    return cfg.take_layers(keep[frozen:])


# ---------------------------------------------------------------- bytes


def activation_bytes(
    run: config.Run, cfg: ModelConfig, rows: int, model: int, *, trained: bool
) -> int:
    """What the forward pass keeps for the backward one, a device: its rows, 1 / `model` of what
    tensor parallelism shares. Without training (the search) no product keeps its input for its
    weight's gradient.

    `selective` as recompute.py names it; `none` by the TPU compiler's peaks for Qwen3-32B:
    280,000 elements a token and layer where the weights are trained (for which this gives 273,000),
    and 114,000, 72,000 and 51,000 in the search with model = 2, 4 and 8 (116, 73 and 52).
    """
    size = 2 if run.model.dtype == "bfloat16" else WIDE
    queries, keys = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    mlp, latent = feed_forward_width(cfg), cfg.latent
    whole, shared = cfg.width, 0.0  # the residual stream into the layer
    if run.model.remat in ("selective", "elementwise"):
        whole, shared = (2 if trained else 3) * cfg.width, 2 * queries + 2 * keys
        if latent:  # keys and values are made again from their vector
            whole += latent.kv_rank + latent.rope_dim + (latent.q_rank or 0)
            shared = queries + cfg.num_heads * latent.value_dim
    if run.model.remat == "elementwise":
        shared += 2 * mlp
        if latent:
            shared += cfg.num_heads * (latent.nope_dim + latent.value_dim)
    if run.model.remat == "none":
        whole, shared = 6 * cfg.width, 2 * queries + 6 * mlp
        if trained:  # norms and the rotation in float32 too
            whole, shared = 10 * cfg.width, 7 * queries + 7 * keys + 6 * mlp
    return int(cfg.num_layers * rows * run.data.window * (whole + shared / model) * size)


@dataclasses.dataclass(frozen=True)
class Pass:
    """A run of a model over a batch, as its traffic sees it."""

    cfg: ModelConfig
    tokens: int  # of a micro-batch, on all devices
    micro: int  # micro-batches
    times: int  # that the weights are gathered and read: 1 forward, 3 with backward and remat
    trained: int = 0  # parameters


def _traffic(passes: list[Pass], mesh: Mesh) -> tuple[float, float, float]:
    """Bytes a device moves: with its memory, in its replica, between replicas."""
    memory = inside = between = 0.0
    for p in passes:
        cfg, model = p.cfg, mesh.model
        params = count_params(cfg)
        here = p.tokens / mesh.shards
        split = (model - 1) / model
        gathered = (mesh.data - 1) / mesh.data * 2 * params / model  # bfloat16
        head = (mesh.data - 1) / mesh.data * 2 * cfg.width * cfg.vocab_size / model
        memory += p.micro * p.times * (2 * params / model + 16 * here * cfg.width * cfg.num_layers)
        inside += p.micro * p.times * gathered
        # Two all-reduces of the residual stream a layer and pass; each moves it twice.
        inside += p.micro * p.times * 4 * split * here * cfg.width * 2 * cfg.num_layers
        if p.trained:
            inside += p.micro * gathered * p.trained / params  # gradients
            if p.trained == params or not cfg.tied:
                inside += p.micro * head  # its gradient is in float32
            shard = p.trained / (mesh.data * model)
            memory += shard * WIDE * (8 + 2 * p.micro)  # parameters, two moments, gradients
            between += p.micro * 2 * shard * 2 * (mesh.replica - 1) / mesh.replica
    return memory, inside, between


def train_roofline(run: config.Run, cfg: ModelConfig, topology: Topology, mesh: Mesh) -> Roofline:
    """Of a distillation step."""
    recipe = run.distill
    batch = -(-recipe.batch // mesh.shards) * mesh.shards
    micro = batch // (recipe.microbatch or batch)
    tokens = batch * run.data.window // micro
    times = 2 if run.model.remat == "none" else 3
    trained, (_, frozen) = trained_config(run, cfg), student_layers(run, cfg)
    embeddings = cfg.vocab_size * cfg.width if frozen else 0
    passes = [Pass(trained, tokens, micro, times, count_params(trained) - embeddings)]
    if recipe.teacher == "online":
        passes.append(Pass(cfg, tokens, micro, 1))
    flops = train_flops(run, cfg) * tokens * micro
    return _roofline(flops, passes, topology, mesh)


def search_roofline(run: config.Run, cfg: ModelConfig, topology: Topology, mesh: Mesh) -> Roofline:
    """Of a search step."""
    spec = run.search
    windows = -(-spec.batch // mesh.shards) * mesh.shards
    micro = spec.batch // spec.together
    tokens = windows * run.data.window  # of the dense model
    masked = tokens * spec.masks_per_window
    times = 1 if spec.estimator == "score" else 2 if run.model.remat == "none" else 3
    passes = [Pass(cfg, masked // micro, micro, times)]
    if spec.loss == "kl":
        passes.append(Pass(cfg, tokens // micro, micro, 1))
    flops = search_flops(run, cfg) * masked
    return _roofline(flops, passes, topology, mesh)


def forward_roofline(
    run: config.Run, cfg: ModelConfig, topology: Topology, mesh: Mesh, rows: int, passes: int
) -> Roofline:
    """Of `passes` forward passes over a batch of `rows`, logits included."""
    tokens = -(-rows // mesh.shards) * mesh.shards * run.data.window
    flops = passes * (body_flops(cfg, run.data.window) + head_flops(cfg)) * tokens
    return _roofline(flops, [Pass(cfg, tokens, 1, passes)], topology, mesh)


def decoded(run: config.Run, cfg: ModelConfig) -> tuple[int, int]:
    """Tokens of the longest prompt, taken as 512 since no data is read, and of an answer."""
    prompt = min(512, cfg.max_position // 2)
    return prompt, min(run.evaluate.max_new_tokens, cfg.max_position - prompt)


def decode_roofline(run: config.Run, cfg: ModelConfig, topology: Topology, mesh: Mesh) -> Roofline:
    """Of one more token for each of evaluate.batch answers of half their greatest length: every
    weight is read, and gathered over `data`, for it."""
    rows = -(-run.evaluate.batch // mesh.shards) * mesh.shards
    prompt, answer = decoded(run, cfg)
    seen = prompt + answer // 2
    queries = cfg.num_heads * cfg.head_dim * cfg.num_layers
    flops = rows * (2 * active_params(cfg) + 4 * queries * seen)
    cache = 2 * cfg.cached_width * cfg.num_layers * seen * rows / mesh.devices  # bfloat16
    return _roofline(flops, [Pass(cfg, rows, 1, 1)], topology, mesh, cache)


def _roofline(
    flops: float, passes: list[Pass], topology: Topology, mesh: Mesh, cache: float = 0.0
) -> Roofline:
    """`cache`: bytes that a device reads beside weights and residual stream."""
    memory, inside, between = _traffic(passes, mesh)
    memory += cache
    chip, each = topology.chip, topology.chip.devices
    if topology.slices == 1:  # replicas are in it
        inside, between = inside + between, 0.0
    elif mesh.replica % topology.slices:
        between, inside = between + inside, 0.0  # the mesh gathers weights over the network
    return Roofline(
        compute=flops / (mesh.devices * chip.flops / each),
        memory=memory / (chip.memory_bandwidth / each),
        interconnect=inside / (chip.interconnect / each),
        network=between / (chip.network / each),
    )
