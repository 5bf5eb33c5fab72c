# Sourced by the other launch scripts: find_python sets PYTHON to a Python with distpad.
# shellcheck shell=bash disable=SC2034 # the sourcing script uses PYTHON

find_python() {
  local root candidate
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  # Each candidate is run, since PATH may have a shim of a version that is not installed.
  for candidate in "${DISTPAD_PYTHON:-}" python3 python "$root/.envs/current/bin/python" "$root/.envs/classic/bin/python"; do
    if [[ -n $candidate ]] && "$candidate" -c 'import distpad.cli.launch' 2>/dev/null; then
      PYTHON=$candidate
      return
    fi
  done
  printf '%s: error: no Python with distpad found. Activate its environment, set DISTPAD_PYTHON, or create one:\n  %s\n' \
    "$(basename "$0")" "$root/launch/environment.sh current" >&2
  exit 10
}
