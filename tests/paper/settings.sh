# shellcheck shell=bash
# What differs between the demonstration world, the paper's models and a rehearsal: sizes, models, seeds and
# problems. Sourced by run_rounds.sh. "# ours:" names what the paper does not give.

REAL=${MODEL:-${MODELS:-${PROMPTS:-${BENCHMARKS:-${REHEARSE:-}}}}}  # any: real models and settings
# Sec. 4.1: K is 32, 16 for Beyond AIME and 4 for IMO Answer Bench, answerbench_v2.csv of
# google-deepmind/superhuman (its row imo-bench-algebra-036 has lost its answer).
SETS=${BENCHMARKS:-aime24=HuggingFaceH4/aime_2024:32 aime25=MathArena/aime_2025:32
  hmmt_feb25=MathArena/hmmt_feb_2025:32 hmmt_nov25=MathArena/hmmt_nov_2025:32
  hmmt_feb26=MathArena/hmmt_feb_2026:32 beyond_aime=ByteDance-Seed/BeyondAIME:16 imo=answerbench_v2.csv:4}
CODE_SETS=${CODE_BENCHMARKS:-livecodebench=test6.jsonl:32}  # of livecodebench/code_generation_lite
KL_SAMPLES=4  # ours: 4 samples of each problem that KL is measured on
# Seeds at the same time, of one thread each: one more than cores, so that three on two cores end together.
JOBS=${JOBS:-${REAL:+1}} JOBS=${JOBS:-$(($(nproc) + 1))}
benchmarks='' code_benchmarks='' validation=''
SMALLER_COLLECT='' SMALLER_TEACH='' SMALLER_DISTIL='' SMALLER_SCORE=''

rehearsal() {         # sizes of a rehearsal, behind those of the recipe: the last flag counts
  local prompts=$((NPROC > 4 ? NPROC : 4))              # at least one for each process
  SMALLER_COLLECT="--num-prompts $prompts -n 4 --max-tokens 48"
  SMALLER_COLLECT="$SMALLER_COLLECT --shard-prompts $(((prompts + NPROC - 1) / NPROC)) --rehearse"
  SMALLER_TEACH="--steps 3 --save-every 1 --value-steps 2" SMALLER_DISTIL="--steps 3 --save-every 1"
  SMALLER_SCORE="--num-problems $prompts --max-tokens 48" KL_SAMPLES=2
  SETS=$(sed -E 's/:[0-9]+( |$)/:2\1/g' <<< "$SETS")
  CODE_SETS=$(sed -E 's/:[0-9]+( |$)/:2\1/g' <<< "$CODE_SETS")
}

