"""cuDNN's attention: where documents are, on any machine; its numbers where there is a GPU."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from e3jax.models import attention, cudnn

ROOT = pathlib.Path(__file__).parent.parent


def packed_segments(rows, time, documents):
    """int32 [B, T]: rows of fewer and more documents, some with padding behind, one of nothing but
    that."""
    rng = np.random.default_rng(0)
    segments = np.zeros((rows, time), np.int32)
    for row in range(rows - 1):
        count = 1 + row % documents
        cuts = np.sort(rng.choice(np.arange(1, time - 8), count - 1, replace=False))
        segments[row] = 1 + np.searchsorted(cuts, np.arange(time), side="right")
        segments[row, time - row % 5 :] *= row % 5 == 0
    return segments


@pytest.mark.parametrize("documents", [1, 2, 5, 9])
def test_spans_tell_the_mask_and_cover_the_row(documents):
    """Each query sees the keys of its span up to itself: the dense mask, padding included."""
    segments = packed_segments(11, 64, 5)
    segments = np.where(segments > documents, documents, segments)
    begin, length = map(np.asarray, cudnn.spans(jnp.asarray(segments), documents))
    assert begin.shape == (11, documents + 2) and length.shape == (11, documents + 1)
    for row in range(len(segments)):
        mask, covered = np.zeros((64, 64), bool), 0
        for at, size in zip(begin[row], length[row]):
            if size < 0:
                assert at == -1 or at == 64
                continue
            assert at == covered
            covered += size
            mask[at : at + size, at : at + size] = np.tril(np.ones((size, size), bool))
        assert covered == 64
        wanted = attention.causal_mask(jnp.asarray(segments[row : row + 1]), None)[0]
        np.testing.assert_array_equal(mask, wanted)


def test_what_it_is_for(monkeypatch):
    monkeypatch.setattr(cudnn.kernels, "check_compute_capability", lambda least: True)
    half = jnp.bfloat16
    assert cudnn.suits(4096, 128, half, 12)
    assert not cudnn.suits(4096, 128, jnp.float32, 12)  # it multiplies in half precision
    assert not cudnn.suits(4096, 128, half, None)  # how many documents is not known
    assert not cudnn.suits(256, 128, half, 12)  # a dense mask is smaller
    assert not cudnn.suits(4096, 260, half, 1) and not cudnn.suits(4096, 36, half, 1)
    monkeypatch.setattr(cudnn.kernels, "check_compute_capability", lambda least: least == "8.0")
    assert cudnn.suits(4096, 128, half, 1) and not cudnn.suits(4096, 128, half, 2)  # an A100


NUMBERS = """
import functools
import jax, jax.numpy as jnp, numpy as np
from e3jax import devices, mesh
from e3jax.models import attention, cudnn
from test_cudnn import packed_segments

def distance(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)

for rows, time, documents, heads, groups, width in (
    (6, 512, 5, 2, 4, 64), (3, 384, 1, 1, 1, 128), (6, 640, 3, 2, 2, 128), (9, 1024, 8, 1, 2, 80),
):
    rng = np.random.default_rng(1)
    q_shape, k_shape = (rows, time, heads, groups, width), (rows, time, heads, width)
    q, k, v, g = (
        jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in (q_shape, k_shape, k_shape, q_shape)
    )
    segments = packed_segments(rows, time, documents)
    real = jnp.asarray(segments > 0)[..., None, None, None]
    g = jnp.where(real, g, 0)  # what padding gets nobody asks for

    def outcome(attend, *arrays):
        def masked(*qkv):
            return jnp.where(real, attend(jnp.int32(0), *qkv), 0)
        y, pull = jax.vjp(masked, *arrays)
        return y, *pull(jax.sharding.reshard(g.astype(y.dtype), jax.typeof(y).sharding))

    with jax.set_mesh(mesh.make_mesh(devices=jax.devices()[:1])):
        segments, real = mesh.shard_batch((np.asarray(segments), np.asarray(real)))
        heads = ("batch", None, "heads", "groups", None)
        q, g = (jax.device_put(x, mesh.sharding(heads)) for x in (q, g))
        k, v = (jax.device_put(x, mesh.sharding(heads[:3] + heads[4:])) for x in (k, v))
        assert devices.platform() == "gpu" and cudnn.suits(time, width, q.dtype, documents)
        kernel = attention.make_attention(segments, (None,), width, q.dtype, documents)
        found = jax.jit(functools.partial(outcome, kernel))(q, k, v)
        dense = attention.by_mask(segments, (None,))
        wide = [x.astype(jnp.float32) for x in (q, k, v)]
        wanted = jax.jit(functools.partial(outcome, dense))(*wide)
        errors = [distance(a, b) for a, b in zip(found, wanted)]
        assert max(errors) < 0.01, (documents, errors)
        # Nothing of another document: other keys there, the same bits here.
        other = [jnp.where(segments[..., None, None] == 1, x, x[::-1] * 3) for x in (k, v)]
        first = (segments == 1)[..., None, None, None]
        ours = jax.jit(lambda *a: jnp.where(first, kernel(jnp.int32(0), *a), 0))
        both = [np.asarray(ours(q, *kv), np.float32) for kv in ((k, v), other)]
        np.testing.assert_array_equal(*both)
print("all the same")
"""


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs an NVIDIA GPU")
def test_kernel_is_dense_attention():
    """Outputs and gradients against float32 with a dense mask, in a process that has the GPU; and
    documents that share a row do not see each other, to the last bit."""
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-c", NUMBERS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "all the same" in done.stdout, done.stderr[-3000:]
