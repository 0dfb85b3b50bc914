#!/usr/bin/env bash
# What this project asks of one GPU. Planned for 14 minutes; it has not been run on one yet, only dry, on a CPU.
# Needs assets/corpus (README.md, "The evidence suite").
# `benchmarks/gpu.sh --dry-run` makes two steps of everything on whatever device there is.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-outputs/gpu}
steps=() tests=(-m gpu tests/gpu) last=6400
if [ "${1:-}" = --dry-run ]; then
    steps=(--training.steps 2 --training.local_batch_size 2 --compile.no-enable --validator.freq 1 --validator.steps 1)
    tests+=(--collect-only) last=2
fi
mkdir -p "$out"
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$out/inductor} # one compilation for each model
checkpoint=$out/teacher/checkpoint/step-$last
[ -d "$checkpoint" ] ||
    let-train train_configs/evidence/gpu_teacher.toml --dump_folder "$out/teacher" "${steps[@]}"
teacher=(--let.teacher.path "$checkpoint")
let-bench converge train_configs/evidence/gpu_student.toml --test-dataset text_files \
    --test-path assets/corpus/test.jsonl --methods-file train_configs/evidence/methods.toml \
    --methods let@0.1 rkd_linear@10 'recipe = recipe_linear@10 --optimizer.param-groups.0.optimizer-kwargs.lr 0.001' --seeds 0 \
    --name "What pays at 40 million parameters?" \
    --out "$out/evidence_gpu.jsonl" --work-dir "$out/work" "${teacher[@]}" "${steps[@]}"
python -m pytest -q "${tests[@]}" || echo "some tests failed"
let-bench throughput train_configs/evidence/gpu_student.toml --cases active rows rkd --pairs 3 --interleave \
    --out "$out/throughput_gpu.jsonl" --work-dir "$out/work" "${teacher[@]}" "${steps[@]:2:3}"
