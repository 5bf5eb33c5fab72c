#!/usr/bin/env bash
# Builds and installs Horovod for the TensorFlow of a Python, and tests it with an all-reduce in two processes.
set -euo pipefail

VERSION=0.28.1

usage() {
  cat <<'EOF'
Builds Horovod 0.28.1 for the TensorFlow of a Python, installs it there, and tests it with an all-reduce in two
processes (once per wheel and machine). The build has Gloo; MPI if mpicxx and mpirun are found; and NCCL if the Python
has NVIDIA's wheel of NCCL, as with tensorflow[and-cuda]. The latter needs CUDA's compiler, which is not on PyPI for
CUDA 12: nvcc in ${CUDA_HOME:-/usr/local/cuda}, or on PATH.

Usage: launch/install_horovod.sh [options]
  --python PYTHON     the Python to install into (default: python3)
  --mpi auto|on|off   build with MPI if found (auto, default), always (on; fails without MPI), or never (off)
  --force             build again, even if the wheel is installed or in the cache
  --print-key         print the wheel's cache key and exit
  -h, --help          print this text

Examples:
  launch/install_horovod.sh --python "$(launch/environment.sh current)"
  launch/install_horovod.sh --mpi off
  CUDA_HOME=/usr/local/cuda-12.9 launch/install_horovod.sh --python "$(launch/environment.sh current-gpu)"

Wheels and logs are cached in ${DISTPAD_CACHE:-${XDG_CACHE_HOME:-~/.cache}/distpad}/wheels, by the versions of Horovod,
TensorFlow, Python, glibc, the compiler, MPI, NCCL and CUDA.
Exit codes: 2 usage, 10 Python, 11 TensorFlow, 12 CMake, 13 compiler, 14 MPI, 15 download, 16 build, 17 install,
18 self-test.
EOF
}

say() { printf 'install_horovod: %s\n' "$*" >&2; }
die() { local code=$1; shift; printf 'install_horovod: error: %s\n' "$@" >&2; exit "$code"; }

# Ends without a program: need CODE PROGRAM DEBIAN_PACKAGES
need() { command -v "$2" >/dev/null || die "$1" "$2 is missing. On Debian: apt-get install -y $3"; }

# Sets TAG, LIBC, TF_PACKAGE, TF, NCCL, SCRIPTS, SITE and PREFIX from metadata, since importing TensorFlow takes seconds.
probe_python() {
  local found
  "$PYTHON" -m pip --version >/dev/null 2>&1 ||
    die 10 "--python $PYTHON does not run or has no pip. Create an environment: launch/environment.sh current"
  PYTHON=$(type -P "$PYTHON")
  found=$("$PYTHON" - <<'EOF'
import importlib.metadata as metadata, platform, sys, sysconfig

def first(names):
    for name in names.split():
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return "none", "none"

print(f"cp{sys.version_info.major}{sys.version_info.minor}-{platform.machine()}", "".join(platform.libc_ver()))
print(*first("tensorflow tensorflow-cpu tensorflow-rocm tensorflow-cpu-aws tf-nightly tf-nightly-cpu"))
print(first("nvidia-nccl-cu12 nvidia-nccl-cu13")[1])
print(sysconfig.get_path("scripts"), sysconfig.get_path("purelib"), sys.prefix, sep="\n")
EOF
)
  { read -r TAG LIBC; read -r TF_PACKAGE TF; read -r NCCL; read -r SCRIPTS; read -r SITE; read -r PREFIX; } <<<"$found"
  [[ $TF != none ]] || die 11 "$PYTHON has no TensorFlow. Install it first, or create an environment: launch/environment.sh current"
}

