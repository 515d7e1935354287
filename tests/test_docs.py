"""The README and the pages of docs/: what they name is there, and their examples parse or run.

A block after `<!-- run -->` is run here, one after `<!-- run: slow -->` by the slow tests.
"""

import ast
import inspect
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml

import e3jax
from e3jax import cli, commands, configure

ROOT = pathlib.Path(__file__).parent.parent
SITE = ROOT / "docs" / "site" / "mkdocs.yml"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (run|run: slow) -->\n)?^```(\w*)\n(.*?)^```$", re.S | re.M)
BLOCKS = [(page, *found) for page in PAGES for found in BLOCK.findall(page.read_text())]
NAMES = "|".join([*commands.COMMANDS, "inspect", "report"])
COMMAND = re.compile(rf"(?:\brun\.py|(?<![\w/.-])e3jax) (?:{NAMES})\b[^\n;&|>'`]*")


def short(page):
    return page.name


def prose(page):
    return BLOCK.sub("", page.read_text())


def lines(shell):
    """The command lines of e3jax in a text."""
    return COMMAND.findall(re.sub(r"\\\n\s*", " ", shell))


def understood(line):
    """Parses a command line as the program would, and checks its keys and values."""
    line = line.replace("--config …", "--config demo").replace("[RUN…]", "")
    words = [word for word in shlex.split(line, comments=True)[1:] if word != "…"]
    options = commands.parse([word.replace("…", "0") for word in words])
    if options.command in ("inspect", "report"):
        return
    given = options.config if "/" not in str(options.config) else ROOT / options.config
    assert configure.load_run(given, options.overrides).out


# ---------------------------------------------------------------- commands and keys


def test_every_command_line_is_understood():
    found = [line for _, _, language, code in BLOCKS if language == "sh" for line in lines(code)]
    within = [line for page in PAGES for code in inline(page) for line in lines(code)]
    found += [line for line in within if "--config" in line]
    assert len(found) > 20
    for line in found:
        understood(line)
    for wrong in ("run.py run --config demo distil.steps=1", "run.py run --config demo --drie"):
        with pytest.raises((e3jax.UserError, SystemExit)):
            understood(wrong)


def inline(page):
    """What stands between backticks outside of blocks, on one line or two."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def test_every_key_is_one():
    known = configure.known_keys()
    sections = {".".join(key.split(".")[:n]) for key in known for n in (1, 2, 3)}
    tops = "|".join({key.split(".")[0] for key in known if "." in key})
    name = re.compile(rf"(?<![\w/.-])(?:{tops})(?:\.[a-z_]+)+(?![\w/]|\.\w)")
    found = {key for page in PAGES for code in inline(page) for key in name.findall(code)}
    found = {key for key in found if not key.endswith((".py", ".json", ".jsonl", ".jinja"))}
    assert len(found) > 40
    assert found - known.keys() - sections == set()


@pytest.mark.parametrize("code", [code for *_, language, code in BLOCKS if language == "yaml"])
def test_configurations_are_valid(code):
    configure.validate({"out": "runs/x"} | yaml.safe_load(code), "the page")


# ---------------------------------------------------------------- examples


def run(blocks, folder, monkeypatch):
    """Runs blocks of one page in their order: Python in one namespace, commands one by one."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))  # whose cache has the tokens
    space: dict = {}
    for _, _, language, code in blocks:
        if language == "python":
            exec(code, space)
            continue
        assert language == "sh"
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            assert words[:2] == ["python", "run.py"], line
            assert cli.main(words[2:]) == 0, line


MARKED = [block for block in BLOCKS if block[1]]


@pytest.mark.parametrize("page", sorted({b[0] for b in MARKED if b[1] == "run"}), ids=short)
def test_examples_run(page, tmp_path, monkeypatch, capsys):
    run([b for b in MARKED if b[0] == page and b[1] == "run"], tmp_path, monkeypatch)
    assert capsys.readouterr().out


LEFT = {"index.md": "cut/model.safetensors", "gpu.md": "runs/demo/plan-h100-2.json"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", sorted({b[0] for b in MARKED if b[1] != "run"}), ids=short)
def test_longer_examples_run(page, tmp_path, monkeypatch):
    """With the short ones before them, whose names they use."""
    run([b for b in MARKED if b[0] == page], tmp_path, monkeypatch)
    assert (tmp_path / LEFT[page.name]).is_file()


def test_python_calls_what_there_is():
    codes = [code for _, _, language, code in BLOCKS if language == "python"]
    calls = [n for code in codes for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)]
    ours = {name: n for n in calls if (name := ast.unparse(n.func)).startswith("e3jax.")}
    assert {"e3jax.prune", "e3jax.load", "e3jax.search_mask", "e3jax.recover"} <= ours.keys()
    for name, call in ours.items():
        keywords = {k.arg or "settings": k.value for k in call.keywords}
        inspect.signature(getattr(e3jax, name[6:])).bind(*call.args, **keywords)


# ---------------------------------------------------------------- errors


def templates(tree):
    """Every text of a module, with `…` for what is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [n.value if isinstance(n, ast.Constant) else "…" for n in node.values]
            yield "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[sd]", "…", node.value)


def test_every_message_is_the_programs():
    texts = {
        " ".join(text.split())
        for path in (ROOT / "e3jax").rglob("*.py")
        for text in templates(ast.parse(path.read_text()))
    }
    page = (ROOT / "docs" / "errors.md").read_text()
    quoted = [" ".join(m.split()) for m in re.findall(r"^\*\*`([^`]+)`\*\*", page, re.M)]
    assert len(quoted) > 35 and len(set(quoted)) == len(quoted)
    assert [m for m in quoted if not any(m in text for text in texts)] == []


# ---------------------------------------------------------------- links, and the site


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        place, _, section = target.partition("#")
        if target.startswith("http"):
            continue
        there = page.parent / place if place else page
        assert there.exists(), target
        headings = re.findall(r"^#+ (.*)", there.read_text(), re.M) if section else ()
        slugs = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
        assert not section or section in slugs, target


def test_site_builds_without_a_warning_or_a_network(tmp_path):
    pytest.importorskip("mkdocs")
    out = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(SITE), "-d", str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    assert {page.stem for page in PAGES[1:]} <= {path.stem for path in out.glob("*.html")}
    fetched = re.compile(
        r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//|"""
        r"""<link[^>]*\shref=["']?(?:https?:)?//|url\(["']?(?:https?:)?//|@import"""
    )
    read = [path for path in out.rglob("*") if path.suffix in (".html", ".css")]
    assert len(read) > 10
    assert [path.name for path in read if fetched.search(path.read_text())] == []
