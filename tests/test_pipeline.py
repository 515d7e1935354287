"""The command `run` from checkpoint to export, in this process, on a tiny random model."""

import csv
import dataclasses
import functools
import hashlib
import html
import json
import logging
import pathlib
import shutil
import weakref

import jax
import numpy as np
import pytest
import torch
import transformers
from matplotlib.image import imread

import e3jax
from e3jax import cli, configure, files, job, outputs
from e3jax.data.batches import prefetch
from e3jax.distill import distill
from e3jax.evaluate import exact
from e3jax.hf import aside
from e3jax.hf.export import export_new
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.report import plots
from e3jax.training import loop
from e3jax.training.metrics import read_metrics
from hf_tiny import edit_json

CFG = ModelConfig(
    family="qwen2", num_layers=4, width=32, mlp_width=48, num_heads=4, num_kv_heads=2, head_dim=8,
    vocab_size=96, max_position=256, norm_eps=1e-6, tied=True, windows=(None,) * 4, qkv_bias=True,
)  # fmt: skip
SETTINGS = """
out: {out}
model: {{path: {model}, dtype: float32, remat: none}}
data:
  train: [{{path: demo/train.jsonl.gz, rows: ["0:60"]}}]
  held_out: [{{path: demo/train.jsonl.gz, rows: ["60:80"]}}]
  test: [{{path: demo/test.jsonl, rows: ["0:6"]}}]
  window: 96
  decontaminate: []
  cache: {cache}
search: {{keep: 2, steps: 4, batch: 8, init_windows: 8, score_every: 2, score_windows: 8}}
distill: {{steps: 3, batch: 8, evaluate_every: 2, optimizer: {{lr: 1.0e-3}}}}
evaluate: {{batch: 8, max_new_tokens: 8}}
"""
ROWS = ["dense", "e3 raw", "e3 recovered", "shortgpt raw", "shortgpt recovered"]


def command(place: pathlib.Path, name: str, *overrides: str) -> int:
    return cli.main([name, "--config", str(place / "run.yaml"), *overrides])


def write_job(place, settings=SETTINGS):
    """A random checkpoint of four layers, and run.yaml, a configuration of it, in the folder."""
    params = decoder.init_params(jax.random.key(0), CFG)
    params = jax.tree.map(lambda w: w * 4 if w.ndim > 2 else w, params)
    tokenizer = files.bundled("demo/model")
    export_new(params, CFG, tokenizer, place / "model", card="", bos=1, eos=2, pad=0)
    parts = {"out": place / "out", "model": place / "model", "cache": place / "cache"}
    (place / "run.yaml").write_text(settings.format(**parts))
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a random checkpoint, a configuration and, in out/, the finished run."""
    place = write_job(tmp_path_factory.mktemp("job"))
    (place / "model" / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    # Greedy is without it, here and in the check through transformers.
    edit_json(
        place / "model" / "generation_config.json", lambda c: c.update(repetition_penalty=1.5)
    )
    assert command(place, "run", "export.raw=true") == 0
    return place


@pytest.fixture
def copy(place, tmp_path):
    """The finished run again, to be changed."""
    shutil.copytree(place / "out", tmp_path / "out")
    return tmp_path / "out"


def told(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def no_work(monkeypatch):
    """Whatever trains, scores or generates raises."""

    def fail(*_, **__):
        raise AssertionError("work was done again")

    monkeypatch.setattr(loop, "prefetch", fail)
    monkeypatch.setattr(exact, "serve", fail)
    monkeypatch.setattr("e3jax.evaluate.table.make_figures", fail)
    monkeypatch.setattr("e3jax.evaluate.table.make_tokens", fail)
    monkeypatch.setattr("e3jax.selectors.similarity.block_influence", fail)
    monkeypatch.setattr("e3jax.selectors.removal.leave_one_out_kl", fail)


# ---------------------------------------------------------------- the whole job


def test_mask_and_record(place):
    mask = files.read_json(place / "out" / "search" / "mask.json")
    assert len(mask["keep"]) == 2 and sorted(mask["keep"] + mask["order"]) == [0, 1, 2, 3]
    assert mask["checkpoint"] == files.checkpoint_hash(place / "model")
    trained, measured = steps_and_figures(place / "out")
    assert [line["step"] for line in trained] == [0, 1, 2]
    assert [line["step"] for line in measured] == [0, 2, 3]


def steps_and_figures(out):
    """The lines of a recovery's record: those of its steps, and those of held-out figures."""
    lines = read_metrics(out / "distill")
    assert all(("loss" in line) != ("held_out_kl" in line) for line in lines)
    return [x for x in lines if "loss" in x], [x for x in lines if "loss" not in x]


