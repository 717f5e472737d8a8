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
stage() { # behind this shell, which passes SIGTERM on: W&B's agent sends it to nobody else
    python "$@" <&0 &
    wait $!
}
trap 'kill -INT $!; wait; exit 143' TERM # SIGINT, since Slurm has sent the stage a SIGTERM already
trap 'wait; exit 130' INT                # Ctrl-C: the terminal has sent it to the stage too
unset WANDB_RUN_ID WANDB_SWEEP_ID WANDB_SWEEP_PARAM_PATH # each replica is a W&B run of its own, also under an agent
stage srpo_critic.py --env "$env" "$@" ${CRITIC:-}
stage srpo_behavior.py --env "$env" "$@" ${BEHAVIOR:-}
stage srpo_actor.py --env "$env" "$@" ${ACTOR:-}

where=() # eval.py takes of the flags only those that say where the run is
while (($#)); do
    case $1 in
    --run[-_]name | --out[-_]dir) where+=("$1" "$2") ;;
    --run[-_]name=* | --out[-_]dir=*) where+=("$1") ;;
    esac
    shift
done
python eval.py --env "$env" ${where[@]+"${where[@]}"} ${EVAL:-}