demonstration() {     # demonstration WORLD   toy, or one of shorter or longer chains for other models
  local toy=${TOY:---base tests/base}
  case $1 in
    toy) base=$OUT/base ;;
    short) base=$TABLES/worlds/short/base toy="$TOY --min-ops 2 --max-ops 3" ;;
    long) base=$TABLES/worlds/long/base toy="$TOY --min-ops 7 --max-ops 8" ;;
  esac
  step "$base" python tests/toy.py --out "${base%/base}" $toy
  prompts=${base%/base}/prompts/train.jsonl
  validation="validation=${base%/base}/prompts/validation.jsonl:2"
  SETS="test=${base%/base}/prompts/test.jsonl:${K_TABLES:-4}"
  # A tenth of the paper's prompts, a quarter of its batches: an epoch has 13 or 7 steps. Learning rates start
  # from those of the default run. beta x length is the paper's: 0.5 at 41 tokens is 0.001 at 20,000.
  COLLECT="--num-prompts ${PROMPTS_TABLES:-100} $SAMPLE" ONLINE="--num-prompts 40 $SAMPLE" ONLINE_PART=5
  FLAGS=$TRAIN DENSE="--save-every 4"
  SCORE="$MEASURE --top-p 0.95" SCORE_KL="$MEASURE --top-p 1" KL_SAMPLES=1  # top-p below 1 would bias it
  BATCH32="--batch-prompts 8" BATCH64="--batch-prompts 16"
  CE="--loss ce --lr 3e-4" BETA_1E3="--beta 0.5" BETA_1E2="--beta 5" BETA_5E2="--beta 25"
  STAGE1_KL="--kl-coef 2" STAGE1_KL_5="--kl-coef 10" EXACT="--kl-coef 10 --kl-kind exact"
  SAPO="--loss sapo --lr 5e-5" GRPO="--loss grpo --lr 3e-4" SFT="--loss sft --lr 3e-4"
  PPO="--loss ppo --lr 2e-4 --value-steps 100 --value-lr 1e-3"
  MSE="--loss mse --lr 5e-4" UNLEARN_5E6="--loss mse --lr 1e-3" UNLEARN_1E5="--loss mse --lr 2e-3"
  UNLEARN_A="--loss mse --lr 1e-4 --negative-weight 0.5" UNLEARN_B="--loss mse --lr 1e-4 --negative-weight 1"
  UNLEARN_C="--loss mse --lr 5e-4 --negative-weight 1"
  # Ours: a KL term over the whole vocabulary, for students and their control (Table 2), and apart (Fig. 6).
  SAME_KL="--kl-coef 0.3 --kl-kind exact" DISTIL="--lr 3e-4 $SAME_KL" DISTIL_SAPO="--lr 1e-4"
  DISTIL_WEAK=$DISTIL
  KL_HIGH="--kl-coef 3 --kl-kind exact" KL_MIDDLE="--kl-coef 1 --kl-kind exact"
  KL_LOW="--kl-coef 0.1 --kl-kind exact" ENTROPY="--entropy-coef 0.3"
}

paper() {             # paper MODEL   settings of Sec. 4.1
  local temperature=0.6 length=32768 large=''
  case $1 in
    *Qwen3.5*) temperature=1.0 length=192000 ;;
    *Qwen3-4B*) length=81920 ;;
    *Nanbeige*) length=65536 ;;
    *) ;;                                               # ours: 32,768 for models that Sec. 4.1 does not name
  esac
  case $1 in *27B*) large="--tensor-parallel 2" ;; esac  # ours: one GPU has no room for a cache beside it
  base=$1 prompts=${PROMPTS:-POLARIS-Project/Polaris-Dataset-53K}
  COLLECT="-n 16 --temperature $temperature --max-tokens 32768 --ask-for-box $large"
  # ours: 32 prompts on-policy. Shards of 4: with 16, eight processes would share two to three shards.
  ONLINE="--num-prompts 32 $COLLECT --shard-prompts 4" ONLINE_PART=1 COLLECT="--num-prompts 1000 $COLLECT"
  FLAGS='' SCORE="--temperature $temperature --max-tokens $length --ask-for-box --shard-prompts 4 $large"
  if [ "$NPROC" -gt 1 ]; then FLAGS=--shard; fi         # from 4B on, 80 GB are too little without it
  if [ -n "$large" ] && [ "$NPROC" -gt 1 ]; then SCORE="$SCORE --shard"; fi
  DENSE='' SAME_KL='' EXACT=''
  SCORE_KL="$SCORE --top-p 1 --top-k -1" SCORE="$SCORE --top-p 0.95"  # top-p below 1 would bias the KL
  if [ -n "${JUDGE_URL:-}" ]; then SCORE="$SCORE --judge-url $JUDGE_URL --judge-model $JUDGE_MODEL"; fi
  BATCH32="--batch-prompts 32" BATCH64="--batch-prompts 64"
  CE="--loss ce --lr 1e-6" BETA_1E3="--beta 0.001" BETA_1E2="--beta 0.01" BETA_5E2="--beta 0.05"
  STAGE1_KL="--kl-coef 2" STAGE1_KL_5="--kl-coef 10"    # Fig. 6: 2. ours: 10
  SAPO="--loss sapo --lr 1e-6" GRPO="--loss grpo --lr 1e-6" SFT="--loss sft --lr 1e-6"
  PPO="--loss ppo --lr 1e-6" MSE="--loss mse --lr 1e-6"
  UNLEARN_5E6="--loss mse --lr 5e-6" UNLEARN_1E5="--loss mse --lr 1e-5"
  UNLEARN_A="--loss mse --lr 2e-6 --negative-weight 0.5" UNLEARN_B="--loss mse --lr 2e-6 --negative-weight 1"
  UNLEARN_C="--loss mse --lr 5e-6 --negative-weight 1"
  DISTIL="--lr 1e-6" DISTIL_WEAK="--lr 1e-6" DISTIL_SAPO="--lr 1e-6"
  KL_HIGH="--kl-coef 0.2" KL_MIDDLE="--kl-coef 0.05" KL_LOW="--kl-coef 0.001" ENTROPY="--entropy-coef 0.5"
}

