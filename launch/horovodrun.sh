#!/usr/bin/env bash
# Horovod over Gloo, a process a GPU, started by horovodrun: needs ssh between the hosts, and no MPI.
#
#   launch/horovodrun.sh -np 4 -- python train.py                             four processes here
#   launch/horovodrun.sh -H node1:4,node2:4 -- python train.py                four on each host
#   launch/horovodrun.sh -H node1:4,node2:4 --network-interface eth0 -- python train.py
#
# All flags are those of `distpad launch` (see: distpad launch --help); options of horovodrun itself go through
# --launcher-arg, as in --launcher-arg=--fusion-threshold-mb=32. Each process takes the GPU of its local rank
# (distpad.backends.start does that), which is GPU 0 where it is shown one alone.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
find_python

# Horovod says after 60 s which ranks have not come to a collective, and ends a job that waited for five minutes: distpad
# launch sets that, since by default it would wait for ever. Where a rank pauses for longer, as for an evaluation on rank
# 0, set HOROVOD_STALL_SHUTDOWN_TIME_SECONDS to more before the call.
# What NCCL says: WARN for what is wrong; INFO also for the interface and the transport that it takes between hosts.
# --network-interface eth0 sets NCCL_SOCKET_IFNAME. NCCL_IB_DISABLE=1 keeps it from an InfiniBand that does not work.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

exec "$PYTHON" -m distpad launch --backend horovod --gloo "$@"
