#!/usr/bin/env bash
# Builds and installs Horovod for the TensorFlow of a Python, and tests it with an all-reduce in two processes.
set -euo pipefail

HOROVOD_VERSION=0.28.1

usage() {
  cat <<'EOF'
Builds Horovod 0.28.1 for the TensorFlow of a Python, installs it there, and tests it with an all-reduce in
two processes (once per wheel and machine). The build has Gloo; MPI if mpicxx and mpirun are found; and NCCL if nvcc and
nccl.h are found and TensorFlow is not the CPU-only package.

Usage: launch/install_horovod.sh [options]
  --python PYTHON     the Python to install into (default: the active environment's, else python3)
  --mpi auto|on|off   build with MPI if found (auto, default), always (on; fails without MPI), or never (off)
  --if-needed         do nothing if the same build is installed and has passed its test
  --force             build again, even if the wheel is in the cache
  --print-key         print the wheel's cache key and exit
  -h, --help          print this text

Examples:
  launch/install_horovod.sh --python "$(launch/environment.sh current)"
  launch/install_horovod.sh --mpi off
  CUDA_HOME=/usr/local/cuda HOROVOD_NCCL_HOME=/usr/local/nccl launch/install_horovod.sh

Wheels and logs are cached in ${DISTPAD_CACHE:-${XDG_CACHE_HOME:-~/.cache}/distpad}/wheels.
Exit codes: 2 usage, 10 Python, 11 TensorFlow, 12 CMake, 13 compiler, 14 MPI, 15 download, 16 build,
17 install, 18 self-test.
EOF
}

say() { printf 'install_horovod: %s\n' "$*" >&2; }
die() { local code=$1; shift; printf 'install_horovod: error: %s\n' "$@" >&2; exit "$code"; }

note() { NOTES+=("$*"); } # printed only if something is built

# Prints the command that installs Debian or Red Hat packages on this system: install_command "DEBIAN NAMES" "RED HAT NAMES"
install_command() {
  local sudo="sudo "
  [[ $(id -u) != 0 ]] || sudo=""
  if command -v dnf >/dev/null && ! command -v apt-get >/dev/null; then
    echo "${sudo}dnf install -y $2"
  else
    echo "${sudo}apt-get install -y $1"
  fi
}

# ---- detection --------------------------------------------------------------------------------------

find_python() {
  if [[ -z $PYTHON ]]; then
    PYTHON=python3
    [[ -z ${VIRTUAL_ENV:-} ]] || PYTHON=$VIRTUAL_ENV/bin/python
  fi
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null ||
    die 10 "$PYTHON does not run, or is older than Python 3.8." \
      "Choose another Python with --python, or create an environment: launch/environment.sh current"
  PYTHON=$("$PYTHON" -c 'import sys; print(sys.executable)')
  "$PYTHON" -m pip --version >/dev/null 2>&1 || die 10 "$PYTHON has no pip. Try: $PYTHON -m ensurepip"
}

# Sets PY_TAG, MACHINE, TF_PACKAGE, TF_VERSION, SCRIPTS and PREFIX from metadata, since importing TensorFlow takes seconds.
probe_python() {
  local answer
  answer=$("$PYTHON" - <<'EOF'
import importlib.metadata as metadata
import platform, sys, sysconfig

names = "tensorflow tensorflow-cpu tensorflow-gpu tensorflow-rocm tensorflow-cpu-aws tf-nightly tf-nightly-cpu"
for name in names.split():
    try:
        found = name, metadata.version(name)
        break
    except metadata.PackageNotFoundError:
        found = "none", "none"
tag = f"{'cp' if sys.implementation.name == 'cpython' else sys.implementation.name}{sys.version_info[0]}{sys.version_info[1]}"
print(tag, platform.machine(), *found, sysconfig.get_path("scripts"), sys.prefix, sep="\n")
EOF
)
  { read -r PY_TAG; read -r MACHINE; read -r TF_PACKAGE; read -r TF_VERSION; read -r SCRIPTS; read -r PREFIX; } <<<"$answer"
  [[ $TF_VERSION != none ]] ||
    die 11 "$PYTHON has no TensorFlow." "Install TensorFlow first, for example: $PYTHON -m pip install tensorflow-cpu==2.15.1"
}

# Sets MPI to e.g. openmpi-4.1.4, or nompi.
probe_mpi() {
  MPI=nompi
  [[ $MPI_WANTED != off ]] || return 0
  local missing=() banner name
  command -v mpicxx >/dev/null || missing+=(mpicxx)
  command -v mpirun >/dev/null || missing+=(mpirun)
  if ((${#missing[@]})); then
    local remedy; remedy="For MPI: $(install_command 'openmpi-bin libopenmpi-dev' 'openmpi-devel')"
    [[ $MPI_WANTED != on ]] || die 14 "--mpi on, but ${missing[*]} not found on PATH." "$remedy"
    note "no MPI: ${missing[*]} not found, building with Gloo only. $remedy"
    return 0
  fi
  banner=$(mpirun --version 2>&1 || true)
  case $banner in
    *"Open MPI"*) name=openmpi ;;
    *Intel*) name=intelmpi ;;
    *HYDRA* | *MPICH*) name=mpich ;;
    *) name=othermpi ;;
  esac
  [[ $banner =~ [0-9]+\.[0-9]+(\.[0-9]+)? ]] && MPI=$name-${BASH_REMATCH[0]} || MPI=$name
}

