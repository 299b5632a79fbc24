#!/usr/bin/env bash
# The whole path on real data, from the repository's root: bash experiments/001_first_light/run.sh ../shared/data
set -euo pipefail
source=${1:?give the data pack, as ../shared/data}
run() { echo "+ $*"; local began=$SECONDS; "$@"; echo "= $((SECONDS - began)) s"; }
stage() { run .venv/bin/python train.py "$@"; }

stage conf=prepare source="$source" out=shards/pack
stage conf=first_light/prefinetune
for seed in 1 2; do
  stage conf=first_light/finetune data.seed=$seed trainer.default_root_dir=runs/first_light/finetune-$seed
done
stage conf=soup checkpoints=[runs/first_light/finetune-1/encoder,runs/first_light/finetune-2/encoder] out=runs/first_light/encoder
stage conf=evaluate checkpoint=runs/first_light/encoder root=shards/pack out=runs/first_light \
  runs=[runs/first_light/prefinetune,runs/first_light/finetune-1,runs/first_light/finetune-2]
