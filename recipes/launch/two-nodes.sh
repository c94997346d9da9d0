#!/bin/sh
# Two machines of eight cards. The same line on both, HEAD the name of the first:
#   HEAD=node1 NODE=0 sh recipes/launch/two-nodes.sh RECIPE [key=value ...]     on node1
#   HEAD=node1 NODE=1 sh recipes/launch/two-nodes.sh RECIPE [key=value ...]     on the other
# Both must see the run's directory, the data and the models under the same names.
set -eu
exec torchrun --nnodes "${NODES:-2}" --node_rank "$NODE" --nproc_per_node "${GPUS:-8}" \
    --master_addr "$HEAD" --master_port "${PORT:-29500}" -m promptkd train "$@"