# Sets NCCL to e.g. nccl-2.19.3, or cpu; and CUDA and NCCL_INCLUDE to their folders.
probe_nccl() {
  NCCL=cpu
  local nvcc="" header="" folder
  for folder in "${HOROVOD_CUDA_HOME:-}" "${CUDA_HOME:-}" /usr/local/cuda; do
    [[ -n $nvcc || -z $folder || ! -x $folder/bin/nvcc ]] || nvcc=$folder/bin/nvcc
  done
  [[ -n $nvcc ]] || nvcc=$(command -v nvcc || true)
  [[ -n $nvcc ]] || return 0
  CUDA=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
  for folder in "${HOROVOD_NCCL_INCLUDE:-}" "${HOROVOD_NCCL_HOME:+$HOROVOD_NCCL_HOME/include}" "$CUDA/include" \
    /usr/include /usr/local/include; do
    [[ -n $header || -z $folder || ! -f $folder/nccl.h ]] || header=$folder/nccl.h
  done
  if [[ $TF_PACKAGE == *-cpu* ]]; then
    note "found CUDA, but $TF_PACKAGE has no CUDA: building for the CPU. For GPUs, install the package tensorflow[and-cuda]."
  elif [[ -z $header ]]; then
    note "found CUDA ($CUDA), but no nccl.h: building for the CPU. Install libnccl-dev, or set HOROVOD_NCCL_HOME."
  else
    NCCL=nccl-$(awk '$2 ~ /^NCCL_(MAJOR|MINOR|PATCH)$/ { v = v s $3; s = "." } END { print v }' "$header")
    NCCL_INCLUDE=$(dirname "$header")
  fi
}

# ---- build configuration: a change in this part changes the cache key -------------------------------

