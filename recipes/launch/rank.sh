#!/bin/sh
# One process of srun's, as torchrun would start it; slurm.sbatch calls it.
set -eu
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
of_nodes="${SLURM_STEP_TASKS_PER_NODE:-$SLURM_NTASKS}" # such as 8(x2)
export LOCAL_WORLD_SIZE="${of_nodes%%[(,]*}"
exec "${PYTHON:-python}" -m promptkd train "$@"
