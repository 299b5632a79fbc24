#!/usr/bin/env bash
# Submit a job with the site's values; options before the word go to sbatch. From anywhere:
#   bash experiments/slurm/submit.sh [--nodes=2 --dependency=afterok:17 ..] stage conf=finetune data.root=shards/pack ..
#   bash experiments/slurm/submit.sh [..] array grid.txt runs/grid      a run for each line, in runs/grid/<number of the line>
#   bash experiments/slurm/submit.sh [..] blocks 16 conf=generate ..    a data stage, its blocks shared by 16 tasks
#   bash experiments/slurm/submit.sh [..] workers 8 conf=mixture_search ..   its trials shared by 8 jobs; more can join
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source "${SITE:-experiments/slurm/site.sh}"
options=(--ntasks-per-node="$TASKS_PER_NODE" --cpus-per-task="$CPUS_PER_TASK")
while [[ ${1:-} == -* ]]; do
  options+=("$1")
  shift
done
kind=${1:-}
shift || true
mkdir -p runs/slurm
case $kind in
  stage)
    useful=$("$PYTHON" -m experiments.slurm.arguments tasks "$@")
    [[ $useful == all ]] || options+=(--nodes=1 --ntasks-per-node=1)
    ;;
  array)
    (($# == 2)) || { echo "error: array needs a file of lines and a folder: submit.sh array grid.txt runs/grid" >&2; exit 1; }
    lines=$("$PYTHON" -m experiments.slurm.arguments grid "$@")
    options=(--array="1-$lines" "${options[@]}")
    set -- "$2/grid.txt" "$2"
    ;;
  blocks)
    [[ ${1:-} =~ ^[1-9][0-9]*$ ]] || { echo "error: blocks needs a number of tasks: submit.sh blocks 16 conf=.." >&2; exit 1; }
    options=(--array="0-$(($1 - 1))" "${options[@]}" --ntasks-per-node=1)
    shift
    "$PYTHON" -m experiments.slurm.arguments blocks "$@" >/dev/null
    ;;
  workers)
    [[ ${1:-} =~ ^[1-9][0-9]*$ ]] || { echo "error: workers needs a number of jobs: submit.sh workers 8 conf=.." >&2; exit 1; }
    options=(--job-name=workers --array="0-$(($1 - 1))" "${options[@]}")
    shift
    "$PYTHON" -m experiments.slurm.arguments workers "$@" >/dev/null
    script=recipe
    ;;
  recipe) ;; # what conf=recipe action=submit calls
  *)
    echo "error: the form is: submit.sh [options of sbatch] stage|array|blocks|workers ..; the first lines of $0 say more" >&2
    exit 1
    ;;
esac
log=runs/slurm/%x-%j.out
[[ $kind == stage || $kind == recipe ]] || log=runs/slurm/%x-%A_%a.out
exec sbatch --output="$log" "${options[@]}" "experiments/slurm/${script:-$kind}.sbatch" "$@"
