# What differs between clusters, and the only file of this folder to edit. Every value may stay as it is.
# Variables that begin with SBATCH_ are sbatch's own (man sbatch, "Input Environment Variables") and go before the scripts' lines.

#export SBATCH_PARTITION=gpu
#export SBATCH_ACCOUNT=project
#export SBATCH_QOS=normal
#export SBATCH_TIMELIMIT=24:00:00      # longer work goes on after it, see README.md
#export SBATCH_GPUS_PER_NODE=1         # all tasks of a node see all of them, as Lightning wants it: none of --gpus-per-task
#export SBATCH_MEM_PER_NODE=64G

: "${TASKS_PER_NODE:=1}"               # processes on a node: one a GPU
: "${CPUS_PER_TASK:=2}"                # of each: itself and data.num_workers
: "${MAX_RESTARTS:=100}"               # of one job, for whatever reason; a job that gets nowhere ends at last
: "${PYTHON:=.venv/bin/python}"

site() { # once in every job, on its first node, before anything runs; what is exported here reaches all processes
  :
  #module load cuda
  #export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # the network between the nodes, where the first one found is not it
}
