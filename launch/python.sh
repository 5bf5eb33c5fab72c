# Sourced by the scripts beside it: find_python sets PYTHON to one that has distpad.
# shellcheck shell=bash disable=SC2034 # PYTHON is for who sources this

find_python() {
  local root candidate
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  # Candidates are run, not believed: a shim may stand on PATH for a version that is not installed.
  for candidate in "${DISTPAD_PYTHON:-}" python3 python "$root/.envs/current/bin/python" "$root/.envs/classic/bin/python"; do
    if [[ -n $candidate ]] && "$candidate" -c 'import distpad.cli.launch' 2>/dev/null; then
      PYTHON=$candidate
      return
    fi
  done
  printf '%s: error: no Python with distpad found. Activate its environment, set DISTPAD_PYTHON, or make one:\n  %s\n' \
    "$(basename "$0")" "$root/launch/environment.sh current" >&2
  exit 10
}
