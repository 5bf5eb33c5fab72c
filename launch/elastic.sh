#!/usr/bin/env bash
# Trains under Horovod while workers leave and join, by `distpad launch`.
set -euo pipefail

usage() {
  cat <<'USAGE'
Runs COMMAND in an elastic Horovod job (over Gloo), on the hosts that a file currently lists.

Usage: launch/elastic.sh --hosts-file FILE [--min-np N] [--max-np N] [OPTIONS of distpad launch] -- COMMAND...
  --hosts-file  lines HOST:SLOTS (see launch/discover_hosts.sh); rewrite the file to add and remove hosts
  --min-np      minimum number of workers (default: 1); training starts as soon as they are available
  --max-np      maximum number of workers (default: the number of slots)
  -h, --help    print this text

Examples:
  launch/elastic.sh --hosts-file hosts --min-np 2 -- python examples/handwriting/train.py --backend horovod --elastic
  launch/elastic.sh --hosts-file hosts --network-interface lo --log-dir logs -- python train.py

COMMAND must use distpad.ElasticState. After a worker fails, its host is not used for 10 s; the pause doubles with each
further failure, up to 5 minutes. A worker that joins must start within 2 minutes, or Horovod ends the job. With
--max-restarts, the job then starts again: COMMAND must resume from a checkpoint.
`distpad launch --help` documents the other flags. A lost worker does not end the job. The job ends if fewer than
--min-np workers remain for a long time, if Horovod's launcher fails, or if the training is done.
USAGE
}

die() { printf 'elastic: error: %s\n' "$*" >&2; exit 2; }

source "$(dirname "${BASH_SOURCE[0]}")/python.sh"

# NCCL's log level: WARN prints errors, INFO also the interface and the transport between hosts.
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
  (($# > 1)) || die "no COMMAND, expected one after --, as in: --hosts-file hosts -- python train.py"
  [[ -r $hosts_file ]] || die "--hosts-file is ${hosts_file:-missing}, expected a readable file"
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
