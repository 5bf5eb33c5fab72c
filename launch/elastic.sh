#!/usr/bin/env bash
# Trains under Horovod with workers that may be lost and may join: a thin layer over `distpad launch`.
set -euo pipefail

usage() {
  cat <<'USAGE'
Runs COMMAND in an elastic Horovod job (over Gloo), on the hosts that a file lists, whatever it lists at the moment.

Usage: launch/elastic.sh --hosts-file FILE [--min-np N] [--max-np N] [OPTIONS of distpad launch] -- COMMAND...
  --hosts-file  lines HOST:SLOTS (launch/discover_hosts.sh tells more); rewrite it to add hosts and to take them away
  --min-np      workers without which training waits (default: 1); it begins as soon as there are so many
  --max-np      workers that are used at most (default: as many as there are slots)
  -h, --help    this text

Examples:
  launch/elastic.sh --hosts-file hosts --min-np 2 -- python examples/handwriting/train.py --backend horovod --elastic
  launch/elastic.sh --hosts-file hosts --network-interface lo --log-dir logs -- python train.py

COMMAND trains by distpad.ElasticState. A host where a worker failed is left alone for 10 s, at each further failure
for twice as long, at most for 5 minutes. A worker that joins must have started within 2 minutes: where one does not,
Horovod ends the job. With --max-restarts it is then started anew: give COMMAND what makes it go on from a checkpoint.
All other flags are those of `distpad launch`. A lost worker is no failure of the job here; what ends it is that fewer
than --min-np are left for long, that Horovod's launcher fails, or that the training is done.
USAGE
}

die() { printf 'elastic: error: %s\n' "$*" >&2; exit 2; }

source "$(dirname "${BASH_SOURCE[0]}")/python.sh"

# What NCCL says: WARN for what is wrong; INFO also for the interface and the transport that it takes between hosts.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

main() {
  local here hosts_file="" min_np=1 max_np=() options=()
  while (($#)) && [[ $1 != -- ]]; do
    case $1 in
      --hosts-file | --min-np | --max-np) (($# > 1)) || die "$1 needs a value. See launch/elastic.sh --help" ;;
    esac
    case $1 in
      --hosts-file) hosts_file=$2; shift ;;
      --min-np) min_np=$2; shift ;;
      --max-np) max_np=(--max-np "$2"); shift ;;
      -h | --help) usage; exit 0 ;;
      *) options+=("$1") ;;
    esac
    shift
  done
  (($# > 1)) || die "no COMMAND. It goes after --, e.g.: --hosts-file hosts -- python train.py"
  [[ -r $hosts_file ]] || die "--hosts-file is ${hosts_file:-missing}, expected a file that can be read"
  here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  find_python
  DISTPAD_HOSTS_FILE=$(cd "$(dirname "$hosts_file")" && pwd)/$(basename "$hosts_file")
  export DISTPAD_HOSTS_FILE
  exec "$PYTHON" -m distpad launch --backend horovod --gloo \
    -np "$min_np" --min-np "$min_np" ${max_np[@]+"${max_np[@]}"} \
    --host-discovery-script "$here/discover_hosts.sh" \
    ${options[@]+"${options[@]}"} "$@"
}

main "$@"
