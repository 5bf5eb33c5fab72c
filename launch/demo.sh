#!/usr/bin/env bash
# Creates an environment and trains the handwriting example on several replicas of this machine.
set -euo pipefail

usage() {
  cat <<'EOF'
Creates an environment and trains a network that reads handwritten digit strings, on several replicas of this machine.

Usage: launch/demo.sh [--stack current|classic] [--backend NAME] [--replicas N] [arguments of train.py]
  --stack     current (TensorFlow 2.21, Keras 3; default) or classic (TensorFlow 2.15, Keras 2)
  --backend   mirrored (default)  one process, MirroredStrategy over N logical devices
              local               one process, one device
              multiworker         N processes, MultiWorkerMirroredStrategy
              horovod             N processes, Horovod (the first run builds it, in 3 to 10 minutes)
  --replicas  number of replicas (default: 4 for mirrored, 1 for local, 2 otherwise)
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
  STACK=current BACKEND=mirrored REPLICAS="" FURTHER=()
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
  [[ $STACK =~ ^(current|classic)$ ]] || die "--stack is $STACK, expected current or classic"
  case $BACKEND in
    mirrored) REPLICAS=${REPLICAS:-4} ;;
    local) REPLICAS=${REPLICAS:-1} ;;
    multiworker | horovod) REPLICAS=${REPLICAS:-2} ;;
    *) die "--backend is $BACKEND, expected mirrored, local, multiworker or horovod" ;;
  esac
  [[ $REPLICAS =~ ^[1-9][0-9]*$ ]] || die "--replicas is $REPLICAS, expected an integer of at least 1"
}

main() {
  parse "$@"
  local root python flags=() launcher=()
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  cd "$root"

  say "setting up the $STACK stack"
  [[ $BACKEND != horovod ]] || flags+=(--horovod)
  python=$(launch/environment.sh "$STACK" ${flags[@]+"${flags[@]}"})
  case $BACKEND in
    horovod) launcher=(launch/horovodrun.sh -np "$REPLICAS" --) ;;
    multiworker) launcher=(launch/multiworker.sh -np "$REPLICAS" --) ;;
  esac

  # Hides TensorFlow's start-up messages.
  export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2} TF_ENABLE_ONEDNN_OPTS=${TF_ENABLE_ONEDNN_OPTS:-0}
  export PYTHONUNBUFFERED=1 MPLBACKEND=agg DISTPAD_PYTHON=$python
  local command=(${launcher[@]+"${launcher[@]}"} "$python" examples/handwriting/train.py
    --backend "$BACKEND" --replicas "$REPLICAS" --out runs/demo ${FURTHER[@]+"${FURTHER[@]}"})
  say "training: ${command[*]}"
  local start=$SECONDS
  "${command[@]}" || { local status=$?; say "the training failed (exit code $status)" >&2; exit "$status"; }

  say "done in $((SECONDS - start)) s. The report: $root/runs/demo/report.png"
  say "To read images with the trained network: $python examples/handwriting/read.py --model runs/demo IMAGE..."
}

main "$@"
