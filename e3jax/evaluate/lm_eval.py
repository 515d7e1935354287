"""EleutherAI's lm-evaluation-harness (arXiv 2405.14782) on models of e3jax, dense or pruned.

    python -m e3jax.evaluate.lm_eval run --model e3jax --tasks arc_easy,wikitext --batch_size 16 \\
        --model_args pretrained=FOLDER,mask=MASK.json

All after the module's name is the harness's own command line; `--model e3jax` is one model more.
"""

# pyright: reportMissingImports=false
# It is optional.

import dataclasses
import functools
import importlib.metadata
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from e3jax import config, files, job
from e3jax.errors import UserError
from e3jax.evaluate.likelihood import make_likelihood
from e3jax.mask import read_mask
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Params
from e3jax.models.generate import make_generator
from e3jax.models.serve import Request, serve
from e3jax.progress import Progress
from e3jax.selectors import laco

INSTALL = 'pip install "lm_eval>=0.4.13,<0.5"'
# What a task may ask of generation; a temperature of 0 is greedy whatever else is asked.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
CHUNK = 2048  # tokens of a device whose logits exist


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that is asked."""

    cfg: ModelConfig
    params: Params
    tokenizer: Any
    eos: tuple[int, ...]
    dtype: Any
    batch: int
    seed: int


def opened(
    *,
    pretrained: str,
    mask: str | None = None,
    dtype: str = "bfloat16",
    batch_size: int | str | None = None,
    seed: int = 0,
    replica: int = 1,
    data: int = -1,
    model: int = 1,
) -> Subject:
    """The model of `--model_args`: a folder, an export of a run for one, or a hub id; of a mask
    only what it keeps. Sets the mesh (replica, data, model) for the rest of the process.
    """
    if batch_size is not None and not str(batch_size).isdigit():
        raise UserError(f"--batch_size {batch_size}: expected a number of rows")
    if dtype not in job.DTYPES:
        raise UserError(f"--model_args dtype={dtype}: expected one of {', '.join(job.DTYPES)}")
    spec = config.Model(path=str(pretrained), dtype=dtype)  # pyright: ignore[reportArgumentType]
    # The window is of training data: any that fits the model.
    run = config.Run(out="", seed=seed, model=spec, data=config.Data(window=8))
    job.open_mesh(config.Mesh(replica=replica, data=data, model=model))
    job_ = job.open_job(run)
    params, cfg = job_.params, job_.cfg
    if mask is not None:
        found = read_mask(pathlib.Path(mask).expanduser(), cfg.num_layers)
        params = laco.survivors(params, cfg, found.keep, found.merges)
        cfg = cfg.take_layers(found.keep)
    batch = job.rows_per_batch(int(batch_size or 1))
    return Subject(cfg, params, job_.tokenizer, job_.eos, job_.dtype, batch, seed)


@functools.cache
def model_class() -> Any:
    """The harness's model class, registered there as `e3jax`. Raises UserError where the harness is
    not installed."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
        from lm_eval.models import utils as model_utils
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness is not installed, or another version ({error}): {INSTALL}"
        ) from error

    @register_model("e3jax")
    class E3jaxLM(TemplateLM):
        """A Subject, or the arguments of `opened`."""

        def __init__(
            self,
            subject: Subject | None = None,
            max_batch_size: Any = None,  # the harness gives these two to every model
            device: Any = None,
            **arguments: Any,
        ) -> None:
            super().__init__()
            if subject is None:
                try:
                    subject = opened(**arguments)
                except TypeError as error:
                    raise UserError(f"--model_args: {error}") from error
            self.subject, self.tokenizer = subject, subject.tokenizer
            self.likelihood = make_likelihood(subject.cfg, dtype=subject.dtype, chunk=CHUNK)

        @property
        def eot_token_id(self) -> int:
            return self.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            bos = self.tokenizer.bos_token_id
            return self.eot_token_id if bos is None else bos

        @property
        def max_length(self) -> int:
            return self.subject.cfg.max_position

        @property
        def tokenizer_name(self) -> str:
            return self.tokenizer.name_or_path.replace("/", "__")

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            """With the special tokens that the tokenizer adds, unless the text has its BOS."""
            if add_special_tokens is None:
                first = self.tokenizer.decode([self.prefix_token_id])
                add_special_tokens = not string.startswith(first)
            return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        def _loglikelihood_tokens(self, requests: Sequence[Any], **unused: Any) -> list[Any]:
            rows = []
            for _, context, asked in requests:
                if len(asked) > self.max_length:
                    raise UserError(
                        f"a continuation of {len(asked)} tokens: the context is {self.max_length}"
                    )
                rows.append(([*context, *asked][-self.max_length - 1 :], len(asked)))
            found = self.likelihood(self.subject.params, rows, self.subject.batch)
            for (text, *_), answer in zip(requests, found, strict=True):
                if text is not None:
                    self.cache_hook.add_partial("loglikelihood", text, answer)
            return found

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            windows, of_text = [], []
            for number, request in enumerate(requests):
                pieces = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                for piece in pieces:
                    windows.append((None, *make_disjoint_window(piece)))
                    of_text.append(number)
            totals = [0.0] * len(requests)
            found = self._loglikelihood_tokens(windows)
            for number, (value, _) in zip(of_text, found, strict=True):
                totals[number] += value
            for request, total in zip(requests, totals, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            """Each by what its task asks for, all in one queue, the longest prompts first."""
            subject, asked = self.subject, [self._request(*r) for r in enumerate(requests)]
            order = sorted(range(len(asked)), key=lambda i: -len(asked[i].prompt))
            generator = make_generator(
                subject.cfg, dtype=subject.dtype, eos={*subject.eos, self.eot_token_id}
            )
            texts = [""] * len(asked)
            with Progress("requests answered", len(asked)) as shown:
                answered: list[int] = []
                for place, ids in serve(
                    generator,
                    subject.params,
                    [asked[i] for i in order],
                    subject.batch,
                    self.tokenizer,
                    lambda tokens: shown.advance(len(answered), tokens),
                ):
                    number = order[place]
                    answered.append(number)
                    text = self.tokenizer.decode(ids, skip_special_tokens=True)
                    texts[number] = model_utils.postprocess_generated_text(
                        generation=text, stop=list(asked[number].stop), think_end_token=None
                    )
                    given = requests[number].args
                    self.cache_hook.add_partial("generate_until", given, texts[number])
            return texts

        def _request(self, number: int, request: Any) -> Request:
            context, asked = request.args
            wanted: Any = {**model_utils.normalize_gen_kwargs(asked, default_max_gen_toks=256)}
            until, count = wanted.pop("until"), wanted.pop("max_gen_toks")
            wanted.pop("do_sample", None)
            if unknown := sorted(wanted.keys() - {*SAMPLING}):
                raise UserError(
                    f"generation_kwargs {', '.join(unknown)}: expected {', '.join(SAMPLING)}, "
                    "do_sample, until and max_gen_toks"
                )
            if count >= self.max_length:
                raise UserError(
                    f"max_gen_toks={count}: the model's context is {self.max_length} tokens"
                )
            draws = np.random.SeedSequence((self.subject.seed, number)).generate_state(1)
            return Request(
                prompt=self.tok_encode(context)[count - self.max_length :],
                max_new_tokens=count,
                stop=tuple(string for string in until if string),
                seed=int(draws[0]),
                **wanted,
            )

    return E3jaxLM


def figures(
    subject: Subject, tasks: Sequence[str], folder: str | None = None
) -> dict[str, dict[str, Any]]:
    """Of each task the metrics of the harness, with their standard errors. tasks, folder: as in
    `known`. Call under the mesh.
    """
    names, manager = known(tasks, folder)
    model = model_class()(subject)
    from lm_eval import simple_evaluate

    found = simple_evaluate(model, tasks=names, task_manager=manager, log_samples=False)
    assert found is not None  # as in a process whose rank is not 0
    return files.plain_tree(
        {
            task: {name: x for name, x in metrics.items() if isinstance(x, int | float)}
            for task, metrics in found["results"].items()
        }
    )


def known(tasks: Sequence[str], folder: str | None = None) -> tuple[list[str], Any]:
    """The tasks as the harness calls them, and what knows them. tasks: names, or YAML files;
    folder: of more tasks. Raises UserError for one that is not there."""
    model_class()  # tells whether the harness is there
    from lm_eval.tasks import TaskManager

    if folder is not None and not _path(folder).is_dir():
        raise UserError(f"evaluate.task_path={folder}: is no folder")
    manager = TaskManager(include_path=None if folder is None else str(_path(folder)))
    names = [str(_path(task)) if task.endswith(".yaml") else task for task in tasks]
    for task in names:
        there = _path(task).is_file() if task.endswith(".yaml") else manager.match_tasks([task])
        if not there:
            raise UserError(
                f"evaluate.tasks: there is no {task}; expected a YAML file, or a task of the "
                "harness or of evaluate.task_path"
            )
    return names, manager


def facts(tasks: Sequence[str], folder: str | None = None) -> dict[str, Any]:
    """What decides their figures, but for data that lies elsewhere: the version of the harness, and
    the files beside the tasks by size and time."""
    model_class()
    version = importlib.metadata.version("lm_eval")
    places = {_path(task).parent for task in tasks if task.endswith(".yaml")}
    places |= set() if folder is None else {_path(folder)}
    beside = sorted(path for place in places for path in place.glob("*") if path.is_file())
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in beside]
    return {"lm_eval": version, "tasks": tasks, "files": stamps}


def _path(text: str) -> pathlib.Path:
    return pathlib.Path(text).expanduser().resolve()


def main() -> int:
    """The harness's command line; 2 for bad input."""
    try:
        model_class()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
