"""Makes .venv from requirements.lock, with the Paddle build that fits this machine; launch.sh runs it first.

Standard library only.  Progress goes to stderr; stdout holds one line, the interpreter to go on with.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements.lock"
PADDLE_INDEX = "https://www.paddlepaddle.org.cn/packages/stable/{build}/"


def read_lock() -> tuple[dict[str, set[str]], set[str]]:
    """The lock file's pins (package -> versions, one a Python version) and the packages that this repository names."""
    pins: dict[str, set[str]] = {}
    direct: set[str] = set()
    name = ""
    for line in LOCK.read_text("utf-8").splitlines():
        pin = re.match(r"([A-Za-z0-9_.-]+)==([^ ;]+)", line)
        if pin:
            name = pin[1].lower()
            pins.setdefault(name, set()).add(pin[2])
        elif line.endswith("(pyproject.toml)"):
            direct.add(name)
    return pins, direct


def nvidia_smi(*arguments: str) -> str | None:
    """What nvidia-smi prints, None where it is missing or fails."""
    if not shutil.which("nvidia-smi"):
        return None
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


@functools.cache
def driver_report() -> str | None:
    """The table that nvidia-smi prints, None without a working driver; asked once a process, as it may take seconds."""
    return nvidia_smi()


@functools.cache
def card_listing() -> str | None:
    """What `nvidia-smi -L` prints, None without a working driver; asked once a process."""
    return nvidia_smi("-L")


def driver_problem() -> str:
    """Why nvidia-smi tells nothing, and what mends it."""
    if not shutil.which("nvidia-smi"):
        return (
            "nvidia-smi is missing: in a container start it with -e NVIDIA_DRIVER_CAPABILITIES=compute,utility, "
            "else install the NVIDIA driver with its utilities"
        )
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as problem:
        said = str(problem)
    else:
        said = (done.stderr + done.stdout).strip() or f"exit code {done.returncode}"
    return f"nvidia-smi fails ({said.splitlines()[0]}): reload the NVIDIA driver, or restart the machine"


class OldDriverError(ValueError):
    """The NVIDIA driver runs no published build of Paddle."""


def paddle_build(driver: str | None, capabilities: str | None = None) -> str:
    """The folder of Paddle's wheel index for this machine: `cpu`, or the newest CUDA build that its driver runs.

    Args:
        driver: What `nvidia-smi` prints, None when there is no working driver.
        capabilities: What `nvidia-smi --query-gpu=compute_cap --format=csv,noheader` prints: `9.0`, a line a GPU.

    Raises:
        OldDriverError: The driver is older than every published build.
    """
    version = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", driver or "")
    if not version:
        return "cpu"
    cuda = (int(version[1]), int(version[2]))
    cards = re.findall(r"^\d+\.\d+$", capabilities or "", re.MULTILINE)
    if any(float(card) < 7.5 for card in cards):  # CUDA 12.9 and 13 builds leave out Volta (V100) and Pascal
        cuda = min(cuda, (12, 8))
    # A driver for any CUDA 12 runs every build for CUDA 12 up to 12.8 (minor version compatibility).
    for lowest, build in (((13, 0), "cu130"), ((12, 9), "cu129"), ((12, 0), "cu126"), ((11, 8), "cu118")):
        if cuda >= lowest:
            return build
    raise OldDriverError(f"the NVIDIA driver runs CUDA {version[1]}.{version[2]} at most; Paddle needs 11.8: update it")


def detect_build() -> str:
    """`paddle_build` of this machine."""
    report = driver_report()
    build = paddle_build(report)
    if build in ("cu129", "cu130"):  # those leave out old cards
        build = paddle_build(report, nvidia_smi("--query-gpu=compute_cap", "--format=csv,noheader"))
    return build


def paddle_wheel(build: str) -> list[str]:
    """Pip's arguments for the pinned Paddle; GPU builds are on Paddle's own index only."""
    (version,) = read_lock()[0]["paddlepaddle"]
    if build == "cpu":
        return [f"paddlepaddle=={version}"]
    return [f"paddlepaddle-gpu=={version}", "-i", PADDLE_INDEX.format(build=build)]


def active_faults() -> list[str]:
    """What the active Python lacks, or has in another version than the lock (VENV=none)."""
    pins, direct = read_lock()
    faults = [TWO_PADDLES] if has_two_paddles() else []
    for name in sorted(direct):
        wanted = " or ".join(sorted(pins[name]))
        if name in ("pip", "setuptools"):  # any will do; the lock names them because Paddle imports them
            if installed(name) is None:
                faults.append(f"{name}: not installed")
        elif name == "paddlepaddle":
            found = installed("paddlepaddle-gpu") or installed("paddlepaddle")
            if found not in pins[name]:
                faults.append(f"paddlepaddle-gpu or paddlepaddle: needs {wanted}, found {found or 'none'}")
        elif installed(name) not in pins[name]:
            faults.append(f"{name}: needs {wanted}, found {installed(name) or 'none'}")
    return faults


