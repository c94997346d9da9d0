#!/bin/sh
# Every card of one machine, a process each: sh recipes/launch/eight-gpus.sh RECIPE [key=value ...]
# GPUS=4 takes four. The number may differ when a stopped run goes on.
set -eu
# a step and its checkpoint must fit between Ctrl-C and torchrun's kill
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
exec torchrun --standalone --nproc_per_node "${GPUS:-8}" -m promptkd train "$@"
