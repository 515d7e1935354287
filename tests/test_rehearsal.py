"""The gate before a long run: every stage in small, once, and nothing of it left."""

import dataclasses
import errno
import functools

import pytest

from e3jax import choice, cli, config, configure, files, outputs, recovery, rehearsal
from e3jax.evaluate import table
from e3jax.hf import families
from e3jax.planning import budget
from test_restart import write_configuration

TEST = 'data.test=[{path: demo/test.jsonl, rows: ["0:20"]}]'
SMALL = (
    "search.steps=4",
    "distill.steps=4",
    "evaluate.baselines=[]",
    "evaluate.batch=4",
    "distill.microbatch=8",
)
STAGES = {
    "search": (choice, "search_mask"),
    "recovery": (recovery, "train_student"),
    "figures": (table, "_measure"),
    "export": (outputs, "_verify"),
}


@pytest.fixture(scope="module")
def configuration(tmp_path_factory):
    return write_configuration(tmp_path_factory.mktemp("rehearsal"))


@pytest.fixture
def played(monkeypatch, one_device):
    """The stages that are gone through, in order, with the depth of the model."""
    seen = []
    for name, (module, function) in STAGES.items():
        whole = getattr(module, function)

        @functools.wraps(whole)
        def watched(*arguments, name=name, whole=whole, **options):
            cfg = options.get("cfg") or next(
                getattr(x, "cfg", x) for x in arguments if hasattr(getattr(x, "cfg", x), "family")
            )
            seen.append((name, cfg.num_layers))
            return whole(*arguments, **options)

        monkeypatch.setattr(module, function, watched)
    monkeypatch.setattr(rehearsal, "FROM", 0)
    return seen


def command(configuration, name, *overrides):
    return cli.main([name, "--config", str(configuration), TEST, *SMALL, *overrides])


@pytest.mark.slow
def test_a_whole_run_is_rehearsed_once(configuration, tmp_path, played, monkeypatch):
    out = tmp_path / "run"
    where = (f"out={out}", "distill.teacher=cache", f"distill.cache={tmp_path}/cache")
    lengths = []
    solve = table.solve

    def solved(params, cfg, problems, tokenizer, spec, **options):
        lengths.append((len(problems), spec.max_new_tokens))
        return solve(params, cfg, problems, tokenizer, spec, **options)

    monkeypatch.setattr(table, "solve", solved)
    assert command(configuration, "run", *where) == 0
    first = [("search", 2), ("recovery", 1), ("figures", 2), ("figures", 2), ("export", 1)]
    assert played[:5] == first
    assert lengths[:2] == [(4, 2), (4, 2)]  # a whole batch of problems, two tokens of each answer
    whole = [("search", 4), ("figures", 4), ("figures", 4), ("recovery", 3), ("figures", 4)]
    assert played[5:] == [*whole, ("export", 3)]
    assert files.read_json(out / "rehearsal.json")["value"].startswith("passed in")
    assert not (out / ".rehearsal").exists()
    shape = files.read_json(tmp_path / "cache" / "meta.json")
    assert shape["teacher"] == files.read_json(out / "search" / "mask.json")["checkpoint"]

    played.clear()
    assert command(configuration, "run", *where) == 0
    assert played == [("search", 4), ("recovery", 3)]  # which find their work done


@pytest.mark.slow
def test_each_command_rehearses_what_it_does(configuration, tmp_path, played):
    assert command(configuration, "search", f"out={tmp_path}/a") == 0
    assert played == [("search", 2), ("search", 4)]
    mask = f"distill.mask={tmp_path}/a/search/mask.json"
    played.clear()
    assert command(configuration, "distill", f"out={tmp_path}/b", mask) == 0
    assert played == [("recovery", 1), ("recovery", 3)]
    given = tmp_path / "mask.json"
    given.write_text('{"num_layers": 4, "keep": [0, 1, 3]}')
    played.clear()
    frozen = (f"out={tmp_path}/c", f"distill.mask={given}", "distill.freeze=true")
    assert command(configuration, "distill", *frozen) == 0
    assert played == [("recovery", 2), ("recovery", 3)]  # with a layer that is frozen


@pytest.mark.slow
def test_what_fails_in_small_is_not_begun(configuration, tmp_path, played, monkeypatch, capsys):
    """A full device or a folder that cannot be written would stop the run hours later."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(outputs, "export", full)
    assert command(configuration, "run", f"out={tmp_path}/run") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert played == [("search", 2), ("recovery", 1), ("figures", 2), ("figures", 2)]
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left <= {"run.json", ".lock", "run.log", "ledger.jsonl", "compiled"}


@pytest.mark.slow
def test_plain_training_too(configuration, tmp_path, played):
    steps = "train.recipe={steps: 3, batch: 8}"
    assert command(configuration, "train", f"out={tmp_path}/run", steps) == 0
    assert played == [("recovery", 2), ("export", 2), ("recovery", 4), ("export", 4)]
    assert (tmp_path / "run" / "plots" / "training.png").is_file()


@pytest.mark.parametrize("name", ["qwen3-32b-math", "llama2-7b", "qwen2.5-14b", "demo"])
def test_runs_of_real_models_are_long(name):
    run = configure.load_run(name)
    facts = f"configs/models/{run.model.path.replace('/', '--')}.json"
    cfg = families.read_config(files.bundled("demo/model/config.json" if name == "demo" else facts))
    tokens = budget.make_budget(run, cfg, "bfloat16").tokens
    assert (tokens >= rehearsal.FROM) == (name != "demo")


def test_only_the_lengths_are_other():
    """Batches, windows and micro-batches, which decide the memory, stay."""
    run = configure.load_run("qwen3-32b-math", ["search.protect=[0]", "search.refine=9"])
    short = rehearsal.shorten(run, "x")
    kept = {"batch", "microbatch", "top_k", "chunk", "teacher", "estimator", "masks", "loss"}
    for part in ("search", "distill"):
        whole, small = (dataclasses.asdict(getattr(r, part)) for r in (run, short))
        assert {k: whole[k] for k in kept & whole.keys()} == {
            k: small[k] for k in kept & small.keys()
        }
        assert small["steps"] == 2
    assert (short.model, short.mesh, short.data) == (run.model, run.mesh, run.data)
    assert isinstance(short, config.Run)
