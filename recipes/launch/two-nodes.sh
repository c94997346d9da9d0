#!/bin/sh
# Two machines of eight cards. The same line on both, HEAD the first one's name or address:
#   HEAD=node1 NODE=0 sh recipes/launch/two-nodes.sh RECIPE [key=value ...]     on node1
#   HEAD=node1 NODE=1 sh recipes/launch/two-nodes.sh RECIPE [key=value ...]     on the other
# within a minute (WAIT: other seconds). Both must see the run's directory, the data and the models
# under the same names. Ctrl-C on one of them stops both, after the step.
set -eu
: "${HEAD:?is the name or address of the first machine, on both the same}"
: "${NODE:?is the number of this machine: 0 on the first, 1 on the other}"
if [ "$NODE" -ge "${NODES:-2}" ]; then
    echo "$0: NODE is $NODE; of ${NODES:-2} machines the last one is $((${NODES:-2} - 1))" >&2
    exit 2
fi
if ! getent hosts "$HEAD" >/dev/null; then
    echo "$0: this machine doesn't know $HEAD. Give HEAD the first machine's address" >&2
    exit 2
fi
# a step and its checkpoint must fit between Ctrl-C and torchrun's kill
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
exec torchrun --nnodes "${NODES:-2}" --node_rank "$NODE" --nproc_per_node "${GPUS:-8}" \
    --master_addr "$HEAD" --master_port "${PORT:-29500}" --rdzv_conf "timeout=${WAIT:-60}" \
    -m promptkd train "$@"
