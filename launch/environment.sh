#!/usr/bin/env bash
# Creates or reuses a virtual environment with one of the stacks that distpad supports.
set -euo pipefail

usage() {
  cat <<'TEXT'
Creates a virtual environment with one of the supported stacks and distpad, or updates an existing one. Prints the path
of its Python on stdout, and everything else on stderr.

Usage: launch/environment.sh STACK [--openmpi5] [--horovod] [--tests]
  STACK       current (TensorFlow 2.21, Keras 3) or classic (TensorFlow 2.15, Keras 2, Addons), for CPUs;
              current-gpu or classic-gpu, with NVIDIA's wheels of CUDA 12, cuDNN and NCCL
  --openmpi5  add Open MPI 5 from PyPI, in a separate environment STACK-openmpi5
  --horovod   add Horovod, built for this TensorFlow, MPI and NCCL (3 to 10 minutes the first time)
  --tests     add pytest, hypothesis, ruff, mypy and mkdocs
  -h, --help  print this text

Examples:
  PYTHON=$(launch/environment.sh current)
  PYTHON=$(launch/environment.sh classic --horovod --tests)
  PYTHON=$(launch/environment.sh current-gpu --horovod)
  DISTPAD_ENVS=/scratch/envs launch/environment.sh current

The environment is .envs/STACK, or $DISTPAD_ENVS/STACK. To create it again, remove this folder.
${DISTPAD_CACHE:-${XDG_CACHE_HOME:-~/.cache}/distpad} caches the packages, so that another checkout takes seconds.
Without --openmpi5, Horovod is built with the MPI on PATH, if any. A Horovod built with Open MPI 4 does
not load with Open MPI 5, which therefore has a separate environment.
Needs Python 3.11. Exit codes: 2 usage, 10 Python, 17 installation, and those of install_horovod.sh.
TEXT
}

say() { printf 'environment: %s\n' "$*" >&2; }
die() { local code=$1; shift; printf 'environment: error: %s\n' "$@" >&2; exit "$code"; }

# Whether the environment was made from this: is_of NAME DIGEST
is_of() { [[ -f $env/.$1 && $(<"$env/.$1") == "$2" ]]; }

main() {
  local stack="" openmpi="" horovod="" tests="" here root env arg packages project files device=cpu
  for arg; do
    case $arg in
      --openmpi5) openmpi=-openmpi5 ;;
      --horovod) horovod=1 ;;
      --tests) tests=1 ;;
      -h | --help) usage; exit 0 ;;
      current | classic | current-gpu | classic-gpu) stack=$arg ;;
      *) die 2 "unknown argument $arg, expected current, classic, current-gpu or classic-gpu, --openmpi5, --horovod, --tests." ;;
    esac
  done
  [[ -n $stack ]] || die 2 "no stack, expected current, classic, current-gpu or classic-gpu. See launch/environment.sh --help"

  here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  root=$(dirname "$here")
  mkdir -p "${DISTPAD_ENVS:-$root/.envs}"
  env=$(cd "${DISTPAD_ENVS:-$root/.envs}" && pwd)/$stack$openmpi
  # shellcheck source=launch/packages.sh
  source "$here/packages.sh"
  lock "$env" || die 17 "cannot write to $(dirname "$env")"

  [[ $stack != *-gpu ]] || device=gpu
  files=("${stack%-gpu}.txt" "${stack%-gpu}-$device.txt")
  [[ -z $openmpi ]] || files+=(openmpi5.txt)
  [[ -z $tests && ! -f $env/.tests ]] || files+=(tests.txt) # what was added once stays
  [[ ${files[*]} != "current.txt"*tests* ]] || files+=(tests-current.txt)
  files=("${files[@]/#/$REQUIREMENTS/}")
  # An environment breaks when it is moved. An image has the files of the project only at the end.
  packages=$({ echo "$env"; cat "${files[@]}"; } | sha256sum)
  project=$({ echo "$packages $root"; cat "$root"/{setup.py,pyproject.toml} 2>/dev/null || true; } | sha256sum)
  if ! is_of packages "$packages" || ! "$env/bin/python" -c '' 2>/dev/null; then
    [[ ! -d $env || -f $env/pyvenv.cfg || -z $(ls -A "$env") ]] ||
      die 17 "$env exists and was not made by this script. Remove it, or set DISTPAD_ENVS."
    say "creating or updating $env"
    make_environment "$env" "${files[@]}" ||
      die $? "could not install $stack (see the output of uv and pip above). It needs Python 3.11 and PyPI. On Debian 12:" \
        "apt-get install -y python3.11 python3.11-venv; elsewhere, for example: conda create -n py311 python=3.11"
    # also compiles the bytecode, which processes that start together would each do
    "$env/bin/python" -c 'import tensorflow' 2>/dev/null || die 17 "TensorFlow does not load: $env/bin/python -c 'import tensorflow'"
    [[ -z $tests ]] || touch "$env/.tests"
    rm -f "$env/.project" # which pip sync has removed
    echo "$packages" >"$env/.packages"
  fi
  if [[ -f $root/setup.py ]] && ! is_of project "$project"; then
    find_uv
    "$UV" pip install --quiet --python "$env/bin/python" --no-deps --no-build-isolation -e "$root" >&2 ||
      die 17 "the environment is complete, but distpad's own setup.py failed in it (see above)."
    echo "$project" >"$env/.project"
  fi
  if [[ -n $horovod ]]; then "$here/install_horovod.sh" --python "$env/bin/python" >&2; fi
  say "ready: $env"
  echo "$env/bin/python"
}

main "$@"
