"""Where a model lies: a folder, or a name (org/name) that is looked for in the local caches and else fetched.

Only data is fetched (safetensors, JSON, texts): nothing that would have to be unpickled or run.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import LocalEntryNotFoundError

from train.config.conf_files import groups
from train.store.hub_checksums import some, verify_checksums
from vl2.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_PUBLISHER = "deepseek-ai"
_REVISION = "main"
# As in vl2.checkpoint.tensor_files, which would load Paddle.
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PDPARAMS = "model_state.pdparams"  # taken where PaddleNLP has it already, never fetched
_SMALL_FILES = ("*.json", "*.txt", "tokenizer.model", "LICENSE*", "README.md")
_WEIGHTS = ("*.safetensors",)
_TRIES = 10
_PAUSE_SECONDS = 1.0
# To connect (with each address of the hub's name) and to answer: one that is out of reach is given up in seconds.
_ANSWER_SECONDS = (3.0, 10.0)


def resolve_model(name: str | Path, *, weights: bool = True) -> Path:
    """The folder of a model.

    Args:
        name: a folder; or org/name, taken from the Hugging Face cache or PaddleNLP's, else downloaded into the former
            (HF_ENDPOINT, HF_HOME and the other variables of huggingface_hub are honoured).
        weights: False is content with config and tokenizer, a few megabytes; a later call fetches what is left.

    Raises:
        UserError: no such folder; a file with a wrong checksum; or a list of what was tried in vain.
    """
    folder, name = Path(name), str(name)
    if folder.is_dir():
        return folder
    if _is_path(name):
        expected = "expected a folder, a model of conf/model, or a name on the hub of the form org/name"
        raise UserError(f"{name}: no such folder{_near(folder)}; {expected}")
    tried = [f"the folder {folder.absolute()}: not there"]
    if found := _find_local(name, tried, weights):
        return found
    try:
        found = _download(name, (_SMALL_FILES, _WEIGHTS) if weights else (_SMALL_FILES,))
    except (OSError, RuntimeError, ValueError) as problem:
        tried.append(f"the hub {_endpoint()}: {_one_line(problem)}")
    else:
        if not (missing := missing_files(found, weights=weights)):
            verify_checksums(found, weights=weights)
            return found
        tried.append(f"the hub {_endpoint()}: what it has of {name} lacks {some(missing)}")
    listed = "\n  ".join(tried)
    raise UserError(
        f"the model {name} cannot be had. Tried:\n  {listed}\n"
        "Give the path of a folder instead; or set HF_ENDPOINT to a mirror that can be reached from here; or run "
        f"`hf download {name}` where there is a network, and copy the folder it prints (cp -rL)"
    )


def _is_path(name: str) -> bool:
    """Whether a name can only mean a folder, so that no hub is asked for what was mistyped.

    Anything but org/name is one (./a, ~/a, /a, a/b/c), and so is a name whose first part is `outputs` or a folder that
    lies here; but the publisher's, who may have a folder here with another of the models.
    """
    if not _NAME.fullmatch(name):
        return True
    first = name.partition("/")[0]
    return first == "outputs" or (first != _PUBLISHER and Path(first).is_dir())


def _near(folder: Path) -> str:
    """` (did you mean X?)`, of the folders beside one that is not there and of the models with a short name."""
    beside = [str(path) for path in sorted(folder.parent.iterdir()) if path.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(str(folder), [*beside, *groups()["model"]], n=3, cutoff=0.7)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _find_local(name: str, tried: list[str], weights: bool) -> Path | None:
    """A whole copy of the model in the local caches; where there is none, what was looked at goes to `tried`."""
    paddle_store = Path(os.environ.get("PPNLP_HOME") or "~/.paddlenlp").expanduser() / "models"
    for title, folder in (
        (f"the Hugging Face cache {constants.HF_HUB_CACHE}", _snapshot(name, Path(constants.HF_HUB_CACHE))),
        (f"PaddleNLP's store {paddle_store / name}", paddle_store / name),
        # What PaddleNLP fetched with from_hf_hub=True.
        (f"PaddleNLP's Hugging Face cache {paddle_store}", _snapshot(name, paddle_store)),
    ):
        if folder is None or not folder.is_dir():
            tried.append(f"{title}: not there")
        elif missing := missing_files(folder, weights=weights):
            tried.append(f"{title}: not whole, lacks {some(missing)}")
        else:
            verify_checksums(folder, weights=weights)
            return folder
    return None


def _snapshot(name: str, cache: Path) -> Path | None:
    """The snapshot in a Hugging Face cache, whole or not."""
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=_REVISION, cache_dir=cache, local_files_only=True))
    except (OSError, ValueError):  # not there; a name that the hub does not allow
        return None


def missing_files(folder: Path, *, weights: bool = True) -> list[str]:
    """What a model's folder lacks: config.json, tokenizer.json, weights, or shards that the index names.

    Args:
        weights: False looks for the first two only.
    """
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if not weights:
        return missing
    index = folder / _INDEX
    if index.is_file():
        try:
            shards = {str(name) for name in json.loads(index.read_bytes().decode("utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            return [*missing, f"a readable {_INDEX}"]
        return missing + [shard for shard in sorted(shards) if not (folder / shard).is_file()]
    there = (folder / _SINGLE).is_file() or (folder / _PDPARAMS).is_file()
    return missing if there else [*missing, f"{_SINGLE} or {_INDEX}"]


def _download(name: str, kinds: Sequence[Sequence[str]]) -> Path:
    """Fetch what is not in the cache yet, going on where an earlier try stopped. Progress bars are on stderr.

    Args:
        kinds: patterns of the files to fetch, kind by kind; weights last, so that where they are whole the rest is.

    huggingface_hub locks each file, goes on with a half one, and tries again when it waits in vain. Not when an answer
    ends early, which is what a dropped connection looks like behind a proxy: so the call is repeated here.
    """
    endpoint = _endpoint()
    # Asked first, and briefly: without an answer, snapshot_download would return what is in the cache, whole or not.
    huggingface_hub.HfApi(endpoint=endpoint).model_info(name, revision=_REVISION, timeout=_ANSWER_SECONDS)  # type: ignore[arg-type]
    for left in reversed(range(_TRIES)):
        try:
            for patterns in kinds:
                folder = huggingface_hub.snapshot_download(
                    name, revision=_REVISION, endpoint=endpoint, allow_patterns=list(patterns)
                )
            break
        except (OSError, RuntimeError) as problem:
            if not left or not _may_pass(problem):
                raise
            print(f"{name}: {_one_line(problem)}; going on where it stopped", file=sys.stderr, flush=True)
            time.sleep(_PAUSE_SECONDS)
    return Path(folder)


def hub_problem(name: str) -> str:
    """Why the hub does not answer when asked for a model, in one line; empty when it does.

    Args:
        name: of the model, `owner/name`.
    """
    endpoint = _endpoint()
    try:
        huggingface_hub.HfApi(endpoint=endpoint).model_info(name, timeout=_ANSWER_SECONDS)  # type: ignore[arg-type]
    except (OSError, RuntimeError, ValueError) as problem:
        return f"{endpoint}: {_one_line(_innermost(problem))}"
    return ""


def _may_pass(problem: BaseException) -> bool:
    """Whether trying again may help: a lost connection or a server in trouble, not a refusal or a full disk."""
    problem = _cause(problem)
    status = getattr(getattr(problem, "response", None), "status_code", None)
    return status >= 500 if status else getattr(problem, "errno", None) is None


def _cause(problem: BaseException) -> BaseException:
    """What happened: huggingface_hub hides some of it behind "not in the cache"."""
    return (problem.__cause__ or problem) if isinstance(problem, LocalEntryNotFoundError) else problem


def _innermost(problem: BaseException) -> BaseException:
    """The first of the exceptions that led to this one: those after it, of three libraries, only wrap its text."""
    while (before := problem.__cause__ or problem.__context__) is not None:
        problem = before
    return problem


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _one_line(problem: BaseException) -> str:
    problem = _cause(problem)
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"
