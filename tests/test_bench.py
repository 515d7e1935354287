"""run.py bench: the same work in both engines, numbers from seconds, a refusal without a run."""

import json
import logging
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from e3jax import cli
from e3jax.bench import bench, steps, work
from e3jax.bench.timing import run_arm
from e3jax.evaluate import speed
from e3jax.evaluate.speed import Arm, Speed
from e3jax.hf import aside
from e3jax.hf.families import read_config
from e3jax.hf.load import load_params
from e3jax.models.params import active_params, count_params
from e3jax.report import page
from hf_tiny import edit_json, save_tiny
from test_report import Page, make_run

SETTINGS = """
out: {out}
model: {{path: {model}, dtype: float32}}
bench: {{batch: [2], prompt: 8, new_tokens: 4, repeats: 2}}
"""


@pytest.fixture
def place(tmp_path, tokenizer_folder):
    """A run folder as `bench` needs it, with an export of three of five layers."""
    source = save_tiny(tmp_path / "model", "qwen3", num_hidden_layers=5)
    make_run(tmp_path / "out")
    (tmp_path / "mask.json").write_text(json.dumps({"num_layers": 5, "keep": [0, 2, 3]}))
    where = [f"model.path={source}", f"out={tmp_path}/out/export"]
    assert cli.main(["export", "--from-mask", str(tmp_path / "mask.json"), *where]) == 0
    settings = SETTINGS.format(out=tmp_path / "out", model=source)
    (tmp_path / "run.yaml").write_text(settings)
    return tmp_path


def command(place, *arguments):
    return cli.main(["bench", "--config", str(place / "run.yaml"), *arguments])


