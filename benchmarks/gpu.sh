#!/usr/bin/env bash
# On a GPU machine with Python, torch >= 2.10 and Triton: tests, rates of additions and times, in less than ten minutes.
# Without a GPU, or with --interpret, everything runs in Triton's interpreter on tiny sizes. Needs no network, no build.
#
#   benchmarks/gpu.sh [--interpret]      PYTHON=python3  OUT=build/gpu
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
export PYTHONPATH="src:benchmarks:tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

on_gpu=1 pytest=("$PYTHON" -m pytest -q -p no:cacheprovider) timing=("$PYTHON" benchmarks/gpu.py --out "$OUT")
if [[ ${1:-} == --interpret ]] || ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  on_gpu=
  export TRITON_INTERPRET=1
  timing+=(--interpret --no-compiled)
elif has xdist; then
  # What takes long is compiling, on the CPU.
  pytest+=(-n 8)
fi

status=0
# Seconds, a name, a command: its output goes to a file too. If it fails, or is out of time, the others still run.
part() {
  local seconds=$1 name=$2
  shift 2
  echo "== $name" >&2
  timeout "$seconds" "$@" 2>&1 | tee "$OUT/$name.log"
  local found=${PIPESTATUS[0]}
  [[ $found == 0 ]] || { echo "== $name: exit $found" | tee -a "$OUT/$name.log" >&2; status=1; }
}

report='import sys; from deformkit.doctor import diagnose; d = diagnose(); print(d.text); sys.exit(not d.healthy)'
if ! has pytest || ! has hypothesis; then
  part 240 doctor "$PYTHON" -c "$report"
elif [[ $on_gpu ]]; then
  part 150 kernels "${pytest[@]}" tests/ops/test_triton.py tests/ops/test_cuda.py
else
  part 240 kernels "${pytest[@]}" tests/ops/test_triton.py tests/ops/test_cuda.py -k "1d and not layout"
fi
part 270 timing "${timing[@]}" --seconds 230
if [[ $on_gpu ]] && has pytest && has hypothesis; then
  part 150 operators "${pytest[@]}" tests/ops --kernels cuda
fi
exit "$status"
