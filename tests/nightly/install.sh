#!/usr/bin/env bash
# Installs or reuses the next Keras, for tests/nightly, and prints its folder. The wheel holds a package named keras: first
# on PYTHONPATH, it takes the place of the environment's. Usage: tests/nightly/install.sh
set -euo pipefail

say() { printf 'nightly: %s\n' "$*" >&2; }

# shellcheck source=launch/packages.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../launch/packages.sh"
file=$REQUIREMENTS/keras-nightly.txt
folder=$CACHE/keras-nightly-$(sha256sum <"$file" | cut -c 1-16)
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