def test_both_engines_do_the_same_work(tmp_path, one_device):
    folder = save_tiny(tmp_path, "qwen3", num_hidden_layers=3)
    cfg = read_config(folder)
    prompts = steps.random_prompts(cfg.vocab_size, 3, 9, seed=1)
    assert prompts.shape == (3, 9) and len(np.unique(prompts)) > 9
    ours = steps.ours(load_params(folder, cfg, jnp.float32), cfg, prompts, jnp.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs = steps.theirs(model, prompts)
    a, b = np.asarray(ours.prefill()), theirs.prefill().numpy()
    assert a.shape == b.shape == (3, cfg.vocab_size)
    assert steps.apart(a, b) < 1e-5
    for count in (1, 7):
        answers = ours.answer(count)
        assert answers.shape == (3, count)
        np.testing.assert_array_equal(answers, theirs.answer(count).numpy())
    assert ours.memory() > 10**7 and theirs.memory() > 10**7


def test_another_model_is_told_apart(tmp_path):
    """One layer less is far above what bfloat16 may differ by."""
    folder = save_tiny(tmp_path, "qwen3", num_hidden_layers=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = steps.random_prompts(96, 2, 9, seed=1)
    whole = steps.theirs(model, prompts).prefill().numpy()
    del model.model.layers[2]
    assert steps.apart(whole, steps.theirs(model, prompts).prefill().numpy()) > 0.2
    noise = np.random.default_rng(0).normal(size=whole.shape)
    spread = np.sqrt(np.mean(np.var(whole, axis=-1)))
    assert steps.apart(whole, whole + 0.01 * spread * noise) == pytest.approx(0.01, rel=0.1)
    assert steps.apart(whole, whole + 3.0) == pytest.approx(0, abs=1e-6)  # softmax sees no shift


def test_seconds_become_rates():
    """Phases from a clock that is known: 8 rows, 100 tokens in, 11 out."""
    clock = {"prefill": 2.0, 1: 3.0, 11: 8.0}
    now = [0.0]

    def spend(what):
        now[0] += clock[what]

    made = steps.Steps(lambda: spend("prefill"), spend, lambda: 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: now[0])
        found = steps.measure(made, 11, warm=1, repeats=3)
    assert found == {"prefill": [2.0] * 3, "decode": [5.0] * 3, "end to end": [8.0] * 3}
    task = bench.arm.Task("e3jax", "", "float32", 8, 100, 11, 3, 0, "")
    made = bench._arm(task, "dense", {"seconds": found, "memory": 5})
    rates = {phase: rate for phase, (rate, _) in made.rates.items()}
    assert rates == {"prefill": 400.0, "decode": 16.0, "end to end": 11.0}
    for noise in ([-1.0, 2.0, 2.0], [0.0, 0.0, 0.0]):
        noisy = bench._arm(task, "dense", {"seconds": found | {"decode": noise}, "memory": 5})
        assert noisy.rates.keys() == {"prefill", "end to end"}


def test_ideal_work():
    """A token reads all weights but an embedding's other rows, and of experts those it is sent to;
    a prompt's products are two operations a weight."""
    sparse = read_config("configs/models/deepseek-ai--DeepSeek-R1.json")
    beside = sparse.vocab_size * sparse.width + 0.0
    one = work.decode_bytes(sparse, 1, 0, 1)
    assert one == pytest.approx(active_params(sparse) - beside)
    assert work.decode_bytes(sparse, 10**6, 0, 1) == pytest.approx(count_params(sparse) - beside)
    assert one < work.decode_bytes(sparse, 2, 0, 1) < 2 * one
    dense = read_config("configs/models/Qwen--Qwen3-32B.json")
    table = dense.vocab_size * dense.width
    wanted = 2 * (count_params(dense) - table + 3 * 50 * dense.cached_width * dense.num_layers)
    assert work.decode_bytes(dense, 3, 50, 2) == wanted
    assert work.prefill_flops(dense, 1) == pytest.approx(
        2 * count_params(dense) - 2 * table, rel=1e-3
    )
    half = dense.take_layers(range(32))
    for ratio in (
        work.decode_bytes(dense, 1, 1, 2) / work.decode_bytes(half, 1, 1, 2),
        work.prefill_flops(dense, 64) / work.prefill_flops(half, 64),
    ):
        assert 1.9 < ratio < 2  # the head stays


@pytest.mark.slow  # five processes that import jax or torch
def test_bench_of_a_run(place, capsys):
    assert command(place) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:-1])) <= 100
    found = speed.read(place / "out" / "bench")
    assert found.layers == (5, 3) and found.device == "cpu" and found.on_host
    assert min(arm.memory for arm in found.arms) > 10**8
    assert [(a.engine, a.model, a.error) for a in found.arms] == [
        (engine, model, None) for engine in ("e3jax", "transformers") for model in speed.MODELS
    ]
    assert all(rate > 0 for a in found.arms for rate, _ in [a.rates["prefill"]])
    lines = (place / "out" / "bench" / "bench.csv").read_text().splitlines()
    assert len(lines) == 5 and lines[1].startswith("e3jax,dense,2,")
    report = (place / "out" / "report.html").read_text()
    assert "Measured speed" in report and "transformers, 2" in report
    assert command(place) == 0  # again, over what is there


MEASURED = {"seconds": dict.fromkeys(speed.PHASES, (1.0, 2.0, 3.0)), "memory": 2**30}


@pytest.fixture
def arms(monkeypatch):
    """What arms find without being run, by engine and model; the tasks that they were given."""
    found, tasks = {}, []

    def run(task):
        tasks.append(task)
        if task.engine == "e3jax":
            np.save(task.logits, np.zeros(1))
        model = "dense" if task.folder.endswith("model") else "pruned"
        return found.get((task.engine, model), MEASURED | {"platform": "gpu", "device": "H9000"})

    monkeypatch.setattr(bench, "_run", run)
    return found, tasks


def test_an_arm_that_fails_is_a_row(place, arms, capsys):
    found, tasks = arms
    found["transformers", "dense"] = {"error": "OutOfMemoryError: 80 GiB"}
    assert command(place, "bench.batch=[2, 1, 2]") == 0
    assert [(task.engine, task.batch) for task in tasks] == [
        (engine, batch) for batch in (2, 1) for engine in ("e3jax",) * 2 + ("transformers",) * 2
    ]
    assert {task.platform for task in tasks if task.engine == "transformers"} == {"gpu"}
    printed = capsys.readouterr().out
    assert "one H9000" in printed and printed.count("OutOfMemoryError: 80 GiB") == 2
    assert "memory" in printed and "resident" not in printed


