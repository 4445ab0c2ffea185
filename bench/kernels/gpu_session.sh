#!/usr/bin/env bash
# Everything that needs a GPU, in one call: build, tests, compute-sanitizer, benchmarks, plots.
#
#   bench/kernels/gpu_session.sh OUT [PHASE...]   phases: build test sanitize bench full serve plot
#
# OUT receives session.log, *.jsonl, table.md and roofline.png. Without phases: build, test, sanitize,
# bench, plot. `full` is the benchmark over every published shape, `serve` SGLang end to end, where
# it is installed: TARGET and DRAFT name a pair (default: a random one), ARMS some of its arms. A
# phase that fails does not stop the later ones; the exit status is that of the worst. PYTHON names
# the interpreter (default python3).
#
# Minutes on an H100 with 16 cores, as planned, not as measured: build 2, test 3, sanitize 8, bench 4,
# serve 12, full 25. Where a command may only run for ten, give the phases one by one.
set -uo pipefail

cd "$(dirname "$0")/../.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
phases=${*:-build test sanitize bench plot}
python=${PYTHON:-python3}
status=0
export PYTHONPATH=$PWD/python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
log=$out/session.log

# run LIMIT NAME COMMAND...: at most LIMIT seconds, output to the log, one line on the terminal.
run() {
  local limit=$1 name=$2 started=$SECONDS
  shift 2
  echo "== $name: $*" >>"$log"
  if timeout "$limit" "$@" >>"$log" 2>&1; then
    echo "ok      $name ($((SECONDS - started)) s)"
  else
    local code=$?
    echo "FAILED  $name (status $code, $((SECONDS - started)) s)"
    tail -n 15 "$log"
    status=1
  fi
}

# bench NAME ARGUMENTS...: the JSON lines of one benchmark script go to OUT/NAME.jsonl.
bench() {
  local name=$1
  shift
  run "${limit:-500}" "$name" bash -c '"$@" >>"$0"' "$out/$name.jsonl" "$python" "$@"
}

has_kernels=("$python" -c 'import torch
from dflare import ops
ops.check_support(torch.device("cuda", 0), torch.bfloat16, 128)
print("torch", torch.__version__, "on", torch.cuda.get_device_name(0))')

build() {
  nvidia-smi >>"$log" 2>&1
  # A library that was built elsewhere for this torch will do.
  "${has_kernels[@]}" >>"$log" 2>&1 || run 580 build "$python" setup.py -q build_ext --inplace
  run 100 kernels "${has_kernels[@]}"
}

test() {
  run 500 tests "$python" -m pytest -q -p no:cacheprovider tests/kernels -m gpu
}

# Small shapes through every kernel: the tools slow a kernel down a hundredfold.
sanitize() {
  local tool
  for tool in memcheck racecheck synccheck; do
    run 180 "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "$python" -m pytest -q -x -p no:cacheprovider tests/kernels/test_cuda_ops.py -k small_shapes
  done
}

bench_default() {
  bench append bench/kernels/append_context_kv.py --refcheck --rows 16 64 256 1024 4096
  bench attention bench/kernels/block_attention.py --refcheck --batch 1 8 --context 1024 4096
  bench attention bench/kernels/block_attention.py --batch 32 --context 4096 16384
}

bench_full() {
  bench append bench/kernels/append_context_kv.py --rows 16 32 64 128 256 512 1024 2048 4096 8192 \
    --model qwen3-4b qwen3-8b qwen3-32b gpt-oss-20b
  bench attention bench/kernels/block_attention.py --batch 1 2 4 8 16 32 64 128 256 \
    --context 512 1024 2048 4096 8192 16384 32768 --rounds 20
  bench attention bench/kernels/block_attention.py --batch 1 8 32 --context 4096 --page 16 64 \
    --model qwen3-4b qwen3-32b gpt-oss-20b
}

serve() {
  local limit=1500
  bench end_to_end bench/kernels/end_to_end.py ${TARGET:+--target "$TARGET" --draft "$DRAFT"} \
    ${ARMS:+--arms $ARMS}
}

plot() {
  run 100 plot bash -c '"$0" bench/kernels/plot.py "$1"/a*.jsonl --png "$1/roofline.png" \
    >"$1/table.md"' "$python" "$out"
}

for phase in $phases; do
  case $phase in
    build | test | sanitize | serve | plot) $phase ;;
    bench) bench_default ;;
    full) bench_full ;;
    *) echo "unknown phase $phase" && exit 2 ;;
  esac
done
exit $status
