#!/usr/bin/env bash
# What the images need of Debian, run as root while they are built.
set -euo pipefail

usage() {
  cat <<'EOT'
Installs what an image needs of Debian's packages; for the stage that runs, it also makes the user of the pods.

Usage: k8s/image/system.sh build|run
  build       what builds Horovod with MPI
  run         Open MPI, ssh and sshd; the user distpad, number 10001, whose home is /tmp
  -h, --help  this text

Example:
  RUN k8s/image/system.sh run

Exit codes: 2 usage, else apt-get's and useradd's.
EOT
}

install_packages() {
  export DEBIAN_FRONTEND=noninteractive
  apt-get -qq update
  apt-get -qq install -y --no-install-recommends "$@"
  rm -rf "${ROOT:-}"/var/lib/apt/lists/*
}

case ${1:-} in
  build)
    install_packages cmake g++ make patch openmpi-bin libopenmpi-dev openssh-client
    ;;
  run)
    install_packages openmpi-bin openssh-client openssh-server
    # Keys that are in an image are nobody's secret; each job brings its own.
    rm -f "${ROOT:-}"/etc/ssh/ssh_host_*
    # A number that no user of a node has; sshd needs the name.
    useradd --uid 10001 --user-group --home-dir /tmp --no-create-home --shell /bin/bash distpad
    ;;
  -h | --help) usage ;;
  *)
    printf 'system: error: unknown argument %s, expected build or run. See k8s/image/system.sh --help\n' "${1:-}" >&2
    exit 2
    ;;
esac
