#!/usr/bin/env bash
# Everything that needs a GPU, in one call: build, tests, compute-sanitizer, benchmarks, plots.
#
#   bench/kernels/gpu_session.sh OUT [PHASE...]
#
# Phases: build test sanitize bench compile append small large shapes serve plot full. Without any:
# build, test, sanitize, bench, plot. OUT receives session.log, append.jsonl, attention.jsonl,
# table.md (the verdicts on the targets first) and roofline.png.
#
#   bench    the cells that the targets speak of, results checked against float64
#   compile  some of them with torch.compile, which takes longer to compile than to measure
#   append   append_context_kv: every model, 16 to 8192 rows, whole prompts and committed blocks
#   small    block_attention: batch 1 to 16, context 512 to 32K
#   large    the same for batch 32 to 256
#   shapes   block_attention: pages of 16 and 64, other models
#   full     append, small, large, shapes, compile, one after the other
#   serve    SGLang end to end, where it is installed: TARGET and DRAFT name a pair (default: a random
#            one), ARMS some of its arms
#
# A phase that fails does not stop the later ones; the exit status is that of the worst. Every command
# has a limit, and those of a phase of benchmarks add up to less than ten minutes: where a command may
# only run for so long, give such phases one by one. What a command measured until then is kept.
# PYTHON names the interpreter (default python3).
#
# Minutes on an H100 with 16 cores, as planned, not as measured: build 2, test 3, sanitize 8, bench 3,
# append 3, small 4, large 5, shapes 4, compile 3, serve 12.
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
  if timeout --kill-after 10 "$limit" "$@" >>"$log" 2>&1; then
    echo "ok      $name ($((SECONDS - started)) s)"
  else
    local code=$?
    echo "FAILED  $name (status $code, $((SECONDS - started)) s)"
    tail -n 15 "$log"
    status=1
  fi
}

# bench LIMIT NAME ARGUMENTS...: the JSON lines of one benchmark script go to OUT/NAME.jsonl.
bench() {
  local limit=$1 name=$2
  shift 2
  run "$limit" "$name" bash -c '"$@" >>"$0"' "$out/$name.jsonl" "$python" "$@"
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

append_script=bench/kernels/append_context_kv.py
attention_script=bench/kernels/block_attention.py

bench_targets() {
  local checked=(--refcheck --without compile)
  bench 130 append $append_script "${checked[@]}" --rows 16 64 256 1024 4096
  # The first command may have FlashInfer compile its kernels.
  bench 250 attention $attention_script "${checked[@]}" --batch 1 8 --context 1024 4096
  bench 110 attention $attention_script "${checked[@]}" --batch 32 64 --context 4096 16384
  bench 90 append $append_script "${checked[@]}" --rows 16 64 256 640 1024 --commit-lens random
}

bench_compile() {
  bench 200 append $append_script --rows 64 1024 --commit-lens none random
  bench 120 attention $attention_script --batch 8 --context 4096
  bench 120 attention $attention_script --batch 32 --context 4096
}

bench_append() {
  local model rounds=(--without compile --rounds 20)
  bench 130 append $append_script "${rounds[@]}" --rows 16 64 256 320 384 512 640 704 768 1024 2048 \
    --commit-lens random full
  for model in qwen3-4b qwen3-8b qwen3-32b llama-3-70b gpt-oss-20b gemma-3-12b; do
    bench 70 append $append_script "${rounds[@]}" --model $model \
      --rows 16 64 256 1024 4096 32 128 320 384 512 2048 8192
  done
}

# Each batch in a process of its own, contexts of the targets first.
bench_batches() {
  local limit=$1 batch
  shift
  for batch in "$@"; do
    bench "$limit" attention $attention_script --without compile --rounds 20 --batch "$batch" \
      --context 4096 1024 2048 512 8192 16384 32768
  done
}

bench_shapes() {
  local model rounds=(--without compile --rounds 20)
  bench 140 attention $attention_script "${rounds[@]}" --batch 8 32 --context 4096 1024 16384 \
    --page 16 64
  for model in gpt-oss-20b qwen3-32b gemma-3-12b llama-3-70b; do
    bench 100 attention $attention_script "${rounds[@]}" --model $model --batch 8 32 1 \
      --context 4096 1024
  done
}

serve() {
  bench 1500 end_to_end bench/kernels/end_to_end.py ${TARGET:+--target "$TARGET" --draft "$DRAFT"} \
    ${ARMS:+--arms $ARMS}
}

plot() {
  run 100 plot bash -c '"$0" bench/kernels/plot.py "$1"/a*.jsonl --png "$1/roofline.png" \
    >"$1/table.md"' "$python" "$out"
  sed -n '/^## Targets/,/^## A/p' "$out/table.md" | grep '^|'
}

for phase in $phases; do
  case $phase in
    build | test | sanitize | serve | plot) $phase ;;
    bench) bench_targets ;;
    compile | append | shapes) bench_$phase ;;
    small) bench_batches 110 8 1 4 2 16 ;;
    large) bench_batches 140 32 64 128 256 ;;
    full)
      bench_append
      bench_batches 110 8 1 4 2 16
      bench_batches 140 32 64 128 256
      bench_shapes
      bench_compile
      ;;
    *) echo "unknown phase $phase" && exit 2 ;;
  esac
done
exit $status
