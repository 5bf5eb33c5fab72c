#!/bin/sh
# Prints the hosts of an elastic job from a file, one line HOST:SLOTS per host. `distpad launch` runs this script once a
# second, without arguments.
#
# Usage: DISTPAD_HOSTS_FILE=FILE discover_hosts.sh, or: discover_hosts.sh FILE
#   FILE  lines HOST, HOST:SLOTS or, as in Open MPI, HOST slots=N; # begins a comment; default: 1 slot
#
# This script does not connect to the hosts, since a connection to a host that is down is slow. The launcher pauses
# hosts that fail. Remove a host from the file when it is gone permanently. To change the file, write a new file and
# rename it: the launcher would read a partial file as hosts that are gone.
# Exit code 1 if the file does not exist. At the start, this ends the job; later, the known hosts remain.
set -eu

file=${1:-${DISTPAD_HOSTS_FILE:-}}
if [ -z "$file" ]; then
  echo "discover_hosts: error: no hosts file is given. Set DISTPAD_HOSTS_FILE, or pass the file as an argument." >&2
  exit 1
fi
if [ ! -r "$file" ]; then
  echo "discover_hosts: error: $file cannot be read." >&2
  exit 1
fi
sed -E 's/#.*//; s/[[:space:]]+$//; s/^[[:space:]]+//; s/[[:space:]]+slots=([0-9]+).*$/:\1/; /^$/d; s/^([^:]+)$/\1:1/' "$file"
