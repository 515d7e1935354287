"""The configuration: every mistake is named before anything runs."""

import dataclasses
import pathlib

import pytest

from e3jax import config, configure
from e3jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


def load(tmp_path, text="out: runs/x\n", overrides=()):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return configure.load_run(path, overrides)


def refused(tmp_path, *overrides, text="out: runs/x\n"):
    """The message of the UserError, which always names the file or the override."""
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, overrides)
    message = str(caught.value)
    assert "x.yaml" in message or "override" in message
    return message


def test_an_empty_file_needs_only_out(tmp_path):
    assert "out: required and missing" in refused(tmp_path, text="")
    assert load(tmp_path).search == config.Search()
    assert load(tmp_path, "", ["out=there"]).out == "there"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("search.kep=3", "search.keep"),
        ("sarch.keep=3", "search"),
        ("keep=3", "search.keep"),
        ("distill.optimiser.lr=1", "distill.optimizer"),
        ("train.recipe.optimizer.warm=0.1", "train.recipe.optimizer.warmup"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(tmp_path, wrong, right):
    message = refused(tmp_path, wrong)
    assert f"{wrong.split('=')[0]}".split(".")[0] in message
    assert message.endswith(f"unknown key; did you mean {right}?")


def test_an_unknown_key_in_a_list_is_found(tmp_path):
    text = "out: x\ndata: {train: [{path: a.jsonl}, {path: b.jsonl, promt: question}]}\n"
    message = refused(tmp_path, text=text)
    assert "data.train.1.promt: unknown key; did you mean data.train.prompt?" in message


@pytest.mark.parametrize("key", ["samples=4", "top_p=0.95", "top_k=20"])
def test_greedy_answers_are_not_sampled(tmp_path, key):
    assert "needs a temperature above 0" in refused(tmp_path, f"evaluate.{key}")
    run = load(tmp_path, overrides=[f"evaluate.{key}", "evaluate.temperature=0.6"])
    assert run.evaluate.grader == "regex"
    assert "evaluate.grader" in refused(tmp_path, "evaluate.grader=latex")


def test_a_key_like_no_other_gets_no_suggestion(tmp_path):
    assert refused(tmp_path, "zzzz=1").endswith("zzzz: unknown key")


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("search.steps=ten", "search.steps"),
        ("search.steps=0", "search.steps"),
        ("search.steps=1.5", "search.steps"),
        ("search.lr=.nan", "search.lr"),
        ("search.lr=.inf", "search.lr"),
        ("search.keep=0", "search.keep"),
        ("search.keep=-3", "search.keep"),
        ("search.loss=mse", "'kl' or 'ce'"),
        ("search.tau=[4]", "search.tau.1"),
        ("search.tau=[4, 0]", "search.tau.1"),
        ("search.protect=3", "search.protect"),
        ("data.train=a.jsonl", "data.train"),
        ("data.train=[{path: a, rows: [0-10]}]", "data.train.0.rows.0"),
        ("data.train=[{split: train}]", "data.train.0.path: required and missing"),
        ("data.window=4", "data.window"),
        ("distill.microbatch=5", "microbatch=5 does not divide batch=64"),
        ("train.recipe.microbatch=5", "train.recipe: microbatch=5"),
        ("evaluate.answer='no group'", "one group"),
        ("evaluate.answer='(a)(b)'", "one group"),
        ("evaluate.answer='(open'", "not a regular expression"),
        ("search=3", "search"),
        ("seed=-1", "seed"),
    ],
)
def test_a_bad_value_is_named(tmp_path, override, part):
    message = refused(tmp_path, override)
    assert part in message and "1 mistake" in message


def test_all_mistakes_are_told_at_once(tmp_path):
    message = refused(tmp_path, "search.steps=ten", "data.window=4", "modl.path=x")
    assert "3 mistake" in message
    assert all(key in message for key in ("search.steps", "data.window", "did you mean model?"))


def test_other_divergences_from_a_cache_need_the_tail(tmp_path):
    cached = ("distill.teacher=cache", "distill.tail=drop")
    wrong = (*cached, "distill.divergence=reverse_kl")
    assert "tail=bucket" in refused(tmp_path, *wrong)
    assert load(tmp_path, overrides=cached).distill.tail == "drop"
    assert load(tmp_path, overrides=(*wrong, "distill.tail=bucket")).distill.top_k == 10


def test_overrides(tmp_path):
    text = "out: x\ndata: {train: [{path: a.jsonl}, {path: b.jsonl}]}\n"
    overrides = (
        "search.keep=24",
        "search.keep=0.5",  # the last one counts
        "search.protect=[0, 1]",
        "search.tau=[2.0, 0.5]",
        "search.lr=1e-2",  # YAML 1.1 reads this as a string
        "distill.optimizer.lr=1.0e-5",
        "distill.mask=null",
        "data.train.1.path=c.jsonl",
        "data.train.0.rows=['0:10', '-5:']",
        "evaluate.answer='= (\\d+)'",  # the first equals sign alone parts key and value
    )
    run = load(tmp_path, text, overrides)
    assert run.search.keep == 0.5 and run.search.protect == (0, 1)
    assert run.search.tau == (2.0, 0.5) and run.search.lr == 0.01
    assert run.distill.optimizer.lr == 1e-5 and run.distill.mask is None
    assert [source.path for source in run.data.train] == ["a.jsonl", "c.jsonl"]
    assert run.data.train[0].rows == ("0:10", "-5:")
    assert run.evaluate.answer == r"= (\d+)"


@pytest.mark.parametrize("override", ["search.keep", "=3", "out.name=x", "search.keep=[1"])
def test_a_broken_override_is_quoted(tmp_path, override):
    assert f"override {override!r}" in refused(tmp_path, override)


@pytest.mark.parametrize("text", ["- a\n- b\n", "out: [x", "out: x\n\tseed: 1\n"])
def test_a_file_that_is_no_mapping(tmp_path, text):
    refused(tmp_path, text=text)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"out: \xff\xfe")
    with pytest.raises(UserError, match=r"x\.yaml"):
        configure.load_run(tmp_path / "x.yaml")


def test_yaml_constructs_no_objects(tmp_path):
    refused(tmp_path, text="out: !!python/object/apply:os.getcwd []\n")


def test_bundled_configurations_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = configure.load_run(ROOT / "configs" / "qwen2.5-14b.yaml")
    assert (
        configure.load_run("qwen2.5-14b")
        == configure.load_run("configs/qwen2.5-14b.yaml")
        == expected
    )
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "qwen2.5-14b.yaml").write_text("out: mine\n")
    assert configure.load_run("qwen2.5-14b").out == "mine"  # what is here comes first
    with pytest.raises(UserError, match=r"nothing\.yaml.*No such file"):
        configure.load_run("nothing")


def test_every_key_has_help_text():
    keys = configure.known_keys()
    assert len(keys) > 80 and {"out", "search.keep", "train.recipe.optimizer.lr"} <= keys.keys()
    assert [key for key, text in keys.items() if not text] == []


def test_frozen_and_plain(tmp_path):
    run = load(tmp_path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
    assert configure.validate(configure.as_dict(run), "again") == run