# Sets MPI to e.g. openmpi4.1.4, or nompi; and CXX and COMPILER, to e.g. g++12.2.0.
probe_tools() {
  MPI=nompi
  if [[ $MPI_WANTED != off ]] && command -v mpicxx >/dev/null && command -v mpirun >/dev/null; then
    MPI=othermpi
    [[ ! $(mpirun --version 2>&1) =~ (Open MPI|Intel|HYDRA)[^0-9]*([0-9.]+) ]] || MPI=${BASH_REMATCH[1]}${BASH_REMATCH[2]}
    MPI=$(tr -d ' ' <<<"${MPI,,}")
  elif [[ $MPI_WANTED == on ]]; then
    need 14 mpicxx libopenmpi-dev
    need 14 mpirun openmpi-bin
  fi
  CXX=${CXX:-c++}
  need 13 "$CXX" 'g++ make'
  COMPILER=$(basename "$(readlink -f "$(command -v "$CXX")")" | sed 's/.*\(clang++\|g++\).*/\1/')
  COMPILER+=$("$CXX" -dumpfullversion 2>/dev/null || "$CXX" -dumpversion)
}

# Sets CUDA to nvcc's folder and version, if the Python has NCCL.
probe_cuda() {
  CUDA="" CUDA_VERSION=""
  [[ $NCCL != none ]] || return 0
  local nvcc driver
  nvcc=$(PATH=${CUDA_HOME:-/usr/local/cuda}/bin:$PATH type -P nvcc) ||
    die 13 "$TF_PACKAGE $TF is for GPUs, but there is no nvcc, CUDA's compiler. Set CUDA_HOME to a CUDA toolkit (on many clusters: module load cuda/12)"
  CUDA_VERSION=$("$nvcc" --version | sed -nE 's/.*release ([0-9.]+).*/\1/p')
  CUDA=$(readlink -f "$("$nvcc" --dryrun x.cu 2>&1 | sed -n 's/^#\$ TOP=//p')") # nvcc itself may be a wrapper
  driver=$(nvidia-smi 2>/dev/null | sed -nE 's/.*CUDA Version: ([0-9.]+).*/\1/p') || true
  [[ -z $driver || ${CUDA_VERSION%%.*} -le ${driver%%.*} ]] ||
    die 13 "$nvcc is of CUDA $CUDA_VERSION, but this driver runs programs of up to CUDA $driver. Set CUDA_HOME to a CUDA $driver toolkit"
}

# Compiles Horovod's source and puts a wheel into a folder: build_wheel SOURCE FOLDER. A change here changes the key.
build_wheel() {
  local python=$PYTHON
  if [[ $PREFIX == *[[:space:]]* ]]; then # the build splits TensorFlow's compiler flags at spaces
    ln -s "$PREFIX" "$WORK/env"
    python=$WORK/env/bin/$(basename "$PYTHON")
  fi
  export HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1
  export CMAKE_POLICY_VERSION_MINIMUM=3.5 # CMake 4 refuses the minimum versions in Horovod's third-party folders
  export CXX MAKEFLAGS=${MAKEFLAGS:--j$(nproc)}
  unset HOROVOD_WITH_MPI HOROVOD_WITHOUT_MPI HOROVOD_WITHOUT_GLOO HOROVOD_GPU_OPERATIONS
  if [[ $MPI == nompi ]]; then export HOROVOD_WITHOUT_MPI=1; else export HOROVOD_WITH_MPI=1; fi
  # Libraries of the environment that the wheel is installed in, not of the one that it was built in. PyPI's Open MPI has
  # the soname of the system's, which is perhaps of version 4. $ORIGIN is lib/python3.11/site-packages/horovod/tensorflow.
  if [[ -x $SCRIPTS/mpicxx ]]; then LDFLAGS="-Wl,-rpath,\$ORIGIN/../../../.. ${LDFLAGS:-}"; fi
  if [[ -n $CUDA ]]; then
    mkdir "$WORK/nccl"
    ln -s "$SITE/nvidia/nccl/lib/libnccl.so.2" "$WORK/nccl/libnccl.so"
    export HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_CUDA_HOME=$CUDA PATH=$CUDA/bin:$PATH
    export HOROVOD_NCCL_LINK=SHARED HOROVOD_NCCL_INCLUDE=$SITE/nvidia/nccl/include HOROVOD_NCCL_LIB=$WORK/nccl
    LDFLAGS="-Wl,-rpath,\$ORIGIN/../../nvidia/nccl/lib ${LDFLAGS:-}"
  fi
  export LDFLAGS=${LDFLAGS:-}
  # pip's own cache of wheels ignores the TensorFlow that a wheel was built for (horovod#4039).
  "$python" -m pip wheel --verbose --no-cache-dir --no-deps --no-build-isolation --wheel-dir "$2" "$1"
}

