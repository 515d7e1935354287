"""Bad input: a message that names it, exit code 2, no traceback, and nothing written."""

import dataclasses
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys

import jax
import numpy as np
import pytest

from e3jax import cli, commands, config, configure, files, job
from e3jax.hf.export import export_new
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.progress import LOG

ROOT = pathlib.Path(__file__).parent.parent
CFG = ModelConfig(
    family="qwen3",
    num_layers=4,
    width=16,
    mlp_width=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=96,
    max_position=256,
    norm_eps=1e-6,
    tied=True,
    windows=(None,) * 4,
    qk_norm=True,
)
SETTINGS = """
out: {out}
model: {{path: {model}, dtype: float32, remat: none}}
data:
  train: [{{path: demo/train.jsonl.gz, rows: ["0:40"]}}]
  held_out: [{{path: demo/train.jsonl.gz, rows: ["40:60"]}}]
  test: [{{path: demo/test.jsonl, rows: ["0:4"]}}]
  window: 128
  decontaminate: []
  cache: {cache}
search: {{keep: 2, steps: 2, batch: 8, init_windows: 8, score_every: 2, score_windows: 8}}
distill: {{steps: 2, batch: 8, evaluate_every: 2}}
evaluate: {{batch: 8, max_new_tokens: 4}}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model of four layers in two shards, with the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    params = decoder.init_params(jax.random.key(0), CFG)
    tokenizer = files.bundled("demo/model")
    export_new(params, CFG, tokenizer, folder, card="", eos=2, pad=0, shard_bytes=20_000)
    return folder


@pytest.fixture
def place(tmp_path, checkpoint):
    """A folder with its own copy of the checkpoint and a configuration that works."""
    shutil.copytree(checkpoint, tmp_path / "model")
    parts = {"out": tmp_path / "out", "model": tmp_path / "model", "cache": tmp_path / "cache"}
    (tmp_path / "run.yaml").write_text(SETTINGS.format(**parts))
    return tmp_path


@pytest.fixture
def refused(place, capsys):
    """Runs a command that must fail; returns its message."""

    def call(*arguments, command="run"):
        before = contents(place)
        code = cli.main([command, "--config", str(place / "run.yaml"), *arguments])
        shown = capsys.readouterr()
        assert code == 2
        assert shown.err.splitlines()[-1:] and "error: " in shown.err
        assert "Traceback" not in shown.err + shown.out
        new = {path for path in contents(place) - before if "cache" not in path.parts}
        new -= {place / "out", place / "out" / "run.json", place / "out" / job.LOCK}
        new -= {place / "out" / LOG}
        assert not new, "half-written output"
        return shown.err

    return call


def contents(folder):
    return set(folder.rglob("*"))


# ---------------------------------------------------------------- the configuration


def test_missing_configuration(capsys):
    assert cli.main(["run", "--config", "nowhere/nothing.yaml"]) == 2
    assert "error: nowhere/nothing.yaml" in capsys.readouterr().err


def test_unknown_key(refused):
    assert "search.kep: unknown key; did you mean search.keep?" in refused("search.kep=2")


@pytest.mark.parametrize("keep", ["4", "7", "2.5", "0.999", "0.01"])
def test_keep_outside_the_model(refused, keep):
    assert f"search.keep={keep}" in refused(f"search.keep={keep}", "--dry-run")
    assert "expected a count from 1 to 3" in refused(f"search.keep={keep}")


def test_keep_below_one(refused):
    assert "search.keep" in refused("search.keep=0")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search.protect=[0, 1, 3]"], "search.protect names 3 layers"),
        (["search.force=[0, 1, 3]"], "search.force names 3 layers"),
        (["search.protect=[4]"], "search.protect: no layer"),
        (["search.protect=[1]", "search.force=[1]"], "both name layers [1]"),
    ],
)
def test_fixed_layers_that_cannot_be_met(refused, overrides, message):
    assert message in refused(*overrides, "--dry-run")
    assert message in refused(*overrides)


def test_window_larger_than_the_context(refused):
    assert "data.window=512: the model's context is 256" in refused("data.window=512")


# ---------------------------------------------------------------- the output folder


def test_output_folder_not_empty(refused, place):
    (place / "out").mkdir()
    (place / "out" / "thesis.tex").write_text("precious")
    assert f"out={place / 'out'}: not empty" in refused()
    assert (place / "out" / "thesis.tex").read_text() == "precious"
    assert [path.name for path in (place / "out").iterdir()] == ["thesis.tex"]


def test_output_folder_is_a_file(refused, place):
    (place / "out").write_text("precious")
    assert "is a file" in refused()
    assert (place / "out").read_text() == "precious"


# ---------------------------------------------------------------- the checkpoint


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_no_checkpoint(refused, place):
    assert f"{place / 'nowhere'}" in refused(f"model.path={place / 'nowhere'}")
    (place / "empty").mkdir()
    assert "no config.json" in refused(f"model.path={place / 'empty'}")


def test_unknown_architecture(refused, place):
    edit(place / "model" / "config.json", model_type="mamba", architectures=["MambaForCausalLM"])
    message = refused()
    assert "mamba" in message
    assert all(family in message for family in ("llama", "mistral", "qwen2", "qwen3"))


def test_unknown_rope(refused, place):
    edit(
        place / "model" / "config.json",
        rope_parameters={"rope_type": "spiral", "rope_theta": 1e4},
    )
    assert "spiral" in refused()


def test_tokenizer_of_another_model(refused, place):
    path = place / "model" / "tokenizer.json"
    file = json.loads(path.read_text())
    file["model"]["vocab"]["zebra"] = 200
    path.write_text(json.dumps(file))
    message = refused()
    assert "token 'zebra' has id 200" in message and "vocab_size is 96" in message


def shards(place):
    return sorted((place / "model").glob("*.safetensors"))


def test_missing_shard(refused, place):
    gone = shards(place)[1]
    gone.unlink()
    assert gone.name in refused()


def test_truncated_shard(refused, place):
    shard = shards(place)[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert shard.name in refused()


def test_header_beyond_the_file(refused, place):
    shard = shards(place)[0]
    shard.write_bytes(struct.pack("<Q", 2**40) + shard.read_bytes()[8:])
    assert shard.name in refused()


def test_shard_outside_the_folder(refused, place):
    index = place / "model" / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shutil.copy(shards(place)[0], place / "elsewhere.safetensors")
    edit(index, weight_map=dict.fromkeys(weight_map, "../elsewhere.safetensors"))
    assert "points outside the folder" in refused()


def test_nan_weights(refused, place):
    shard = shards(place)[0]
    data = bytearray(shard.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    shard.write_bytes(data)
    assert "NaN or infinite" in refused()


# ---------------------------------------------------------------- what is compiled


@pytest.mark.slow
def test_compiled_programs_stay_in_the_run_folder(tmp_path):
    """A second process finds them there; one that is told of another place uses that."""
    program = (
        "import pathlib, sys, jax; from e3jax import job; job.keep_compiled(pathlib.Path('.'));"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0);"
        "print(jax.jit(lambda x: x @ x)(jax.numpy.ones((3, 3)))[0, 0])"
    )
    path = {"PYTHONPATH": str(ROOT), "JAX_LOG_COMPILES": "1"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    command = [sys.executable, "-c", program]

    def run(**more):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment | path | more, capture_output=True, text=True
        )
        assert done.stdout == "3.0\n", done.stderr
        return done.stderr

    run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "there"))
    assert {path.name for path in tmp_path.iterdir()} == {"there"}
    assert "cache hit" not in run()
    kept = set((tmp_path / "compiled").iterdir())
    assert any("lambda" in path.name for path in kept)
    assert "Persistent compilation cache hit for 'jit__lambda'" in run()
    assert set((tmp_path / "compiled").iterdir()) == kept


# ---------------------------------------------------------------- the data


def with_rows(place, *rows):
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_no_data(refused):
    assert "data.train" in refused("data.train=[]")


def test_missing_data_file(refused, place):
    assert "nowhere.jsonl" in refused(f"data.train.0.path={place / 'nowhere.jsonl'}")


def test_empty_data_set(refused, place):
    path = with_rows(place)
    message = refused(f"data.train=[{{path: {path}}}]")
    assert str(path) in message and "empty" in message


def test_missing_field(refused, place):
    path = with_rows(place, {"question": "1 + 1", "answer": "2"})
    message = refused(f"data.train=[{{path: {path}}}]")
    assert str(path) in message and "'prompt'" in message and "question, answer" in message


def test_test_problems_without_answer(refused, place):
    path = with_rows(place, {"prompt": "ant = 1 ; ant ?", "completion": "ant = 1"})
    assert "no answer in field 'answer'" in refused(f"data.test=[{{path: {path}}}]")


def test_window_dropped_for_every_row(refused, place):
    assert "data" in refused("data.window=8", "data.long_rows=drop")


def test_missing_mask(refused, place):
    assert "nothing.json" in refused(f"distill.mask={place / 'nothing.json'}", command="distill")


# ---------------------------------------------------------------- train


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.config=nowhere.json", "train.tokenizer=demo/model"], "nowhere.json"),
        (["train.config=configs/demo-model.json"], "train.tokenizer: required"),
        (["train.recipe.teacher=online"], "plain training has none"),
    ],
)
def test_train(refused, overrides, message):
    assert message in refused(*overrides, command="train")


# ---------------------------------------------------------------- dry run, help


# bench is of a run that is there: test_bench.py.
@pytest.mark.parametrize("command", sorted(commands.COMMANDS.keys() - {"bench"}))
def test_dry_run_prints_the_plan_and_touches_nothing(place, capsys, command):
    before = contents(place)
    arguments = ["--topology", "v5e:2x2"] if command == "plan" else []
    arguments += ["--config", str(place / "run.yaml"), "--dry-run", "seed=3"]
    arguments += ["sweep.keep=[2, 3]"]  # the model has 4
    assert cli.main([command, *arguments]) == 0
    printed = capsys.readouterr().out
    assert contents(place) == before
    total = decoder.count_params(CFG)
    if command == "train":
        assert f"4 layers, {total:,} parameters" in printed
    else:
        assert "4 -> 2 (ideal speed-up 2.00x)" in printed
        assert all(word in printed for word in ("parameters", "search", "distillation", "export"))


@pytest.mark.slow
def test_a_dry_run_needs_no_device(place):
    """Neither one that is there nor one that is not: on a pod's login host, or beside a run."""
    program = "import jax, sys; from e3jax import cli; code = cli.main(sys.argv[1:])"
    program += "; assert not jax._src.xla_bridge._backends; sys.exit(code)"
    arguments = ["run", "--config", str(place / "run.yaml"), "--dry-run"]
    subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"JAX_PLATFORMS": "nowhere"},
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=120,
    )


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_help_lists_the_keys(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    _, _, sections = commands.COMMANDS[command]
    wanted = {key: t for key, t in configure.known_keys().items() if key.split(".")[0] in sections}
    assert len(wanted) >= 3
    missing = [key for key, text in wanted.items() if key not in printed or text not in printed]
    assert not missing
    assert command in sections or command in ("run", "plan")


def test_every_section_is_in_some_help():
    shown = {section for _, _, sections in commands.COMMANDS.values() for section in sections}
    assert {field.name for field in dataclasses.fields(config.Run)} == shown


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["prune"],
        ["run"],
        ["run", "--config", "x.yaml", "--fast"],
        ["run", "--config", "x.yaml", "keep"],
    ],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_options_and_overrides_in_any_order():
    given = "run search.keep=3 --config x.yaml seed=1 --dry-run out=y".split()
    options = commands.parse(given)
    assert options.dry_run and options.config == "x.yaml"
    assert sorted(options.overrides) == ["out=y", "search.keep=3", "seed=1"]


@pytest.mark.slow
def test_a_refused_run_can_be_repeated(refused, place, capsys):
    """The folder that a refused run claimed is its own the next time."""
    refused("search.keep=4")
    assert cli.main(["search", "--config", str(place / "run.yaml")]) == 0
    mask = json.loads((place / "out" / "search" / "mask.json").read_text())
    assert len(mask["keep"]) == 2
    assert pathlib.Path(place / "out" / "run.json").is_file()