TWO_PADDLES = "paddlepaddle and paddlepaddle-gpu are both installed, and each has overwritten files of the other"


def has_two_paddles() -> bool:
    """Whether the CPU and the GPU build are both installed here: they share the folder paddle/."""
    return None not in (installed("paddlepaddle"), installed("paddlepaddle-gpu"))


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def ensure(folder: Path) -> Path:
    """Makes or refreshes the virtual environment; returns its interpreter.

    installed.txt holds the lock's hash and the Paddle build. It is written last, so that an interrupted install is done
    again, and compared first, so that nothing else happens while the lock stays the same.
    """
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    with locked(folder):  # of two launches at once the second waits here and finds the stamp
        build = detect_build()
        wanted = f"{hashlib.sha256(LOCK.read_bytes()).hexdigest()} {build}\n"
        found = stamp.read_text() if stamp.is_file() else ""
        sound = starts(python)
        if found == wanted and sound:
            return python
        say(f"setting up {folder}: Python {sys.version.split()[0]}, Paddle for {build}, about 2 GB; once")
        if not sound or (found and found.split()[-1] != build):  # CPU and GPU Paddle overwrite each other's files
            create(folder)
        stamp.write_text(f"unfinished {build}\n")
        install(python, build)
        stamp.write_text(wanted)
    return python


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Waits for the lock of a folder, the file FOLDER.lock beside it.

    NFS locks only what is open for writing.  Where nothing can be written, or the file system has no locks, it goes on
    without: then a complete environment is only read, or launches at once are the user's to avoid.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(f"{folder}.lock", "ab"))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as problem:
            say(f"warning: {folder}.lock: not locked ({problem.strerror}); start nothing else until this one is set up")
        yield


def create(folder: Path) -> None:
    """An empty virtual environment in place of whatever the folder holds."""
    uv = shutil.which("uv")
    if uv is None and importlib.util.find_spec("ensurepip") is None:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise ValueError(f"{sys.executable} has no ensurepip: install python{version}-venv (Debian, Ubuntu), or uv")
    venv.EnvBuilder(symlinks=True, clear=True, with_pip=uv is None).create(folder)


def install(python: Path, build: str) -> None:
    """Brings an interpreter's packages to the lock; --no-deps because the lock overrides some of paddlenlp's pins."""
    uv = shutil.which("uv")
    pip = [uv, "pip", "install", "--python", str(python)] if uv else [str(python), "-m", "pip", "install"]
    if build == "cpu":
        run([*pip, "--no-deps", "-r", str(LOCK)])
        return
    others = python.parent.parent / "requirements-without-paddle.txt"
    lines = LOCK.read_text("utf-8").splitlines(keepends=True)
    others.write_text("".join(line for line in lines if not line.startswith("paddlepaddle==")), "utf-8")
    run([*pip, "--no-deps", "-r", str(others)])
    run([*pip, *paddle_wheel(build)])  # with its dependencies: CUDA's own libraries, from the same index


def run(command: list[str]) -> None:
    """Runs a command with all it prints on stderr."""
    say("+ " + " ".join(command))
    subprocess.run(command, stdout=sys.stderr, check=True)


def starts(python: Path) -> bool:
    """Whether an interpreter runs (that of a half-made environment does not)."""
    return python.exists() and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


def say(text: str) -> None:
    """Prints to stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Prints the interpreter for the folder in argv[1], or for `none` checks and prints the active one."""
    try:
        if sys.argv[1] != "none":
            print(ensure(Path(sys.argv[1]).absolute()))
            return 0
        faults = active_faults()
        if faults:
            listed = "\n  ".join(faults)
            rest = f"grep -v ^paddlepaddle== {LOCK} | {sys.executable} -m pip install --no-deps -r /dev/stdin"
            away = (
                f"{sys.executable} -m pip uninstall -y paddlepaddle paddlepaddle-gpu && " if has_two_paddles() else ""
            )
            raise ValueError(
                f"VENV=none, but {sys.executable} does not fit requirements.lock:\n  {listed}\n"
                f"All of it but Paddle: {rest}\nPaddle for this machine: {away}{sys.executable} -m pip install "
                f"{' '.join(paddle_wheel(detect_build()))}"
            )
        print(sys.executable)
        return 0
    except OldDriverError as problem:
        say(f"error: {problem}")
        return 3  # as of `doctor`, which could not tell more
    except (ValueError, OSError) as problem:
        say(f"error: {problem}")
    except subprocess.CalledProcessError as problem:
        say(
            f"error: the install failed ({problem.cmd[0]} ended with {problem.returncode}). The same command goes on "
            "with it; where an index is out of reach, install the packages by hand and give VENV=none"
        )
    return 2


if __name__ == "__main__":
    sys.exit(main())
