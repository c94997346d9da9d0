#!/bin/sh
# One process of srun's, as torchrun would start it; slurm.sbatch calls it.
set -eu
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
export LOCAL_WORLD_SIZE="${SLURM_NTASKS_PER_NODE:-$SLURM_NTASKS}"
exec "${PYTHON:-python}" -m promptkd train "$@"
