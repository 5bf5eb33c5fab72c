#!/usr/bin/env bash
# Creates an environment and trains the handwriting example on several replicas of this machine.
set -euo pipefail

usage() {
  cat <<'EOF'
Creates an environment and trains a network that reads handwritten digit strings, on several replicas of this machine.
Where nvidia-smi lists GPUs, these are the replicas.

Usage: launch/demo.sh [--stack STACK] [--backend NAME] [--replicas N] [arguments of train.py]
  --stack     current (TensorFlow 2.21, Keras 3) or classic (TensorFlow 2.15, Keras 2), for CPUs, or current-gpu or
              classic-gpu (default: current-gpu with GPUs, else current)
  --backend   mirrored (default)  one process, MirroredStrategy over N logical devices
              local               one process, one device
              multiworker         N processes, MultiWorkerMirroredStrategy
              horovod             N processes, Horovod (the first run builds it, in 3 to 10 minutes)
  --replicas  number of replicas (default: the GPUs, else 4 for mirrored and 2 for several processes; 1 for local)
  -h, --help  print this text

Examples:
  launch/demo.sh
  launch/demo.sh --backend horovod --replicas 2
  launch/demo.sh --stack classic --backend multiworker
EOF
}

say() { printf 'demo: %s\n' "$*"; }
die() { printf 'demo: error: %s\n' "$*" >&2; exit 2; }

parse() {
  STACK="" BACKEND=mirrored REPLICAS="" FURTHER=()
  while (($#)); do
    case $1 in
      --stack) STACK=${2:-}; shift ;;
      --backend) BACKEND=${2:-}; shift ;;
      --replicas) REPLICAS=${2:-}; shift ;;
      -h | --help) usage; exit 0 ;;
      *) FURTHER+=("$1") ;;
    esac
    shift || die "the last option needs a value. See launch/demo.sh --help"
  done
  GPUS=$(count_gpus)
  STACK=${STACK:-$( ((GPUS)) && echo current-gpu || echo current)}
  [[ $STACK =~ ^(current|classic)(-gpu)?$ ]] || die "--stack is $STACK, expected current, classic, current-gpu or classic-gpu"
  [[ $STACK == *-gpu ]] || GPUS=0
  case $BACKEND in
    mirrored) REPLICAS=${REPLICAS:-$((GPUS ? GPUS : 4))} ;;
    local) REPLICAS=${REPLICAS:-1} ;;
    multiworker | horovod) REPLICAS=${REPLICAS:-$((GPUS ? GPUS : 2))} ;;
    *) die "--backend is $BACKEND, expected mirrored, local, multiworker or horovod" ;;
  esac
  [[ $REPLICAS =~ ^[1-9][0-9]*$ ]] || die "--replicas is $REPLICAS, expected an integer of at least 1"
}

main() {
  ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  cd "$ROOT"
  source launch/python.sh
  parse "$@"
  local python flags=() launcher=() gpus=()

  say "setting up the $STACK stack"
  [[ $BACKEND != horovod ]] || flags+=(--horovod)
  python=$(launch/environment.sh "$STACK" ${flags[@]+"${flags[@]}"})
  [[ $STACK != *-gpu ]] || gpus=(--gpus "$REPLICAS" --gpus-per-worker 1)
  case $BACKEND in
    horovod) launcher=(launch/horovodrun.sh -np "$REPLICAS" ${gpus[@]+"${gpus[@]}"} --) ;;
    multiworker) launcher=(launch/multiworker.sh -np "$REPLICAS" ${gpus[@]+"${gpus[@]}"} --) ;;
    *) [[ $STACK != *-gpu ]] || export DISTPAD_GPUS=$REPLICAS ;; # the training ends if TensorFlow does not see them
  esac

  # Hides TensorFlow's start-up messages.
  export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2} TF_ENABLE_ONEDNN_OPTS=${TF_ENABLE_ONEDNN_OPTS:-0}
  export PYTHONUNBUFFERED=1 MPLBACKEND=agg DISTPAD_PYTHON=$python
  local command=(${launcher[@]+"${launcher[@]}"} "$python" examples/handwriting/train.py
    --backend "$BACKEND" --replicas "$REPLICAS" --out runs/demo ${FURTHER[@]+"${FURTHER[@]}"})
  say "training: ${command[*]}"
  local start=$SECONDS
  "${command[@]}" || { local status=$?; say "the training failed (exit code $status)" >&2; exit "$status"; }

  say "done in $((SECONDS - start)) s. The report: $ROOT/runs/demo/report.png"
  say "To read images with the trained network: $python examples/handwriting/read.py --model runs/demo IMAGE..."
}

main "$@"
