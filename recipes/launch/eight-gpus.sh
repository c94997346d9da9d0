#!/bin/sh
# Every card of one machine, a process each: sh recipes/launch/eight-gpus.sh RECIPE [key=value ...]
# GPUS=4 takes four. The number may differ when a stopped run goes on.
set -eu
exec torchrun --standalone --nproc_per_node "${GPUS:-8}" -m promptkd train "$@"