shared_settings() {   # what several recipes train: loss, batch and steps
  # ours: 100 steps of CE, GRPO and PPO; 70 of MSE beyond Tables 1, 7, 12; 16 for students of GRPO and MSE
  local dozens="$BATCH32 --steps 100 $DENSE"
  CE_100="$CE $BETA_1E3 $dozens" CE_1E2="$CE $BETA_1E2 $dozens" CE_5E2="$CE $BETA_5E2 $dozens"
  GRPO_100="$GRPO $dozens" PPO_100="$PPO $dozens"
  SAPO_120="$SAPO $BATCH32 --steps 120 $DENSE" MSE_70="$MSE $BATCH32 --steps 70"
  STUDENT="$DISTIL $BATCH64 --steps 16" STUDENT_10="$DISTIL $BATCH64 --steps 10"
  SAPO_STUDENT="$DISTIL_SAPO $BATCH32 --steps 32" SAPO_STUDENT_2="$SAPO_STUDENT --save-every 2"
  WEAK="$DISTIL_WEAK $BATCH64 --steps 16"
}

models() {            # models TABLE   MODEL, else MODELS, else those of the paper or their stand-ins
  local qwen=Qwen/Qwen3-4B-Thinking-2507 nbg=Nanbeige/Nanbeige4-3B-Thinking-2511
  if [ -n "${MODEL:-}${MODELS:-}" ]; then echo "${MODEL:-$MODELS}"; return; fi
  case $1${REAL:+-real} in
    table1-real|table12-real|fig4-real) echo "$qwen $nbg" ;;
    table4-real|table5-real|fig8-real) echo "$nbg" ;;
    # The first thinks only after a system message "detailed thinking on": PROMPTS, BENCHMARKS of messages.
    table10-real) echo "nvidia/Llama-3.1-Nemotron-Nano-4B-v1.1 nvidia/AceReason-Nemotron-1.1-7B" \
      "hbx/JustRL-Nemotron-1.5B $qwen $nbg" ;;
    table11-real) echo "Qwen/Qwen3.5-9B Qwen/Qwen3.5-27B" ;;
    *-real) echo "$qwen" ;;
    table10) echo "toy short long" ;;
    table11|table12) echo "toy long" ;;
    *) echo toy ;;
  esac
}

seeds() {             # seeds TABLE   three where claims are decided, one in other worlds and on real models
  if [ -n "$SEEDS" ]; then echo "$SEEDS"; return; fi
  case ${REAL:+real-}$model-$1 in               # Table 3's own rows decide no claim
    toy-table3) echo 0 ;;
    toy-*) echo "0 1 2" ;;
    *) echo 0 ;;
  esac
}

reads() {             # reads TABLE   of SETS those that the table reads, and those that are not the paper's
  if [ -n "$REAL" ]; then python3 tests/paper/reads.py "$1" "$where" $SETS; else echo "$SETS"; fi
}
