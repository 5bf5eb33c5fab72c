# Sourced by environment.sh, tests/k8s/tools.sh and tests/nightly/install.sh: installs packages with uv. Environments
# consist of hard links to uv's cache, so that another checkout's takes seconds.
# shellcheck shell=bash

CACHE=${DISTPAD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/distpad}
REQUIREMENTS=$(cd "$(dirname "${BASH_SOURCE[0]}")/requirements" && pwd)
export UV_CACHE_DIR=${UV_CACHE_DIR:-$CACHE/uv} UV_PYTHON_DOWNLOADS=never
export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match} # all indexes, as pip; hashes tell the right file
unset PYTHONDONTWRITEBYTECODE # without bytecode, each process compiles TensorFlow for ten seconds

# Waits until no other process works on FOLDER, and locks it until this shell ends: lock FOLDER
lock() {
  local file
  { mkdir -p "$(dirname "$1")" && exec {file}>"$(dirname "$1")/.$(basename "$1").lock"; } 2>/dev/null || return 1
  flock -n "$file" || { say "another process is working on $1: waiting for it"; flock "$file"; }
}

# Sets UV to the uv on PATH; without one, to PyPI's, which gets pip's package sources.
find_uv() {
  local own key value python
  UV=$(command -v uv) && return
  own=$CACHE/uv-$(sha256sum <"$REQUIREMENTS/uv.txt" | cut -c 1-8)
  UV=$own/bin/uv
  ( # a subshell, which unlocks at its end
    lock "$own"
    [[ -x $UV ]] || {
      for python in python3.11 python3 python; do # Debian ships a Python without ensurepip
        if "$python" -m venv --clear "$own" || "$python" -m virtualenv --quiet --clear "$own"; then break; fi
      done
      "$own/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r "$REQUIREMENTS/uv.txt"
    } >&2
  ) || return 1
  while IFS='=' read -r key value; do # :env:.find-links='/a b', then the files' settings
    value=${value#\'}
    value=${value%\'}
    value=${value//\\n/ }
    case ${key##*.} in
      index-url) key=UV_DEFAULT_INDEX ;;
      extra-index-url) key=UV_INDEX ;;
      find-links) key=UV_FIND_LINKS value=${value// /,} ;;
      trusted-host) key=UV_INSECURE_HOST ;;
      cert) key=SSL_CERT_FILE ;;
      proxy) key=ALL_PROXY ;;
      *) continue ;;
    esac
    export "$key=${!key:-$value}"
  done < <("$own/bin/python" -m pip config list)
}

# Makes an environment of Python 3.11 hold exactly the requirements of some files: make_environment FOLDER FILE...
make_environment() {
  local folder=$1
  shift
  find_uv || return 17
  "$folder/bin/python" -c '' 2>/dev/null ||
    PATH=$PATH:$(echo ~/.pyenv/versions/3.11*/bin) "$UV" venv --quiet --no-project --clear -p 3.11 "$folder" >&2 || return 10
  # first offline, which takes a second if the cache has all files
  "$UV" pip sync --quiet --offline --python "$folder/bin/python" "$@" 2>/dev/null ||
    "$UV" pip sync --quiet --python "$folder/bin/python" "$@" >&2 || return 17
}
