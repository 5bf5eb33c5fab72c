#!/usr/bin/env bash
# Certifies and measures distpad on the GPUs of this machine, and writes one report to send back.
set -euo pipefail

# name | engines | script of benchmarks/, or target of distpad certify | arguments on GPUs | arguments with --cpu
STEPS='
built-in model       | mirrored multiworker horovod | certify                          | --cases 32                   | --cases 12
float32              | mirrored multiworker horovod | certify certified:plain          | --cases 32                   | --cases 7
float32, XLA         | mirrored multiworker horovod | certify certified:compiled       | --cases 32                   | --cases 4
mixed precision      | mirrored multiworker horovod | certify certified:mixed          | --cases 32                   | --cases 7
mixed precision, XLA | mirrored multiworker horovod | certify certified:mixed_compiled | --cases 32                   | --cases 4
wrapper              | mirrored                     | wrapper.py --replicas COUNT      | --units 4096                 | --rounds 1 --steps 2 --units 8
tokens               | multiworker horovod          | tokens.py                        | --examples 16384             | --rounds 1 --examples 96
tokens, float16      | multiworker horovod          | tokens.py --mixed-precision      | --examples 16384             | --rounds 1 --examples 96
overhead             | multiworker horovod          | overhead.py                      | --batch-size 64 --units 4096 | --rounds 1 --steps 8 --units 8
overhead, XLA        | multiworker horovod          | overhead.py --jit-compile        | --batch-size 64 --units 4096 | --rounds 1 --steps 8 --units 8
overhead, float16    | multiworker horovod          | overhead.py --mixed-precision    | --batch-size 64 --units 4096 | --rounds 1 --steps 8 --units 8
'
LIMIT_S=1800 # of a step

usage() {
  cat <<'TEXT'
Sets up the stack for GPUs with Horovod and NCCL, compares gradients on all GPUs of this machine with those of one device
(distpad certify) under MirroredStrategy, MultiWorkerMirroredStrategy and Horovod, with and without XLA, in float32 and in
mixed precision, and measures tokens per second and the cost of the window sync. It takes about an hour. A step that fails
does not stop the others. Please send the report back: it holds the output of all steps, and of nvidia-smi.

Usage: benchmarks/gpu.sh [--stack current|classic] [--cpu] [NAME...]
  NAME        run only these steps, such as "float32, XLA" (default: all)
  --stack     TensorFlow 2.21 (current, default) or 2.15 (classic)
  --cpu       run the steps on two CPU devices, on little data: this tests the script, not the GPUs
  -h, --help  print this text

The report is runs/gpu/STACK.txt. Building Horovod needs CUDA's compiler, see launch/install_horovod.sh --help; without
Horovod, its steps are reported as not run. Exit codes: 1 a step failed, was not run or not by NCCL, 2 usage, 3 no GPU.
TEXT
}

say() { printf '\n== %s\n' "$*"; }
die() { local code=$1; shift; printf 'benchmarks/gpu.sh: error: %s\n' "$*" >&2; exit "$code"; }

# Prints what a reader needs to know of this machine and its software.
describe() {
  say "distpad $(git describe --always --dirty 2>/dev/null || echo 'not from git'), stack $STACK, $COUNT devices, $(date -u +%F)"
  if ((GPUS)); then nvidia-smi; nvidia-smi topo -m; fi
  "$PYTHON" -m distpad doctor || true
}

# Prints NCCL's version and transports, from its log: proof that the collectives were NCCL's.
nccl_of() {
  local found
  found=$(grep -aoE 'NCCL version [0-9.]+|via (P2P|SHM|NET|NVLS|COLLNET)[/A-Za-z]*' "$1" | sort | uniq -c | awk '{ $1 = $1 "x"; print }' | paste -sd ';')
  echo "${found:-none}"
}

