#!/usr/bin/env bash
# Horovod over Gloo, one process per GPU, started by horovodrun. Needs ssh between the hosts, but no MPI.
#
#   launch/horovodrun.sh -np 4 -- python train.py                             four processes here
#   launch/horovodrun.sh -H node1:4,node2:4 -- python train.py                four on each host
#   launch/horovodrun.sh -H node1:4,node2:4 --network-interface eth0 -- python train.py
#
# For all flags, see: distpad launch --help. Pass options of horovodrun itself with --launcher-arg, as in
# --launcher-arg=--fusion-threshold-mb=32. In each process, distpad.backends.start selects the GPU of the local rank, or
# GPU 0 if the process sees only one.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
find_python

# Horovod names the ranks that miss a collective after 60 s, and ends the job after five minutes. `distpad launch` sets
# both times; Horovod's default is to wait forever. If a rank pauses for longer, as for an evaluation on rank 0, set
# HOROVOD_STALL_SHUTDOWN_TIME_SECONDS to a larger value before the call.
# NCCL's log level: WARN prints errors, INFO also the interface and the transport between hosts.
# --network-interface eth0 sets NCCL_SOCKET_IFNAME. NCCL_IB_DISABLE=1 disables an InfiniBand that does not work.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

exec "$PYTHON" -m distpad launch --backend horovod --gloo "$@"
