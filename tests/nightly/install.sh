#!/usr/bin/env bash
# Installs or reuses packages that no environment holds, and prints their folder, which goes first on PYTHONPATH: the next
# Keras, for tests/nightly, in the place of the environment's; or fuzz, for tests/faults/fuzz.py.
# Usage: tests/nightly/install.sh [keras-nightly|fuzz]
set -euo pipefail

say() { printf 'nightly: %s\n' "$*" >&2; }

# shellcheck source=launch/packages.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../launch/packages.sh"
name=${1:-keras-nightly}
file=$REQUIREMENTS/$name.txt
folder=$CACHE/$name-$(sha256sum <"$file" | cut -c 1-16)
lock "$folder"
if [[ ! -d $folder ]]; then
  say "making $folder"
  rm -rf "$folder.new"
  find_uv
  "$UV" pip install --quiet --python python --no-deps --require-hashes --target "$folder.new" -r "$file" >&2 || {
    say "error: could not install $file (see above). If PyPI no longer has this version, write the newest one into" \
      "launch/requirements/pyproject.toml, and run launch/requirements/lock.sh."
    exit 17
  }
  mv "$folder.new" "$folder" # the rename is atomic: no partial folder has this name
fi
echo "$folder"