is_at_least() { [[ $(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]; }

# Removes code that does not compile with the installed TensorFlow: prepare_source FOLDER
prepare_source() {
  is_at_least "$TF_VERSION" 2.16 || return 0
  # TensorFlow moved the XLA headers that this file includes. Without this file, only collectives inside
  # XLA-compiled functions are missing; all others are in mpi_ops.cc.
  local list=$1/horovod/tensorflow/CMakeLists.txt operations=$1/horovod/tensorflow/mpi_ops.cc
  grep -q 'xla_mpi_ops\.cc' "$list" || return 1
  sed -i.orig '/xla_mpi_ops\.cc/d' "$list"
  # TensorFlow removed this function, which GPU builds call; the stream itself has its handle.
  local declared='GpuStreamHandle AsGpuStreamValue(Stream\* stream);'
  grep -q "^$declared" "$operations" || return 1
  sed -i.orig "s|^$declared|template <class S> GpuStreamHandle AsGpuStreamValue(S* stream) {\n\
  return static_cast<GpuStreamHandle>(stream->platform_specific_handle().stream);\n}|" "$operations"
}

# Compiles the source and puts one wheel into a folder: build_wheel SOURCE FOLDER
build_wheel() {
  local python=$PYTHON
  if [[ $PREFIX == *[[:space:]]* ]]; then
    # The build splits TensorFlow's compiler flags at spaces: use a path without spaces.
    ln -s "$PREFIX" "$WORK/env"
    python=$WORK/env/bin/$(basename "$PYTHON")
  fi
  export HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1
  # CMake 4 refuses the old minimum versions in Horovod's third-party folders.
  export CMAKE_POLICY_VERSION_MINIMUM=3.5
  export MAKEFLAGS=${MAKEFLAGS:--j$(nproc)}
  unset HOROVOD_WITH_MPI HOROVOD_WITHOUT_MPI HOROVOD_WITHOUT_GLOO HOROVOD_GPU_OPERATIONS
  if [[ $MPI == nompi ]]; then export HOROVOD_WITHOUT_MPI=1; else export HOROVOD_WITH_MPI=1; fi
  if [[ $NCCL != cpu ]]; then
    export HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_CUDA_HOME=$CUDA HOROVOD_NCCL_INCLUDE=$NCCL_INCLUDE
  fi
  # pip's own wheel cache ignores the TensorFlow that a wheel was built for (horovod#4039): never use it.
  "$python" -m pip wheel --verbose --no-cache-dir --no-deps --no-build-isolation --wheel-dir "$2" "$1"
}

# Open MPI 5 has no C++ bindings. Horovod needs only the C bindings, and links the libraries that mpicxx prints.
has_own_mpi() { [[ $MPI != nompi && -x $SCRIPTS/mpicxx ]]; } # from PyPI's openmpi

# Makes the wheel load the MPI of the environment that it is installed in. mpicxx adds the path of the environment that
# it was built in; without this environment, the wheel would load the system's libmpi.so.40, perhaps of Open MPI 4.
link_own_mpi() {
  # From lib/python3.11/site-packages/horovod/tensorflow/ to lib/
  export LDFLAGS="-Wl,-rpath,\$ORIGIN/../../../.. ${LDFLAGS:-}"
}

cache_key() {
  local config functions=(prepare_source build_wheel)
  if has_own_mpi; then functions+=(link_own_mpi); fi
  config=$(declare -f "${functions[@]}" | sha256sum | cut -c 1-8)
  echo "horovod-$HOROVOD_VERSION-tf-$TF_VERSION-$PY_TAG-$MACHINE-$MPI-$NCCL-$config"
}

# ---- building ---------------------------------------------------------------------------------------

check_tools() {
  local error version
  error=$("$PYTHON" -c 'import tensorflow' 2>&1) ||
    die 11 "$TF_PACKAGE $TF_VERSION is installed in $PYTHON, but cannot be imported: ${error##*$'\n'}"
  command -v cmake >/dev/null || die 12 "CMake is missing. Install CMake: $(install_command 'cmake g++ make' 'cmake gcc-c++ make')" \
    "or, without root: $PYTHON -m pip install cmake"
  version=$(cmake --version | grep -oE '[0-9]+\.[0-9.]+' | head -n 1 || true)
  is_at_least "${version:-0}" 3.13 ||
    die 12 "$(command -v cmake) is version ${version:-unknown}, expected 3.13 or newer." \
      "Install a newer CMake: $PYTHON -m pip install cmake"
  command -v "${CXX:-c++}" >/dev/null ||
    die 13 "no C++ compiler (${CXX:-c++}). Install a compiler: $(install_command 'g++ make' 'gcc-c++ make')"
  command -v make >/dev/null || die 13 "make is missing. Install make: $(install_command make make)"
}

# Downloads and unpacks the released source to $WORK/source
fetch_source() {
  say "downloading the source of Horovod $HOROVOD_VERSION"
  "$PYTHON" -m pip download --no-cache-dir --no-deps --no-binary :all: --no-build-isolation \
    --dest "$WORK" "horovod==$HOROVOD_VERSION" >"$WORK/download.log" 2>&1 || {
    tail -n 15 "$WORK/download.log" >&2
    die 15 "could not download Horovod $HOROVOD_VERSION. Check the network, and try:" \
      "$PYTHON -m pip download --no-deps --no-binary :all: horovod==$HOROVOD_VERSION"
  }
  mkdir "$WORK/source"
  tar -xzf "$WORK/horovod-$HOROVOD_VERSION.tar.gz" -C "$WORK/source" --strip-components=1
}

# Prints a line every 20 seconds while a process lives: report_progress PID LOG
report_progress() {
  local start=$SECONDS next=20 elapsed line
  while kill -0 "$1" 2>/dev/null; do
    sleep 1
    elapsed=$((SECONDS - start))
    ((elapsed >= next)) || continue
    next=$((next + 20))
    line=$(grep -aoE '\[ *[0-9]+%\] (Building|Linking) .*' "$2" | tail -n 1 || true)
    line=${line:-configuring}
    # "[ 42%] Building CXX object a/b/broadcast.cc.o" becomes "[ 42%] broadcast.cc"
    [[ $line != \[* ]] || line="${line%%]*}] $(basename "${line##* }" .o)"
    printf 'install_horovod:   %d:%02d  %s\n' $((elapsed / 60)) $((elapsed % 60)) "$line" >&2
  done
}

build() {
  local each
  for each in "${NOTES[@]}"; do say "$each"; done
  check_tools
  fetch_source
  prepare_source "$WORK/source" || die 16 "the source of Horovod $HOROVOD_VERSION has no xla_mpi_ops.cc or no AsGpuStreamValue, expected both."
  local log=$STORE/build.log builder status=0
  say "building for $TF_PACKAGE $TF_VERSION, $MPI, $NCCL: 3 to 10 minutes. Log: $log"
  if has_own_mpi; then link_own_mpi; fi
  set -m # gives the build a process group of its own, which cleanup can end as a whole
  build_wheel "$WORK/source" "$WORK/wheel" >"$log" 2>&1 &
  builder=$!
  BUILDER=$builder
  set +m
  report_progress "$builder" "$log"
  wait "$builder" || status=$?
  BUILDER=""
  if ((status)); then
    { grep -aE -m 10 '( error: |CMake Error|No space left|Killed)' "$log" || true; echo ...; tail -n 25 "$log"; } |
      cut -c 1-300 >&2
    die 16 "the build failed (see the first errors and the last lines above). Full log: $log"
  fi
  # The move is the last step, so that a wheel in the cache is always complete.
  cp "$WORK"/wheel/horovod-*.whl "$STORE/.partial"
  mv "$STORE/.partial" "$STORE/$(basename "$WORK"/wheel/horovod-*.whl)"
}

cached_wheel() {
  local wheel
  for wheel in "$STORE"/horovod-*.whl; do [[ ! -f $wheel ]] || echo "$wheel"; done
}

install_wheel() {
  say "installing $(basename "$1") into $PYTHON"
  "$PYTHON" -m pip install --quiet --no-cache-dir --no-deps --force-reinstall "$1" >&2 ||
    die 17 "pip could not install the wheel $1 (see its output above). If this Python belongs to the system, create" \
      "an environment first: launch/environment.sh current"
}

# ---- self-test --------------------------------------------------------------------------------------

# Runs the all-reduce below in two processes: self_test CONTROLLER COMMAND...
self_test() {
  local controller=$1 answer status=0
  shift
  cat >"$WORK/self_test.py" <<'EOF'
import sys
import tensorflow as tf
import horovod.tensorflow as hvd

hvd.init()
rank = hvd.rank()
assert hvd.size() == 2, f"the world has {hvd.size()} processes, expected 2"
assert {"gloo": hvd.gloo_enabled, "mpi": hvd.mpi_enabled}[sys.argv[1]](), f"{sys.argv[1]} is not the controller"
total = hvd.allreduce(tf.constant([rank + 1.0, 10.0 * (rank + 1)]), op=hvd.Sum, name="self_test").numpy().tolist()
assert total == [3.0, 30.0], f"rank {rank} got {total}, expected [3, 30]"
sys.stdout.write(f"rank {rank} of {hvd.size()} is right\n")
EOF
  # Containers often forbid Open MPI's single-copy mechanism for shared memory.
  answer=$(TF_CPP_MIN_LOG_LEVEL=2 CUDA_VISIBLE_DEVICES="" OMPI_MCA_btl_vader_single_copy_mechanism=none PATH=$SCRIPTS:$PATH \
    timeout --kill-after=10 120 "$@" -np 2 "$PYTHON" "$WORK/self_test.py" "$controller" 2>&1 </dev/null) || status=$?
  if ((status)) || [[ $answer != *"rank 0 of 2 is right"* || $answer != *"rank 1 of 2 is right"* ]]; then
    tail -n 25 <<<"$answer" >&2
    ((status != 124)) || say "the self-test did not end within 120 s."
    [[ $controller != gloo ]] || say "Gloo resolves this host's name. Check the name with: getent hosts \$(hostname)"
    [[ $controller != mpi ]] || say "mpirun must belong to the MPI of the build ($MPI). Check this with: mpirun --version"
    die 18 "the self-test failed (exit $status): an all-reduce in two processes over $controller."
  fi
  say "self-test passed: an all-reduce in two processes over $controller"
}

self_tests() {
  self_test gloo "$SCRIPTS/horovodrun" --gloo
  [[ $MPI != nompi ]] || return 0
  local mpirun=(mpirun)
  if [[ $MPI == openmpi* ]]; then
    mpirun+=(--oversubscribe)
    [[ $(id -u) != 0 ]] || mpirun+=(--allow-run-as-root)
  fi
  self_test mpi "${mpirun[@]}"
}

# Prints a line that identifies the installed build.
installed() {
  "$PYTHON" - "$KEY" <<'EOF'
import hashlib, importlib.metadata as metadata, sys

try:
    record = metadata.distribution("horovod").read_text("RECORD") or ""
    print(sys.argv[1], hashlib.sha256(record.encode()).hexdigest())
except metadata.PackageNotFoundError:
    print("none")
EOF
}

summary() {
  local controllers=Gloo operations=Gloo
  [[ $MPI == nompi ]] || { controllers+=", MPI ($MPI)"; operations+=", MPI"; }
  [[ $NCCL == cpu ]] || operations+=", NCCL ($NCCL)"
  cat <<EOF
Horovod $HOROVOD_VERSION for $TF_PACKAGE $TF_VERSION in $PYTHON
  controllers: $controllers
  operations:  $operations
  wheel:       $(cached_wheel)
EOF
}

cleanup() {
  [[ -z $BUILDER ]] || kill -- "-$BUILDER" 2>/dev/null || true
  [[ -z $WORK ]] || rm -rf "$WORK"
}

main() {
  PYTHON="" MPI_WANTED=auto WORK="" BUILDER="" NOTES=()
  local force="" if_needed="" print_key=""
  while (($#)); do
    case $1 in
      --python) PYTHON=${2:-}; shift ;;
      --mpi) MPI_WANTED=${2:-}; shift ;;
      --force) force=1 ;;
      --if-needed) if_needed=1 ;;
      --print-key) print_key=1 ;;
      -h | --help) usage; exit 0 ;;
      *) die 2 "unknown argument $1. See launch/install_horovod.sh --help" ;;
    esac
    shift || die 2 "the last option needs a value. See launch/install_horovod.sh --help"
  done
  [[ $MPI_WANTED =~ ^(auto|on|off)$ ]] || die 2 "--mpi is $MPI_WANTED, expected auto, on or off"

  export PIP_DISABLE_PIP_VERSION_CHECK=1
  find_python
  probe_python
  PATH=$SCRIPTS:$PATH # finds a cmake that pip installed
  probe_mpi
  probe_nccl
  KEY=$(cache_key)
  [[ -z $print_key ]] || { echo "$KEY"; exit 0; }
  STORE=${DISTPAD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/distpad}/wheels/$KEY
  local stamp=$PREFIX/.horovod-passed
  if [[ -n $if_needed && -z $force && -f $stamp && $(<"$stamp") == "$(installed)" ]]; then
    say "already installed: $KEY"
    exit 0
  fi

  trap cleanup EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  local temp=${TMPDIR:-/tmp}
  [[ $temp != *[[:space:]]* ]] || temp=/tmp # see build_wheel
  WORK=$(mktemp -d "$temp/horovod.XXXXXX")
  mkdir -p "$STORE"
  # pip skips installed packages, and then needs no network.
  "$PYTHON" -m pip install --quiet 'setuptools<81' wheel cloudpickle psutil packaging pyyaml >&2 ||
    die 17 "pip could not install Horovod's requirements into $PYTHON." \
      "If this Python belongs to the system, create an environment first: launch/environment.sh current"
  exec 8>"$STORE/.lock"
  flock -n 8 || { say "another process is building this wheel: waiting for it"; flock 8; }
  if [[ -z $force && -n $(cached_wheel) ]]; then say "the wheel is in the cache: $KEY"; else build; fi
  exec 8>&-
  install_wheel "$(cached_wheel)"
  local tested; tested="$(sha256sum <"$(cached_wheel)") $(uname -n)"
  if [[ -z $force && -f $STORE/.passed && $(<"$STORE/.passed") == "$tested" ]]; then
    say "this wheel has passed its self-test on this machine: --force repeats it"
  else
    self_tests
    printf '%s\n' "$tested" >"$STORE/.passed"
  fi
  installed >"$stamp"
  summary
}

main "$@"
