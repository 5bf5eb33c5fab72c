#!/bin/sh
# Prints the hosts of an elastic job, one a line as HOST:SLOTS, from a file that whoever manages the hosts rewrites.
# `distpad launch` calls it once a second, without arguments, and takes what it prints for what there is.
#
# Usage: DISTPAD_HOSTS_FILE=FILE discover_hosts.sh, or: discover_hosts.sh FILE
#   FILE  lines HOST, HOST:SLOTS or, as Open MPI has them, HOST slots=N; # begins a comment; 1 slot where none is given
#
# Whether a host can be reached is not asked here: a connection to each, every second, would be slow just where one is
# down. Who fails is left alone by the launcher for a while, and hosts that are gone for good are taken off the file.
# Write another file and rename it onto this one: half a file looks like hosts that are gone.
# Exit code 1 where there is no such file, which at the start ends the job, and later changes nothing.
set -eu

file=${1:-${DISTPAD_HOSTS_FILE:-}}
if [ -z "$file" ]; then
  echo "discover_hosts: error: no file of hosts. Set DISTPAD_HOSTS_FILE, or name it." >&2
  exit 1
fi
if [ ! -r "$file" ]; then
  echo "discover_hosts: error: $file cannot be read." >&2
  exit 1
fi
sed -E 's/#.*//; s/[[:space:]]+$//; s/^[[:space:]]+//; s/[[:space:]]+slots=([0-9]+).*$/:\1/; /^$/d; s/^([^:]+)$/\1:1/' "$file"
