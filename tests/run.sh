#!/usr/bin/env bash
# Runs the test suites on both stacks; with --all, also the slow suites. See tests/run.sh --help.
set -euo pipefail

# Python 3.9 or newer runs the queue. launch/environment.sh creates the environments of the suites with Python 3.11.
for python in python3.11 python3 python; do
  if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then
    exec "$python" "$(dirname "${BASH_SOURCE[0]}")/run.py" "$@"
  fi
done
echo "tests/run.sh: error: no Python 3.9 or newer on PATH. On Debian 12: sudo apt-get install -y python3.11 python3.11-venv" >&2
exit 2
