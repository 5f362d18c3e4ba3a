#!/usr/bin/env bash
# Records a command's raw output in bench/results/ with what is needed to read it: date, commit, machine, command.
#
#   bench/record.sh NAME COMMAND [ARGUMENT...]     writes bench/results/NAME.txt
set -euo pipefail
name=$1
shift
cd "$(dirname "$0")/.."
out=bench/results/$name.txt
{
    echo "date:    $(date -u +%Y-%m-%d)"
    echo "commit:  $(git rev-parse --short HEAD)$(git diff --quiet HEAD -- src cuda bench ':!bench/results' weights_tools/refrag-nano || echo ' + changes')"
    echo "machine: $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(nproc) CPUs, $(free -g | awk '/^Mem/ {print $2}') GiB; $(uname -sr)"
    echo "command: $*"
    echo
    "$@" 2>&1
} | tee "$out.tmp"
mv "$out.tmp" "$out"
