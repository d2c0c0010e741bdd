# shellcheck shell=bash
# Every table and figure of the paper as literal commands, and how they run. Sourced by run_rounds.sh.
#
# A recipe holds the commands for one model and one seed; `recipes` loops over both. Runs live in
# TABLES/runs/MODEL/seedN and are shared: a command whose output is there is skipped, so every recipe names
# all
# that it needs. What differs between the demonstration world and the paper's models stands in `demonstration`
# and `paper`, what a rehearsal changes in `rehearsal`, and nowhere else.
#
# The comment behind a command holds the paper's numbers for its result; "# ours:" names what the paper does
# not give.
# Everywhere ours: the batch of each teacher (32 prompts, one of the three of Sec. 4.1), the last checkpoint
# of a teacher
# as the one that is distilled, how often checkpoints are saved, and the steps where a table gives none: 100
# for CE, GRPO
# and PPO, 70 for MSE (Table 7), 50 for a recovery by SFT or CE, and 16 of 64 prompts for a student.

REAL=${MODEL:-${MODELS:-${PROMPTS:-${REHEARSE:-}}}}     # with any of these: real models, the paper's settings
POLARIS=${PROMPTS:-POLARIS-Project/Polaris-Dataset-53K}        # fields problem and answer
# Sec. 4.1: K is 32, 16 for Beyond AIME and 4 for IMO Answer Bench. All have fields that rollout.py
# recognises. The
# last is answerbench_v2.csv of google-deepmind/superhuman (its row imo-bench-algebra-036 has lost its
# answer).
SETS=${BENCHMARKS:-aime24=HuggingFaceH4/aime_2024:32 aime25=MathArena/aime_2025:32
  hmmt_feb25=MathArena/hmmt_feb_2025:32 hmmt_nov25=MathArena/hmmt_nov_2025:32
  hmmt_feb26=MathArena/hmmt_feb_2026:32 beyond_aime=ByteDance-Seed/BeyondAIME:16 imo=answerbench_v2.csv:4}
# Table 11: train.jsonl of inclusionAI/AReaL-boba-2-RL-Code
CODE_PROMPTS=${CODE_PROMPTS:-areal-boba-2-rl-code.jsonl}
CODE_BENCHMARKS=${CODE_BENCHMARKS:-livecodebench=test6.jsonl:32}       # of livecodebench/code_generation_lite
PROMPTS_TABLES=${PROMPTS_TABLES:-500}          # demonstration world: 500 prompts x 8 responses for 1,000 x 16
K_TABLES=${K_TABLES:-8}                                        # samples per test problem
LENGTH=${LENGTH:-20000}                          # tokens of a response, for the cost that a rehearsal reckons
JOBS=${JOBS:-$([ -n "$REAL" ] && echo 1 || nproc)}             # seeds at the same time, with one thread each
code_benchmarks= validation= child= children= where= dir= seed=
trap 'for child in $children; do kill -- "-$child" 2> /dev/null || true; done' EXIT

rehearsal() {                     # the sizes of a rehearsal, behind those of the recipe: the last flag counts
  SMALLER_COLLECT= SMALLER_TEACH= SMALLER_DISTIL= SMALLER_SCORE=
  if [ -z "${REHEARSE:-}" ]; then return; fi
  local prompts=$((NPROC > 4 ? NPROC : 4))                     # at least one for each process
  SMALLER_COLLECT="--num-prompts $prompts -n 4 --max-tokens 48"
  SMALLER_COLLECT+=" --shard-prompts $(((prompts + NPROC - 1) / NPROC)) --rehearse"
  SMALLER_TEACH="--steps 3 --save-every 1 --value-steps 2" SMALLER_DISTIL="--steps 3 --save-every 1"
  # and K = 2, in `score`; steps of a name become 1 or 2, in `at`
  SMALLER_SCORE="--num-problems $prompts --max-tokens 48"
}

demonstration() {    # demonstration WORLD   toy, or one of shorter or longer chains in place of another model
  case $1 in
    toy)   base=$OUT/base toy=$TOY ;;
    short) base=$TABLES/worlds/short/base toy="$TOY --min-ops 2 --max-ops 3" ;;
    long)  base=$TABLES/worlds/long/base toy="$TOY --min-ops 7 --max-ops 8" ;;
  esac
  step "$base" python tests/toy.py --out "${base%/base}" $toy
  prompts=${base%/base}/prompts/train.jsonl
  validation="validation=${base%/base}/prompts/validation.jsonl:2"
  benchmarks="test=${base%/base}/prompts/test.jsonl:$K_TABLES"
  # Half the paper's prompts, responses and batches, so an epoch has its 32 or 16 steps. Chosen on validation
  # prompts.
  COLLECT="--num-prompts $PROMPTS_TABLES $SAMPLE" ONLINE="--num-prompts 16 $SAMPLE" ONLINE_PART=5 FLAGS=$TRAIN
  SCORE="$MEASURE --shard-prompts 200" SCORE_KL=
  BATCH32="--batch-prompts 16" BATCH64="--batch-prompts 32"
  CE="--loss ce --lr 3e-4" BETA_1E3="--beta 0.5" BETA_1E2="--beta 1" BETA_5E2="--beta 2"
  STAGE1_KL="--kl-coef 3 --kl-kind exact" STAGE1_KL_5="--kl-coef 10 --kl-kind exact"
  SAPO="--loss sapo --lr 1e-4" GRPO="--loss grpo --lr 3e-4" PPO="--loss ppo --lr 2e-4 --value-steps 100 \
    --value-lr 1e-3"
  MSE="--loss mse --lr 5e-4" UNLEARN_5E6="--loss mse --lr 1e-3" UNLEARN_1E5="--loss mse \
    --lr 2e-3" SFT="--loss sft --lr 3e-4"
  UNLEARN_A="--loss mse --lr 5e-4 --negative-weight 0.5" UNLEARN_B="--loss mse --lr 5e-4 --negative-weight 1"
  UNLEARN_C="--loss mse --lr 1e-3 --negative-weight 1"
  DISTIL="--lr 3e-4 --kl-coef 1 --kl-kind exact" DISTIL_WEAK="--lr 3e-4 --kl-coef 0.3 \
    --kl-kind exact" DISTIL_SAPO="--lr 1e-4"
  KL_HIGH="--kl-coef 3 --kl-kind exact" KL_MIDDLE="--kl-coef 1 --kl-kind exact" KL_LOW="--kl-coef 0.1 \
    --kl-kind exact"
  ENTROPY="--entropy-coef 0.3"
}

