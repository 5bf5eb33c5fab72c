#!/usr/bin/env bash
# Sets everything up and runs all test suites on both stacks; CI runs it with --short.
set -euo pipefail

# name | stacks | those of them that --short takes, and which third of the tests there (none: all) | time limit in minutes |
# command, run in the checkout with the environment's programs first on PATH. The longest stands before what runs beside
# it. `pytests` is pytest with the report that the counts at the end are taken from, `world` the same tests in an engine
# with so many replicas (tests/worlds.py).
SUITES='
lint          | current         | current             |  5 | ruff check . && ruff format --check . && mypy distpad && lint_scripts
single        | current classic | current classic     | 15 | pytests tests/single
local         | current classic |                     | 22 | world local
onedevice     | current         |                     | 22 | world onedevice
mirrored:1    | current         |                     | 22 | world mirrored:1
mirrored:2    | current classic | current:1 classic:2 | 22 | world mirrored:2
mirrored:4    | current         | current:2           | 22 | world mirrored:4
keras:4       | classic         |                     | 22 | world mirrored:4 -k "test_fit_and_evaluate or test_several_outputs"
multiworker:2 | current classic | current:2 classic:3 | 22 | world multiworker:2
horovod:2     | current classic | current:3 classic:1 | 22 | world horovod:2
horovod:3     | current         |                     | 22 | world horovod:3
mpirun:2      | current         | current:2           | 22 | world mpirun:2
examples      | current classic | current:2 classic:1 | 30 | pytests tests/examples --ignore tests/examples/test_benchmarks.py
k8s           | current         | current:3           | 60 | tests/k8s/tools.sh && pytests tests/k8s
launch        | current classic | current:3           | 20 | pytests tests/launch --ignore tests/launch/test_launcher.py
launcher      | current         | current             | 20 | pytests tests/launch/test_launcher.py
cluster       | current         | current:1           | 35 | launch/environment.sh current --openmpi5 --horovod && pytests tests/cluster
smoke         | classic         | classic             | 30 | launch/environment.sh classic --openmpi5 --horovod && tests/k8s/tools.sh && pytests -m smoke tests/cluster tests/k8s/test_running.py
mutants       | current         |                     | 40 | python tests/mutants.py
benchmarks    | current         |                     | 30 | pytests tests/examples/test_benchmarks.py
'

# what tells that it is here | the Debian package that brings it
# shellcheck disable=SC2016 # PATH is expanded where the test of it runs
NEEDS='
command -v cmake               | cmake
command -v g++                 | g++
command -v make                | make
command -v mpirun              | openmpi-bin
command -v mpicxx              | libopenmpi-dev
command -v ip                  | iproute2
command -v ssh                 | openssh-client
PATH=$PATH:/usr/sbin; command -v sshd | openssh-server
PATH=$PATH:/usr/sbin; command -v slurmctld | slurm-wlm
PATH=$PATH:/usr/sbin; command -v munged | munge
python3.11 -c "import venv, ensurepip" | python3.11-venv
'

usage() {
  cat <<'EOF'
Makes the environments, builds Horovod (3 to 10 minutes a stack, the first time) and runs the test suites, several at
once; what one prints is shown when it ends. Goes on after a failed suite. Exit code 1 where any failed.

Usage: tests/run.sh [--short] [--stack current|classic|all] [--suite NAME...] [--jobs N] [--list]
  --short     what CI runs: every engine, launcher and feature, each test of an engine once a stack, in MirroredStrategy,
              MultiWorkerMirroredStrategy or Horovod; a third of the jobs in clusters, one by each launcher among them;
              three quarters of an hour on two cores
  --stack     which of the two stacks (default: all)
  --suite     only these suites
  --jobs      suites that run at once (default: 2, or 1 on a single core)
  --list      print the suites and stop
  -h, --help  this text

Examples:
  tests/run.sh
  tests/run.sh --short
  tests/run.sh --stack current --suite lint single
  tests/run.sh --stack classic --suite horovod:2 mirrored:4

As root on Debian or Ubuntu it installs missing packages; otherwise it names them and goes on. With CI=true
an engine that is missing is a failure, not a skipped test.
EOF
}

