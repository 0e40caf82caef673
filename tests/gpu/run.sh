#!/usr/bin/env bash
# Run the tests and the benchmark that need a GPU, in at most four minutes: tests/gpu/run.sh [FOLDER [SHAPE...]]
# FOLDER (default: out/gpu) gets gpu.json with all figures and log.txt. SHAPE is 135m, 1.2b or 8b (default: all three, the
# one with the most goals first). What does not fit the time is left out.
# Wheels of Python packages that the machine lacks are taken from the folder .whl, if there is one.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-out/gpu}
shift || true
[ $# -gt 0 ] || set -- 1.2b 8b 135m
mkdir -p "$out" && out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1
if compgen -G '.whl/*.whl' > /dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl || exit 1
  export PYTHONPATH=/tmp/site:$PWD
fi
began=$(date +%s)
{
  timeout 60 "$python" -m pytest --noconftest -W ignore -q -p no:xdist tests/gpu
  tests=$?
  for shape in "$@"; do
    counts=1,16,64
    [ "$shape" != 8b ] || counts=1,16
    left=$((${LIMIT_S:-240} - $(date +%s) + began))
    echo "== $shape, $left s left"
    [ "$left" -gt 0 ] || continue
    timeout "$left" "$python" -m tests.benchmarks.bench_batched --shape "$shape" --counts $counts \
      ${BENCH_OPTIONS:-} --out "$out/$shape.json"
  done
  echo "== done after $(($(date +%s) - began)) s"
  "$python" - "$out" "$tests" <<'CODE'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
made = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.stem != "gpu"}
(folder / "gpu.json").write_text(json.dumps({"tests_exit_code": int(sys.argv[2]), "bases": made}, indent=1) + "\n")
CODE
} 2>&1 | tee "$out/log.txt"
