#!/usr/bin/env bash
# Table 1 of the paper by a Slurm array, a task per job: sbatch slurm.sh; flags after it go to run.sh.
# The data: python examples/import_d4rl.py all
# A job that is preempted goes on from its last checkpoint when Slurm starts it again.
#SBATCH --job-name=srpo --array=0-14 --gres=gpu:1 --cpus-per-task=8 --time=24:00:00 --requeue
tasks=(
    {halfcheetah,hopper,walker2d}-{medium-expert,medium,medium-replay}-v2
    antmaze-{umaze,umaze-diverse,medium-play,medium-diverse,large-play,large-diverse}-v2
)
cpus=${SLURM_CPUS_PER_TASK:-8}
export ACTOR="${ACTOR:-} --eval-workers $cpus" EVAL="${EVAL:-} --workers $cpus"
srun --cpus-per-task="$cpus" bash run.sh "${tasks[$SLURM_ARRAY_TASK_ID]}" --num-seeds 6 --resume "$@"
