#!/usr/bin/env bash
# Hard negatives mined with a pre-fine-tuned model, random ones and none, from the repository's root:
#   bash experiments/006_hard_negatives/run.sh ../shared/data
set -euo pipefail
source=${1:?give the data pack, as ../shared/data}
runs=runs/hard_negatives
run() { echo "+ $*"; local began=$SECONDS; "$@"; echo "= $((SECONDS - began)) s"; }
stage() { run .venv/bin/python train.py "$@"; }
judge() { stage conf=hard_negatives/evaluate checkpoint="$1/encoder" out="$1"; }

stage conf=prepare source="$source" out=shards/pack 'sets=[text/cranfield,text/agnews,code/cosqa]'
for seed in 1 2 3; do
  first=$runs/seed-$seed
  seeds=(data.seed=$seed seed_everything=$seed)
  stage conf=hard_negatives/prefinetune "${seeds[@]}" trainer.default_root_dir=$first
  judge $first
  for set in text/cranfield text/agnews code/cosqa; do
    query="task: search result | query: {text}"
    [ $set = code/cosqa ] && query="task: code retrieval | query: {text}"
    train=shards/pack/$set/train
    stage conf=mine checkpoint=$first/encoder queries=$train corpus=$train out=$first/mined/$set \
      "query_prompt='$query'" "target_prompt='title: {title} | text: {text}'"
    for choice in last first; do
      stage conf=assemble source=$first/mined/$set corpus=$train out=$first/shards/$choice/$set/train \
        selection.negatives=$choice "judged=[shards/pack/$set/$([ $set = text/agnews ] && echo test || echo queries-test)]"
    done
    run .venv/bin/python experiments/006_hard_negatives/random_negatives.py $first/shards/last/$set/train $seed \
      $first/shards/none/$set/train $first/shards/random/$set/train
  done
  for choice in none random last first; do
    stage conf=hard_negatives/finetune "${seeds[@]}" data.root=$first/shards/$choice model.init_from=$first/encoder \
      trainer.default_root_dir=$first/$choice
    judge $first/$choice
  done
done
run .venv/bin/python experiments/006_hard_negatives/table.py $runs
