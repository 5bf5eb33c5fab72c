#!/usr/bin/env bash
# One machine, one process: MirroredStrategy over all GPUs, or over the number that -np gives.
#
#   launch/local.sh -- python train.py
#   launch/local.sh -np 2 -- python train.py --epochs 3
#   launch/local.sh --log-dir logs --max-restarts 3 -- python train.py --resume
#
# For all flags, see: distpad launch --help. Without GPUs, -np N creates N CPU devices, for experiments.
# CUDA_VISIBLE_DEVICES=0,1 before the call restricts the job to these GPUs, CUDA_VISIBLE_DEVICES= to the CPU.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
find_python

# NCCL's log level: WARN prints errors, INFO also the transport between the GPUs (NVLink, PCIe, memory).
# NCCL fails if a container's /dev/shm is small: docker run --shm-size=1g. Training hangs if peer access is broken, as
# in some virtual machines: NCCL_P2P_DISABLE=1 avoids it, but is slower.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# By default, TensorFlow allocates all memory of all visible GPUs. With true, it allocates memory as needed.
export TF_FORCE_GPU_ALLOW_GROWTH=${TF_FORCE_GPU_ALLOW_GROWTH:-false}

# A job on a machine with GPUs does not train on its CPU.
gpus=$(count_gpus)
((gpus == 0)) || set -- --gpus "$gpus" "$@"
exec "$PYTHON" -m distpad launch --backend mirrored "$@"
