"""Eight CPU devices for every test, and what several tests share."""

import atexit
import collections
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What XLA does to an operation after it is placed takes half of compilation.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Most of the tests' time is compilation: workers, and the processes that tests start, share it.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="e3jax-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import pathlib

import jax
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from e3jax import devices, mesh
from e3jax.config import Data
from words_tiny import BOS, VOCAB

ROOT = pathlib.Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test marked `cases(n)` all but the first n that are not slow become slow."""
    seen = collections.Counter()
    for item in items:
        mark = item.get_closest_marker("cases")
        if mark is not None and item.get_closest_marker("slow") is None:
            seen[item.path, item.originalname] += 1
            if seen[item.path, item.originalname] > mark.args[0]:
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def one_device():
    """A mesh of a single device, set."""
    with jax.set_mesh(mesh.make_mesh(1, 1, 1, devices=jax.devices()[:1])) as found:
        yield found


@pytest.fixture
def hopper_kernels(monkeypatch):
    """The kernels for NVIDIA's Hopper are taken, and run by JAX's interpreter of them."""
    if jax.__version_info__ < (0, 12):
        pytest.skip("JAX before 0.12 cannot interpret them")
    from jax._src.pallas.mosaic_gpu.interpret.params import force_gpu_interpret_mode

    monkeypatch.setattr(devices, "is_hopper", lambda: True)
    with force_gpu_interpret_mode():
        yield


@pytest.fixture
def shared() -> pathlib.Path:
    """The folder of larger checkpoints and data beside the project; skips where there is none."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared")
    return SHARED


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A word-level tokenizer that puts <bos> in front and knows <eos>; no chat template."""
    folder = tmp_path_factory.mktemp("words")
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(VOCAB)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def chat_folder(tokenizer_folder, tmp_path):
    """The same with a chat template: `chat_folder(template)`."""

    def make(template):
        folder = tmp_path / "chat"
        shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


@pytest.fixture
def data(tmp_path):
    """`data(window=..)`: a Data whose cache is in the test's folder."""
    return lambda **options: Data(**{"window": 16, "cache": str(tmp_path / "cache")} | options)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """The hub cannot be reached, and nothing is in its cache."""
    import datasets
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
