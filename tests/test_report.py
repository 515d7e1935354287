"""The report's page: what is on record and nothing else, text that cannot break out, no network."""

import html.parser
import json
import math
import re
import shutil
import subprocess
import sys

import pytest

from e3jax import cli, files, ledger
from e3jax.errors import UserError
from e3jax.evaluate import intervals
from e3jax.evaluate.rows import beside
from e3jax.hf import aside, families
from e3jax.models.params import count_params
from e3jax.report import facts, page
from test_cli import ROOT

EVIL = (
    "</script><script>document.title = 'evil'</script><img src=x onerror=\"document.title='evil'\">"
)
ALONE = ("area", "br", "hr", "img", "input", "link", "meta")  # tags that are never closed
NONE = "\N{EN DASH}"  # in a table
KL = {"dense": 0.0, "e3 raw": 0.4, "e3 recovered": 0.1}
RIGHT = {"dense": "1110", "e3 raw": "0010", "e3 recovered": "1011"}  # of four problems


def make_run(out, *, evil="", kl=1.0):
    """A run folder of a model of four layers, written as the stages do."""
    write = lambda name, value: files.write_json(out / name, value)
    settings = {"model": {"path": f"org/model{evil}"}, "search": {"refine": 0}}
    write("run.json", settings | {"distill": {"mask": None}, "evaluate": {"baselines": []}})
    mask = {"num_layers": 4, "keep": [0, 2], "tokens": 1000, "teacher_tokens": 500}
    write("search/mask.json", mask | {"checkpoint": "c0ffee"})
    write("search/importance.json", {"value": {"scores": [1.0, 0.01, 0.5, 0.0]}})
    lines = [
        {"step": 0, "held_out_kl": 0.9, "best_kl": 0.9, "keep_probability": [1, 0.3, 0.6, 0.1]}
    ]
    lines += [
        {"step": n, "loss": float("nan") if n == 1 else 0.5, "tokens": 10.0} for n in range(4)
    ]
    lines += [{"step": 4, "held_out_kl": 0.4, "best_kl": 0.4, "keep_probability": [1, 0.1, 0.9, 0]}]
    files.write_text(out / "search" / "metrics.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
    table = []
    for model, right in RIGHT.items():
        row = {"model": model, "layers": 2, "parameters": 600, "perplexity": 1.5, "agreement": 0.9}
        row |= {"kl": kl * KL[model], "exact_match": right.count("1") / 4, "problems": 4}
        table.append(row | {"tokens": 0})
        place = f"evaluate/{model.replace(' ', '-')}"
        write(f"{place}.windows.json", [[kl * KL[model] * 8, 10], [kl * KL[model] * 12, 10]])
        write(f"{place}.deciles.json", [{"kl": kl * KL[model] / 10 * n} for n in range(10)])
        answers = [
            {
                "prompt": f"problem {i}{evil}", "expected": f"{i}{evil}", "correct": mark == "1",
                "found": f"{i}{evil}" if mark == "1" else f"none{evil}", "ended": True,
                "text": f"{model} says {i}{evil}",
            }
            for i, mark in enumerate(right)
        ]  # fmt: skip
        text = "".join(json.dumps(answer) + "\n" for answer in answers)
        files.write_text(out / f"{place}.answers.jsonl", text)
    table[0]["parameters"] = 1000
    write("evaluate/results.json", table)
    write_ledger(out, ["search", "search"], evil)
    return out


def write_ledger(out, stages, evil=""):
    line = {"seconds": 90.0, "devices": 4, "kind": f"TPU{evil}", "processes": 1, "commit": None}
    line |= {"device_bytes": 3 * 2**30, "host_bytes": 2**30, "e3jax": "0.1.0", "jax": "0.10"}
    lines = [line | {"stage": stage, "python": "3.12.1"} for stage in stages]
    files.write_text(out / "ledger.jsonl", "".join(json.dumps(x) + "\n" for x in lines))


# Of each choice, by selector and seed: layers removed, KL and tokens of three windows, raw and
# recovered.
CHOICES = {
    ("e3", 3): ((1, 3), [(2, 10), (6, 30), (1, 20)], [(1, 10), (2, 30), (1, 20)]),
    ("e3", 4): ((1, 2), [(4, 10), (6, 30), (3, 20)], [(1, 10), (3, 30), (0, 20)]),
    ("sleb", 3): ((0, 3), [(1, 10), (3, 30), (2, 20)], [(2, 10), (3, 30), (0, 20)]),
    ("sleb", 4): ((1, 2), [(3, 10), (3, 30), (2, 20)], [(2, 10), (3, 30), (1, 20)]),
}


def make_comparison(out, *, evil="", recover=True):
    """A folder of `compare` of a model of four layers, as it writes it."""
    settings = {"model": {"path": f"org/model{evil}"}, "search": {}, "distill": {"mask": None}}
    files.write_json(out / "run.json", settings)
    common = {"layers": 2, "parameters": 600, "perplexity": 1.5, "agreement": 0.9, "problems": 4}
    results = []
    for (name, seed), (removed, *states) in CHOICES.items():
        here, selector = out / f"seed-{seed}", name + (name != "e3") * evil
        result = {"selector": selector, "seed": seed, "removed": removed, "allowed": 5000}
        result |= {"tokens": 1000 * seed, "teacher_tokens": 500, "seconds": 10.0 * seed}
        result |= {"recovered": None, "recovery_seconds": 77.0}
        for state, windows in list(zip(("raw", "recovered"), states, strict=True))[: 1 + recover]:
            kl, tokens = (sum(x) for x in zip(*windows, strict=True))
            model = f"without-{name}{seed}{evil} {state}"
            row = common | {"model": model, "kl": kl / tokens, "exact_match": (seed - 1) / 4}
            result[state] = row | {"tokens": 0 if state == "raw" else 2000}
            place = beside(here / "evaluate", model, "windows.json")
            files.write_json(place, windows)
        results.append(result)
        mask = {"checkpoint": f"c0ffee{evil}"}
        files.write_json(here / ("search" if name == "e3" else name) / "mask.json", mask)
    files.write_json(out / "compare.json", results)
    dense = common | {"model": "dense", "layers": 4, "kl": 0.0, "exact_match": 1.0, "tokens": 0}
    files.write_json(out / "evaluate" / "dense.json", {"inputs": "", "value": dense})
    write_ledger(out, ["evaluate", "choose e3", f"choose sleb{evil}", "choose e3"], evil)
    return out


def make_training(out, *, evil="", steps=4, perplexity=(40.0, 20.0)):
    """A folder of `train`, that has done four steps, as it writes it."""
    settings = {"model": {"path": f"org/model{evil}"}, "distill": {"mask": None}}
    settings["train"] = {"config": f"config{evil}.json", "recipe": {"steps": steps}}
    files.write_json(out / "run.json", settings)
    lines = [{"step": n, "loss": 3.0, "nll": 3.0, "tokens": 250.0} for n in range(4)]
    lines += [{"step": 4 * n, "held_out_perplexity": x} for n, x in enumerate(perplexity)]
    text = "".join(json.dumps(x) + "\n" for x in sorted(lines, key=lambda x: x["step"]))
    files.write_text(out / "train" / "metrics.jsonl", text)
    files.write_json(out / "train" / "checkpoints" / "inputs.json", {"config": {}})
    export = out / "export"
    shutil.copytree(ROOT / "e3jax" / "demo" / "model", export)
    files.write_json(export / aside.RECORD, {})
    files.write_text(export / f"more{evil.replace('/', '')}.txt", "more")
    write_ledger(out, ["train"], evil)
    return out


MAKERS = (make_run, make_comparison, make_training)


class Page(html.parser.HTMLParser):
    """A parsed page: its elements, texts, and what was closed in the wrong order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.wrong, self._open = [], [], [], []
        self.feed(text)
        self.close()
        self.wrong += self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ALONE:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.texts.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def test_page_says_what_is_on_record(tmp_path):
    text = page.render([make_run(tmp_path / "run")])
    found = Page(text)
    assert not found.wrong
    said = found.text.replace("\N{NO-BREAK SPACE}", " ")
    assert "2 of the 4 decoder layers of org/model were kept, 40.0 % of its parameters" in said
    assert "solves 75.0 % of 4 problems where the dense model solves 75.0 %" in said
    low, high = intervals.wilson(3, 4)
    assert f"{100 * low:.1f} to {100 * high:.1f}" in said
    _, error = intervals.mean([(0.8, 10), (1.2, 10)])
    assert f"± {error:.4f}" in said
    assert "180 s 720 s 3.0 GiB 1.0 GiB 2 4 x TPU" in said  # both pieces, four devices
    assert found.count("figure") == 4 and "removal" not in said
    assert "No export is there" in said


def test_page_says_pass_at_1_of_drawn_answers(tmp_path):
    out = make_run(tmp_path / "run")
    rows = files.read_json(out / "evaluate" / "results.json")
    for row in rows:
        row |= {"samples": 8, "interval": [0.123, 0.876]}
    files.write_json(out / "evaluate" / "results.json", rows)
    said = Page(page.render([out])).text
    assert "model pass@1 KL" in said and "12.3 to 87.6, pass@1 of 8" in said
    assert "over 4 problems, with 8 answers drawn to each" in said
    assert "the first of 8 answers to each" in said
    both = Page(page.render([out, make_run(tmp_path / "greedy")])).text
    assert both.count("pass@1 of 8") > said.count("pass@1 of 8")


def test_page_needs_nothing_else(tmp_path):
    found = Page(page.render([make_run(tmp_path / "run")]))
    assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in found.elements}
    addresses = [a[key] for _, a in found.elements for key in ("src", "href") if key in a]
    assert all(address.startswith("#") for address in addresses)
    style = re.sub(r"/\*.*?\*/", "", page.STYLE)
    assert "url(" not in style and "@import" not in style
    script = page.SCRIPT.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|fetch|XMLHttp|eval|innerHTML", script)


@pytest.mark.parametrize("make", MAKERS)
def test_text_from_data_cannot_break_out(tmp_path, make):
    plain = Page(page.render([make(tmp_path / "plain")]))
    out = make(tmp_path / f"run{EVIL.replace('/', '')}", evil=EVIL)
    found = Page(page.render([out]))
    assert found.elements and not found.wrong
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in plain.elements]
    assert not [a for _, attributes in found.elements for a in attributes if a.startswith("on")]
    assert f"org/model{EVIL}" in found.text  # and yet all of it is shown
    assert make is not make_run or f"e3 raw says 3{EVIL}" in found.text
    assert make is not make_comparison or f"sleb{EVIL}, seed 4" in found.text


def drawn(text):
    """The figures of a page."""
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert block is not None

    def refuse(name):
        raise AssertionError(name)

    return json.loads(block[1], parse_constant=refuse)


def test_figures_are_json_without_nan(tmp_path):
    charts = drawn(page.render([make_run(tmp_path / "run", evil=EVIL)]))
    assert [chart["kind"] for chart in charts] == ["heat", "bars", "curves", "curves"]
    assert charts[0]["rows"] == [[1, 0.3, 0.6, 0.1], [1, 0.1, 0.9, 0]]
    assert charts[2]["series"][0]["y"] == [0.5, None, 0.5, 0.5]


def test_turned_answers_come_first(tmp_path):
    found = facts.read(make_run(tmp_path / "run"))
    assert [(s.number, s.turned) for s in found.samples] == [
        (2, "lost"), (4, "gained"), (1, ""), (3, ""),
    ]  # fmt: skip
    assert [(model, flips.lost, flips.gained) for model, flips in found.flips] == [
        ("e3 raw", 2, 0), ("e3 recovered", 1, 1),
    ]  # fmt: skip


def test_what_is_not_on_record_is_said_to_be_so(tmp_path):
    out = tmp_path / "run"
    whole = page.render([make_run(out)])
    (out / "search" / "mask.json").unlink()  # the search goes on
    text = page.render([out])
    assert not Page(text).wrong and text.count("<figure>") == whole.count("<figure>")
    assert '"keep": null' in text and "final answer" not in text and "outlined" not in text
    for name in ("evaluate", "search"):
        shutil.rmtree(out / name)
    (out / "ledger.jsonl").unlink()
    text = page.render([out])
    assert not Page(text).wrong
    assert "No layers of org/model have been chosen yet" in text and "Not measured yet" in text
    assert "<figure>" in whole and "<figure>" not in text
    assert text.count("ot on record") == 3  # cost, versions, the dense checkpoint


def test_curves_are_thinned_to_means():
    x, y = page._thinned(list(range(1000)), [float(i % 2) for i in range(1000)])
    assert 300 < len(x) <= page.POINTS
    assert x[0] == 1 and sum(y) / len(y) == pytest.approx(0.5, abs=0.01)
    assert page._spread(1000, 5) == [0, 250, 500, 749, 999] and page._spread(1, 5) == [0]


# ---------------------------------------------------------------- comparisons and trainings


def test_page_of_a_comparison(tmp_path):
    text = page.render([make_comparison(tmp_path / "run")])
    found = Page(text)
    said = found.text.replace("\N{NO-BREAK SPACE}", " ")
    assert not found.wrong
    assert "2 selectors chose which 2 of the 4 decoder layers of org/model to keep, over 2" in said
    assert "at most 5 K tokens" in said
    # Nats of a window, sleb's less e3's, means of both seeds, over 60 tokens.
    for state, apart, best in (("raw", [-1, -3, 0], "sleb"), ("recovered", [1, 0.5, 0], "e3")):
        mean = sum(apart) / 60
        rest = [x - mean * tokens for x, tokens in zip(apart, (10, 30, 20), strict=True)]
        error = math.sqrt(3 / 2 * sum(x**2 for x in rest)) / 60
        place = 1 if state == "raw" else 2
        kl = {(name, seed): sum(x for x, _ in c[place]) / 60 for (name, seed), c in CHOICES.items()}
        means = {name: (kl[name, 3] + kl[name, 4]) / 2 for name in ("e3", "sleb")}
        spread = {name: abs(kl[name, 3] - kl[name, 4]) for name in means}
        for name, shown in (("e3", NONE), ("sleb", f"{mean:+.4f} ± {error:.4f}")):
            cost = "3.5 K 500 35 s" if state == "raw" else "2 K 77 s"
            assert f"{name} {means[name]:.4f} {spread[name]:.4f} {shown} 62.5 % {cost}" in said
        other, *_ = set(means) - {best}
        told = f"of {best} are nearest to the dense model, at a KL divergence of {means[best]:.2g}"
        told += " nats a token" * (state == "raw")
        told += f"; {other} is next, {abs(mean):.2g} ± {error:.2g} farther"
        ratio = f"{abs(mean) / error:.1f} times" if abs(mean) > error else "no more than"
        farther = sum(kl[other, seed] > kl[best, seed] for seed in (3, 4))
        told += f", {ratio} that standard error over windows, and farther with {farther} of 2 seeds"
        assert told in said
    labels = [a["aria-label"] for tag, a in found.elements if a.get("class") == "layers"]
    assert labels == [f"layers removed: {x}" for x in ("1, 3", "1, 2", "0, 3", "1, 2")]
    (chart,) = drawn(text)
    assert chart["names"] == ["sleb", "e3"] and chart["seeds"] == [3, 4]
    assert chart["states"][0]["values"][0] == [0.1, pytest.approx(8 / 60, rel=1e-4)]
    # 90 s a piece on four devices; tokens are of both seeds, the recoveries' 2,000 of each of four.
    assert "choose e3 7 K 1 K 180 s 720 s" in said and f"distill 8 K {NONE} not on record" in said
    assert "dense checkpoint c0ffee" in said and "(baseline)" not in said
    assert f"distill.mask={tmp_path}/run/seed-3/search/mask.json out=runs/best" in said


@pytest.mark.parametrize("seeds", [(4,), (3, 4)])
def test_comparison_where_recoveries_diverged(tmp_path, seeds):
    out = make_comparison(tmp_path / "run")
    results = files.read_json(out / "compare.json")
    for result in results:
        if result["selector"] == "sleb" and result["seed"] in seeds:
            result["recovered"] = None
    files.write_json(out / "compare.json", results)
    text = page.render([out])
    said = Page(text).text.replace("\N{NO-BREAK SPACE}", " ")
    (chart,) = drawn(text)
    assert chart["names"] == ["sleb", "e3"]
    if seeds == (3, 4):
        assert chart["states"][1]["values"][0] == [None, None] and "sleb (" not in said
        return
    # Of seed 3 alone: 5 nats for e3's 4, in the same windows.
    assert chart["states"][1]["values"][0] == [pytest.approx(5 / 60, rel=1e-4), None]
    mean, error = intervals.apart([CHOICES["e3", 3][2]], [CHOICES["sleb", 3][2]])
    assert mean == pytest.approx(1 / 60)
    assert f"sleb (1 of 2 seeds) 0.0833 0.0000 {mean:+.4f} ± {error:.4f}" in said
    assert "farther with" not in said.split("After the same recovery")[1].split("\n")[0]


def test_comparison_without_recovery_or_windows(tmp_path):
    out = make_comparison(tmp_path / "run", recover=False)
    said = Page(page.render([out])).text
    assert "recover" not in said.split("What it cost")[0]
    assert f"--from-mask {out}/seed-3/sleb/mask.json" in said
    results = files.read_json(out / "compare.json")
    for result in results:
        del result["allowed"]  # of an older version
        result["raw"]["kl"] = math.nan if result["selector"] == "e3" else 0.5
    files.write_json(out / "compare.json", results)
    shutil.rmtree(out / "seed-3" / "evaluate")
    text = page.render([out])
    assert "of sleb are nearest" in text and "is next" not in text
    assert "tokens through masked models." not in text
    assert drawn(text)[0]["states"] == [
        {"name": "nothing trained", "values": [[0.5, 0.5], [None, None]]}
    ]
    for wrong in ({"seed": 3}, results[0] | {"seed": "3/../../other"}, results[0] | {"raw": None}):
        files.write_json(out / "compare.json", [wrong])
        with pytest.raises(UserError, match=f"{out}: a record there is damaged"):
            page.render([out])
    (out / "compare.json").unlink()
    assert "has not ended yet" in page.render([out])


def test_equal_choices_are_not_set_apart(tmp_path):
    out = make_comparison(tmp_path / "run", recover=False)
    results = files.read_json(out / "compare.json")
    for same in [dict(r, selector="kl") for r in results if r["selector"] == "sleb"]:
        results.append(same)
    files.write_json(out / "compare.json", results)
    said = Page(page.render([out])).text
    assert "of sleb (and of kl, which are the same) are nearest" in said
    assert "; e3 is next" in said


def test_page_of_a_training(tmp_path):
    text = page.render([make_training(tmp_path / "run")])
    found = Page(text)
    assert not found.wrong
    parameters = count_params(families.read_config(ROOT / "configs" / "demo-model.json"))
    size = f"{parameters / 1e6:.4g} M"
    assert (
        f"A model of {size} parameters was trained from random initialisation on 1 K tokens in 4 "
        "steps. Held-out perplexity went from 40 to 20." in found.text
    )
    (chart,) = drawn(text)
    held_out = next(one for one in chart["series"] if one["name"] == "held out")
    assert held_out["y"] == [pytest.approx(math.log(x), rel=1e-4) for x in (40, 20)]
    assert f"train 1 K {NONE} 90 s 360 s" in found.text
    assert "started from random initialisation" in found.text and "model.safetensors" in found.text
    again = f"python run.py train --config {tmp_path}/run/run.json out=runs/again"
    assert again in found.text
    shutil.rmtree(tmp_path / "run" / "export")
    early = make_training(tmp_path / "early", steps=9, perplexity=(40.0,))
    shutil.rmtree(early / "export")  # which there is at the end
    said = Page(page.render([early])).text
    assert "in 4 steps, of 9 so far. Held-out perplexity was 40 before" in said


def test_trainings_side_by_side_and_what_is_not(tmp_path):
    run, comparison, training = (make(tmp_path / make.__name__) for make in MAKERS)
    other = make_training(tmp_path / "other", perplexity=(40.0, 10.0))
    found = Page(text := page.render([training, other]))
    assert not found.wrong
    for name, after in (("make_training", "20.000"), ("other", "10.000")):
        assert f"{name} {after} 40.000 3.163 M 4 1 K 360 s" in found.text
    assert [one["name"] for one in drawn(text)[-1]["series"]] == ["make_training", "other"]
    with pytest.raises(UserError, match=f"{training}: made by train, and {run} is not"):
        page.render([run, training])
    for outs in ([comparison, run], [run, comparison], [comparison, comparison]):
        with pytest.raises(UserError, match=f"{comparison}: a comparison"):
            page.render(outs)


# ---------------------------------------------------------------- several runs, and the command


def test_runs_side_by_side(tmp_path):
    first, other = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", kl=2.0)
    text = page.render([first, other])
    assert not Page(text).wrong
    assert f"{first} beside {other}" in text  # one name would be that of both
    assert "+0.1000" in text  # nats a token, recovered, in the same windows
    files.write_json(other / "evaluate" / "e3-recovered.windows.json", [[1.0, 10], [1.0, 11]])
    assert "+0.1000" not in page.render([first, other])


def test_command_without_jax(tmp_path):
    out = make_run(tmp_path / "run")
    program = (
        "import sys; from e3jax import cli; code = cli.main(sys.argv[1:]); "
        "sys.exit(code or 'jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "report", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (out / "report.html").read_text() == page.render([out])  # and it is the same each time


def test_command_is_told_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = make_run(tmp_path / "run")

    def refused(*arguments):
        assert cli.main(["report", *map(str, arguments)]) == 2
        assert not (tmp_path / "p.html").exists() and not (out / "report.html").exists()
        return capsys.readouterr().err

    assert f"{tmp_path}: not a run of e3jax" in refused(tmp_path)
    assert "nowhere: not a run of e3jax" in refused(out, "nowhere", "out=p.html")
    assert "given twice" in refused(out, "out=p.html", "--out", "p.html")
    assert "no run was named" in refused("out=p.html")
    assert "cannot be written" in refused(out, f"out={out}/run.json/p.html")
    (out / "evaluate" / "results.json").write_text('[{"model": "dense", "colour": 3}]')
    assert f"{out}: a record there is damaged" in refused(out)
    (out / "evaluate" / "results.json").write_text("[")
    assert f"{out}: a record there is damaged" in refused(out)
    shutil.rmtree(out / "evaluate")
    (out / "search" / "metrics.jsonl").write_text('{"keep_probability": [1]}')
    assert f"{out}: a record there is damaged" in refused(out)
    shutil.rmtree(out / "search")
    (out / "run.json").write_text("{}")
    assert cli.main(["report", str(out), str(out), "out=p.html"]) == 0
    assert "<title>" in (tmp_path / "p.html").read_text()


def test_a_file_of_another_folder_is_not_read(tmp_path):
    """Names in records lead nowhere else."""
    out, secret = make_run(tmp_path / "run"), make_run(tmp_path / "secret")
    settings = files.read_json(out / "run.json")
    settings["evaluate"]["baselines"] = ["../secret/search"]
    files.write_json(out / "run.json", settings)
    rows = files.read_json(out / "evaluate" / "results.json")
    rows[2]["model"] = f"../../secret/evaluate/{secret.name} recovered"
    files.write_json(out / "evaluate" / "results.json", rows)
    found = facts.read(out)
    assert found.figures[2].windows == [] and "../secret/search" not in found.baselines


# ---------------------------------------------------------------- the ledger


def test_ledger_tells_what_an_attempt_took_and_how_it_ended(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(ledger.time, "monotonic", lambda: now[0])
    with pytest.raises(UserError), ledger.stage(tmp_path, "search"):
        now[0] += 60
        raise UserError("a full disk")
    with ledger.stage(tmp_path, "search"):
        now[0] += 0.5  # read back
    with ledger.stage(tmp_path, "distill"):
        now[0] += 7.25
    lines = list(files.read_lines(tmp_path / files.LEDGER))
    told = [(x["stage"], x["seconds"], x["ended"]) for x in lines]
    assert told == [("search", 60.0, "UserError"), ("distill", 7.2, "done")]
    assert all(x["devices"] == 8 and x["host_bytes"] > 2**20 for x in lines)


# ---------------------------------------------------------------- in a browser


def shown(tmp_path, out):
    """The page of a folder as a browser of a phone's width makes it."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("needs Chromium")
    place = tmp_path / "p.html"
    page.write([out], place)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,800", "--dump-dom"]
    done = subprocess.run([*command, place.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "<title>run · e3jax</title>" in done.stdout  # no script but ours ran
    return Page(done.stdout)


@pytest.mark.slow
def test_in_a_browser(tmp_path):
    found = shown(tmp_path, make_run(tmp_path / "run", evil=EVIL))
    assert found.count("rect") > 20 and found.count("polyline") == 5
    assert found.count("svg") == 5 + 5  # figures, the slider's among them, and keys of curves
    assert "step 4: held-out KL of the answer 0.4" in found.text


@pytest.mark.slow
def test_comparison_in_a_browser(tmp_path):
    found = shown(tmp_path, make_comparison(tmp_path / "run", evil=EVIL))
    assert found.count("circle") == 2 * len(CHOICES) + 2  # raw and recovered, and the key
    (label,) = [a["aria-label"] for tag, a in found.elements if tag == "svg" and "role" in a]
    assert "e3 nothing trained 0.15, 0.217; recovered 0.0667, 0.0667" in label
    assert f"sleb{EVIL}, seed 4, recovered: 0.1" in found.text  # of its dot
