#!/usr/bin/env bash
# What a GPU is needed for, in two calls of less than ten minutes each; README.md says how to prepare.
#
#   bench/kernels/gpu_session.sh OUT first     the kernels load, bench (the targets), gpu tests, table
#   bench/kernels/gpu_session.sh OUT second    sanitize, wide, table
#   bench/kernels/gpu_session.sh OUT PHASE...  kernels bench tests sanitize wide serve table
#
#   kernels   the library loads; it is built where it does not
#   bench     the cells that bench/results/README.md asks for, small ones first
#   tests     tests/ops on the GPU
#   sanitize  memcheck, racecheck and synccheck on small shapes through every kernel
#   wide      other models, pages, batches, torch.compile
#   serve     SGLang end to end, where it is installed: TARGET and DRAFT name a pair (default: the demo
#             pair), ARMS some of its arms
#   table     OUT/table.md of all that was measured
#
# OUT receives session.log, append.jsonl, attention.jsonl, backends/report.md and table.md; a line is
# written as soon as it is measured, and the table after every phase, so whatever ends the session
# costs only what was not measured yet. A command that fails does not stop the later ones; the exit
# status is 1 then. PYTHON names the interpreter (default python3). REHEARSE=1 runs the same commands
# on the CPU: small shapes, and the tests that need a GPU skipped.
set -uo pipefail

cd "$(dirname "$0")/../.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
python=${PYTHON:-python3}
log=$out/session.log
status=0
device=${REHEARSE:+cpu}
device=${device:-cuda}
export PYTHONPATH=$PWD/python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# run LIMIT NAME COMMAND...: at most LIMIT seconds, output to the log, one line on the terminal.
run() {
  local limit=$1 name=$2 started=$SECONDS code
  shift 2
  [ $device = cpu ] && limit=$((10 * limit))
  echo "== $name: $*" >>"$log"
  timeout --kill-after 10 "$limit" "$@" >>"$log" 2>&1
  code=$?
  if [ $code = 0 ]; then
    echo "ok      $name ($((SECONDS - started)) s)"
  else
    echo "FAILED  $name (status $code, $((SECONDS - started)) s)"
    tail -n 15 "$log"
    status=1
  fi
}

# measure LIMIT OP ARGUMENTS...: JSON lines go to OUT/OP.jsonl.
measure() {
  local limit=$1 op=$2 flags=()
  shift 2
  case $device-$op in
    cpu-append) flags=(--device cpu --model smollm2-135m --rounds 1 --warm --rows 12) ;;
    cpu-attention) flags=(--device cpu --model smollm2-135m --rounds 1 --warm --batch 2 --context 64) ;;
  esac
  run "$limit" "$op $*" bash -c '"$@" >>"$0"' "$out/$op.jsonl" \
    "$python" -m bench.kernels "$op" "$@" "${flags[@]}"
}

kernels() {
  local loads=("$python" -c 'import sys, torch
from dflare import ops
from dflare.processor import device_name
ops.check_support(torch.device(sys.argv[1]), torch.bfloat16, 128)
print("torch", torch.__version__, "on", device_name(cuda=sys.argv[1] == "cuda"))'
    "$device")
  nvidia-smi >>"$log" 2>&1
  "${loads[@]}" >>"$log" 2>&1 || run 100 build "$python" setup.py -q build_ext --inplace
  run 20 kernels "${loads[@]}"
}

bench() {
  measure 60 append --rows 16 64 256
  measure 100 attention --batch 1 8 --context 1024 4096
  measure 80 attention --batch 32 64 --context 4096
  measure 60 append --rows 1024 4096
  measure 60 append --rows 16 64 256 640 --commit-lens random
}

tests() {
  run 100 tests "$python" -m pytest -q -p no:cacheprovider tests/ops -m gpu
}

# The tools slow a kernel down a hundredfold. memcheck sees no overrun inside a cached segment.
sanitize() {
  local tool sanitizer
  for tool in memcheck racecheck synccheck; do
    sanitizer=(compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all)
    [ $device = cpu ] && sanitizer=(env)
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run 100 "$tool" "${sanitizer[@]}" "$python" -m pytest \
      -q -x -p no:cacheprovider tests/ops -m gpu -k "nothing_else or equals_the_reference_for"
  done
}

wide() {
  measure 60 attention --batch 32 --context 16384
  measure 60 attention --batch 8 --context 4096 --page 16 64
  measure 60 append --model qwen3-8b llama-3-70b gpt-oss-20b --rows 16 256
  measure 60 attention --model gpt-oss-20b llama-3-70b --batch 8 32 --context 4096
  measure 50 attention --batch 8 --context 4096 --arms dflare compile
}

serve() {
  run 1500 serve "$python" -m bench.serving.sweep bench/serving/sweeps/backends.yaml \
    --out "$out/backends" ${TARGET:+--model "$TARGET" --draft "$DRAFT"} ${ARMS:+--arms $ARMS}
}

table() {
  local files=("$out"/a*.jsonl)
  [ -s "${files[0]}" ] || return 0
  "$python" -m bench.kernels table "${files[@]}" >"$out/table.md" 2>>"$log" || status=1
}

for phase in ${*:-first}; do
  case $phase in
    first) phases=(kernels bench tests) ;;
    second) phases=(sanitize wide) ;;
    kernels | bench | tests | sanitize | wide | serve | table) phases=("$phase") ;;
    *) echo "unknown phase $phase: the head of $0 lists them" && exit 2 ;;
  esac
  for part in "${phases[@]}"; do
    "$part"
    table
  done
done
exit $status