build() {
  local log=$STORE/build.log error
  error=$("$PYTHON" -c 'import tensorflow' 2>&1) || die 11 "$TF_PACKAGE $TF in $PYTHON cannot be imported: ${error##*$'\n'}"
  need 12 cmake cmake # or: pip install cmake
  need 13 make make
  need 13 patch patch
  say "building for $TF_PACKAGE $TF, $MPI, NCCL $NCCL${CUDA_VERSION:+, CUDA $CUDA_VERSION}: 3 to 10 minutes. Log: $log"
  "$PYTHON" -m pip download --no-cache-dir --no-deps --no-binary :all: --no-build-isolation --dest "$WORK" \
    "horovod==$VERSION" >"$log" 2>&1 || { tail -n 15 "$log" >&2; die 15 "could not download Horovod $VERSION (see above)"; }
  tar -xzf "$WORK/horovod-$VERSION.tar.gz" -C "$WORK"
  patch -d "$WORK/horovod-$VERSION" -p1 <"$PATCH" >>"$log" || die 16 "$PATCH does not apply. Log: $log"
  build_wheel "$WORK/horovod-$VERSION" "$WORK/wheel" >>"$log" 2>&1 || {
    { grep -aE -m 10 '( error: |CMake Error|No space left|Killed)' "$log" || true; tail -n 25 "$log"; } | cut -c 1-300 >&2
    die 16 "the build failed (see the first errors and the last lines above). Log: $log"
  }
  cp "$WORK"/wheel/horovod-*.whl "$STORE/.partial" # perhaps to another disk: a wheel in the cache is always complete
  mv "$STORE/.partial" "$STORE/$(basename "$WORK"/wheel/horovod-*.whl)"
}

# Runs an all-reduce in two processes: self_test CONTROLLER COMMAND...
self_test() {
  local controller=$1 answer status=0
  shift
  cat >"$WORK/self_test.py" <<'EOF'
import sys
import tensorflow as tf
import horovod.tensorflow as hvd

hvd.init()
assert hvd.size() == 2, f"the world has {hvd.size()} processes, expected 2"
assert {"gloo": hvd.gloo_enabled, "mpi": hvd.mpi_enabled}[sys.argv[1]](), f"{sys.argv[1]} is not the controller"
total = hvd.allreduce(tf.constant([hvd.rank() + 1.0, 10.0]), op=hvd.Sum, name="self_test").numpy().tolist()
assert total == [3.0, 20.0], f"rank {hvd.rank()} got {total}, expected [3, 20]"
print(f"rank {hvd.rank()} of {hvd.size()} is right")
EOF
  # Containers often forbid Open MPI's single-copy mechanism for shared memory.
  answer=$(TF_CPP_MIN_LOG_LEVEL=2 CUDA_VISIBLE_DEVICES="" OMPI_MCA_btl_vader_single_copy_mechanism=none \
    timeout --kill-after=10 120 "$@" -np 2 "$PYTHON" "$WORK/self_test.py" "$controller" 2>&1 </dev/null) || status=$?
  [[ $status == 0 && $answer == *"rank 0 of 2 is right"* && $answer == *"rank 1 of 2 is right"* ]] || {
    tail -n 25 <<<"$answer" >&2
    die 18 "an all-reduce in two processes over $controller failed (exit code $status, see above)." \
      "Gloo resolves this host's name (getent hosts \$(hostname)); mpirun must be that of the build ($MPI)"
  }
  say "an all-reduce in two processes over $controller is right"
}