def test_nothing_measured_leaves_nothing(place, arms, capsys):
    found, tasks = arms
    for model in speed.MODELS:  # after the logits were there
        found["e3jax", model] = {"error": "RESOURCE_EXHAUSTED: 80 GiB"}
    assert command(place) == 2
    assert "nothing could be measured: RESOURCE_EXHAUSTED" in capsys.readouterr().err
    assert {task.engine for task in tasks} == {"e3jax"}
    assert not (place / "out" / "bench").exists()


def test_without_torch_the_other_rows_are_there(place, arms, monkeypatch, capsys, caplog):
    monkeypatch.setattr(bench, "is_torch_available", lambda: False)
    with caplog.at_level(logging.INFO):
        assert command(place) == 0
    assert "`pip install torch`" in caplog.text
    printed = capsys.readouterr().out
    assert "e3jax pruned" in printed and "transformers" not in printed


def test_without_a_run_nothing_is_made(tmp_path, place, capsys):
    assert command(place, f"out={tmp_path}/other") == 2
    assert f"{tmp_path}/other/export: no export is there" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert command(place, "bench.prompt=61") == 2
    assert "context is 64 tokens" in capsys.readouterr().err
    edit_json(place / "model" / "config.json", lambda config: config.update(bos_token_id=7))
    assert command(place) == 2
    assert "was made of another checkpoint" in capsys.readouterr().err
    # The export of `train` from scratch is of no checkpoint.
    edit_json(place / "out" / "export" / aside.RECORD, lambda record: record.pop("model"))
    assert command(place) == 2
    assert "was made of another checkpoint" in capsys.readouterr().err
    assert not (place / "out" / "bench").exists()


def test_dry_run(place, capsys):
    assert command(place, "--dry-run") == 0
    assert "e3jax, transformers, 4 processes" in capsys.readouterr().out


SOME = Speed(
    device="H9000",
    on_host=False,
    dtype="bfloat16",
    prompt=128,
    new_tokens=64,
    repeats=5,
    layers=(16, 12),
    ideals={"1": {"prefill": 1.31, "decode": 1.29}},
    versions={"e3jax": "1"},
    arms=[
        Arm("e3jax", "dense", 1, dict.fromkeys(speed.PHASES, (1e7, 0.1)), 2**30),
        Arm("e3jax", "pruned", 1, dict.fromkeys(speed.PHASES, (1.3e7, 0.1)), 2**29),
        Arm("transformers", "dense", 1, {"prefill": (100.0, 2.0)}, 2**31),
        Arm("transformers", "pruned", 1, {}, None, "<b>out of memory" + "!" * 200),
    ],
)


def test_table_and_report(tmp_path):
    out = make_run(tmp_path / "run")
    speed.write(out / "bench", SOME)
    assert speed.read(out / "bench").layers == SOME.layers
    text = speed.render(speed.read(out / "bench"))
    assert max(map(len, text.splitlines())) < 100
    assert "10,000,000.0 ±  5.0 %" in text and "1.30 x" in text and "1.33 x" in text
    assert text.count("in the noise") == 2
    assert text.count("pruned / dense") == 1  # not where one is missing
    found = Page(page.render([out]))
    assert not found.wrong and "<b>out of memory" in found.text
    assert "10 M ± 5.0" in found.text and "1.30 x" in found.text and "512.0 MiB" in found.text


def test_an_arm_that_dies_is_told():
    assert "exit code 3" in run_arm([sys.executable, "-c", "raise SystemExit(3)"])["error"]
    died = run_arm([sys.executable, "-c", "raise ValueError('no room')"])
    assert died == {"error": "ValueError: no room"}
