#!/usr/bin/env bash
# Creates the environment and runs the benchmarks. The table below lists the engines of each benchmark.
set -euo pipefail

# name | engines | script and arguments
BENCHMARKS='
overhead    | horovod multiworker | overhead.py
tokens      | horovod multiworker | tokens.py --set lognormal
docstrings  | horovod             | tokens.py --set docstrings
wrapper     | horovod             | wrapper.py
mirrored    | local               | wrapper.py --replicas 4
batchnorm   | local horovod       | normalization.py
drift       | local               | drift.py
shapes      | local horovod       | shapes.py --count
planning    | local               | planning.py
padding     | local               | padding.py
pipeline    | local               | pipeline.py
waiting     | local               | waiting.py
convergence | local               | convergence.py
'

usage() {
  cat <<'TEXT'
Runs the benchmarks, most of them on two workers with one core each. The contenders of a speed benchmark take turns in
one process, and the benchmark prints ratios of their times. All benchmarks take about an hour on two idle cores. The
output is also written to runs/benchmarks.

Usage: benchmarks/run.sh [--stack current|classic] [NAME...]
  NAME        overhead, tokens, docstrings, wrapper, mirrored, batchnorm, drift, shapes, planning, padding, pipeline,
              waiting, convergence (default: all)
  --stack     environment (default: current)
  -h, --help  print this text

Examples:
  benchmarks/run.sh
  benchmarks/run.sh --stack classic overhead tokens
TEXT
}

say() { printf '\n== %s\n' "$*"; }
die() { printf 'benchmarks/run.sh: error: %s\n' "$*" >&2; exit 2; }

main() {
  local stack=current chosen=() root python out name engines script launcher engine
  while (($#)); do
    case $1 in
      --stack) stack=${2:-}; shift ;;
      -h | --help) usage; exit 0 ;;
      -*) die "unknown argument $1. See benchmarks/run.sh --help" ;;
      *) chosen+=("$1") ;;
    esac
    shift || die "--stack needs a value"
  done
  [[ $stack =~ ^(current|classic)$ ]] || die "--stack is $stack, expected current or classic"
  for name in ${chosen[@]+"${chosen[@]}"}; do
    grep -q "^$name " <<<"$BENCHMARKS" || die "unknown benchmark $name. See benchmarks/run.sh --help"
  done
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  cd "$root"
  out=runs/benchmarks/$stack
  mkdir -p "$out"
  python=$(launch/environment.sh "$stack" --horovod)
  # one core per worker, for all contenders
  export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 TF_CPP_MIN_LOG_LEVEL=3
  export DISTPAD_PYTHON=$python PYTHONUNBUFFERED=1 TERM=dumb TF_ENABLE_ONEDNN_OPTS=0 # oneDNN prints its note at any log level
  while IFS='|' read -r name engines script; do
    name=${name// /}
    [[ -n $name ]] || continue
    [[ ${#chosen[@]} == 0 || " ${chosen[*]} " == *" $name "* ]] || continue
    for engine in $engines; do
      case $engine in
        horovod) launcher=("$(dirname "$python")/horovodrun" --gloo -np 2) ;;
        multiworker) launcher=(launch/multiworker.sh -np 2 --) ;;
        local) launcher=() ;;
      esac
      say "$name, $engine, $stack"
      # shellcheck disable=SC2086 # the script and its arguments are words
      ${launcher[@]+"${launcher[@]}"} "$python" benchmarks/${script# } 2>&1 |
        sed -u -E 's/^\[[0-9,]*\]<(stdout|stderr)>: ?//; s/^\[worker [0-9]+\] //' | tee "$out/$name-$engine.txt"
    done
  done <<<"$BENCHMARKS"
}

main "$@"
