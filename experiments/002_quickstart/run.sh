#!/usr/bin/env bash
# The quick start's training and evaluation with three seeds, from the repository's root after `make quickstart`:
#   bash experiments/002_quickstart/run.sh
set -euo pipefail
for seed in 0 1 2; do
  run=runs/quickstart_seed$seed
  stage() { .venv/bin/python train.py "$@"; }
  stage conf=quickstart/prefinetune seed_everything=$seed data.seed=$seed trainer.default_root_dir=$run/prefinetune
  for number in 1 2; do
    stage conf=quickstart/finetune seed_everything=$seed data.seed=$seed$number model.init_from=$run/prefinetune/encoder \
      trainer.default_root_dir=$run/finetune-$number
  done
  stage conf=quickstart/soup checkpoints=[$run/finetune-1/encoder,$run/finetune-2/encoder] out=$run/encoder
  stage conf=quickstart/evaluate checkpoint=$run/encoder out=$run runs=[$run/prefinetune]
done
.venv/bin/python experiments/002_quickstart/table.py runs/quickstart_seed*/results.json
