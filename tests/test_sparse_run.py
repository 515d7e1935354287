"""The whole job on a small DeepSeek-V3, as a user would give it."""

import json
import shutil

import pytest

from e3jax import files
from e3jax.cli import main
from e3jax.hf.families import read_config
from hf_tiny import our_logits, random_tokens, save_tiny, torch_logits
from test_families import CASES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # 250 s on two cores of their own
SMALL = """
search.keep=4 search.steps=6 search.refine=4 search.init_windows=4 search.score_windows=4
search.refine_windows=8 distill.steps=6 distill.evaluate_every=3 distill.checkpoint_every=3
evaluate.rows=20 evaluate.batch=10 evaluate.max_new_tokens=16
"""


@pytest.mark.parametrize("mesh", ["", "mesh.data=2 mesh.model=4"])
def test_search_recovery_export_and_figures(tmp_path, mesh, capsys):
    """Dense layers, experts and latent attention; on one device and on eight."""
    family, changes = CASES["deepseek_v3"]
    folder = save_tiny(
        tmp_path / "model",
        family,
        **{**changes, "num_hidden_layers": 6, "max_position_embeddings": 512},
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(files.bundled(f"demo/model/{name}"), folder)
    out = tmp_path / "run"
    command = ["run", "--config", "configs/demo.yaml", f"model.path={folder}", f"out={out}"]
    assert main([*command, *SMALL.split(), *mesh.split()]) == 0
    said = capsys.readouterr().out
    assert "e3 recovered" in said and "shortgpt raw" in said
    cfg = read_config(out / "export")
    assert cfg.num_layers == 4 and cfg.experts is not None
    keep = json.loads((out / "search" / "mask.json").read_text())["keep"]
    assert cfg.dense == ((0,) if 0 in keep else ())
    behaviour = (out / "evaluate" / "behaviour.txt").read_text()
    assert "experts: the busiest" in behaviour and "e3 recovered" in behaviour
    tokens = random_tokens(96, 20)
    ours, theirs = (logits(out / "export", tokens) for logits in (our_logits, torch_logits))
    assert abs(ours - theirs).max() < 1e-4 * abs(theirs).max()
