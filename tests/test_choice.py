"""Stage 1 from configuration to mask.json: refinement and candidates, what they cost, restarts."""

import numpy as np
import pytest

from e3jax import choice, cli, files, job, recovery, refinement
from e3jax.errors import Diverged
from e3jax.training import loop
from test_pipeline import write_job


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a random checkpoint of four layers and a configuration."""
    return write_job(tmp_path_factory.mktemp("choice"))


# Every step's answer is another one, and they are what there is to choose from.
MOVING = (
    "search.init=random",
    "search.steps=6",
    "search.score_every=1",
    "search.lr=3",
    "search.refine=0",
)


def searched(place, name, *overrides):
    """The mask of a search in the folder `name`."""
    out = place / name
    command = ["search", "--config", str(place / "run.yaml"), f"out={out}", *overrides]
    assert cli.main(command) == 0
    return files.read_json(out / "search" / "mask.json")


@pytest.mark.slow
def test_the_refinement_does_not_depend_on_the_devices(place, monkeypatch):
    """Eight devices measure eight windows at a time; a race goes on four, and counts those. Nothing
    else is measured."""
    calls, real = [], choice.make_figures

    def counted(*_, **options):
        figures = real(*_, **options)
        return lambda *given, **more: calls.append(more) or figures(*given, **more)

    monkeypatch.setattr(choice, "make_figures", counted)
    refined = ("search.refine=8", "search.refine_windows=20")
    eight = searched(place, "eight", "mesh.data=8", *refined)
    two = searched(place, "two", "mesh.data=2", "mesh.model=4", *refined)
    for name in ("keep", "tokens", "teacher_tokens"):
        assert eight[name] == two[name], name
    assert calls.count({"each_window": True}) <= 2 * (8 * 8 // 4 + 20 // 4)
    assert eight["kl"] == pytest.approx(two["kl"], rel=1e-4)
    without = searched(place, "without", "search.refine=0")
    assert without["tokens"] < eight["tokens"]
    more = eight["tokens"] - without["tokens"]
    assert more == eight["teacher_tokens"] - without["teacher_tokens"]
    assert more <= 8 * 8 * 96 + 20 * 96  # as the budget has it


@pytest.mark.slow
def test_answers_are_scored_with_weights_that_learnt_to_do_without_layers(place, monkeypatch):
    """Of those weights the mask has the KL; what they cost is counted; on other devices, and after
    a kill, they are the same; and they do not stay."""
    refined = ("search.refine=4", "search.refine_windows=8")
    plain = searched(place, "as-they-are", *refined)
    adapt = (*refined, "search.adapt_steps=8", "distill.optimizer.lr=3e-3")
    seen, real = [], refinement._adapted
    monkeypatch.setattr(
        refinement, "_adapted", lambda *given: seen.append((given, real(*given))) or seen[-1][1]
    )
    mask = searched(place, "adapted", *adapt)
    ((job_, _, figures, _), (params, spent)), *_ = seen
    with job.open_mesh(job_.run.mesh):
        batches = list(job.ordered(job_.held_out, 8, 8))
        kl = figures(job_.params, params, batches, np.array(mask["keep"])).kl
        assert mask["kl"] == pytest.approx(kl, rel=1e-4)
        assert kl < 0.9 * figures(job_.params, job_.params, batches, np.array(mask["keep"])).kl
    # The refinements may differ by what their answers were scored on.
    assert 0 < spent <= mask["tokens"] - plain["tokens"] + 4 * 8 * 96
    assert not (place / "adapted" / "search" / "adapted" / "checkpoints").exists()
    two = searched(place, "adapted-two", "mesh.data=2", "mesh.model=4", *adapt)
    assert two["keep"] == mask["keep"] and two["kl"] == pytest.approx(mask["kl"], rel=1e-3)

    def stop(*_, **__):
        raise RuntimeError("planted")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="planted"):
        patched.setattr("e3jax.search.refine.refine", stop)
        searched(place, "killed", *adapt)
    steps = []
    fit = refinement.fit
    monkeypatch.setattr(refinement, "fit", lambda *x, **y: steps.append(x[0]) or fit(*x, **y))
    monkeypatch.setattr(loop, "prefetch", stop)  # a step would be taken again
    assert searched(place, "killed", *adapt) == mask and steps == ["adapt"]


def test_adapted_weights_need_answers_to_score(place, capsys):
    command = ["search", "--config", str(place / "run.yaml"), f"out={place}/refused-too"]
    assert cli.main([*command, "search.adapt_steps=2", "search.refine=0"]) == 2
    assert "it needs refine above 0" in capsys.readouterr().err
    command += ["search.adapt_steps=2", "search.refine=2"]
    assert cli.main([*command, "distill.batch=3", "mesh.data=8"]) == 2
    assert "distill.batch=3" in capsys.readouterr().err


@pytest.mark.slow
def test_the_best_candidate_after_a_short_recovery_is_chosen(place, monkeypatch, caplog):
    tried = ("search.candidates=3", "search.candidate_steps=2", *MOVING)
    mask = searched(place, "tried", *tried)
    folder = place / "tried" / "search" / "candidates"
    found = {x.stem: files.read_json(x)["value"] for x in folder.glob("without-*.json")}
    assert 2 <= len(found) <= 3  # the search may have had two answers
    best = min(found, key=lambda name: found[name]["kl"])
    assert best == "without-" + "-".join(map(str, sorted(mask["order"])))
    assert not any(x.is_dir() for x in folder.glob("without-*"))  # models are large
    plain = searched(place, "plain", *MOVING)
    spent = sum(each["tokens"] for each in found.values())
    assert spent > 0 and mask["tokens"] == plain["tokens"] + spent
    assert sorted(np.argsort(mask["theta"])[2:].tolist()) == mask["keep"]

    def fail(*_, **__):
        raise AssertionError("work was done again")

    (place / "tried" / "search" / "mask.json").unlink()
    (folder / f"{best}.json").unlink()
    made = []
    real = recovery.recover
    monkeypatch.setattr(recovery, "recover", lambda *x: made.append(x[2].name) or real(*x))
    assert searched(place, "tried", *tried) == mask
    assert made == [best]  # the other candidates were kept
    monkeypatch.setattr(loop, "prefetch", fail)
    assert searched(place, "tried", *tried) == mask


@pytest.mark.slow
def test_a_candidate_that_diverges_is_not_chosen(place, monkeypatch):
    real, names = recovery.recover, []

    def diverge(job_, mask, folder, *more):
        names.append(folder.name)
        if len(names) == 1:
            raise Diverged("planted")
        return real(job_, mask, folder, *more)

    monkeypatch.setattr(recovery, "recover", diverge)
    tried = ("search.candidates=2", "search.candidate_steps=2")
    mask = searched(place, "diverged", *tried, *MOVING)
    assert names[1] == "without-" + "-".join(map(str, sorted(mask["order"])))


@pytest.mark.slow
def test_the_steps_are_not_made_again_for_another_end_of_the_search(place, monkeypatch):
    """Nor for another recovery of its candidates."""
    searched(place, "recipe", *MOVING)

    def fail(*_, **__):
        raise AssertionError("the search was made again")

    monkeypatch.setattr("e3jax.search.gumbel.sample", fail)
    tried = ("search.candidates=2", "search.candidate_steps=1", "distill.optimizer.lr=1e-4")
    one = searched(place, "recipe", *MOVING, *tried)
    two = searched(place, "recipe", *MOVING, *tried[:2], "distill.optimizer.lr=1e-2")
    assert one["config"] != two["config"]
    little = searched(place, "recipe", *MOVING, "search.refine=2")
    more = searched(place, "recipe", *MOVING, "search.refine=4")
    assert len({mask["config"] for mask in (one, two, little, more)}) == 4


def test_candidates_need_the_teacher_in_the_step(place, capsys):
    command = ["search", "--config", str(place / "run.yaml"), f"out={place}/refused"]
    assert cli.main([*command, "search.candidates=2", "distill.teacher=cache"]) == 2
    assert "needs distill.teacher=online, not cache" in capsys.readouterr().err
    assert cli.main([*command, "search.candidates=2", "distill.batch=3", "mesh.data=8"]) == 2
    assert "distill.batch=3" in capsys.readouterr().err
    assert not (place / "refused" / "search").exists()