# Identifies the installed build, if there is one.
installed() { echo "$KEY $(sha256sum 2>/dev/null <"$SITE/horovod-$VERSION.dist-info/RECORD")"; }

main() {
  PYTHON=python3 MPI_WANTED=auto
  local force="" print_key="" wheel tested mpirun=(mpirun)
  while (($#)); do
    case $1 in
      --python) PYTHON=${2:-}; shift ;;
      --mpi) MPI_WANTED=${2:-}; shift ;;
      --force) force=1 ;;
      --print-key) print_key=1 ;;
      -h | --help) usage; exit 0 ;;
      *) die 2 "unknown argument $1. See launch/install_horovod.sh --help" ;;
    esac
    shift || die 2 "the last option needs a value. See launch/install_horovod.sh --help"
  done
  [[ $MPI_WANTED =~ ^(auto|on|off)$ ]] || die 2 "--mpi is $MPI_WANTED, expected auto, on or off"

  export PIP_DISABLE_PIP_VERSION_CHECK=1
  probe_python
  PATH=$SCRIPTS:$PATH # of this Python: horovodrun, and perhaps an MPI and a CMake
  probe_tools
  probe_cuda
  PATCH=/dev/null
  [[ $(printf '2.16\n%s\n' "$TF" | sort -V | head -n 1) != 2.16 ]] ||
    PATCH=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/horovod-$VERSION-tensorflow-2.16.patch
  KEY=horovod-$VERSION-tf-$TF-$TAG-$LIBC-$COMPILER-$MPI
  [[ ! -x $SCRIPTS/mpicxx ]] || KEY+=-own # from PyPI, in this environment: see build_wheel
  [[ -z $CUDA ]] || KEY+=-nccl$NCCL-cuda$CUDA_VERSION
  KEY+=-$({ declare -f build_wheel; cat "$PATCH"; } | sha256sum | cut -c 1-8)
  [[ -z $print_key ]] || { echo "$KEY"; exit 0; }
  [[ -n $force || ! -f $PREFIX/.horovod-passed || $(<"$PREFIX/.horovod-passed") != "$(installed)" ]] ||
    { say "already installed: $KEY"; exit 0; }

  STORE=${DISTPAD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/distpad}/wheels/$KEY
  WORK=$(mktemp -d)
  trap 'rm -rf "$WORK"' EXIT
  mkdir -p "$STORE"
  # pip skips installed packages, and then needs no network
  "$PYTHON" -m pip install --quiet 'setuptools<81' wheel cloudpickle psutil packaging pyyaml >&2 ||
    die 17 "pip could not install Horovod's requirements into $PYTHON. Create an environment: launch/environment.sh current"
  exec 8>"$STORE/.lock"
  flock -n 8 || { say "another process is building this wheel: waiting for it"; flock 8; }
  [[ -z $force ]] || rm -f "$STORE"/horovod-*.whl
  compgen -G "$STORE/horovod-*.whl" >/dev/null || build
  exec 8>&-
  wheel=$(echo "$STORE"/horovod-*.whl)
  say "installing $wheel into $PYTHON"
  "$PYTHON" -m pip install --quiet --no-cache-dir --no-deps --force-reinstall "$wheel" >&2 ||
    die 17 "pip could not install $wheel (see above). Create an environment: launch/environment.sh current"
  tested="$(sha256sum <"$wheel") $(uname -n)"
  if [[ ! -f $STORE/.passed || $(<"$STORE/.passed") != "$tested" ]]; then
    self_test gloo "$SCRIPTS/horovodrun" --gloo
    [[ $MPI != openmpi* ]] || mpirun+=(--oversubscribe)
    [[ $MPI != openmpi* || $(id -u) != 0 ]] || mpirun+=(--allow-run-as-root)
    [[ $MPI == nompi ]] || self_test mpi "${mpirun[@]}"
    echo "$tested" >"$STORE/.passed"
  fi
  installed >"$PREFIX/.horovod-passed"
  say "ready: $KEY"
}

main "$@"