# Runs a step under an engine, and adds its result to SUMMARY: run_step NAME ENGINE WORDS...
run_step() {
  local name=$1 engine=$2 log start=$SECONDS code=0 launcher program nccl result=passed
  shift 2
  log=$OUT/$STACK.step.log
  if [[ $engine == horovod && -z $HOROVOD ]]; then
    SUMMARY+=("$(printf '%-22s %-12s %-8s' "$name" "$engine" "NOT RUN")")
    return
  fi
  case $engine in
    mirrored) launcher=(launch/local.sh -np "$COUNT") ;;
    multiworker) launcher=(launch/multiworker.sh -np "$COUNT") ;;
    horovod) launcher=(launch/horovodrun.sh -np "$COUNT") ;;
  esac
  if ((GPUS)) && [[ $engine != mirrored ]]; then launcher+=(--gpus "$COUNT" --gpus-per-worker 1); fi
  program=("$PYTHON" "$@")
  [[ $1 != certify ]] || program=("$PYTHON" -m distpad certify "${@:2}")
  say "$name, $engine"
  timeout --kill-after=60 "$LIMIT_S" "${launcher[@]}" --cwd benchmarks -- "${program[@]}" >"$log" 2>&1 || code=$?
  grep -av 'NCCL INFO' "$log" || true
  nccl=$(nccl_of "$log")
  if ((code)); then result="FAILED $code"; elif ((GPUS > 1)) && [[ $nccl == none ]]; then result="NOT NCCL"; fi
  SUMMARY+=("$(printf '%-22s %-12s %-8s %5d s   NCCL: %s' "$name" "$engine" "$result" $((SECONDS - start)) "$nccl")")
}

main() {
  local cpu="" stack=current names=() name engines words on_gpus on_cpu engine
  while (($#)); do
    case $1 in
      --stack) stack=${2:-}; shift ;;
      --cpu) cpu=1 ;;
      -h | --help) usage; exit 0 ;;
      -*) die 2 "unknown argument $1. See benchmarks/gpu.sh --help" ;;
      *) names+=("$1") ;;
    esac
    shift || die 2 "--stack needs a value"
  done
  [[ $stack =~ ^(current|classic)$ ]] || die 2 "--stack is $stack, expected current or classic"
  for name in ${names[@]+"${names[@]}"}; do grep -q "^$name *|" <<<"$STEPS" || die 2 "unknown step $name. See benchmarks/gpu.sh --help"; done

  ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  cd "$ROOT"
  # shellcheck source=launch/python.sh
  source launch/python.sh
  if [[ -n $cpu ]]; then
    GPUS=0 COUNT=2 STACK=$stack
    export CUDA_VISIBLE_DEVICES=""
  else
    GPUS=$(count_gpus) STACK=$stack-gpu
    COUNT=$GPUS
    ((GPUS)) || die 3 "nvidia-smi lists no GPU on this machine, so that there is nothing to measure. benchmarks/gpu.sh --cpu tests the script itself."
  fi
  OUT=runs/gpu HOROVOD=1 SUMMARY=()
  mkdir -p "$OUT"
  PYTHON=$(launch/environment.sh "$STACK" --horovod) || { HOROVOD="" && PYTHON=$(launch/environment.sh "$STACK"); }
  export DISTPAD_PYTHON=$PYTHON PYTHONUNBUFFERED=1 TERM=dumb COLUMNS=120 NCCL_DEBUG=INFO TF_CPP_MIN_LOG_LEVEL=2 TF_ENABLE_ONEDNN_OPTS=0
  {
    describe
    while IFS='|' read -r name engines words on_gpus on_cpu; do
      read -r name <<<"$name" # without the spaces at its end
      [[ -n $name ]] || continue
      [[ ${#names[@]} == 0 || " ${names[*]/%/|}" == *" $name|"* ]] || continue
      [[ -z $cpu ]] || on_gpus=$on_cpu
      # shellcheck disable=SC2086 # words
      for engine in $engines; do run_step "$name" "$engine" ${words//COUNT/$COUNT} $on_gpus </dev/null; done
    done <<<"$STEPS"
    say "summary: $COUNT $( ((GPUS)) && echo GPUs || echo 'CPU devices, which say nothing of GPUs')"
    printf '%s\n' "${SUMMARY[@]}"
    [[ "${SUMMARY[*]}" != *FAILED* && "${SUMMARY[*]}" != *"NOT "* ]] || touch "$OUT/$STACK.failed"
  } 2>&1 | tee "$OUT/$STACK.txt"
  rm -f "$OUT/$STACK.step.log"
  say "please send back $ROOT/$OUT/$STACK.txt"
  if [[ -e $OUT/$STACK.failed ]]; then rm "$OUT/$STACK.failed"; exit 1; fi
}

main "$@"
