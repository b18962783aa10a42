"""Where a model lies: a folder, or a name (org/name) that is looked for in the local caches and else fetched.

Only data is fetched (safetensors, JSON, texts): nothing that would have to be unpickled or run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import LocalEntryNotFoundError, WeakFileLock
from tqdm import tqdm

from vl2.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_REVISION = "main"
# As in vl2.checkpoint.tensor_files, which would load Paddle.
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PDPARAMS = "model_state.pdparams"  # taken where PaddleNLP has it already, never fetched
_SMALL_FILES = ("*.json", "*.txt", "tokenizer.model", "LICENSE*", "README.md")
_WEIGHTS = ("*.safetensors",)
_TRIES = 5  # that bring nothing, in a row
_PAUSE_SECONDS = 1.0
_READ_BYTES = 1 << 20


def resolve_model(name: str | Path) -> Path:
    """The folder of a model.

    Args:
        name: a folder; or org/name, taken from the Hugging Face cache or PaddleNLP's, else downloaded into the former
            (HF_ENDPOINT, HF_HOME and the other variables of huggingface_hub are honoured).

    Raises:
        UserError: no such folder; a file with a wrong checksum; or a list of what was tried in vain.
    """
    folder, name = Path(name), str(name)
    if folder.is_dir():
        return folder
    if not _NAME.fullmatch(name):
        raise UserError(f"{name}: no such folder; expected a folder, or a name on the hub of the form org/name")
    tried = [f"the folder {folder.absolute()}: not there"]
    if found := _find_local(name, tried):
        return found
    try:
        found = _download(name)
    except (OSError, RuntimeError, ValueError) as problem:
        tried.append(f"the hub {_endpoint()}: {_one_line(problem)}")
    else:
        if not (missing := missing_files(found)):
            verify_checksums(found)
            return found
        tried.append(f"the hub {_endpoint()}: what it has of {name} lacks {_some(missing)}")
    listed = "\n  ".join(tried)
    raise UserError(
        f"the model {name} cannot be had. Tried:\n  {listed}\n"
        "Give the path of a folder instead; or set HF_ENDPOINT to a mirror that can be reached from here; or run "
        f"`hf download {name}` where there is a network, and copy the folder it prints (cp -rL)"
    )


def _find_local(name: str, tried: list[str]) -> Path | None:
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
        elif missing := missing_files(folder):
            tried.append(f"{title}: not whole, lacks {_some(missing)}")
        else:
            verify_checksums(folder)
            return folder
    return None


def _snapshot(name: str, cache: Path) -> Path | None:
    """The snapshot in a Hugging Face cache, whole or not."""
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=_REVISION, cache_dir=cache, local_files_only=True))
    except (OSError, ValueError):  # not there; a name that the hub does not allow
        return None


def missing_files(folder: Path) -> list[str]:
    """What a model's folder lacks: config.json, tokenizer.json, weights, or shards that the index names."""
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    index = folder / _INDEX
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            return [*missing, f"a readable {_INDEX}"]
        return missing + [shard for shard in sorted(shards) if not (folder / shard).is_file()]
    there = (folder / _SINGLE).is_file() or (folder / _PDPARAMS).is_file()
    return missing if there else [*missing, f"{_SINGLE} or {_INDEX}"]


def _download(name: str) -> Path:
    """Fetch what is not in the cache yet, going on where an earlier try stopped. Progress bars are on stderr."""
    endpoint = _endpoint()
    # Asked first: without an answer, snapshot_download would return what is in the cache, whole or not.
    huggingface_hub.HfApi(endpoint=endpoint).model_info(name, revision=_REVISION, timeout=30)
    store = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    store.mkdir(parents=True, exist_ok=True)
    tries, had = 0, 0
    with WeakFileLock(store / ".fetch.lock"):  # several processes of one machine: one fetches, the others wait
        while True:
            try:
                # The weights last: where they are whole, the rest is.
                for patterns in (_SMALL_FILES, _WEIGHTS):
                    folder = huggingface_hub.snapshot_download(
                        name, revision=_REVISION, endpoint=endpoint, allow_patterns=list(patterns)
                    )
                return Path(folder)
            except (OSError, RuntimeError) as problem:
                has = sum(file.stat().st_size for file in store.glob("blobs/*"))
                tries, had = (1 if has > had else tries + 1), has
                if tries >= _TRIES or not _may_pass(problem):
                    raise
                print(f"{name}: {_one_line(problem)}; going on from {has / 1e9:.2f} GB", file=sys.stderr, flush=True)
                time.sleep(_PAUSE_SECONDS * tries)


def _may_pass(problem: BaseException) -> bool:
    """Whether trying again may help: a lost connection or a server in trouble, not a refusal or a full disk."""
    problem = _cause(problem)
    status = getattr(getattr(problem, "response", None), "status_code", None)
    return status >= 500 if status else getattr(problem, "errno", None) is None


def _cause(problem: BaseException) -> BaseException:
    """What happened: huggingface_hub hides some of it behind "not in the cache"."""
    return (problem.__cause__ or problem) if isinstance(problem, LocalEntryNotFoundError) else problem


def verify_checksums(folder: Path) -> None:
    """Compare the files of a snapshot with the hub's checksums, which huggingface_hub (it looks at sizes) does not.

    In its cache a file is a link to a blob named by the hub's ETag: the sha256 of a large file, git's sha1 of a small
    one.  What was found good is remembered beside the blobs.  Folders of another kind carry no checksums.

    Raises:
        UserError: naming the file, which is removed, so that the next try fetches it again.
    """
    links = {path: path.resolve() for path in sorted(folder.iterdir()) if path.is_symlink() and path.is_file()}
    blobs = {path: blob for path, blob in links.items() if re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", blob.name)}
    unchecked = [path.name for path in links if path.suffix == ".safetensors" and path not in blobs]
    if unchecked:
        print(f"warning: the hub gave no checksum for {_some(unchecked)}", file=sys.stderr)
    marker = folder.parents[1] / ".verified.json"
    good = _read_marker(marker)
    todo = {path: blob for path, blob in blobs.items() if good.get(blob.name) != _stamp(blob)}
    if not todo:
        return
    total = sum(blob.stat().st_size for blob in todo.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Checksums", file=sys.stderr) as bar:
        for path, blob in todo.items():
            stamp = _stamp(blob)
            found = _checksum(blob, bar)
            if found != blob.name:
                path.unlink(missing_ok=True)
                blob.unlink(missing_ok=True)
                raise UserError(
                    f"{path}: wrong checksum, expected {blob.name}, found {found}; the file was removed, "
                    "start again to fetch it anew"
                )
            good[blob.name] = stamp
            _write_marker(marker, good)


def _checksum(blob: Path, bar: tqdm) -> str:
    """Of the kind its name is: sha256, or sha1 over git's header and the content."""
    if len(blob.name) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
    for chunk in _chunks(blob):
        digest.update(chunk)
        bar.update(len(chunk))
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            yield chunk


def _stamp(blob: Path) -> list[int]:
    """What changes when a blob is fetched again."""
    stat = blob.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _read_marker(marker: Path) -> dict[str, list[int]]:
    try:
        return dict(json.loads(marker.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}  # none yet, or half written: everything is checked


def _write_marker(marker: Path, good: dict[str, list[int]]) -> None:
    with contextlib.suppress(OSError):  # a cache that others own: checked again next time
        marker.write_text(json.dumps(good), encoding="utf-8")


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _one_line(problem: BaseException) -> str:
    problem = _cause(problem)
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