@pytest.mark.parametrize("name", ["export", "export-raw"])
def test_transformers_loads_the_export(place, name):
    out = place / "out" / name
    keep = files.read_json(place / "out" / "search" / "mask.json")["keep"]
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.config.num_hidden_layers == len(model.model.layers) == 2
    assert len(model.config.layer_types) == 2
    dense = transformers.AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    for ours, layer in zip(model.model.layers, keep, strict=True):
        same = torch.equal(ours.mlp.up_proj.weight, dense.model.layers[layer].mlp.up_proj.weight)
        assert same == (name == "export-raw")  # the other one was trained
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / file).read_bytes() == (place / "model" / file).read_bytes()


def test_prune_reads_the_finished_run(place, no_work):
    """The function is the command: it finds nothing to do."""
    found = e3jax.prune(config=place / "run.yaml", **{"export.raw": True})
    assert found.export == place / "out" / "export" and found.out == place / "out"
    assert list(found.keep) == files.read_json(place / "out" / "search" / "mask.json")["keep"]
    rows = files.read_json(place / "out" / "evaluate" / "results.json")
    assert [dataclasses.asdict(row) for row in found.rows] == rows
    assert all(name in str(found) for name in ROWS)


def test_model_card(place):
    keep = files.read_json(place / "out" / "search" / "mask.json")["keep"]
    card = (place / "out" / "export" / "README.md").read_text()
    assert f"kept layers (of the base model, counted from 0): {keep[0]}, {keep[1]}" in card
    assert "license: mit" in card and "recovered by entropy-aware distillation" in card
    assert all(name in card for name in ROWS)
    assert "not trained since" in (place / "out" / "export-raw" / "README.md").read_text()


def test_table(place):
    rows = files.read_json(place / "out" / "evaluate" / "results.json")
    assert [row["model"] for row in rows] == ROWS
    assert [row["layers"] for row in rows] == [4, 2, 2, 2, 2]
    by_name = {row["model"]: row for row in rows}
    assert (by_name["dense"]["kl"], by_name["dense"]["agreement"]) == (
        pytest.approx(0, abs=1e-6),
        1,
    )
    assert by_name["dense"]["tokens"] == 0 < by_name["e3 raw"]["tokens"]
    spent = sum(line.get("tokens", 0) for line in read_metrics(place / "out" / "distill"))
    assert by_name["e3 recovered"]["tokens"] == by_name["e3 raw"]["tokens"] + spent
    for row in rows:
        assert row["parameters"] == decoder.count_params(CFG.take_layers(range(row["layers"])))
        assert np.isfinite(row["perplexity"]) and row["problems"] == 6
    answers = (place / "out" / "evaluate" / "e3-recovered.answers.jsonl").read_text().splitlines()
    correct = [json.loads(line)["correct"] for line in answers]
    assert by_name["e3 recovered"]["exact_match"] == sum(correct) / 6


def test_behaviour(place):
    """KL by tenths adds up to the table's, and the answers are the problems'."""
    folder = place / "out" / "evaluate"
    for row in files.read_json(folder / "results.json"):
        name = row["model"].replace(" ", "-")
        tenths = files.read_json(folder / f"{name}.deciles.json")
        tokens = [x["tokens"] for x in tenths]
        assert len(tenths) == 10 and max(tokens) - min(tokens) <= 1
        assert np.average([x["kl"] for x in tenths], weights=tokens) == pytest.approx(row["kl"])
        windows = np.array(files.read_json(folder / f"{name}.windows.json"))
        assert windows[:, 0].sum() / windows[:, 1].sum() == pytest.approx(row["kl"])
    _, answers = (folder / "behaviour.txt").read_text().split("answers beside")
    for line in answers.splitlines()[-4:]:
        assert sum(map(int, line.split()[-5:])) == 6
    shown = (folder / "samples.md").read_text()
    assert all(f"**{name}**" in shown for name in ROWS)


