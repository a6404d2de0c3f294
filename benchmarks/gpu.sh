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

kernels=cuda options=()
if [[ ${1:-} == --interpret ]] || ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  kernels=triton options=(--interpret)
  export TRITON_INTERPRET=1
fi

status=0
part() { # seconds, name, command: its output to a file too; a part that fails or runs out of time does not stop the rest
  local seconds=$1 name=$2
  shift 2
  echo "== $name" >&2
  timeout "$seconds" "$@" 2>&1 | tee "$OUT/$name.log"
  local found=${PIPESTATUS[0]}
  [[ $found == 0 ]] || { echo "== $name: exit $found" | tee -a "$OUT/$name.log" >&2; status=1; }
}

part 60 doctor "$PYTHON" -c 'import sys; from deformkit.doctor import diagnose; d = diagnose(); print(d.text); sys.exit(not d.healthy)'
if "$PYTHON" -c 'import pytest, hypothesis' 2>/dev/null; then
  if [[ $kernels == cuda ]]; then
    part 90 test_triton "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops/test_triton.py tests/ops/test_cuda.py
    part 120 tests "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops --kernels cuda
  else
    part 120 test_triton "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops/test_triton.py tests/ops/test_cuda.py -k "1d"
  fi
else
  echo "no pytest or no hypothesis here: the doctor's self-test is all" >&2
fi
part 300 gpu "$PYTHON" benchmarks/gpu.py --out "$OUT" --seconds 250 "${options[@]}"
exit "$status"
