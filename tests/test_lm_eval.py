"""lm-evaluation-harness on our models against its own `hf` on exports, with tasks made here."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml

from e3jax import config, files, from_mask, mesh
from e3jax.errors import UserError
from e3jax.evaluate import likelihood, lm_eval, table
from e3jax.hf.families import read_config
from e3jax.hf.load import load_params
from hf_tiny import save_tiny, torch_logits
from training_tiny import set_mesh

KEEP = [0, 1, 2, 3, 5, 7, 8, 9, 11, 12, 14]  # some answers are right, some are wrong
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{whole}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{said}}",
        "generation_kwargs": {"until": [" ; "], "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.mark.cases(1)
@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
def test_likelihoods_are_those_of_transformers(tmp_path, sizes):
    """Of rows of many lengths and continuations, in the order given."""
    folder = save_tiny(tmp_path, "qwen2")
    cfg = read_config(folder)
    params = load_params(folder, cfg, jnp.float32)
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 96, n).tolist(), k) for n, k in ((9, 3), (40, 1), (2, 1), (17, 16))]
    best = torch_logits(folder, np.array([rows[0][0]]))[0].argmax(-1)
    rows.append(([*rows[0][0], int(best[-1])], 1))
    score = likelihood.make_likelihood(cfg, dtype=jnp.float32, chunk=16)
    if sizes is None:
        found = score(params, rows, 2)
    else:
        with set_mesh(*sizes):
            spread = load_params(folder, cfg, jnp.float32)
            found = score(spread, rows, 4)
    for (ids, asked), (value, greedy) in zip(rows, found, strict=True):
        logp = torch.tensor(torch_logits(folder, np.array([ids]))).log_softmax(-1)[0]
        each = logp[:-1].gather(1, torch.tensor(ids)[1:, None])[-asked:, 0]
        assert value == pytest.approx(float(each.sum()), abs=2e-4)
        assert greedy == (logp[:-1].argmax(-1)[-asked:] == torch.tensor(ids)[-asked:]).all()
    assert found[-1][1]


def test_the_harness_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
    lm_eval.model_class.cache_clear()
    assert lm_eval.main() == 2
    assert "pip install" in capsys.readouterr().err


def test_metrics_are_columns_of_the_table():
    found = {"our": {"acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 9, "f1,strict": 0.25}}
    figures = {"layers": 1, "parameters": 1, "perplexity": 1.0, "kl": 0.0, "agreement": 1.0}
    counts = {"exact_match": None, "problems": 0, "tokens": 0}
    row = table.Row(model="dense", **figures, **counts, tasks=table.metrics(found))
    assert list(row.shown().items())[-2:] == [("our acc", "0.5000"), ("our f1,strict", "0.2500")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Task files and their data, and the demo cut to 12 layers as an export and as a mask."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")  # the harness's own models need it
    folder = tmp_path_factory.mktemp("tasks")
    problems = [json.loads(line) for line in problem_lines()]
    with open(folder / "data.jsonl", "w") as file:
        for number, row in enumerate(problems):
            said = row["completion"].split(" ; ")[0]
            gold, other = f" {said}", f" {said.split()[0]} ="
            choices = [gold, f"{other} 1", f"{other} 7 - 3 = 4", f" answer : {row['answer']}"]
            choices = choices[number % 4 :] + choices[: number % 4]
            more = {"choices": choices, "gold": -number % 4, "said": said}
            whole = " ".join([row["prompt"], row["completion"]] * (1 + 8 * (number == 0)))
            file.write(json.dumps({**row, **more, "whole": whole}) + "\n")
    for name, spec in TASKS.items():
        data = {"data_files": {"test": str(folder / "data.jsonl")}}
        common = {"task": f"our_{name}", "dataset_path": "json", "test_split": "test"}
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump({**common, "dataset_kwargs": data, **spec})
        )
    mask = folder / "mask.json"
    mask.write_text(json.dumps({"num_layers": 16, "keep": KEEP}))
    from_mask.export(config.Run(out=str(folder / "cut")), str(mask))
    return folder


def problem_lines():
    return files.bundled("demo/test.jsonl").read_text().splitlines()[:12]


def theirs(folder, model):
    import lm_eval as harness
    from lm_eval.tasks import TaskManager

    arguments = {"pretrained": str(model), "dtype": "float32", "batch_size": 4, "device": "cpu"}
    found = harness.simple_evaluate(
        "hf",
        model_args=arguments,
        tasks=[f"our_{name}" for name in TASKS],
        task_manager=TaskManager(include_path=str(folder)),
        log_samples=False,
    )
    return found["results"]


def assert_same(found, expected):
    compared = 0
    assert found.keys() == expected.keys()
    for task, metrics in expected.items():
        for name, value in metrics.items():
            if isinstance(value, float) and not math.isnan(value):
                assert found[task][name] == pytest.approx(value, rel=2e-4), (task, name)
                compared += 1
    assert compared >= 6


@pytest.mark.slow
def test_figures_are_those_of_the_harness_on_the_export(place):
    expected = theirs(place, place / "cut")
    of_tasks = [expected[f"our_{name}"] for name in TASKS]
    assert of_tasks[0]["acc,none"] > 0.5 and 0 < of_tasks[2]["exact_match,none"] < 1
    names = [f"our_{name}" for name in TASKS]
    with jax.set_mesh(mesh.make_mesh(2, 2, 2)):
        masked = lm_eval.opened(
            pretrained="demo", mask=str(place / "mask.json"), dtype="float32", batch_size=4,
            replica=2, data=2, model=2,
        )  # fmt: skip
        assert_same(lm_eval.figures(masked, names, str(place)), expected)


@pytest.mark.slow
def test_a_task_may_be_a_file_and_one_that_is_missing_is_named(place):
    with jax.set_mesh(mesh.make_mesh()):
        subject = lm_eval.opened(pretrained=str(place / "cut"), dtype="float32", batch_size=8)
        found = lm_eval.figures(subject, [str(place / "answer.yaml")])
        assert 0 < found["our_answer"]["exact_match,none"] < 1
        for missing in ("no_such_task", str(place / "no.yaml")):
            with pytest.raises(UserError, match="there is no"):
                lm_eval.figures(subject, [missing])


def test_what_a_task_may_not_ask_for_is_named(place):
    with jax.set_mesh(mesh.make_mesh()):
        subject = lm_eval.opened(pretrained=str(place / "cut"), dtype="float32")
    model = lm_eval.model_class()(subject)
    instance = type("Asked", (), {"args": ("sun", {"num_beams": 4})})
    with pytest.raises(UserError, match="num_beams"):
        model.generate_until([instance])
    instance.args = ("sun", {"max_gen_toks": 100_000})
    with pytest.raises(UserError, match="context is"):
        model.generate_until([instance])
    for wrong in ({"batch_size": "auto"}, {"dtype": "int8"}, {"nonsense": 1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            lm_eval.model_class()(pretrained=str(place / "cut"), **wrong)
