#!/usr/bin/env bash
# Horovod over MPI, a process a GPU, started by mpirun: where there is an MPI already.
#
#   launch/mpirun.sh -np 4 -- python train.py                                 four processes here
#   launch/mpirun.sh -H node1:4,node2:4 --network-interface ib0 -- python train.py
#   launch/mpirun.sh --hostfile hosts --launcher-arg=--mca --launcher-arg=pml --launcher-arg=ucx -- python train.py
#
# MPI itself goes over TCP unless told otherwise, as Horovod recommends where NCCL moves the gradients; the last line is
# for CPUs on InfiniBand, and needs an Open MPI with UCX.
# All flags are those of `distpad launch` (see: distpad launch --help). Open MPI 4 and 5 take different options, which are
# chosen by what `mpirun --version` says; Horovod must have been built for the one that is on PATH: `distpad doctor` looks.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
find_python

# As in horovodrun.sh: a rank that does not come is named after 60 s, and ends the job after five minutes.
# What NCCL says: WARN for what is wrong; INFO also for the interface and the transport that it takes between hosts.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

exec "$PYTHON" -m distpad launch --backend horovod --mpi "$@"
