# Sourced by the other launch scripts: find_python sets PYTHON to a Python with distpad.
# shellcheck shell=bash disable=SC2034 # the sourcing script uses PYTHON

# Prints the number of GPUs that nvidia-smi lists, or of those in CUDA_VISIBLE_DEVICES.
count_gpus() {
  local listed visible=()
  listed=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || listed=0
  IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES-}"
  if ((listed)) && [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then listed=${#visible[@]}; fi
  echo "$listed"
}

find_python() {
  local root candidate stacks=(current classic)
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  if (($(count_gpus))); then stacks=(current-gpu classic-gpu "${stacks[@]}"); fi
  # Each candidate is run, since PATH may have a shim of a version that is not installed.
  stacks=("${stacks[@]/#/$root/.envs/}")
  for candidate in "${DISTPAD_PYTHON:-}" python3 python "${stacks[@]/%//bin/python}"; do
    if [[ -n $candidate ]] && "$candidate" -c 'import distpad.cli.launch' 2>/dev/null; then
      PYTHON=$candidate
      return
    fi
  done
  printf '%s: error: no Python with distpad found. Activate its environment, set DISTPAD_PYTHON, or create one:\n  %s\n' \
    "$(basename "$0")" "$root/launch/environment.sh ${stacks[0]##*/}" >&2
  exit 10
}
