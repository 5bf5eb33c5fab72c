# Sourced by environment.sh and tests/k8s/tools.sh: creates environments in seconds. uv fills each environment once, in
# a cache that all checkouts share. A checkout's environment consists of hard links. Without uv, pip takes minutes.
# shellcheck shell=bash

CACHE=${DISTPAD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/distpad}
UV=""
REQUIREMENTS=$(cd "$(dirname "${BASH_SOURCE[0]}")/requirements" && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CACHE_DIR=${PIP_CACHE_DIR:-$CACHE/pip}
unset PYTHONDONTWRITEBYTECODE # without bytecode, each process compiles for ten seconds

# Waits until no other process works on FOLDER, and locks it until this shell ends: lock FOLDER
lock() {
  local file
  { mkdir -p "$(dirname "$1")" && exec {file}>"$(dirname "$1")/.$(basename "$1").lock"; } 2>/dev/null || return 1
  flock -n "$file" || { say "another process is working on $1: waiting for it"; flock "$file"; }
}

make_venv() { # make_venv PYTHON FOLDER
  if "$1" -c 'import venv, ensurepip' 2>/dev/null; then
    "$1" -m venv "$2" >&2
  else
    "$1" -m virtualenv --quiet "$2" >&2
  fi
}

# Sets UV, and passes pip's package sources on to it: find_uv PYTHON
find_uv() {
  [[ -z $UV ]] || return 0
  local own=$CACHE/uv-itself line
  (
    lock "$own" || exit 1
    ! cmp -s "$REQUIREMENTS/uv.txt" "$own/made-from" || ! "$own/bin/python" -c '' 2>/dev/null || exit 0
    rm -rf "$own"
    make_venv "$1" "$own" && "$own/bin/python" -m pip install --quiet -r "$REQUIREMENTS/uv.txt" >&2 &&
      cp "$REQUIREMENTS/uv.txt" "$own/made-from"
  ) || return 1
  UV=$own/bin/uv
  export UV_CACHE_DIR=${UV_CACHE_DIR:-$CACHE/uv} UV_PYTHON_DOWNLOADS=never
  export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match} # like pip
  local line
  while read -r line; do export "${line?}"; done < <("$own/bin/python" - <<'PYTHON'
import ast
import os
import subprocess
import sys

NAMES = {  # pip's option: uv's variable, and its separator
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
}
configured = {}
lines = subprocess.run([sys.executable, "-m", "pip", "config", "list"], stdout=subprocess.PIPE, text=True).stdout
for line in lines.splitlines():
    name, _, value = line.partition("=")
    section, _, key = name.rpartition(".")
    configured[section, key] = ast.literal_eval(value)
for key, (variable, separator) in NAMES.items():
    values = [configured[section, key] for section in (":env:", "install", "global") if (section, key) in configured]
    if values and variable not in os.environ:
        print(f"{variable}={separator.join(values[0].split())}")
PYTHON
  )
}

# Installs with uv, first offline from its cache, then with pip if uv fails: install PYTHON ARGUMENTS...
install() {
  local python=$1
  shift
  if [[ -n $UV ]]; then
    "$UV" pip install --quiet --offline --compile-bytecode --python "$python" "$@" 2>/dev/null && return
    "$UV" pip install --quiet --compile-bytecode --python "$python" "$@" >&2 && return
    say "uv could not install $* (see its output above): trying pip"
  fi
  "$python" -m pip install --quiet "$@" >&2
}

# Creates an environment with the requirements of some files: make_environment PYTHON FOLDER FILE...
make_environment() {
  local python=$1 folder=$2 cached
  cached=$CACHE/envs/$(basename "$folder")
  shift 2
  mkdir -p "$folder"
  if find_uv "$python" && (
    lock "$cached" && fill_cache "$python" "$cached" "$@" &&
      # copies if the cache is on another disk
      { cp -a --link "$cached/." "$folder" 2>/dev/null || cp -a --remove-destination "$cached/." "$folder" >&2; }
  ); then return 0; fi
  UV=""
  say "uv or its cache in $CACHE is not available: using pip, which takes minutes"
  make_venv "$python" "$folder" && install "$folder/bin/python" "${@/#/--requirement=}"
}

fill_cache() { # fill_cache PYTHON FOLDER FILE...
  local python=$1 folder=$2 state
  shift 2
  state=$({ "$python" -c 'import sys; print(sys.executable, sys.version)'; uname -m; cat "$@"; } | sha256sum)
  if [[ -f $folder/made-from && $(<"$folder/made-from") == "$state" ]] && "$folder/bin/python" -c '' 2>/dev/null; then
    return 0
  fi
  say "filling the cache $folder: one or two minutes, mostly for downloads"
  rm -rf "$folder"
  "$UV" venv --quiet --no-project --relocatable --python "$python" "$folder" >&2 &&
    install "$folder/bin/python" "${@/#/--requirement=}" && printf '%s\n' "$state" >"$folder/made-from"
}
