#!/usr/bin/env bash
# Several processes, here or on several hosts: MultiWorkerMirroredStrategy, each with its TF_CONFIG, started by ssh.
#
#   launch/multiworker.sh -np 2 -- python train.py                            two workers here
#   launch/multiworker.sh -H node1,node2 -- python train.py                   a worker a host, with all its GPUs
#   launch/multiworker.sh -H node1,node2 --port 5000 -- python train.py       at port 5000, for a firewall
#   launch/multiworker.sh --hostfile hosts --max-restarts 5 -- python train.py --resume
#
# All flags are those of `distpad launch` (see: distpad launch --help). One worker a host is right: it trains on all GPUs
# of its host. A worker that is lost means that all have to start again, from the last checkpoint: --max-restarts.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
find_python

# What NCCL says: WARN for what is wrong; INFO also for the interface and the transport that it takes between hosts.
# --network-interface eth0 sets NCCL_SOCKET_IFNAME. NCCL_IB_DISABLE=1 keeps it from an InfiniBand that does not work.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

exec "$PYTHON" -m distpad launch --backend multiworker "$@"
