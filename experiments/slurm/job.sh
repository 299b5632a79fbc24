# What the scripts share; they source it from the project's root.
set -euo pipefail
source "${SITE:-experiments/slurm/site.sh}"
STOPPED=138 # train.py ended after a batch, with a checkpoint, because of SIGUSR1; or SIGUSR1 ended what goes on by itself

begin() { # once in every job, before anything else
  if ((${SLURM_RESTART_COUNT:-0} > MAX_RESTARTS)); then
    echo "error: job $SLURM_JOB_ID was begun again $SLURM_RESTART_COUNT times; MAX_RESTARTS in site.sh allows $MAX_RESTARTS" >&2
    exit 1
  fi
  site
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it from the job
}

run() { # what experiments/slurm/arguments.py is to make of the job's words
  begin
  local words status=0
  words=$(mktemp)
  "$PYTHON" -m experiments.slurm.arguments "$@" >"$words" || { rm "$words"; exit 1; }
  mapfile -d '' -t arguments <"$words"
  rm "$words"
  srun --wait=600 "$PYTHON" train.py "${arguments[@]}" || status=$? # of tasks that a lost one leaves waiting, after 600 s
  requeue_if_stopped "$status"
  exit "$status"
}

requeue_if_stopped() {
  if (($1 == STOPPED)); then
    echo "job $SLURM_JOB_ID is put back into the queue, and goes on where it stopped"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # slurm ends this script
  fi
}
