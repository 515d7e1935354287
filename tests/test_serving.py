"""An export through `transformers serve`, asked by its OpenAI-compatible interface."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import jax.numpy as jnp
import pytest
from transformers.utils.import_utils import is_serve_available

from e3jax import cli
from e3jax.data import text
from e3jax.hf.families import read_config
from e3jax.hf.load import load_params
from e3jax.models.generate import make_generator
from e3jax.models.serve import generate
from hf_tiny import save_tiny

TEMPLATE = "<bos> {% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant:"
PROMPTS = ("w1 w2 w3", "w30 w7", "w11")
TOKENS = 24
START_S = 120


@pytest.fixture
def exported(tmp_path, chat_folder):
    """Three of five layers of a random model with a chat template, as `export` leaves it.

    (Of a Qwen transformers reads the answer by Qwen's own markers, which no tokenizer here has.)
    """
    source = save_tiny(tmp_path / "source", "llama", num_hidden_layers=5)
    shutil.copytree(chat_folder(TEMPLATE), source, dirs_exist_ok=True)
    (tmp_path / "mask.json").write_text(json.dumps({"num_layers": 5, "keep": [0, 2, 3]}))
    where = [f"model.path={source}", f"out={tmp_path}/export"]
    assert cli.main(["export", "--from-mask", str(tmp_path / "mask.json"), *where]) == 0
    return tmp_path / "export"


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ask(port, path, body=None):
    """The JSON answer to a GET, or to a POST of a body."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@contextlib.contextmanager
def served(folder, log):
    """The port of a server of the folder, which ends with the block."""
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder.name]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            cwd=folder.parent,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=file,
            stderr=file,
        )
        try:
            end = time.monotonic() + START_S
            while True:
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    ask(port, "/health")
                    break
                assert process.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.2)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def our_answer(folder, ids):
    """The greedy answer to a prompt's token ids in float32, as text, by this project alone."""
    cfg, tokenizer = read_config(folder), text.load_tokenizer(folder)
    generator = make_generator(cfg, dtype=jnp.float32, eos=[tokenizer.eos_token_id])
    params = load_params(folder, cfg, jnp.float32)
    (answer,) = generate(generator, params, [ids], 1, TOKENS)
    return tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.slow  # the server takes ten seconds to start
@pytest.mark.skipif(
    not is_serve_available(), reason='needs a server: pip install "transformers[serving]"'
)
def test_served_text_is_ours(exported, tmp_path, one_device):
    assert "/v1/chat/completions" in (exported / "README.md").read_text()
    tokenizer = text.load_tokenizer(exported)
    options = {"model": exported.name, "max_tokens": TOKENS, "temperature": 0}
    seen = set()
    with served(exported, tmp_path / "serve.log") as port:
        assert [m["id"] for m in ask(port, "/v1/models")["data"]] == [exported.name]
        for prompt in PROMPTS:
            wanted = our_answer(exported, tokenizer(prompt)["input_ids"])
            plain = ask(port, "/v1/completions", options | {"prompt": prompt})
            assert plain["choices"][0]["text"] == wanted
            turn = [{"role": "user", "content": prompt}]
            rendered = tokenizer(f"user: {prompt} assistant:")["input_ids"]
            wanted_chat = our_answer(exported, rendered)
            chat = ask(port, "/v1/chat/completions", options | {"messages": turn})
            assert chat["choices"][0]["message"]["content"] == wanted_chat
            seen |= {wanted, wanted_chat}
    assert len(seen) > len(PROMPTS)  # the answers are not all one
