"""Lists the kernels that a CUDA build of Paddle registers, with their data types, from a checkout of its sources.

    python tests/precision/make_gpu_kernels.py PADDLE

PADDLE is a folder with `paddle/phi/` and `paddle/fluid/operators/` as they are in Paddle's repository, or a bare git
directory with `:COMMIT` after it. Needs a C preprocessor (`cpp`). Writes `gpu_kernels.json` beside this file: facts
about names and types, no code. The wheel for CPUs knows its own kernels only, so this cannot be asked of Paddle.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

TABLE = Path(__file__).with_name("gpu_kernels.json")
KERNELS = ("paddle/phi/kernels", "paddle/fluid/operators")
OPERATORS = "paddle/phi/ops/yaml"
# Kernels of other devices, and of tensors that are not dense.
SKIPPED = {"cpu", "onednn", "mkldnn", "xpu", "custom", "sparse", "strings"}
FILES = ("ops", "backward", "fused_ops", "fused_backward", "inconsistent/dygraph_ops", "inconsistent/dygraph_backward")
# A wheel for CUDA 12, and the oldest that the sources allow for; a kernel or type that only the first has depends on
# the build. NVIDIA only: neither HIP nor XPU is defined.
BUILD = (
    "PADDLE_WITH_CUDA",
    "PADDLE_WITH_CUTLASS",
    "PADDLE_WITH_FLASHATTN",
    "PADDLE_WITH_FLASHATTN_V3",
    "PADDLE_WITH_MEMORY_EFFICIENT_ATTENTION",
    "PADDLE_WITH_NCCL",
    "PADDLE_WITH_RCCL_OR_NCCL",
    "__NVCC__",
)
NEW = ("CUDA_VERSION=12060", "CUDART_VERSION=12060", "NCCL_VERSION_CODE=22700", "CUDNN_VERSION=90500")
OLD = ("CUDA_VERSION=10020", "CUDART_VERSION=10020", "NCCL_VERSION_CODE=20800", "CUDNN_VERSION=7600")
VERSION_MACRO = "CUDNN_VERSION_MIN(a,b,c)=(CUDNN_VERSION>=(a)*1000+(b)*100+(c))"
REGISTRATION = re.compile(
    r"\bPD_REGISTER_(KERNEL|STRUCT_KERNEL|KERNEL_FOR_ALL_DTYPE|KERNEL_FOR_ALL_BACKEND_DTYPE\w*)\s*\("
)
BACKENDS = {"GPU", "GPUDNN", "KPS"}
ALL = "all"
TYPES = {
    "float": "float32",
    "double": "float64",
    "int": "int32",
    "int64_t": "int64",
    "int16_t": "int16",
    "int8_t": "int8",
    "uint8_t": "uint8",
    "uint16_t": "uint16",
    "uint32_t": "uint32",
    "uint64_t": "uint64",
    "bool": "bool",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "complex<float>": "complex64",
    "complex<double>": "complex128",
    "complex64": "complex64",
    "complex128": "complex128",
    "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
    "int32_t": "int32",
    "unsigned char": "uint8",
    "signed char": "int8",
    "pstring": "pstring",
}


def parts(text: str) -> list[str]:
    """Arguments of a call, from behind its opening bracket: `a, F<x, y>, b) {` -> [a, F<x, y>, b]."""
    found, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        if letter in ")," and depth == 0:
            found.append(" ".join(text[start:i].split()))
            start = i + 1
            if letter == ")":
                return found
        depth += (letter in "(<") - (letter in ")>")
    raise ValueError(f"no end: {text[:80]}")


def registrations(text: str) -> Iterator[tuple[str, set[str]]]:
    """(name, data types) of each kernel for GPUs that a preprocessed source registers."""
    for match in REGISTRATION.finditer(text):
        name, *rest = parts(text[match.end() :])
        if match[1].startswith("KERNEL_FOR_ALL_BACKEND"):
            yield name, {ALL}
        elif rest[0] in BACKENDS:
            types = rest[3:]
            yield name, {ALL} if match[1] == "KERNEL_FOR_ALL_DTYPE" else {_type(one) for one in types}


def _type(text: str) -> str:
    bare = re.sub(r"\b(phi|dtype|paddle|platform|plat|std)\b|::", "", text).strip()
    return TYPES[bare]


def preprocessed(text: str, versions: tuple[str, ...]) -> str:
    """The source for a CUDA build, its own macros written out, what it includes left out."""
    bare = re.sub(r"^\s*#\s*(include|pragma|error).*$", "", text, flags=re.M)
    defined = [f"-D{one}" for one in (*BUILD, *versions, VERSION_MACRO)]
    ran = subprocess.run(["cpp", "-P", "-undef", "-w", *defined, "-"], input=bare, capture_output=True, text=True)
    return ran.stdout


def read_kernels(root: Path) -> dict[str, dict]:
    """name -> {"dtypes", "files", and "depends": types that only a newer CUDA, cuDNN or NCCL has}"""
    kernels: dict[str, dict] = {}
    for path in sorted(path for top in KERNELS for path in (root / top).rglob("*") if path.suffix in (".cu", ".cc")):
        place = path.relative_to(root)
        text = path.read_text("utf-8", errors="replace")
        if SKIPPED & set(place.parts) or "PD_REGISTER_" not in text:
            continue
        new = list(registrations(preprocessed(text, NEW)))
        old: dict[str, set[str]] = {}
        if re.search(r"CUDA_VERSION|CUDART_VERSION|CUDNN_VERSION|NCCL_VERSION", text):
            for name, types in registrations(preprocessed(text, OLD)):
                old.setdefault(name, set()).update(types)
        else:
            old = dict(new)
            for name, types in new:
                old[name] = old[name] | types
        for name, types in new:
            entry = kernels.setdefault(name, {"dtypes": set(), "files": [], "depends": set()})
            entry["dtypes"] |= types
            entry["depends"] |= types - old.get(name, set())
            short = str(place).removeprefix("paddle/").removeprefix("phi/kernels/")
            if short not in entry["files"]:
                entry["files"].append(short)
    return kernels


def read_operators(root: Path) -> dict[str, dict]:
    """Operator -> the kernels that it may take, the operand whose type chooses among them, and its gradient."""
    operators: dict[str, dict] = {}
    for name in FILES:
        for entry in yaml.safe_load((root / OPERATORS / f"{name}.yaml").read_text("utf-8")) or ():
            operator = entry.get("op") or entry.get("backward_op")
            kernel = entry.get("kernel") or {}
            functions = [one.split("{")[0].strip() for one in re.split(r",(?![^{]*\})", str(kernel.get("func", "")))]
            found: dict[str, Any] = {}
            names = [one for one in functions if one and not one.endswith("_sr")]
            if "invoke" in entry:
                found["invoke"] = entry["invoke"].split("(")[0].strip()
            elif names != [operator]:
                found["kernels"] = names
            if "data_type" in kernel:
                found["data_type"] = kernel["data_type"]
                found["arguments"] = _names(entry["args"])
            if "backward" in entry:
                found["backward"] = entry["backward"]
            if found:
                operators[operator] = found
    return operators


def _names(arguments: str) -> list[str]:
    """`(Tensor x, float[] b = {1, 2})` -> [x, b]"""
    bare = re.sub(r"\{[^}]*\}", "", arguments.strip().strip("()"))
    return [one.split("=")[0].split()[-1] for one in bare.split(",") if one.strip()]


def checkout(source: str, folder: Path) -> tuple[Path, str]:
    """(root of the sources, commit); a git directory's files are laid out in `folder` first."""
    git, _, commit = source.partition(":")
    if not commit:
        head = subprocess.run(["git", "-C", git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        return Path(git), head.stdout.strip()
    command = ["git", f"--git-dir={git}", "archive", commit, *KERNELS, OPERATORS]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    full = subprocess.run(["git", f"--git-dir={git}", "rev-parse", commit], capture_output=True, text=True, check=True)
    return folder, full.stdout.strip()


def line(types: set[str]) -> str:
    return ALL if ALL in types else " ".join(sorted(types))


def main(source: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, commit = checkout(source, Path(folder))
        kernels, operators = read_kernels(root), read_operators(root)
    table = {
        "source": {"repository": "PaddlePaddle/Paddle", "commit": commit, "made_by": "make_gpu_kernels.py"},
        "kernels": {
            name: [line(entry["dtypes"]), entry["files"][-1], *([line(entry["depends"])] if entry["depends"] else [])]
            for name, entry in sorted(kernels.items())
        },
        "operators": dict(sorted(operators.items())),
    }
    lines = [f'"source": {json.dumps(table["source"])}']
    for part in ("kernels", "operators"):
        rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in table[part].items())
        lines.append(f'"{part}": {{\n{rows}\n}}')
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