paper() {                 # paper MODEL   settings of Sec. 4.1; on real models with MODEL, PROMPTS, BENCHMARKS
  local temperature=0.6 length=32768 large=
  case $1 in
    *Qwen3.5*) temperature=1.0 length=192000 ;;
    *Qwen3-4B*) length=81920 ;;
    *Nanbeige*) length=65536 ;;
    *) ;;                                                # ours: 32,768 for models that Sec. 4.1 does not name
  esac
  # ours: 54 GB of bf16 weights leave no room for 192,000 tokens
  case $1 in *27B*) large="--tensor-parallel 2" ;; esac
  base=$1 prompts=$POLARIS
  COLLECT="--num-prompts 1000 -n 16 --temperature $temperature --max-tokens 32768 --ask-for-box $large"
  # ours: 32
  ONLINE="--num-prompts 32 -n 16 --temperature $temperature --max-tokens 32768 \
    --ask-for-box $large" ONLINE_PART=1
  FLAGS= SCORE="--temperature $temperature --max-tokens $length --ask-for-box $large"
  # from 4B on, 80 GB are too little without it (README, memory)
  if [ "$NPROC" -gt 1 ]; then FLAGS=--shard; fi
  if [ -n "$large" ] && [ "$NPROC" -gt 1 ]; then SCORE="$SCORE --shard"; fi
  SCORE_KL="$SCORE --top-p 1 --top-k -1" SCORE="$SCORE --top-p 0.95"         # top-p below 1 would bias the KL
  if [ -n "${JUDGE_URL:-}" ]; then SCORE="$SCORE --judge-url $JUDGE_URL --judge-model $JUDGE_MODEL"; fi
  BATCH32="--batch-prompts 32" BATCH64="--batch-prompts 64"
  CE="--loss ce --lr 1e-6" BETA_1E3="--beta 0.001" BETA_1E2="--beta 0.01" BETA_5E2="--beta 0.05"
  STAGE1_KL="--kl-coef 2" STAGE1_KL_5="--kl-coef 10"           # Fig. 6: 2. ours: 10
  SAPO="--loss sapo --lr 1e-6" GRPO="--loss grpo --lr 1e-6" PPO="--loss ppo --lr 1e-6"
  MSE="--loss mse --lr 1e-6" UNLEARN_5E6="--loss mse --lr 5e-6" UNLEARN_1E5="--loss mse \
    --lr 1e-5" SFT="--loss sft --lr 1e-6"
  UNLEARN_A="--loss mse --lr 2e-6 --negative-weight 0.5" UNLEARN_B="--loss mse --lr 2e-6 --negative-weight 1"
  UNLEARN_C="--loss mse --lr 5e-6 --negative-weight 1"
  DISTIL="--lr 1e-6" DISTIL_WEAK="--lr 1e-6" DISTIL_SAPO="--lr 1e-6"
  KL_HIGH="--kl-coef 0.2" KL_MIDDLE="--kl-coef 0.05" KL_LOW="--kl-coef 0.001"
  ENTROPY="--entropy-coef 0.5"
}

# ---- one function per kind of command ----------------------------------------------------------------------

at() {                                # a policy by its short name
  case $1 in base) echo "$base"; return ;; old|none|live) echo "$1"; return ;; esac
  if [ -z "${REHEARSE:-}" ]; then echo "$dir/$1"; return; fi
  case $1 in                    # of a rehearsal's three steps, the first is any early one (Table 7 needs two)
    */step-00[0-3]?) echo "$dir/${1%/*}/step-0001" ;;
    */step-*) echo "$dir/${1%/*}/step-0002" ;;
    *) echo "$dir/$1" ;;
  esac
}

collect() {                           # collect NAME POLICY NUMBER   rollouts of a policy
  step "$dir/$1/rollouts.json" $PY rollout.py --model "$(at "$2")" --prompts "$prompts" --out "$dir/$1" \
    --seed "$((100 * seed + $3))" $COLLECT $SMALLER_COLLECT
}

teach() {                          # teach NAME START ROLLOUTS FLAGS   a teacher: many steps on fixed rollouts
  step "$dir/$1/final" $PY teacher.py --model "$(at "$2")" --rollouts "$dir/$3" --out "$dir/$1" --seed \
    "$seed" "${@:4}" $FLAGS $SMALLER_TEACH
}

