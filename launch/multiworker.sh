#!/usr/bin/env bash
# MultiWorkerMirroredStrategy on one or several hosts. Each process gets its TF_CONFIG; ssh starts them.
#
#   launch/multiworker.sh -np 2 -- python train.py                            two workers on this host
#   launch/multiworker.sh -H node1,node2 -- python train.py                   one worker per host, with all its GPUs
#   launch/multiworker.sh -H node1,node2 --port 5000 -- python train.py       at port 5000, for a firewall
#   launch/multiworker.sh --hostfile hosts --max-restarts 5 -- python train.py --resume
#
# For all flags, see: distpad launch --help. Start one worker per host: it trains on all GPUs of its host. If a worker
# is lost, all workers must restart from the last checkpoint: --max-restarts.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
find_python

# NCCL's log level: WARN prints errors, INFO also the interface and the transport between hosts.
# --network-interface eth0 sets NCCL_SOCKET_IFNAME. NCCL_IB_DISABLE=1 disables an InfiniBand that does not work.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

exec "$PYTHON" -m distpad launch --backend multiworker "$@"
