#!/usr/bin/env bash
# One machine, several GPUs, one process: MirroredStrategy over all GPUs, or over as many as -np says.
#
#   launch/local.sh -- python train.py
#   launch/local.sh -np 2 -- python train.py --epochs 3
#   launch/local.sh --log-dir logs --max-restarts 3 -- python train.py --resume
#
# All flags are those of `distpad launch` (see: distpad launch --help). Without a GPU, -np N makes N devices of the CPU,
# which is for trying things out. CUDA_VISIBLE_DEVICES=0,1 before the call leaves the other GPUs to others.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
find_python

# What NCCL says: WARN for what is wrong; INFO also for which way it takes between the GPUs (NVLink, PCIe, memory).
# Where a container has a small /dev/shm, NCCL fails: docker run --shm-size=1g. Where peer access is broken (some virtual
# machines), training hangs: NCCL_P2P_DISABLE=1 goes around it, slower.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# TensorFlow takes all memory of all GPUs it sees; with true only what it needs, so that others may use the rest.
export TF_FORCE_GPU_ALLOW_GROWTH=${TF_FORCE_GPU_ALLOW_GROWTH:-false}

exec "$PYTHON" -m distpad launch --backend mirrored "$@"
