#!/usr/bin/env bash
# Starts N local worker processes of one command. The work is done in multiworker.py beside this file.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for python in "${PYTHON:-}" python3 python; do
  # Candidates are run, not believed: a shim may stand on PATH for a version that is not installed.
  if [[ -n $python ]] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
    exec "$python" "$here/multiworker.py" "$@"
  fi
done
echo "multiworker: error: no Python 3.8 or newer found. Put one on PATH, or set PYTHON." >&2
exit 10