distil() {                            # distil NAME START TEACHER DENOMINATOR ROLLOUTS FLAGS   a student
  step "$dir/$1/final" $PY distill.py --student "$(at "$2")" --teacher "$(at "$3")" --denominator "$(at \
    "$4")" \
    --rollouts "$dir/$5" --out "$dir/$1" --seed "$seed" "${@:6}" $FLAGS $SMALLER_DISTIL
}

ONLINE_KEPT="10 25 40 50 60 70 100"   # steps whose weights stay, for all recipes: they share runs

onpolicy() {                          # onpolicy NAME START STEP...   one optimizer step on each fresh batch,
                                      # Adam carried over; STEPs are measured
  local i out data policy previous= number= names="" updates
  # demonstration world: one for five of the paper's, which name it
  updates=$(seq "$ONLINE_PART" "$ONLINE_PART" "${*: -1}")
  if [ -n "${REHEARSE:-}" ]; then updates=${*:3}; fi
  policy=$(at "$2")
  for i in $updates; do
    out=$dir/$1/update$(printf %03d "$i") data=$dir/$1/rollouts$(printf %03d "$i")
    if [ -n "${DRY_RUN:-}" ] || [ ! -e "$out/final" ]; then
      step "$data/rollouts.json" $PY rollout.py --model "$policy" --prompts "$prompts" --out "$data" \
        --seed "$((1000 * seed + i / ONLINE_PART))" $ONLINE $SMALLER_COLLECT
      step "$out/final" $PY teacher.py --model "$policy" --rollouts "$data" --out "$out" --seed "$seed" \
        $GRPO $BATCH32 --steps 1 \
        ${previous:+--optimizer-from "$previous"} $FLAGS
      if [ -n "$previous" ] && [ -z "${DRY_RUN:-}" ]; then   # the newest update holds what the next one needs
        rm -f "$previous/final/optimizer.pt"
        case " $ONLINE_KEPT " in *" $number "*) ;; *) rm -f "$previous"/final/*.safetensors ;; esac
      fi
    fi
    previous=$out policy=$out/final number=$i
  done
  for i in "${@:3}"; do names="$names $1/update$(printf %03d "$i")/final"; done
  measure $names
}

score() {                     # score DATA FLAGS CHECKPOINT...   on the benchmarks DATA, those that lack a row
  local checkpoint names="" data=$1 flags=$2
  if [ -n "${REHEARSE:-}" ]; then data=$(sed -E 's/:[0-9]+( |$)/:2\1/g' <<< "$data"); fi
  for checkpoint in "${@:3}"; do names="$names $(at "$checkpoint")"; done
  names=$(printf '%s\n' $names | awk '!seen[$0]++')
  names=$(lacking "$where/results.jsonl" "$data" "$flags" $names)
  if [ -z "$names" ]; then return; fi
  step "" $PY evaluate.py --model $names --base "$base" --out "$where/results.jsonl" --data $data $flags \
    $SMALLER_SCORE
}

reads() {               # reads TABLE   of SETS those that the table reads, and those that are not the paper's
  if [ -n "$REAL" ]; then python3 tests/paper/reads.py "$1" "$where" $SETS; else echo "$benchmarks"; fi
}

selection() {           # the benchmark that checkpoints are chosen on: HMMT Feb 25 (Sec. 4.1), else the first
  case " $benchmarks" in *" hmmt_feb25="*) echo hmmt_feb25 ;; *) echo "${benchmarks%%=*}" ;; esac
}

kl_data() {         # the problems that KL is measured on: those of the selection benchmark, else of the first
  local all=${code_benchmarks:-$SETS} word
  word=$(tr -s ' \n' '\n' <<< "$all" | grep -m 1 '^hmmt_feb25=' || tr -s ' \n' '\n' <<< "$all" | sed -n 1p)
  word=${word#*=}
  echo "kl=${word%:*}:4"              # ours: 4 samples
}

measure() {                           # measure CHECKPOINT...   accuracy on the table's benchmarks, and the KL
  score "${code_benchmarks:-$benchmarks}" "$SCORE" "$@"
  if [ -n "$SCORE_KL" ]; then score "$(kl_data)" "$SCORE_KL" "$@"; fi
}

validate() {                          # validate CHECKPOINT...   on the demonstration world's validation
                                      # prompts too, where one is chosen by them
  if [ -n "$validation" ]; then score "$validation" "$SCORE" "$@"; fi
}

choose() {                 # choose BENCHMARK FLAGS CHECKPOINT...   one of them, by the rows of that benchmark
  local checkpoint names=""
  for checkpoint in "${@:3}"; do names="$names $(at "$checkpoint")"; done
  checkpoint=$(python evaluate.py --pick "$1" $2 --model $names --out "$where/results.jsonl")
  echo "${checkpoint#"$dir/"}"
}

best() {          # best CHECKPOINT...   the most accurate on the selection benchmark; DRY_RUN takes the first
  if [ -n "${DRY_RUN:-}" ]; then echo "$1"; return; fi
  measure "$@" >&2
  validate "$@" >&2
  if [ -n "$validation" ]; then choose validation "" "$@"; else choose "$(selection)" "" "$@"; fi
}

half_kl() {                           # half_kl RUN STEPS EVERY   its checkpoint with half the last one's KL;
                                      # DRY_RUN takes the middle one
  if [ -n "${DRY_RUN:-}" ]; then printf '%s/step-%04d\n' "$1" "$(($2 / 2))"; return; fi
  if [ -z "$SCORE_KL" ]; then validate $(path "$@") >&2; fi
  if [ -n "$SCORE_KL" ]; then score "$(kl_data)" "$SCORE_KL" $(path "$@") >&2; fi
  choose "$([ -n "$SCORE_KL" ] && echo kl || echo validation)" "--nearest-kl 0.5" $(path "$@")
}

movement() {                          # movement RUN...   what the tokens of a run did, into its run.json
  local run runs=""
  for run in "$@"; do runs="$runs $dir/$run"; done
  step "" $PY evaluate.py --movement $runs
}

# ---- tables ------------------------------------------------------------------------------------------------

table1() {            # losses x distillation; the comments hold the paper's averages for Qwen3-4B and NBG4-3B
  collect rollouts base 1                                                                   # base: 68.5, 72.5
  teach ppo  base rollouts $PPO $BATCH32 --steps 100                                              # 68.1, 73.9
  teach grpo base rollouts $GRPO $BATCH32 --steps 100                                             # 69.0, 73.6
  distil grpo-student base grpo/final old rollouts $DISTIL $BATCH64 --steps 16                    # 69.2, 73.5
  teach sapo base rollouts $SAPO $BATCH32 --steps 120                                             # 69.9, 76.2
  # 70.6, 77.5
  distil sapo-student base sapo/final old rollouts $DISTIL_SAPO $BATCH32 --steps 32 --save-every 2
  teach ce   base rollouts $CE $BETA_1E3 $BATCH32 --steps 100                                     # 72.9, 76.7
  distil ce-student base ce/final old rollouts $DISTIL $BATCH64 --steps 16                        # 73.3, 77.7
  teach mse  base rollouts $MSE $BATCH32 --steps 70                                               # 36.4, 37.1
  # 71.1, 74.9
  distil mse-min0 base mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16 \
    --positive-signal min0
  measure $(path ppo 100 50) $(path grpo 100 50) $(path sapo 120 20) $(path ce 100 20) mse/step-0010 \
    mse/final {grpo,sapo,ce}-student/final mse-min0/final
  validate $(path ppo 100 50) $(path grpo 100 50) $(path sapo 120 20) $(path ce 100 20)
}

batches() {                           # batches 1 to 4 of Table 2
  local n start=ce-student/step-0010
  collect rollouts base 1
  teach ce base rollouts $CE $BETA_1E3 $BATCH32 --steps 100                                 # 73.8 at KL 0.041
  distil ce-student base ce/final old rollouts $DISTIL $BATCH64 --steps 16     # 71.1 at 0.010, after 10 steps
  for n in 2 3; do
    collect batch$n/rollouts $start $n
    # 75.6 at 0.044, 77.2 at 0.042
    teach batch$n/ce $start batch$n/rollouts $CE $BETA_1E3 $BATCH32 --steps 100
    # 73.6 at 0.026, 76.4 at 0.037
    distil batch$n/student $start batch$n/ce/final old batch$n/rollouts $DISTIL $BATCH64 --steps 10
    start=batch$n/student/final
  done
  collect batch4/rollouts $start 4                              # strategy 3: away from the student of batch 1
  teach batch4/ce $start batch4/rollouts $CE $BETA_1E3 $BATCH32 --steps 100                    # 77.5 at 0.043
  # 79.3 at 0.062
  distil batch4/student $start batch4/ce/final ce-student/step-0010 batch4/rollouts $DISTIL $BATCH64 \
    --steps 10
  measure ce/final ce-student/step-0010 batch{2,3,4}/ce/final batch{2,3,4}/student/final
}

table2() {                 # rounds with and without distillation: average of three benchmarks, KL to the base
  local n half start=batch4/student/final
  batches                                                                                         # base: 67.9
  for n in 5 6; do                                 # strategy 2: weak to strong; the CE teacher for comparison
    collect batch$n/rollouts $start $n
    # 79.4 at 0.066, 80.2 at 0.077
    teach batch$n/ce $start batch$n/rollouts $CE $BETA_1E3 $BATCH32 --steps 100
    teach batch$n/mse $start batch$n/rollouts $MSE $BATCH32 --steps 70
    # 79.9, 80.6
    distil batch$n/student $start batch$n/mse/final batch$n/mse/step-0010 batch$n/rollouts $DISTIL_WEAK \
      $BATCH64 --steps 10
    start=batch$n/student/final
  done
  collect a2/rollouts ce/final 2           # (a) goes on from the last teacher, (b) from an earlier checkpoint
  teach a2/ce ce/final a2/rollouts $CE $BETA_1E3 $BATCH32 --steps 100                         # (a) 73.8, 74.0
  half=$(half_kl ce 100 10)                                          # the paper's (b) has KL 0.022, (a) 0.041
  collect b2/rollouts $half 2
  teach b2/ce $half b2/rollouts $CE $BETA_1E3 $BATCH32 --steps 100                            # (b) 70.6, 68.4
  measure batch{5,6}/ce/final batch{5,6}/student/final $half a2/ce/final b2/ce/final
}

table3() {                            # on-policy GRPO from the base and from batch 4's student, HMMT Feb 25
  onpolicy online base 25 50                                                                # 56.0, 57.2, 53.2
  batches
  onpolicy online-batch4 batch4/student/final 40 60                                         # 71.6, 70.4, 71.4
}

table4() {                            # time per stage: score and hours so far
  onpolicy online base 10 50 70 100                                                   # 66.8, 67.2, 68.5, 66.8
  collect rollouts base 1                                                                                # 7 h
  teach sapo base rollouts $SAPO $BATCH32 --steps 120                    # 40, 80, 100 steps: 68.9, 68.3, 70.5
  # 10, 16, 32: 67.2, 68.3, 73.3
  distil sapo-student base sapo/final old rollouts $DISTIL_SAPO $BATCH32 --steps 32 --save-every 2
  measure sapo/step-00{40,80} sapo/step-0100 sapo-student/step-00{10,16} sapo-student/final
}

table5() {                            # steps and KL weight of the distillation: HMMT Feb 25 and KL
  collect rollouts base 1                                                                         # base: 63.9
  teach sapo base rollouts $SAPO $BATCH32 --steps 120                  # 60: 68.1 at 0.016, 120: 70.2 at 0.023
  # 16, 20, 32: 68.3, 70.2, 73.3
  distil sapo-student base sapo/final old rollouts $DISTIL_SAPO $BATCH32 --steps 32 --save-every 2
  distil sapo-kl-high base sapo/final old rollouts $DISTIL_SAPO $BATCH32 --steps 32 $KL_HIGH   # 70.2 at 0.014
  # 69.6 at 0.020
  distil sapo-kl-middle base sapo/final old rollouts $DISTIL_SAPO $BATCH32 --steps 32 $KL_MIDDLE
  distil sapo-kl-low base sapo/final old rollouts $DISTIL_SAPO $BATCH32 --steps 32 $KL_LOW     # 71.7 at 0.018
  measure sapo/step-0060 \
    sapo/final sapo-student/step-00{16,20} sapo-student/final sapo-kl-{high,middle,low}/final
}

table6() {                            # three batches without and with the entropy bonus: AIME 2025, entropy
  local n start=entropy1/final
  batches                                                           # 82.5 at 0.19, 84.5 at 0.16, 84.5 at 0.14
  distil entropy1 base ce/final old rollouts $DISTIL $ENTROPY $BATCH64 --steps 10               # 83.7 at 0.19
  for n in 2 3; do
    collect entropy$n/rollouts $start $n
    teach entropy$n/ce $start entropy$n/rollouts $CE $BETA_1E3 $BATCH32 --steps 100
    # 88.3 at 0.21, 85.6 at 0.25
    distil entropy$n/student $start entropy$n/ce/final old entropy$n/rollouts $DISTIL $ENTROPY $BATCH64 \
      --steps 10
    start=entropy$n/student/final
  done
  measure entropy1/final entropy{2,3}/student/final
}

table7() {                            # which steps of the MSE run make the signal: HMMT Feb 25
  local n
  collect rollouts base 1                                                                         # base: 56.0
  teach mse base rollouts $MSE $BATCH32 --steps 70
  distil signal-70-10 base mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16            # 60.1
  distil signal-70-20 base mse/final mse/step-0020 rollouts $DISTIL_WEAK $BATCH64 --steps 16            # 59.1
  distil signal-70-30 base mse/final mse/step-0030 rollouts $DISTIL_WEAK $BATCH64 --steps 16            # 53.1
  distil signal-60-10 base mse/step-0060 mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16        # 61.0
  distil signal-50-10 base mse/step-0050 mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16        # 64.3
  distil signal-40-10 base mse/step-0040 mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16        # 59.5
  distil signal-old-50 base old mse/step-0050 rollouts $DISTIL_WEAK $BATCH64 --steps 16                 # 59.1
  distil signal-10-old base mse/step-0010 old rollouts $DISTIL_WEAK $BATCH64 --steps 16                 # 61.3
  distil signal-10-none base mse/step-0010 none rollouts $DISTIL_WEAK $BATCH64 --steps 16               # 56.3
  distil signal-none-50 base none mse/step-0050 rollouts $DISTIL_WEAK $BATCH64 --steps 16               # 59.3
  # ours: 16 steps of 64; Sec. 3.4: "does not lead to improvements"
  distil signal-70-old base mse/final old rollouts $DISTIL_WEAK $BATCH64 --steps 16
  measure signal-70-{10,20,30,old}/final signal-{60,50,40}-10/final signal-old-50/final \
    signal-10-{old,none}/final signal-none-50/final
}

table8() {   # ensembles: an old-start teacher, then an unlearned-start one; each 16 or 32 steps by validation
  local strong weak                            # ours: the old-start teacher first, 16 steps of 64 or 32 of 32
  collect rollouts base 1                                                            # HMMT Feb 25, base: 56.0
  teach mse base rollouts $MSE $BATCH32 --steps 70
  teach ce base rollouts $CE $BETA_1E3 $BATCH32 --steps 100
  teach ce-5e2 base rollouts $CE $BETA_5E2 $BATCH32 --steps 100
  teach unlearned-ce-1e3 mse/step-0010 rollouts $CE $BETA_1E3 --ref start $BATCH32 --steps 100
  teach unlearned-ce-1e2 mse/step-0010 rollouts $CE $BETA_1E2 --ref start $BATCH32 --steps 100
  # MSE alone: 62.7
  distil mse-min0 base mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16 \
    --positive-signal min0
  distil ce-student base ce/final old rollouts $DISTIL $BATCH64 --steps 16               # CE 1e-3 alone: 67.1
  distil ce-student-32 base ce/final old rollouts $DISTIL $BATCH32 --steps 32 --save-every 16
  # CE 5e-2 alone: 63.8
  distil ce-5e2-student base ce-5e2/final old rollouts $DISTIL $BATCH32 --steps 32 --save-every 16
  weak=$(best ce-student-32/step-0016 ce-student-32/final)
  strong=$(best ce-5e2-student/step-0016 ce-5e2-student/final)
  # 66.7
  distil ensemble-mse-5e2 $strong mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH32 --steps 32 \
    --save-every 16
  # 66.5
  distil ensemble-1e3-1e3 $weak unlearned-ce-1e3/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH32 \
    --steps 32 --save-every 16
  # 66.8
  distil ensemble-1e2-5e2 $strong unlearned-ce-1e2/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH32 \
    --steps 32 --save-every 16
  # 69.0
  distil ensemble-1e3-5e2 $strong unlearned-ce-1e3/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH32 \
    --steps 32 --save-every 16
  measure mse-min0/final ce-student/final ensemble-{mse-5e2,1e3-1e3,1e2-5e2,1e3-5e2}/{step-0016,final}
  validate ensemble-{mse-5e2,1e3-1e3,1e2-5e2,1e3-5e2}/{step-0016,final}
}

table9() {                  # recovery of an unlearned policy by SFT or CE: students on HMMT Feb 25 and Nov 25
  local un
  collect rollouts base 1
  teach unlearned-a base rollouts $UNLEARN_A $BATCH32 --steps 10
  teach unlearned-b base rollouts $UNLEARN_B $BATCH32 --steps 10
  teach unlearned-c base rollouts $UNLEARN_C $BATCH32 --steps 10
  # SFT: 57.6 66.4, 53.5 64.9, 63.5 67.9; CE: 62.5 71.0, 64.1 70.4, 62.6 67.9
  for un in unlearned-a unlearned-b unlearned-c; do
    teach $un-sft $un/final rollouts $SFT $BATCH32 --steps 50
    distil $un-sft-student base $un-sft/final $un/final rollouts $DISTIL_WEAK $BATCH64 --steps 16
    teach $un-ce $un/final rollouts $CE $BETA_1E3 --ref start $BATCH32 --steps 50
    distil $un-ce-student base $un-ce/final $un/final rollouts $DISTIL_WEAK $BATCH64 --steps 16
  done
  measure unlearned-{a,b,c}/final unlearned-{a,b,c}-{sft,ce}-student/final
}

table10() {                           # MSE + distillation on five models: HMMT Feb 25 and AIME24 length
  collect rollouts base 1                         # 40.8 19.8K, 45.0 14.8K, 39.3 12.8K, 56.0 19.8K, 63.9 24.8K
  teach mse base rollouts $MSE $BATCH32 --steps 70
  # 44.3 18.0K ... 62.7 20.8K
  distil mse-min0 base mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16 \
    --positive-signal min0
  # NBG4-3B: 67.6 23.3K
  distil signal-70-10 base mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16
  measure mse/final mse-min0/final signal-70-10/final
}

table11() {         # Qwen3.5: three batches of MSE + distillation on math; code with three unlearned policies
  local n start=signal-70-10/final
  collect rollouts base 1                                                              # 80.1 (9B), 86.5 (27B)
  teach mse base rollouts $MSE $BATCH32 --steps 70
  distil signal-70-10 base mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16      # 82.8, 88.7
  for n in 2 3; do
    collect mse-batch$n/rollouts $start $n
    teach mse-batch$n/mse $start mse-batch$n/rollouts $MSE $BATCH32 --steps 70
    distil mse-batch$n/student $start mse-batch$n/mse/final mse-batch$n/mse/step-0010 mse-batch$n/rollouts \
      $DISTIL_WEAK $BATCH64 --steps 16                                           # 86.4, 89.5; then 86.7, 90.9
    start=mse-batch$n/student/final
  done
  measure signal-70-10/final mse-batch{2,3}/student/final
  case $model in *27B|long) return ;; esac
  teach ce base rollouts $CE $BETA_1E3 $BATCH32 --steps 100                                             # 80.8
  measure ce/final
  if [ -n "$REAL" ]; then code; else unlearned_rates; fi      # the demonstration world has no programs
}

code() {                        # the code half of Table 11, trained apart: programs in place of boxed answers
  local where=$where-code dir=$where-code/seed$seed prompts=$CODE_PROMPTS code_benchmarks=$CODE_BENCHMARKS
  local COLLECT="${COLLECT/--ask-for-box/} --task code" SCORE_KL="${SCORE_KL/--ask-for-box/} --task code"
  local SCORE="${SCORE/--ask-for-box/} --task code"
  SCORE=${SCORE/--judge-url ${JUDGE_URL:-} --judge-model ${JUDGE_MODEL:-}/}     # programs are run, not judged
  collect rollouts base 1                                                                               # 56.1
  measure base
  teach ce base rollouts $CE $BETA_1E3 $BATCH32 --steps 100                                             # 50.7
  teach mse base rollouts $MSE $BATCH32 --steps 70
  distil signal-70-10 base mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16      # 1e-6: 40.2
  measure ce/final signal-70-10/final
  unlearned_rates
}

unlearned_rates() {                   # unlearned apart at other rates, under the same recovered teacher
  teach unlearned-5e6 base rollouts $UNLEARN_5E6 $BATCH32 --steps 10
  # 5e-6: 63.7
  distil unlearned-5e6-student base mse/final unlearned-5e6/final rollouts $DISTIL_WEAK $BATCH64 --steps 16
  teach unlearned-1e5 base rollouts $UNLEARN_1E5 $BATCH32 --steps 10
  # 1e-5: 62.4
  distil unlearned-1e5-student base mse/final unlearned-1e5/final rollouts $DISTIL_WEAK $BATCH64 --steps 16
  measure unlearned-{5e6,1e5}-student/final
}

table12() {                           # outliers on positive responses: HMMT Feb 25, Qwen3-4B and NBG4-3B
  collect rollouts base 1                                                                         # 56.0, 63.9
  teach mse base rollouts $MSE $BATCH32 --steps 70
  distil signal-70-10 base mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16      # 60.1, 67.6
  # 59.5, 65.7
  distil mse-max0 base mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16 \
    --positive-signal max0
  # 62.7, 68.6
  distil mse-min0 base mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16 \
    --positive-signal min0
  measure signal-70-10/final mse-max0/final mse-min0/final
}

fig4() {          # accuracy over steps on one batch: SAPO (NBG4-3B), CE (Qwen3-4B); probabilities and entropy
  collect rollouts base 1
  teach sapo base rollouts $SAPO $BATCH32 --steps 120
  teach sapo-4 base rollouts $SAPO $BATCH32 --steps 4                     # what common practice stops at
  teach ce base rollouts $CE $BETA_1E3 $BATCH32 --steps 100
  teach ce-4 base rollouts $CE $BETA_1E3 $BATCH32 --steps 4
  measure {sapo,ce}-4/final $(path sapo 120 20) $(path ce 100 20)
  validate $(path sapo 120 20) $(path ce 100 20)
}

fig5() {                              # MSE: unlearning, then recovery; explained variance
  collect rollouts base 1
  teach mse base rollouts $MSE $BATCH32 --steps 70
  measure $(path mse 70 10)
}

fig6() {       # accuracy against KL: CE at two betas and with a KL weight of 2, and students of the first two
  collect rollouts base 1
  teach ce base rollouts $CE $BETA_1E3 $BATCH32 --steps 100
  teach ce-1e2 base rollouts $CE $BETA_1E2 $BATCH32 --steps 100                                         # 61.0
  teach ce-kl base rollouts $CE $BETA_1E3 $STAGE1_KL $BATCH32 --steps 100       # "no significant improvement"
  # ours: 100 steps, a single stage at the student's own KL
  teach ce-kl-5 base rollouts $CE $BETA_1E3 $STAGE1_KL_5 $BATCH32 --steps 100
  distil ce-student base ce/final old rollouts $DISTIL $BATCH64 --steps 16
  # 65.1 after 10 steps, 63.8 after 16
  distil ce-1e2-student base ce-1e2/final old rollouts $DISTIL $BATCH64 --steps 16
  measure $(path ce 100 20) $(path ce-1e2 100 20) ce-kl/step-0010 $(path ce-kl 100 20) ce-kl-5/step-0010 \
    $(path ce-kl-5 100 20) {ce,ce-1e2}-student/{step-0010,final}
  validate $(path ce 100 20) $(path ce-kl 100 20)
}

fig7() {                              # pi_old or the live student as denominator
  collect rollouts base 1
  teach ce-1e2 base rollouts $CE $BETA_1E2 $BATCH32 --steps 100                                         # 61.0
  # 65.1 after 10 steps, 63.8 after 16
  distil ce-1e2-student base ce-1e2/final old rollouts $DISTIL $BATCH64 --steps 16
  distil ce-1e2-live base ce-1e2/final live rollouts $DISTIL $BATCH64 --steps 16                  # 61.2, 61.1
  measure ce-1e2/final ce-1e2-{student,live}/{step-0010,final}
  movement ce-1e2-student ce-1e2-live
}

fig8() {                              # online and offline phases in turn, SAPO
  # ours: which phase starts where, and the lengths of the online phases
  collect rollouts base 1
  teach sapo base rollouts $SAPO $BATCH32 --steps 120
  # Offline-1: 73.3
  distil sapo-student base sapo/final old rollouts $DISTIL_SAPO $BATCH32 --steps 32 --save-every 2
  offline offline2 sapo-student/final 2                                            # Offline-2: no improvement
  offline offline3 offline2/student/final 3
  onpolicy online2 offline2/student/final 50
  offline offline4 online2/update050/final 4
  onpolicy online base 100
  measure sapo-student/final offline{2,3,4}/student/final
}

offline() {                           # offline NAME START NUMBER   one round of SAPO + distillation
  collect $1/rollouts $2 $3
  teach $1/sapo $2 $1/rollouts $SAPO $BATCH32 --steps 120
  distil $1/student $2 $1/sapo/final old $1/rollouts $DISTIL_SAPO $BATCH32 --steps 32
}

fig9() {                              # unlearning strength, and SFT from the policy after ten steps
  collect rollouts base 1
  teach unlearned-a base rollouts $UNLEARN_A $BATCH32 --steps 10
  teach unlearned-b base rollouts $UNLEARN_B $BATCH32 --steps 10
  teach unlearned-c base rollouts $UNLEARN_C $BATCH32 --steps 10
  local un
  for un in unlearned-a unlearned-b unlearned-c; do
    teach $un-sft $un/final rollouts $SFT $BATCH32 --steps 50
  done
  measure unlearned-{a,b,c}/final
  movement unlearned-{a,b,c}-sft
}

fig10() {            # outliers: probabilities of the MSE policy against the values of a linear critic (PPO's)
  collect rollouts base 1
  teach mse base rollouts $MSE $BATCH32 --steps 70
  teach ppo base rollouts $PPO $BATCH32 --steps 100
  movement mse ppo
}

# ---- models, seeds, jobs -----------------------------------------------------------------------------------

models() {                     # models TABLE   MODEL, else MODELS, else those of the paper or their stand-ins
  local qwen=Qwen/Qwen3-4B-Thinking-2507 nbg=Nanbeige/Nanbeige4-3B-Thinking-2511
  if [ -n "$REAL" ] && [ -n "${MODEL:-}${MODELS:-}" ]; then echo "${MODEL:-$MODELS}"; return; fi
  case $1${REAL:+-real} in
    table1-real|table12-real|fig4-real) echo "$qwen $nbg" ;;
    table4-real|table5-real|fig8-real) echo "$nbg" ;;
    table10-real) echo "nvidia/Llama-3.1-Nemotron-Nano-4B-v1.1 nvidia/AceReason-Nemotron-1.1-7B \
      hbx/JustRL-Nemotron-1.5B $qwen $nbg" ;;
    table11-real) echo "Qwen/Qwen3.5-9B Qwen/Qwen3.5-27B" ;;
    *-real) echo "$qwen" ;;
    table10) echo "toy short long" ;;
    table11|table12) echo "toy long" ;;
    *) echo toy ;;
  esac
}

seeds() {            # seeds TABLE   more where they are cheap and decide; one on real models, as in the paper
  if [ -n "$SEEDS" ]; then echo "$SEEDS"; return; fi
  case ${REAL:+real}$1-${model:-} in
    real*|table11-long) echo 0 ;;
    fig4*|fig7*) echo "0 1 2 3" ;;
    *) echo "0 1" ;;
  esac
}

tables() {           # tables NAME...   every model and seed of these recipes, JOBS at a time, then one report
  local list="" model name
  for name in "$@"; do
    for model in $(models "$name"); do
      case " $list " in *" $model "*) continue ;; esac
      # or a processor waits for them at the end
      case $model in short|long) list="$model $list" ;; *) list="$list $model" ;; esac
    done
  done
  # on a small model two jobs of one thread do twice the work of one job of two
  if [ "$JOBS" -gt 1 ]; then export OMP_NUM_THREADS=1; fi
  for model in $list; do
    free
    where=$TABLES/runs/$(basename "$model")
    rehearsal
    if [ -n "$REAL" ]; then paper "$model"; else demonstration "$model"; fi
    for name in "$@"; do              # once, before the seeds run beside each other
      case " $(models "$name") " in *" $model "*) benchmarks=$(reads "$name"); measure base ;; esac
    done
    validate base
    for seed in $(for name in "$@"; do seeds "$name" | tr ' ' '\n'; done | sort -nu); do
      dir=$where/seed$seed
      if [ -n "${DRY_RUN:-}" ]; then ( recipes "$@" ); continue; fi
      free
      mkdir -p "$where"
      set -m                         # a process group of its own, so that it can be stopped with its children
      if [ "$JOBS" = 1 ]; then
        recipes "$@" < /dev/null &
      else
        ( trap '[ $? = 0 ] || { tail -n 5 "$dir.log"; echo "run_rounds.sh: stopped, see $dir.log"; } >&3' EXIT
          recipes "$@" ) >> "$dir.log" 2>&1 < /dev/null &
      fi
      set +m
      children="$children $!"
    done
  done
  while [ -n "$(jobs -p)" ]; do wait -n; done
  local out=$TABLES/$1 title="demonstration world" worlds=""
  for model in $list; do worlds="$worlds $(basename "$model") $(basename "$model")-code"; done
  if [ "$#" -gt 1 ]; then out=$TABLES/all; fi
  if [ -n "$REAL" ]; then title=${MODEL:-${MODELS:-models of the paper}}; fi
  step "" python evaluate.py --report "$out" --tables "$@" --runs "$TABLES/runs" --models $worlds --title \
    "$title"
  # what it took, and what the whole recipe would cost
  if [ -n "${REHEARSE:-}" ] && [ -z "${DRY_RUN:-}" ]; then
    DRY_RUN=1 REHEARSE= PROMPTS=$POLARIS TABLES=$TABLES ./run_rounds.sh "$command" | python \
      tests/paper/cost.py "$TABLES" --length "$LENGTH"
  fi
}

recipes() {                  # recipes NAME...   those that want this model and this seed, one after the other
  local name start
  for name in "$@"; do
    case " $(models "$name") " in *" $model "*) ;; *) continue ;; esac
    case " $(seeds "$name") " in *" $seed "*) ;; *) continue ;; esac
    start=$SECONDS benchmarks=$(reads "$name")
    "$name"
    if [ -n "${DRY_RUN:-}" ]; then continue; fi
    echo "$name ${model##*/} seed$seed $((SECONDS - start)) s" | tee -a "$TABLES/seconds.txt" >&3
  done
}

# wait until fewer than JOBS jobs run; stop if one failed
free() { while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n; done; }

