"""Quantised weights as float32: DeepSeek's float8 in blocks, and MXFP4.

- float8 (DeepSeek-V3, arXiv 2412.19437, section 3.3): `X` in e4m3 and `X_scale_inv`, a number for
  each block of 128 x 128, of which those at the ends may be cut short.
- MXFP4 (OCP Microscaling Formats, 2023; gpt-oss): `X_blocks`, two numbers of e2m1 a byte, the first
  in the low half, and `X_scales`, an exponent for each 32 of them. X is [E, in, out], the blocks
  are [E, out, in / 32, 16].
"""

import dataclasses

import ml_dtypes
import numpy as np

from e3jax.hf.safetensors import DTYPES, Stored

FP8, FP8_BLOCK = "F8_E4M3", 128  # rows and columns of a block
MXFP4, MXFP4_BLOCK = "MXFP4", 32  # numbers along a row
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])
SCALE, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"


def is_read(quantized: dict) -> bool:
    """Whether weights of this `quantization_config` can be read."""
    kind = quantized.get("quant_method"), quantized.get("fmt", "e4m3")
    in_blocks = quantized.get("weight_block_size") == [FP8_BLOCK] * 2
    return kind[0] == "mxfp4" or (kind == ("fp8", "e4m3") and in_blocks)


def with_scales(stored: dict[str, Stored]) -> dict[str, Stored]:
    """A checkpoint's tensors, each quantised one with its scales, by the name of what it is."""
    found = dict(stored)
    for name, t in stored.items():
        if t.code == FP8 and name + SCALE in stored:
            found[name] = dataclasses.replace(t, scale=found.pop(name + SCALE))
        base = name.removesuffix(BLOCKS)
        if base != name and t.code == "U8" and len(t.shape) == 4 and base + SCALES in stored:
            count, rows, blocks, _ = t.shape
            shape = (count, blocks * MXFP4_BLOCK, rows)
            scale = found.pop(base + SCALES)
            del found[name]
            found[base] = dataclasses.replace(t, name=base, code=MXFP4, shape=shape, scale=scale)
    return found


def is_sound(t: Stored) -> bool:
    """Whether a quantised tensor and its scales have sizes that fit."""
    if (scale := t.scale) is None:
        return False
    if t.code == FP8:
        blocks = tuple(-(-size // FP8_BLOCK) for size in t.shape)
        return scale.code in DTYPES and scale.shape == blocks
    count, columns, rows = t.shape
    numbers = (count, rows, columns // MXFP4_BLOCK)
    whole = t.nbytes == scale.nbytes * MXFP4_BLOCK // 2
    return (scale.code, scale.shape) == ("U8", numbers) and whole


def parts(t: Stored) -> int:
    """How many pieces along axis 0 a tensor is dequantised in: what fits the memory of a thread."""
    return 1 if t.code == FP8 else t.shape[0]


def part(t: Stored, number: int) -> np.ndarray:
    """float32: one of `parts` of a tensor, all of axis 0 or one index of it."""
    assert t.scale is not None
    if t.code == FP8:
        raw = np.frombuffer(t.read(0, t.nbytes), ml_dtypes.float8_e4m3fn).reshape(t.shape)
        scale = np.frombuffer(t.scale.read(0, t.scale.nbytes), DTYPES[t.scale.code])
        factors = scale.astype(np.float32).reshape(t.scale.shape)
        factors = factors.repeat(FP8_BLOCK, axis=0).repeat(FP8_BLOCK, axis=1)
        return raw.astype(np.float32) * factors[: t.shape[0], : t.shape[1]]
    size, of_scale = (x.nbytes // t.shape[0] for x in (t, t.scale))
    packed = np.frombuffer(t.read(number * size, size), np.uint8).reshape(-1, MXFP4_BLOCK // 2)
    exponents = np.frombuffer(t.scale.read(number * of_scale, of_scale), np.uint8)
    values = np.stack([E2M1[packed & 15], E2M1[packed >> 4]], axis=-1).reshape(len(packed), -1)
    values = np.ldexp(values, exponents.astype(np.int32)[:, None] - 127)
    _, columns, rows = t.shape
    return np.ascontiguousarray(values.reshape(rows, columns).T)[None]
