#!/usr/bin/env bash
# Resolves the groups of pyproject.toml together, and writes them as .txt files: all packages, with the hashes of their
# files. A file does not repeat the packages of the files that it is used with. Needs uv. Usage: launch/requirements/lock.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

ALL="\(platform_machine == 'aarch64' or platform_machine == 'x86_64'\) and sys_platform == 'linux'" # says nothing

names() { sed -n 's/==.*//p' "$@"; } # of the packages in files

write() { # write FILE GROUP PACKAGE...: the packages of a group without some
  local file=$1 group=$2
  shift 2
  { echo "# Written by lock.sh" && uv export --quiet --frozen --no-header --no-annotate --only-group "$group" "${@/#/--no-emit-package=}" |
    sed -E "s/ ; $ALL//"; } >"$file"
}

trap 'rm -rf uv.lock .venv' EXIT
uv lock
for stack in current classic; do
  write $stack.txt $stack-cpu tensorflow tensorflow-cpu
  mapfile -t known < <(names $stack.txt)
  for device in cpu gpu; do write $stack-$device.txt $stack-$device "${known[@]}"; done
done
mapfile -t known < <(names current.txt classic.txt)
write tests.txt tests "${known[@]}"
mapfile -t known < <(names current.txt tests.txt)
write tests-current.txt tests-current "${known[@]}"
write keras-nightly.txt keras-nightly "${known[@]}"
for group in openmpi5 uv fuzz; do write $group.txt $group; done
