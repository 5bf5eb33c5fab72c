#!/usr/bin/env bash
# The hosts of tests/cluster/slurm.py, as namespaces: a login host with munged and slurmctld, and nodes with one slurmd
# each. This script is the first process of a process namespace, so that no process outlives it. It ends with its input.
#   slurm.sh FOLDER SHARED... -- NODE...   in namespaces of its own (unshare)
#   slurm.sh --node FOLDER NODE SHARED...  one node, likewise; called by itself
set -euo pipefail

# Hosts do not share /tmp and /dev/shm. A shared folder, on a real cluster a network file system, is a bind mount here.
own_folders() { # own_folders STAGE SHARED...
  local stage=$1 shared
  shift
  mkdir -p "$stage"
  mount -t tmpfs -o mode=1777 tmpfs "$stage"
  for shared; do
    [[ $shared == /tmp/* && -d $shared ]] || continue
    mkdir -p "$stage${shared#/tmp}"
    mount --bind "$shared" "$stage${shared#/tmp}"
  done
  mount --rbind "$stage" /tmp
  mount -t tmpfs -o mode=1777 tmpfs /dev/shm
}

node() { # node FOLDER NODE SHARED...
  local folder=$1 name=$2
  shift 2
  hostname "$name"
  own_folders "$folder/tmp.$name" "$@"
  exec slurmd -D -N "$name" </dev/null >"$folder/slurmd.$name.out" 2>&1
}

main() {
  local folder=$1 shared=() name number=0
  shift
  while [[ $1 != -- ]]; do shared+=("$1"); shift; done
  shift
  hostname login
  mount --bind "$folder/hosts" /etc/hosts
  mount -t tmpfs tmpfs /run # for ip's /run/netns
  ip link set lo up
  ip link add name bridge type bridge
  ip address add 10.0.0.1/24 dev bridge
  ip link set bridge up

  munged -F --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" </dev/null >"$folder/munged.out" 2>&1 &
  until [[ -S $folder/munge.socket ]]; do sleep 0.05; done
  slurmctld -D </dev/null >"$folder/slurmctld.out" 2>&1 &

  for name; do
    number=$((number + 1))
    ip netns add "$name"
    ip link add "to-$name" type veth peer name eth0 netns "$name"
    ip link set "to-$name" master bridge up
    ip -n "$name" link set lo up
    ip -n "$name" link set eth0 up
    ip -n "$name" address add "10.0.0.$((10 + number))/24" dev eth0
    nsenter --net="/run/netns/$name" unshare --uts --mount --ipc --pid --fork --kill-child --mount-proc \
      bash "${BASH_SOURCE[0]}" --node "$folder" "$name" "${shared[@]}" &
  done
  echo up
  read -r _ || true # the end of the input ends the script
}

if [[ $1 == --node ]]; then
  shift
  node "$@"
else
  main "$@"
fi
