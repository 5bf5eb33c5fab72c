#!/usr/bin/env bash
# Horovod over MPI, one process per GPU, started by mpirun. Needs an MPI installation.
#
#   launch/mpirun.sh -np 4 -- python train.py                                 four processes here
#   launch/mpirun.sh -H node1:4,node2:4 --network-interface ib0 -- python train.py
#   launch/mpirun.sh --hostfile hosts --launcher-arg=--mca --launcher-arg=pml --launcher-arg=ucx -- python train.py
#
# By default, MPI itself uses TCP, as Horovod recommends if NCCL moves the gradients. The last line is for CPUs on
# InfiniBand, and needs an Open MPI with UCX.
# For all flags, see: distpad launch --help. Open MPI 4 and 5 take different options; `distpad launch` selects them by
# `mpirun --version`. Horovod must be built for the Open MPI on PATH, which `distpad doctor` checks.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
find_python

# As in horovodrun.sh, Horovod names a rank that misses a collective after 60 s, and ends the job after five minutes.
# NCCL's log level: WARN prints errors, INFO also the interface and the transport between hosts.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

exec "$PYTHON" -m distpad launch --backend horovod --mpi "$@"