say() { printf '\n== %s\n' "$*"; }
die() { printf 'tests/run.sh: error: %s\n' "$*" >&2; exit 2; }
trim() { local word=$1; word=${word#"${word%%[![:space:]]*}"}; printf '%s' "${word%"${word##*[![:space:]]}"}"; }
names() { local name; while IFS='|' read -r name _; do [[ -z ${name// /} ]] || trim "$name "; echo; done <<<"$SUITES" | grep .; }

install_packages() {
  local probe package missing=()
  while IFS='|' read -r probe package; do
    [[ -n ${package// /} ]] || continue
    bash -c "$probe" >/dev/null 2>&1 </dev/null || missing+=("$(trim "$package")")
  done <<<"$NEEDS"
  ((${#missing[@]})) || return 0
  if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    say "missing: ${missing[*]}. Going on without; on Debian and Ubuntu: sudo apt-get install -y ${missing[*]}"
    return 0
  fi
  say "installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get -qq update </dev/null || true
  for package in "${missing[@]}"; do # one by one: a name that this release lacks must not stop the others
    apt-get -qq install -y --no-install-recommends "$package" </dev/null >"$REPORTS/apt.log" 2>&1 ||
      { tail -n 3 "$REPORTS/apt.log"; echo "apt-get could not install $package: going on without it"; }
  done
}

# Everything that makes two runs alike, and keeps two cores from being shared by dozens of threads.
# TensorFlow's inter-op threads stay as they are: collectives of several replicas block in them.
set_up_variables() {
  export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1
  export TF_CPP_MIN_LOG_LEVEL=2 PYTHONHASHSEED=0 MPLBACKEND=agg
  [[ ${CI:-} != true ]] || export DISTPAD_CI=1
}

pytests() { python -m pytest --junitxml="$report" "$@"; }
lint_scripts() { git ls-files | grep -E '\.(sh|sbatch)$|^\.ci/run$' | xargs shellcheck -x -P SCRIPTDIR; }
world() { python tests/worlds.py "$@" --junitxml="$report"; }

# Passed, failed and skipped tests of one suite: count REPORT STATUS. A suite without pytest is one test.
count() {
  "$PYTHON" - "$@" <<'EOF'
import sys
import xml.etree.ElementTree as ET

report, status = sys.argv[1], int(sys.argv[2])
try:
    suites = list(ET.parse(report).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    # Where pytest ended badly without a failed test (nothing collected, interrupted), that counts as one.
    print(total - failed - skipped, max(failed, int(status != 0)), skipped)
except (OSError, ET.ParseError):
    print(int(status == 0), int(status != 0), 0)
EOF
}

# In a process of its own, which leaves what the suite printed and its row of the table: run_suite STACK NAME MINUTES COMMAND
run_suite() {
  local report=$REPORTS/$1-$2.xml start=$SECONDS status=0 result=passed passed failed skipped prelude child
  prelude="$(declare -f pytests world lint_scripts); report=$(printf %q "$report")"
  # In the background with `wait`, so that a signal is passed on at once.
  PATH=$(dirname "$PYTHON"):$PATH timeout --kill-after=30 "${3}m" bash -c "$prelude; $4" </dev/null &
  child=$!
  trap 'kill "$child" 2>/dev/null; wait "$child"; exit 143' TERM
  wait "$child" || status=$?
  ((status == 0)) || result=FAILED
  ((status != 124 && status != 137)) || result="TIMED OUT"
  read -r passed failed skipped < <(count "$report" "$status")
  row "$1" "$2" "$result" $((SECONDS - start)) "$passed" "$failed" "$skipped" >"$REPORTS/$1-$2.row"
}

row() { # row STACK SUITE RESULT SECONDS PASSED FAILED SKIPPED
  printf '%-8s|%-13s|%-10s|%3d:%02d|%7d|%7d|%8d\n' "$1" "$2" "$3" $(($4 / 60)) $(($4 % 60)) "$5" "$6" "$7"
}

# Waits for the first of the running suites that ends, and shows what it printed.
finish_one() {
  local process name
  wait -n "${!RUNNING[@]}" || true
  for process in "${!RUNNING[@]}"; do
    ! kill -0 "$process" 2>/dev/null || continue
    name=${RUNNING[$process]}
    unset "RUNNING[$process]"
    say "${name/|/: }"
    cat "$REPORTS/${name%%|*}.out"
  done
}

run_stack() {
  local stack=$1 name stacks short minutes command share wanted=() start=$SECONDS
  while IFS='|' read -r name stacks short minutes command; do
    name=$(trim "$name")
    [[ -n $name ]] || continue
    share=
    if [[ -n $SHORT ]]; then
      [[ $short =~ $stack(:([123]))? ]] || continue
      share=${BASH_REMATCH[2]:+${BASH_REMATCH[2]}/3}
    fi
    [[ " $stacks " == *" $stack "* && " $CHOSEN " == *" $name "* ]] || continue
    wanted+=("$name|$(trim "$minutes")|$share|$(trim "$command")")
  done <<<"$SUITES"
  ((${#wanted[@]})) || return 0
  local flags=(--tests)
  [[ $CHOSEN == lint ]] || flags+=(--horovod)
  say "$stack: setting up"
  if ! PYTHON=$("$ROOT/launch/environment.sh" "$stack" "${flags[@]}"); then
    row "$stack" setup FAILED $((SECONDS - start)) 0 1 0 >"$REPORTS/$stack-.row"
    return 0
  fi
  row "$stack" setup passed $((SECONDS - start)) 0 0 0 >"$REPORTS/$stack-.row"
  for wanted in "${wanted[@]}"; do
    IFS='|' read -r name minutes share command <<<"$wanted"
    ((${#RUNNING[@]} < JOBS)) || finish_one
    say "$stack $name: started${share:+, share $share of its tests}"
    DISTPAD_SHARE=$share run_suite "$stack" "$name" "$minutes" "$command" >"$REPORTS/$stack-$name.out" 2>&1 &
    RUNNING[$!]="$stack-$name|$command"
  done
  while ((${#RUNNING[@]})); do finish_one; done
}

cleanup() {
  ((${#RUNNING[@]} == 0)) || { kill "${!RUNNING[@]}" 2>/dev/null; wait "${!RUNNING[@]}"; } || true
  rm -rf "$REPORTS"
}

main() {
  local stacks="current classic" chosen=()
  declare -gA RUNNING=() # process: STACK-SUITE|COMMAND
  SHORT=
  JOBS=$(nproc)
  ((JOBS <= 2)) || JOBS=2 # worlds of several processes fill more than one core each
  while (($#)); do
    case $1 in
      --stack)
        [[ ${2:-} =~ ^(current|classic|all)$ ]] || die "--stack is ${2:-missing}, expected current, classic or all"
        [[ $2 == all ]] || stacks=$2
        shift ;;
      --suite)
        while [[ -n ${2:-} && $2 != -* ]]; do
          names | grep -qx -- "$2" || die "there is no suite $2, expected one of: $(names | paste -sd ' ')"
          chosen+=("$2")
          shift
        done ;;
      --jobs)
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "--jobs is ${2:-missing}, expected a number from 1"
        JOBS=$2
        shift ;;
      --short) SHORT=yes ;;
      --list) printf '%s\n' "${SUITES#$'\n'}"; exit 0 ;;
      -h | --help) usage; exit 0 ;;
      *) die "unknown argument $1. See tests/run.sh --help" ;;
    esac
    shift
  done
  CHOSEN=${chosen[*]:-$(names | paste -sd ' ')}
  ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  cd "$ROOT"
  REPORTS=$(mktemp -d "${TMPDIR:-/tmp}/distpad-tests.XXXXXX")
  trap cleanup EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM

  set_up_variables
  install_packages
  local stack name
  for stack in $stacks; do run_stack "$stack"; done

  say "results"
  printf '%-8s %-13s %-10s %6s %7s %7s %8s\n' stack suite result min:s passed failed skipped
  for stack in $stacks; do
    while read -r name; do cat "$REPORTS/$stack-$name.row" 2>/dev/null || true; done < <(echo; names)
  done | tee "$REPORTS/rows" | tr '|' ' '
  printf '\n%d passed, %d failed\n' "$(total 5)" "$(total 6)"
  (($(total 6) == 0))
}

total() { awk -F '|' -v column="$1" '{ sum += $column } END { print sum + 0 }' "$REPORTS/rows"; } # of a column of the table

main "$@"