@pytest.mark.slow
def test_killed_under_other_settings_it_measures_again(place, copy, monkeypatch):
    """What is half there of drawn answers is not taken for the greedy ones of the row before."""
    serve, folder = exact.serve, copy / "evaluate"
    before = [(folder / name).read_text() for name in ("results.json", "dense.answers.jsonl")]

    def killed(*arguments, **options):
        yield next(serve(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(exact, "serve", killed)
    assert command(place, "evaluate", f"out={copy}", "evaluate.temperature=1") != 0
    assert len((folder / "dense.answers.jsonl").read_text().splitlines()) == 1
    monkeypatch.setattr(exact, "serve", serve)
    assert command(place, "evaluate", f"out={copy}") == 0
    assert [
        (folder / name).read_text() for name in ("results.json", "dense.answers.jsonl")
    ] == before


def test_removal_curve_begins_at_the_dense_model(place):
    curve = files.read_json(place / "out" / "evaluate" / "removal.json")["value"]
    rows = files.read_json(place / "out" / "evaluate" / "results.json")
    assert [point["removed"] for point in curve] == [0, 1, 2]
    assert curve[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert curve[-1]["kl"] == pytest.approx(rows[1]["kl"], rel=1e-4)  # e3 raw


def test_pictures(place):
    folder = place / "out" / "plots"
    names = {"kept-layers", "search", "importance", "removal", "distillation", "behaviour"}
    assert {path.name for path in folder.iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("png", "csv")
    }
    for name in names:
        assert_drawn(folder / f"{name}.png")
    with open(folder / "removal.csv", newline="") as file:
        found = [
            (row["curve"], float(row["KL to dense (nats/token)"])) for row in csv.DictReader(file)
        ]
    curve = files.read_json(place / "out" / "evaluate" / "removal.json")["value"]
    assert found == [("KL", point["kl"]) for point in curve]


def test_report_has_the_table_and_every_figure(place):
    text = (place / "out" / "report.html").read_text()
    rows = files.read_json(place / "out" / "evaluate" / "results.json")
    assert [row["model"] for row in rows] == ROWS
    for row in rows:
        assert f'<th scope="row">{row["model"]}</th>' in text
        assert f"{row['kl'] + 0:.4f}" in text
    assert text.count('class="chart"') == 6
    weights = place / "out" / "export" / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in text
    assert "export-raw: " in text


def test_the_same_command_again_does_nothing(place, no_work, capsys, caplog):
    before = {p: p.stat().st_mtime_ns for p in (place / "out" / "export").iterdir()}
    with caplog.at_level(logging.INFO):
        assert command(place, "run", "export.raw=true") == 0
    assert told(caplog).count("is there already, from the same model") == 2
    printed = capsys.readouterr().out
    assert all(name in printed for name in ROWS)
    assert before == {p: p.stat().st_mtime_ns for p in (place / "out" / "export").iterdir()}


def test_another_configuration_is_refused(place, no_work, capsys):
    assert command(place, "distill", "distill.steps=4") == 2
    assert "recipe.steps: 3 -> 4" in capsys.readouterr().err
    assert command(place, "export", "export.dtype=bfloat16") == 2
    assert "dtype_out: 'source' -> 'bfloat16'" in capsys.readouterr().err


@pytest.mark.slow
def test_fitted_and_nothing_trained(place, copy):
    """Least squares alone is a recovery: nearer on windows that it has not seen."""
    shutil.rmtree(copy / "distill")
    only = ("distill.fit=40", "distill.steps=0")
    assert command(place, "distill", f"out={copy}", *only) == 0
    steps, (fitted,) = steps_and_figures(copy)
    raw = steps_and_figures(place / "out")[1][0]
    assert raw["step"] == fitted["step"] == 0 and not steps
    assert fitted["held_out_kl"] < 0.9 * raw["held_out_kl"]


def test_what_the_model_cannot_have_is_told_before_it_is_read(place, tmp_path, monkeypatch, capsys):
    def never(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("e3jax.hf.load.load_params", never)
    assert command(place, "run", f"out={tmp_path}/out", "search.keep=9") == 2
    assert "search.keep" in capsys.readouterr().err


def test_more_outcomes_than_the_vocabulary_has(place, copy, capsys):
    cached = ("distill.teacher=cache", "distill.top_k=100")
    assert command(place, "distill", f"out={copy}", *cached) == 2
    assert "distill.top_k=100: the model's vocabulary has 96" in capsys.readouterr().err
    assert not (copy / "teacher").exists()


# ---------------------------------------------------------------- the export's verification


def test_failed_verification_leaves_nothing(copy, place, monkeypatch, capsys):
    shutil.rmtree(copy / "export")
    monkeypatch.setattr(outputs, "TOLERANCE", 0.0)
    before = sorted(path.name for path in copy.iterdir())
    assert command(place, "export", f"out={copy}") == 2
    error = capsys.readouterr().err
    assert f"{copy / 'export'}: logits differ from transformers" in error
    assert "nothing was exported" in error
    assert sorted(path.name for path in copy.iterdir()) == before


def test_greedy_answers_are_compared(copy, place, monkeypatch, capsys):
    shutil.rmtree(copy / "export")
    other = lambda generator, params, prompts, batch, count: ([5] for _ in prompts)
    monkeypatch.setattr(outputs, "generate", other)
    assert command(place, "export", f"out={copy}") == 2
    assert "a greedy answer of transformers differs from ours" in capsys.readouterr().err
    assert not (copy / "export").exists()


def test_without_torch_the_check_is_skipped_and_said(copy, place, monkeypatch, caplog):
    shutil.rmtree(copy / "export")
    monkeypatch.setattr(outputs, "is_torch_available", lambda: False)
    with caplog.at_level(logging.INFO):
        assert command(place, "export", f"out={copy}") == 0
    assert "the check through transformers was skipped" in told(caplog)
    assert f"`pip install -U torch`, remove {copy / 'export'}" in told(caplog)
    assert "against its own read-back" in told(caplog)
    assert "against transformers" not in told(caplog)
    assert (copy / "export" / "model.safetensors").exists()


def test_a_model_too_large_for_the_host_is_not_checked(copy, place, monkeypatch, caplog):
    shutil.rmtree(copy / "export")
    monkeypatch.setattr(outputs, "_host_memory", lambda: 100_000)
    with caplog.at_level(logging.INFO):
        assert command(place, "export", f"out={copy}") == 0
    assert "host memory and there are" in told(caplog) and "on a larger host" in told(caplog)
    assert "against transformers" not in told(caplog)


@pytest.mark.slow
def test_an_export_killed_before_its_name_is_made_again(copy, place):
    """What is there under the final name is whole; so a run goes on from any moment."""
    (copy / "export").rename(copy / ".export.partial-00000000")
    assert command(place, "export", f"out={copy}") == 0
    assert (copy / "export" / aside.RECORD).exists()
    assert not list(copy.glob(".export*"))


# ---------------------------------------------------------------- other ways through


def test_who_lets_the_dense_model_go_lets_it_go_for_all(tmp_path):
    read = []
    load = functools.cache(lambda: read.append(1) or len(read))
    run = configure.load_run(None, values={"out": str(tmp_path)})
    one = job.Job(run, tmp_path, tmp_path, "", CFG, load, None)
    other = one.having(out=tmp_path / "other")
    assert one.params == other.params == 1
    other.release()
    assert one.params == other.params == 2


@pytest.mark.slow
def test_a_given_mask_has_none_of_the_search_s_fixed_layers(place, tmp_path):
    """A baseline removes as many layers as it, any of them."""
    file = tmp_path / "mask.json"
    files.write_json(file, {"num_layers": 4, "keep": [0, 3]})
    settings = (f"distill.mask={file}", "search.keep=3", "search.force=[1, 2]")
    assert command(place, "evaluate", f"out={tmp_path}/out", *settings) == 0
    theirs = files.read_json(tmp_path / "out" / "shortgpt" / "mask.json")
    free = files.read_json(place / "out" / "shortgpt" / "mask.json")
    assert theirs["keep"] == free["keep"]


@pytest.mark.slow
def test_distillation_from_a_teacher_cache(copy, place, monkeypatch, caplog):
    """The student is trained from the stored teacher, written once and used by the baseline too;
    meanwhile the dense model is nowhere."""
    init_state, dense, left = distill.init_state, [], []

    def begin(*given):
        state = init_state(*given)
        del given  # they share the embedding
        left.append([one() is not None for one in dense])
        dense.clear()
        return state

    def take_layers(params, cfg, keep):
        dense.extend(map(weakref.ref, jax.tree.leaves(params)))
        return decoder_take_layers(params, cfg, keep)

    decoder_take_layers = decoder.take_layers
    monkeypatch.setattr(decoder, "take_layers", take_layers)
    monkeypatch.setattr(distill, "init_state", begin)
    for name in ("distill", "shortgpt", "export", "evaluate"):
        shutil.rmtree(copy / name)
    again = ["distill.teacher=cache", "distill.top_k=4", f"out={copy}"]
    with caplog.at_level(logging.INFO):
        assert command(place, "evaluate", *again) == 0
    assert len(left) == 2 and all(len(one) > 8 and not any(one) for one in left)
    assert told(caplog).count("teacher cache: ") == 3  # both sizes beforehand, its mass after
    assert told(caplog).count("teacher cache of data.held_out: ") == 1
    rows = files.read_json(copy / "evaluate" / "results.json")
    assert all(np.isfinite([row["kl"], row["perplexity"]]).all() for row in rows)
    train, _ = steps_and_figures(copy)
    assert all(np.isfinite(line["loss"]) for line in train)
    online, _ = steps_and_figures(place / "out")
    assert train[0]["nll"] == pytest.approx(online[0]["nll"], rel=1e-5)  # the same first batch
    assert train[0]["loss"] != online[0]["loss"]

    shutil.rmtree(copy / "distill")
    monkeypatch.setattr("e3jax.data.teacher.TeacherCache.write", None)
    assert command(place, "distill", *again) == 0
    assert [x["loss"] for x in steps_and_figures(copy)[0]] == [x["loss"] for x in train]


@pytest.mark.slow
def test_train_from_a_checkpoint_and_from_scratch(place, tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO)
    steps = "train.recipe={steps: 2, batch: 8}"  # and the rest is plain training's
    assert command(place, "train", steps, f"out={tmp_path / 'on'}") == 0
    on = tmp_path / "on" / "export"
    config = json.loads((on / "config.json").read_text())
    assert config == json.loads((place / "model" / "config.json").read_text())
    assert "license: mit" in (on / "README.md").read_text()
    assert told(caplog).count("logits against") == 2 and "greedy answers equal" in told(caplog)
    again = (f"out={tmp_path / 'on'}", "export.dtype=bfloat16")
    assert command(place, "train", steps, *again) == 2
    assert "dtype_out: 'source' -> 'bfloat16'" in capsys.readouterr().err
    scratch = [f"train.config={place}/model/config.json", f"train.tokenizer={place}/model"]
    assert command(place, "train", steps, *scratch, f"out={tmp_path / 'new'}") == 0
    new = tmp_path / "new" / "export"
    assert transformers.AutoModelForCausalLM.from_pretrained(new).config.eos_token_id == 2
    assert "from random initialisation" in (new / "README.md").read_text()
    size = f"{decoder.count_params(CFG) / 1e3:.4g} K parameters"
    for folder, told_ in (
        ("on", f"{place}/model, a model of {size}, was trained further on"),
        ("new", f"A model of {size} was trained from random initialisation on"),
    ):
        text = html.unescape((tmp_path / folder / "report.html").read_text())
        lines = read_metrics(tmp_path / folder / "train")
        first, *_, last = (x["held_out_perplexity"] for x in lines if "held_out_perplexity" in x)
        assert told_ in text and f"perplexity went from {first:.4g} to {last:.4g}." in text
        assert files.checkpoint_hash(tmp_path / folder / "export") in text
    assert files.checkpoint_hash(place / "model") in (tmp_path / "on" / "report.html").read_text()


# ---------------------------------------------------------------- pictures


def assert_drawn(path):
    """A PNG in which something is: several colours, and not only at the rim."""
    pixels = imread(path)[..., :3]
    inner = pixels[60:-60, 60:-60].reshape(-1, 3)
    assert len(np.unique((inner * 255).round(), axis=0)) > 6


@pytest.mark.cases(1)
@pytest.mark.parametrize("layers", [2, 12, 80])
def test_heat_map_of_any_depth(tmp_path, layers):
    probability = np.random.default_rng(0).random((4, layers))
    keep = range(0, layers, 2)
    plots.kept_layers(tmp_path / "map.png", [0, 10, 20, 30], probability, keep)
    plots.importance(tmp_path / "kl.png", np.linspace(0, 1, layers), keep)
    assert_drawn(tmp_path / "map.png")
    assert_drawn(tmp_path / "kl.png")


def test_curves_leave_out_what_has_no_place(tmp_path):
    series = {"a": ([0, 1, 2], [1.0, float("nan"), 0.1]), "b": ([0, 1], [0.0, -1.0]), "c": ([], [])}
    plots.curves(tmp_path / "c.png", series, xlabel="x", ylabel="y", title="t")
    assert_drawn(tmp_path / "c.png")


@pytest.mark.slow
def test_nothing_compiles_after_the_first_step(place, tmp_path, monkeypatch):
    """Neither steps nor, once the first was done, the evaluations between them."""
    events: list[tuple[str, object]] = []

    def heard(name: str, *_, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            events.append(("compiled", None))

    def marked(batches, start, stop):
        events.append(("begun", None))
        for step, batch in prefetch(batches, start, stop):
            events.append(("step", step))
            yield step, batch
        events.append(("ended", None))

    monkeypatch.setattr(loop, "prefetch", marked)
    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        assert command(place, "run", f"out={tmp_path / 'out'}") == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert ("compiled", None) in events and events.count(("ended", None)) == 3
    running = False
    for kind, step in events:
        running = (running or step == 1) and kind != "ended"
        assert not (running and kind == "compiled"), events
