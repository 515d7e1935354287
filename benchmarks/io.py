"""Time and host memory of load, export and export --from-mask, against the disk itself.

    python benchmarks/io.py --folder /big/disk/e3jax-io     # 16.4 GB; needs 33 GB there

Generates a checkpoint of Qwen3-8B's shapes (random finite bfloat16, shards of 5 GB), measures each
part in a process of its own, with the files out of the page cache, and removes what it made. Load
and export need host memory for the model on a machine without accelerators: --layers makes it
smaller, --parts leaves some out.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import threading
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
PARTS = ("disk", "load", "export", "from-mask")
BLOCK = 2**24


def generate(folder: pathlib.Path, layers: int) -> None:
    from e3jax.hf import aside, safetensors
    from e3jax.hf.families import from_hf
    from e3jax.hf.tensors import tensor_table

    config = QWEN3_8B | {"num_hidden_layers": layers}
    table = tensor_table(from_hf(config, "benchmark"))
    shards = aside.shard(table, lambda t: 2 * t.size, aside.SHARD_BYTES)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    # Without the top bit of the exponent all are finite. A window into it is a tensor's part.
    pool = rng.integers(0, 2**16, 2**26, np.uint16) & 0xBFFF
    for name, tensors in shards.items():
        layout = [(t.name, "BF16", t.shape, 2 * t.size) for t in tensors]

        def pieces(tensors=tensors):
            for t in tensors:
                for done in range(0, t.size, BLOCK):
                    start = int(rng.integers(len(pool) - BLOCK))
                    yield pool[start : start + min(BLOCK, t.size - done)]

        safetensors.write_file(folder / name, layout, pieces())
    names = {file: [t.name for t in tensors] for file, tensors in shards.items()}
    aside.write_files(folder, {"config.json": aside.to_json(config)} | aside.index(names))


def drop_cache(folder: pathlib.Path) -> None:
    """The folder's files out of the page cache, and as root everything."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if os.access("/proc/sys/vm/drop_caches", os.W_OK):
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")


def size_of(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def read_all(folder: pathlib.Path) -> dict:
    """The disk's own sequential speed: every file, 16 MiB at a time, into the same memory."""
    buffer = bytearray(BLOCK)
    drop_cache(folder)
    begun = time.monotonic()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", 0) as file:
            while file.readinto(buffer):
                pass
    seconds = time.monotonic() - begun
    return {"seconds": seconds, "gb_per_s": size_of(folder) / seconds / 1e9}


class Peak:
    """Greatest anonymous memory of this process while the block runs, beyond that before it."""

    def __enter__(self) -> "Peak":
        self.before, self.greatest, self.over = self.now(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.added = self.greatest - self.before

    def watch(self) -> None:
        while not self.over.wait(0.005):
            self.greatest = max(self.greatest, self.now())

    @staticmethod
    def now() -> int:
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024


def load(folder: pathlib.Path) -> tuple[dict, object, object]:
    import jax

    from e3jax import mesh
    from e3jax.hf.families import read_config
    from e3jax.hf.load import load_params

    cfg = read_config(folder)
    with jax.set_mesh(mesh.make_mesh()):
        jax.block_until_ready(jax.numpy.ones(1) + 1)  # the device's own start is not the load's
        drop_cache(folder)
        begun = time.monotonic()
        cpu = time.process_time()
        with Peak() as peak:
            params = jax.block_until_ready(load_params(folder, cfg))
        seconds = time.monotonic() - begun
    arrays = sum(x.nbytes for x in jax.tree.leaves(params))
    on_host = arrays if jax.devices()[0].platform == "cpu" else 0
    found = {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "gb_per_s": arrays / seconds / 1e9,
        "beyond_arrays_mb": (peak.added - on_host) / 1e6,
        "device": jax.devices()[0].device_kind,
    }
    return found, params, cfg


def export(folder: pathlib.Path, out: pathlib.Path) -> dict:
    from e3jax.hf.export import export as write

    _, params, cfg = load(folder)
    begun = time.monotonic()
    with Peak() as peak:
        write(params, range(cfg.num_layers), cfg, folder, out, card="")
    seconds = time.monotonic() - begun
    size = size_of(out)
    shutil.rmtree(out)
    return {
        "seconds": seconds,
        "gb_per_s": size / seconds / 1e9,
        "beyond_arrays_mb": peak.added / 1e6,
    }


def from_mask(folder: pathlib.Path, out: pathlib.Path, repeats: int) -> list[dict]:
    """cp and --from-mask in turns, both from a cold cache to synced files; the mask keeps all but
    one layer, so that both copy the same to a few per cent."""
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    mask = out.with_suffix(".json")
    keep = [i for i in range(layers) if i != layers // 2]
    mask.write_text(json.dumps({"keep": keep, "num_layers": layers}))
    command = [sys.executable, str(ROOT / "run.py"), "export", "--from-mask", str(mask)]
    command += [f"model.path={folder}", f"out={out}"]
    found = []
    for _ in range(repeats):
        row = {}
        for name in ("cp", "from_mask"):
            drop_cache(folder)
            begun = time.monotonic()
            if name == "cp":
                subprocess.run(["cp", "-r", "--reflink=never", folder, out], check=True)
                for path in [*out.iterdir(), out]:
                    handle = os.open(path, os.O_RDONLY)
                    os.fsync(handle)
                    os.close(handle)
            else:
                subprocess.run(command, check=True, capture_output=True)
            seconds = time.monotonic() - begun
            row |= {f"{name}_seconds": seconds, f"{name}_gb_per_s": size_of(out) / seconds / 1e9}
            shutil.rmtree(out)
        row["ratio_of_seconds"] = row["from_mask_seconds"] / row["cp_seconds"]
        row["ratio_a_byte"] = row["cp_gb_per_s"] / row["from_mask_gb_per_s"]
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        found.append(row | {"resident_mb": children * 1024 / 1e6})
    mask.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="made, and removed")
    parser.add_argument("--layers", type=int, default=36, help="36 = Qwen3-8B, 16.4 GB")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    source, out = options.folder / "source", options.folder / "out"
    if options.part:
        run = {
            "disk": lambda: read_all(source),
            "load": lambda: load(source)[0],
            "export": lambda: export(source, out),
            "from-mask": lambda: from_mask(source, out, options.repeats),
        }
        print(json.dumps(run[options.part]()))
        return
    try:
        generate(source, options.layers)
        print(f"{options.layers} layers, {size_of(source) / 1e9:.1f} GB", flush=True)
        for _ in range(options.repeats):
            for part in [p for p in options.parts if p != "from-mask"]:
                print(part, _in_own_process(options.folder, part, options.repeats), flush=True)
        if "from-mask" in options.parts:
            for row in json.loads(_in_own_process(options.folder, "from-mask", options.repeats)):
                print("from-mask", json.dumps(row), flush=True)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)


def _in_own_process(folder: pathlib.Path, part: str, repeats: int) -> str:
    command = [sys.executable, __file__, "--folder", str(folder), "--part", part]
    command += ["--repeats", str(repeats)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()[-1]


if __name__ == "__main__":
    main()
