#!/usr/bin/env bash
# Runs all test suites on both stacks, what is slow or wide aside; with --all, that too. See tests/run.sh --help.
set -euo pipefail

# Any Python can run the queue: those of the suites are made by launch/environment.sh, which wants 3.11.
for python in python3.11 python3 python; do
  if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then
    exec "$python" "$(dirname "${BASH_SOURCE[0]}")/run.py" "$@"
  fi
done
echo "tests/run.sh: error: no Python on PATH. On Debian 12: sudo apt-get install -y python3.11 python3.11-venv" >&2
exit 2
