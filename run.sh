#!/usr/bin/env bash
# The three stages and eval.py in order.
#   bash run.sh                                the demo: makes its own data, 5 to 6 minutes on 2 CPU cores
#   bash run.sh hopper-medium --num-seeds 6    any task by the paper's numbers; the flags go to all three stages
# CRITIC, BEHAVIOR, ACTOR and EVAL may hold flags for one script alone: ACTOR="--beta 0.01 0.05" bash run.sh hopper-medium
set -euo pipefail
cd "$(dirname "$0")"

if (($# == 0)); then
    python examples/collect_pointmaze.py
    set -- local/pointmaze-demo-v0
    CRITIC="--steps 40000 --batch-size 128 --lr 1e-3 --tau 0.02 ${CRITIC:-}" # few steps: let V's horizon grow fast
    BEHAVIOR="--steps 6000 --batch-size 128 ${BEHAVIOR:-}"
    ACTOR="--steps 8000 --batch-size 128 --beta 0.1 --eval-every 2000 ${ACTOR:-}"
fi

env=${1#--env=} # as a sweep names it
shift
if [[ $env == -* ]]; then
    echo "error: first comes the task: bash run.sh TASK [flags]" >&2
    exit 1
fi
if [[ $env == *-medium-replay* && -n ${D4RL:-} ]]; then # Minari has none: D4RL is the folder of the original files
    name=${env%-v2}
    set -- --dataset "$D4RL/${name//-/_}-v2.hdf5" "$@"
fi
unset WANDB_RUN_ID WANDB_SWEEP_ID WANDB_SWEEP_PARAM_PATH # each replica is a W&B run of its own, also under an agent
python srpo_critic.py --env "$env" "$@" ${CRITIC:-}
python srpo_behavior.py --env "$env" "$@" ${BEHAVIOR:-}
python srpo_actor.py --env "$env" "$@" ${ACTOR:-}

where=() # eval.py takes of the flags only those that say where the run is
while (($#)); do
    case $1 in
    --run[-_]name | --out[-_]dir) where+=("$1" "$2") ;;
    --run[-_]name=* | --out[-_]dir=*) where+=("$1") ;;
    esac
    shift
done
python eval.py --env "$env" ${where[@]+"${where[@]}"} ${EVAL:-}
