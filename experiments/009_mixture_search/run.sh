#!/usr/bin/env bash
# Rates of the mixture "code" searched on dev splits, and what they are worth on test splits, from the repository's root:
#   bash experiments/009_mixture_search/run.sh ../shared/data
set -euo pipefail
source=${1:?give the data pack, as ../shared/data}
runs=runs/mixture_search
stage() { echo "+ train.py $*"; .venv/bin/python train.py "$@"; }

stage conf=prepare source="$source" out=shards/pack \
  'sets=[text/agnews,code/cosqa,code/java_cs,code/nl2bash,code/wikisql]'
for seed in 1 2 3; do
  stage conf=mixture_search/prefinetune data.seed=$seed seed_everything=$seed trainer.default_root_dir=$runs/seed-$seed/first
done
own='agnews/title-body: agnews_dev/text-text, java_cs/java-csharp: java_cs_dev/code-code'
own+=', nl2bash/text-code: nl2bash_dev/text-code, wikisql/text-code: wikisql_dev/text-code'
search() {
  OMP_NUM_THREADS=1 stage conf=mixture_search stage=mixture_search/finetune out=$runs/search 'benchmarks=[code_dev]' every_steps=30 \
    "keys={model.init_from: $runs/seed-1/first/encoder}" alone_steps=[120] "alone_scores={$own}" \
    'grid={java_cs/*: [0.5, 1, 2], "*/text-code": [0.5, 1, 2]}' num_random=8 num_bayesian=10
}
search & # two processes on two cores; more would join in the same way
search
wait $!
stage conf=mixture_search/evaluate checkpoint=$runs/search/encoder out=$runs/search/test
for seed in 1 2 3; do # the same rates from other pre-fine-tuned encoders
  for rates in own seed best; do
    mapfile -t words < <(.venv/bin/python experiments/009_mixture_search/table.py rates $runs/search $rates)
    out=$runs/seed-$seed/$rates
    stage conf=mixture_search/finetune data.seed=$seed seed_everything=$seed model.init_from=$runs/seed-$seed/first/encoder \
      trainer.default_root_dir=$out "${words[@]}"
    stage conf=mixture_search/evaluate checkpoint=$out/encoder out=$out
  done
done
.venv/bin/python experiments/009_mixture_search/table.py table $runs
