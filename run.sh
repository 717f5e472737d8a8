#!/usr/bin/env bash
# The three stages and eval.py in order.
#   bash run.sh                              the demo: makes its own data, two to three minutes on 2 CPU cores
#   bash run.sh hopper-medium --num-seeds 6  a task with the paper's settings, for a GPU; flags go to all three stages
#                                            (--amp, --dataset and --normalize-obs to those that have them)
#   bash run.sh --small hopper-medium        a task on a small budget, for a CPU
# CRITIC, BEHAVIOR, ACTOR and EVAL hold flags for one script alone: ACTOR="--beta 0.01 0.05" bash run.sh hopper-medium
# For --small, import D4RL's AntMaze with --until-success.
set -euo pipefail
cd "$(dirname "$0")"
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 # glibc keeps freed memory: saves page faults
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000} # idle threads stop spinning sooner, which helps beside other jobs

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n 's/^# //p' run.sh
    exit
fi
critic="" behavior="" actor="" # a recipe's flags, which those of the command line override
if (($# == 0)); then
    python examples/collect_pointmaze.py
    set -- local/pointmaze-demo-v0
    critic="--steps 15000 --batch-size 128 --lr 1e-3 --lr-decay --tau 0.05" # a large tau: values propagate in few steps
    behavior="--steps 2000 --batch-size 128 --lr 1e-3 --lr-decay --predict v --no-dropout"
    actor="--steps 3000 --batch-size 128 --lr 1e-3 --beta 0.1 --eval-every 1000"
elif [[ $1 == --small ]]; then
    shift
    critic_steps=60000 behavior_steps=20000 actor_steps=20000 betas="0.002 0.01 0.05 0.2" tau=0.005
    if [[ ${1:-} == *antmaze* ]]; then
        behavior_steps=30000 actor_steps=15000 betas="0.05 0.1 0.25" tau=0.02
        [[ $1 == *umaze* ]] || critic_steps=120000 # longer ways for values to propagate
    fi
    both="--num-seeds 3 --lr 1e-3 --lr-decay --normalize-obs"
    critic="$both --steps $critic_steps --tau $tau"
    behavior="$both --steps $behavior_steps --batch-size 128 --predict v --no-dropout"
    actor="--steps $actor_steps --batch-size 128 --lr 1e-3 --beta $betas --q-grad-norm none --eval-every 10000"
    EVAL="--policy srpo behavior ${EVAL:-}"
fi

env=${1:-}
env=${env#--env=} # as a sweep names it
if [[ $env == -* || -z $env ]]; then
    echo "error: the task comes first: bash run.sh [--small] TASK [flags]" >&2
    exit 1
fi
shift
all=() data=() model=() where=() # flags of all stages, of stages 1 and 2, of stages 2 and 3, and of eval.py too
out=runs name=${env//\//-}      # the run's folder
while (($#)); do
    case $1 in
    --dataset) data+=("$1" "$2") && shift ;;
    --dataset=* | --normalize[-_]obs | --no-normalize[-_]obs) data+=("$1") ;;
    --amp | --no-amp) model+=("$1") ;;
    --track | --no-track | --wandb[-_]*=*) where+=("$1") all+=("$1") ;;
    --wandb[-_]*) where+=("$1" "$2") all+=("$1" "$2") && shift ;;
    --run[-_]name) name=$2 where+=("$1" "$2") all+=("$1" "$2") && shift ;;
    --run[-_]name=*) name=${1#*=} where+=("$1") all+=("$1") ;;
    --out[-_]dir) out=$2 where+=("$1" "$2") all+=("$1" "$2") && shift ;;
    --out[-_]dir=*) out=${1#*=} where+=("$1") all+=("$1") ;;
    *) all+=("$1") ;;
    esac
    shift
done
set -- ${all[@]+"${all[@]}"}
unset WANDB_RUN_ID WANDB_SWEEP_ID WANDB_SWEEP_PARAM_PATH # each replica is a W&B run of its own, also under an agent
mkdir -p "$out"
lock=$out/.${name//\//-}.lock
exec 9> "$lock" # open until this shell, and all that it starts, has ended
python -c '
import fcntl, glob, sys
for file in [9, *glob.glob(glob.escape(sys.argv[1]) + "/.*.lock")]: # of this script, and of the stages
    try:
        fcntl.flock(file if file == 9 else open(file, "r+"), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"error: {sys.argv[1]} is being trained or scored: wait until that ends, or give another --run-name")
    except OSError: # no locks in this file system
        pass' "$out/$name"
touch "$lock" # its time is that of this start
failed=0
python srpo_critic.py --env "$env" $critic "$@" ${data[@]+"${data[@]}"} ${CRITIC:-}
python srpo_behavior.py --env "$env" $behavior "$@" ${data[@]+"${data[@]}"} ${model[@]+"${model[@]}"} ${BEHAVIOR:-}
python srpo_actor.py --env "$env" $actor "$@" ${model[@]+"${model[@]}"} ${ACTOR:-} || failed=$?
if ((failed)) && [[ ! $out/$name/actor.pt -nt $lock ]]; then
    exit $failed # else only evaluations in training failed, and the policies can be scored
fi
python eval.py --env "$env" ${where[@]+"${where[@]}"} ${EVAL:-}
exit $failed
