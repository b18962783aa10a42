#!/usr/bin/env bash
# The one door: picks a Python, has train/machine/environment.py make .venv from requirements.lock, and hands over to train/door/launch.py.
# It never changes directory: a relative path means what it means where you type it.  VENV=none uses the active Python.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
# glibc: keep freed memory instead of giving it back page by page (about 15 % of a CPU training step).
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-4294967296}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-4294967296}"
export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-268435456}"
# In large pages, which the processor finds and clears faster (4 % of a CPU training step of VL2-Tiny).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
# Paddle's MKL takes its slowest kernels on a processor that is not Intel's; with AVX2 there, matrix products are 4x as fast.
# The tests take the kernels that give the same numbers on every processor: goldens hold to the last digits.
if [ "${1:-}" = test ]; then
  export MKL_CBWR="${MKL_CBWR:-COMPATIBLE}"
elif grep -q AuthenticAMD /proc/cpuinfo 2>/dev/null && grep -qw avx2 /proc/cpuinfo; then
  export MKL_DEBUG_CPU_TYPE="${MKL_DEBUG_CPU_TYPE:-5}"
fi

suits() { # a name on PATH is not enough: pyenv leaves names behind that only print an error
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' </dev/null >/dev/null 2>&1
}

python=
if [ "${VENV:-}" = none ]; then names="python python3"; else names="python3.11 python3.12 python3.10 python3 python"; fi
for name in $names; do
  if suits "$name"; then python=$name; break; fi
done
if [ -z "$python" ] && [ "${VENV:-}" != none ] && command -v uv >/dev/null; then
  uv python install 3.11 >&2
  python=$(uv python find 3.11)
fi
if [ -z "$python" ]; then
  echo "error: no Python 3.10, 3.11 or 3.12 runs here (looked for: $names); install one, or uv, which brings its own" >&2
  exit 2
fi

case "${1:-help}" in
  help | -h | --help) ;; # needs no installed package
  *) python=$("$python" -I "$root/train/machine/environment.py" "${VENV:-$root/.venv}") ;;
esac
exec "$python" -m train.door.launch "$@"
