#!/usr/bin/env bash
# Extreme Region Policy Distillation, from one command.
#
#   ./run_rounds.sh          the whole method on the demonstration world, CPU is enough; ends with runs/demo/report.md
#   ./run_rounds.sh all      every table and figure in one report, with verdicts on the paper's claims: runs/tables/all/report.md
#   ./run_rounds.sh NAME     one of these. Hours: all its models on 8 GPUs, reckoned for 3B from Table 4 of the paper, which does not name its
#                            hardware; evaluation not counted. Minutes: one seed on one core, demonstration world, in the
#                            order of `all`, where the runs of an earlier table are there already (runs/tables/seconds.txt has yours).
#     table1   teacher losses with and without distillation              113 h  10 min
#     table2   rounds with and without distillation                      142 h  16 min
#     table3   on-policy GRPO from the base and from a student           100 h   5 min
#     table4   score and time per stage                                   51 h   3 min
#     table5   steps and KL weight of the distillation                    31 h   2 min
#     table6   rounds with an entropy bonus in the distillation          100 h   4 min
#     table7   which checkpoints make the weak-to-strong signal           32 h   5 min
#     table8   ensembles of two teachers, unlearned starts                71 h   7 min
#     table9   recovery of an unlearned policy by SFT or CE               45 h   6 min
#     table10  weak to strong on models of other lengths                  82 h   6 min
#     table11  weak to strong in rounds; unlearned policies for code     124 h   5 min
#     table12  outliers of the signal on right responses                  36 h   1 min
#     fig4     many steps on one batch                                    52 h   1 min
#     fig5     dynamics of the MSE loss                                   13 h   1 min
#     fig6     accuracy against KL                                        44 h   6 min
#     fig7     the denominator: pi_old or the live student                19 h   1 min
#     fig8     online and offline phases in turn                         128 h   8 min
#     fig9     strength of the unlearning, and SFT after it               22 h   1 min
#     fig10    outliers against a linear critic                           21 h   1 min
#                            On real models: MODEL (else the models of the table; MODELS="A B"), PROMPTS, BENCHMARKS, NPROC, for example
#                            MODEL=Qwen/Qwen3-4B-Thinking-2507 PROMPTS=polaris.jsonl BENCHMARKS="hmmt=hmmt.jsonl:32" NPROC=8
#   ./run_rounds.sh test     the tests
#   ./run_rounds.sh help     this text
#
# Sets itself up first (.venv, requirements.txt). Steps whose output exists are skipped, so a run that was stopped goes on
# where it was, and SEEDS="0 1 2" ./run_rounds.sh adds seeds to a finished run. DRY_RUN=1 prints the commands only.
# STRATEGY=1|2|3|auto says where the signal of a round comes from (Fig. 3). auto follows Sec. 4.4: strategy 1 while the
# teacher clearly beats the policy it started from on the validation set, else the best of strategies 2 and 3 there.
set -euo pipefail
cd "$(dirname "$0")"
exec 3>&1                             # commands are announced here, also where output goes to a log

SEEDS=${SEEDS:-}                      # seeds of rollouts and training, 0 for the demonstration; the base is the same for all
ROUNDS=${ROUNDS:-3}
STRATEGY=${STRATEGY:-1}
OUT=${OUT:-runs/demo}
TABLES=${TABLES:-runs/tables}
NPROC=${NPROC:-1}                     # processes per stage; on a machine with GPUs one per GPU

# Sizes of the demonstration world, chosen on its validation prompts. The paper's sizes are the defaults of the scripts.
TOY=${TOY:-}                                                   # options of tests/toy.py
PROMPTS_PER_ROUND=${PROMPTS_PER_ROUND:-1000}                   # as in the paper, with 8 responses each instead of 16
TEACHER_STEPS=${TEACHER_STEPS:-48}                             # 1.5 epochs
DISTILL_STEPS=${DISTILL_STEPS:-10}                             # paper: 10 when iterating rounds
MSE_STEPS=${MSE_STEPS:-60}
K=${K:-16}                                                     # samples per test problem
SAMPLE="-n 8 --temperature 1 --max-tokens 128 --engine hf --shard-prompts 100 --workers 1"
TRAIN="--micro-tokens 4096 --no-checkpointing"
MEASURE="--temperature 1 --top-p 1 --top-k -1 --max-tokens 128 --engine hf --shard-prompts 50 --micro-tokens 8192 --workers 1"

# Tables and figures
REAL=${MODEL:-${MODELS:-${PROMPTS:-}}}                         # with any of these: real models, the paper's settings
PROMPTS_TABLES=${PROMPTS_TABLES:-500}                          # demonstration world: 500 prompts x 8 responses where the paper has 1,000 x 16
K_TABLES=${K_TABLES:-8}                                        # samples per test problem
JOBS=${JOBS:-$([ -n "$REAL" ] && echo 1 || nproc)}             # seeds at the same time, with one thread each
CODE_PROMPTS=${CODE_PROMPTS:-areal-boba-2-rl-code.jsonl}       # Table 11
CODE_BENCHMARKS=${CODE_BENCHMARKS:-livecodebench=livecodebench-v6.jsonl:32}
code_benchmarks= validation= child= children= where= dir= seed=
trap 'for child in $children; do kill -- "-$child" 2> /dev/null || true; done' EXIT

# glibc gives large blocks back to the system after each use; keeping them makes training on CPU a little faster
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456
export TOKENIZERS_PARALLELISM=false

if [ "$NPROC" -gt 1 ]; then PY="torchrun --standalone --nproc-per-node $NPROC"; else PY=python; fi

step() {                              # step OUTPUT COMMAND...   print the command, run it unless its output is there
  local output=$1; shift
  if [ -n "${DRY_RUN:-}" ]; then echo "$*"; return; fi
  if [ -e "$output" ]; then return; fi
  echo "+ $*" >&3
  "$@" 9>&- & child=$!                # in the background, or a SIGTERM to this script would wait for the end of the stage
  wait "$child"
  child=
}

stop() {                              # stop SIGNAL CODE   the stages save and leave, and then so does this script
  trap '' TERM INT
  local pid
  for pid in $child; do kill -s TERM "$pid" 2> /dev/null || true; done
  for pid in $children; do kill -s TERM -- "-$pid" 2> /dev/null || true; done
  wait || true
  echo "run_rounds.sh: stopped by $1; the same command continues" >&2
  exit "$2"
}

lock() {                              # lock FOLDER   one run at a time in it, and none beside a stage that outlived a killed run
  [ -z "${DRY_RUN:-}" ] && command -v flock > /dev/null || return 0
  mkdir -p "$1"
  exec 8>> "$1/.stage.lock" 9>> "$1/.lock"                     # 8 stays open in the stages, 9 does not
  flock -n 9 || { echo "run_rounds.sh: another run is at work in $1: wait for it, or give another folder" >&2; exit 2; }
  flock -n 8 || { echo "waiting for the stage that an earlier run left at work in $1"; flock 8; }
}

evaluate() {                          # evaluate CHECKPOINT...   those that RESULTS does not have yet
  local missing="" checkpoint results=${RESULTS:-$OUT/results.jsonl}
  for checkpoint in "$@"; do
    if [ -n "${DRY_RUN:-}" ] || ! grep -qs "\"model\": \"$checkpoint\".*\"benchmark\": \"test\".*\"seconds\": [^}]*}$" "$results"; then missing="$missing $checkpoint"; fi
  done
  if [ -z "$missing" ]; then return; fi
  step "" $PY evaluate.py --model $missing --base "$OUT/base" --out "$results" \
    --data ${DATA:-validation=$OUT/prompts/validation.jsonl:2 test=$OUT/prompts/test.jsonl:$K} $MEASURE
}

checkpoints() {                       # checkpoints RUN STEPS EVERY   the paths that a training run saves
  local s
  for ((s = $3; s < $2; s += $3)); do printf '%s/step-%04d ' "$1" "$s"; done
  echo "$1/final"
}

setup() {                             # .venv unless an environment is active; requirements.txt when it changed
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -e .venv/bin/activate ] || python3 -m venv .venv
    # shellcheck disable=SC1091
    . .venv/bin/activate
  fi
  local wanted="$VIRTUAL_ENV/erpd-requirements.txt"
  if command -v nvidia-smi > /dev/null; then cp requirements.txt "$wanted.new"; else grep -v '^vllm' requirements.txt > "$wanted.new"; fi
  if cmp -s "$wanted.new" "$wanted"; then return; fi
  echo "+ pip install -r requirements.txt   (once; later runs skip this)"
  python -m pip install --quiet --disable-pip-version-check -r "$wanted.new"
  mv "$wanted.new" "$wanted"
}

demo() {
  # The world: a small model that is competent but unreliable at a task whose answers can be checked.
  step "$OUT/base" python tests/toy.py --out "$OUT" $TOY

  local seed round dir policy older control single data
  for seed in ${SEEDS:-0}; do
    policy=$OUT/base
    older=
    control=$OUT/base
    for ((round = 1; round <= ROUNDS; round++)); do
      dir=$OUT/seed$seed/round$round
      data=$dir/rollouts
      # Stage 0: sample the current policy once.
      step "$dir/rollouts/rollouts.json" $PY rollout.py --model "$policy" --prompts "$OUT/prompts/train.jsonl" --out "$dir/rollouts" \
        --num-prompts "$PROMPTS_PER_ROUND" --seed "$((100 * seed + round))" $SAMPLE
      # Stage 1: a weakly constrained teacher, for dozens of steps on that batch. beta acts through beta x length: 0.5 at 40
      # tokens is what 0.001 is at 20,000.
      step "$dir/teacher/final" $PY teacher.py --model "$policy" --rollouts "$dir/rollouts" --out "$dir/teacher" --seed "$seed" \
        --loss ce --beta 0.5 --lr 1e-4 --batch-prompts 32 --steps "$TEACHER_STEPS" --save-every 16 $TRAIN
      # Stage 2: back to the policy that wrote the rollouts, and distil.
      student
      older=$policy
      policy=$dir/student/final

      # The control: one stage, the teacher's loss with the student's KL term, iterated without distillation.
      single=$OUT/seed$seed/control$round
      if [ "$round" -gt 1 ]; then
        data=$single/rollouts         # round 1 shares its rollouts: both start from the base
        step "$data/rollouts.json" $PY rollout.py --model "$control" --prompts "$OUT/prompts/train.jsonl" --out "$data" \
          --num-prompts "$PROMPTS_PER_ROUND" --seed "$((100 * seed + round))" $SAMPLE
      fi
      step "$single/teacher/final" $PY teacher.py --model "$control" --rollouts "$data" --out "$single/teacher" --seed "$seed" \
        --loss ce --beta 0.5 --kl-coef 1 --kl-kind exact --lr 1e-4 --batch-prompts 32 --steps "$TEACHER_STEPS" --save-every 16 $TRAIN
      control=$single/teacher/final

      evaluate "$OUT/base" $(checkpoints "$dir/teacher" "$TEACHER_STEPS" 16) "$dir/student/final" "$single/teacher/final"
    done

    # Weak to strong (strategy 2): an MSE teacher, worse than the base, over its own early "unlearned" checkpoint.
    dir=$OUT/seed$seed/mse
    step "$dir/teacher/final" $PY teacher.py --model "$OUT/base" --rollouts "$OUT/seed$seed/round1/rollouts" --out "$dir/teacher" \
      --seed "$seed" --loss mse --lr 5e-4 --batch-prompts 16 --steps "$MSE_STEPS" --save-every 10 $TRAIN
    step "$dir/student/final" $PY distill.py --student "$OUT/base" --teacher "$dir/teacher/final" --denominator "$dir/teacher/step-0010" \
      --rollouts "$OUT/seed$seed/round1/rollouts" --out "$dir/student" --seed "$seed" \
      --lr 3e-4 --batch-prompts 64 --steps "$DISTILL_STEPS" --kl-coef 0.1 --kl-kind exact $TRAIN
    evaluate "$dir/teacher/step-0010" "$dir/teacher/final" "$dir/student/final"
  done
  report "$OUT"
}

pupil() {                             # pupil NAME TEACHER DENOMINATOR FLAGS...   a student of $policy on the rollouts of this round
  step "$dir/$1/final" $PY distill.py --student "$policy" --teacher "$2" --denominator "$3" --rollouts "$data" \
    --out "$dir/$1" --seed "$seed" --lr 3e-4 --batch-prompts 64 --steps "$DISTILL_STEPS" --kl-kind exact "${@:4}" $TRAIN
}

student() {                           # the student of this round, by STRATEGY
  local strategy=$STRATEGY best candidates="" finals=""
  if [ "$strategy" = auto ]; then
    strategy=1                        # DRY_RUN prints this
    if [ -z "${DRY_RUN:-}" ]; then
      evaluate "$policy" "$dir/teacher/final"
      best=$(python evaluate.py --pick validation --margin 2 --model "$policy" "$dir/teacher/final" --out "${RESULTS:-$OUT/results.jsonl}")
      if [ "$best" = "$policy" ]; then strategy=2; fi
      echo "round $round of seed $seed: strategy $strategy"
    fi
  fi
  case $strategy in
    1) pupil student "$dir/teacher/final" old --kl-coef 1 ;;
    2)                                # the unlearned checkpoint matters most (Table 7), so the students of three are compared
      step "$dir/mse/final" $PY teacher.py --model "$policy" --rollouts "$dir/rollouts" --out "$dir/mse" --seed "$seed" \
        --loss mse --lr 5e-4 --batch-prompts 16 --steps "$MSE_STEPS" --save-every 10 $TRAIN
      if [ "$MSE_STEPS" -le 30 ]; then echo "run_rounds.sh: strategy 2 compares the MSE run's steps 10, 20 and 30: MSE_STEPS must be above 30" >&2; exit 2; fi
      for best in 10 20 30; do
        pupil "student-un$best" "$dir/mse/final" "$dir/mse/step-00$best" --kl-coef 0.1
        candidates="$candidates student-un$best"
      done
      for best in ${UNLEARNED_LR:-}; do                        # Table 11: unlearned apart, ten steps at another rate, same teacher
        step "$dir/unlearned-$best/final" $PY teacher.py --model "$policy" --rollouts "$dir/rollouts" --out "$dir/unlearned-$best" \
          --seed "$seed" --loss mse --lr "$best" --batch-prompts 16 --steps 10 $TRAIN
        pupil "student-un-$best" "$dir/mse/final" "$dir/unlearned-$best/final" --kl-coef 0.1
        candidates="$candidates student-un-$best"
      done
      if [ "$STRATEGY" = auto ] && [ -n "$older" ]; then       # strategy 3 needs an older student
        pupil student-older "$dir/teacher/final" "$older" --kl-coef 1
        candidates="$candidates student-older"
      fi
      for best in $candidates; do finals="$finals $dir/$best/final"; done
      evaluate $finals
      pick student $candidates ;;
    3) pupil student "$dir/teacher/final" "${older:-old}" --kl-coef 1 ;;     # in round 1 nothing is older than pi_old
    *) echo "run_rounds.sh: STRATEGY is 1, 2, 3 or auto, not '$strategy'" >&2; exit 2 ;;
  esac
}

pick() {                              # pick NAME CANDIDATE...   the best student on validation gets the name too (links, not copies)
  local best candidate finals=""
  if [ -n "${DRY_RUN:-}" ]; then echo "cp -al $dir/$2 $dir/$1"; return; fi       # the first, or another if it does better
  if [ -e "$dir/$1" ]; then return; fi
  for candidate in "${@:2}"; do finals="$finals $dir/$candidate/final"; done
  best=$(python evaluate.py --pick validation --model $finals --out "${RESULTS:-$OUT/results.jsonl}")
  rm -rf "$dir/$1.partial"
  cp -al "$(dirname "$best")" "$dir/$1.partial"
  mv "$dir/$1.partial" "$dir/$1"
  echo "$dir/$1 is $best"
}

report() {                            # report FOLDER   anew if there are new results
  if [ -n "${DRY_RUN:-}" ] || [ ! -e "$1/report.md" ] || [ "$1/results.jsonl" -nt "$1/report.md" ]; then
    step "" python evaluate.py --report "$1" --title "demonstration world"
  fi
  echo "report: $1/report.md"
}

# ---- the paper's tables and figures --------------------------------------------------------------------------------------
#
# A recipe holds the commands for one model and one seed; `recipe` loops over both. Runs live in TABLES/runs/MODEL/seedN and are
# shared: a command whose output is there is skipped, so every recipe names all that it needs. What differs between the
# demonstration world and the paper's models stands in the next two functions and nowhere else.

demonstration() {                     # demonstration WORLD   toy, or one of shorter or longer chains in place of another model
  case $1 in
    toy)   base=$OUT/base toy=$TOY ;;
    short) base=$TABLES/worlds/short/base toy="$TOY --min-ops 2 --max-ops 3" ;;
    long)  base=$TABLES/worlds/long/base toy="$TOY --min-ops 7 --max-ops 8" ;;
  esac
  step "$base" python tests/toy.py --out "${base%/base}" $toy
  prompts=${base%/base}/prompts/train.jsonl
  validation="validation=${base%/base}/prompts/validation.jsonl:2" benchmarks="test=${base%/base}/prompts/test.jsonl:$K_TABLES"
  # Half the paper's prompts, responses and batches, so an epoch has its 32 or 16 steps. Chosen on validation prompts.
  COLLECT="--num-prompts $PROMPTS_TABLES $SAMPLE" ONLINE="--num-prompts 16 $SAMPLE" ONLINE_PART=5 FLAGS=$TRAIN SCORE="$MEASURE --shard-prompts 200" SCORE_KL=
  BATCH32="--batch-prompts 16" BATCH64="--batch-prompts 32"
  CE="--loss ce --lr 3e-4" BETA_1E3="--beta 0.5" BETA_1E2="--beta 1" BETA_5E2="--beta 2" STAGE1_KL="--kl-coef 3 --kl-kind exact" STAGE1_KL_5="--kl-coef 10 --kl-kind exact"
  SAPO="--loss sapo --lr 1e-4" GRPO="--loss grpo --lr 3e-4" PPO="--loss ppo --lr 2e-4 --value-steps 100 --value-lr 1e-3"
  MSE="--loss mse --lr 5e-4" UNLEARN_5E6="--loss mse --lr 1e-3" UNLEARN_1E5="--loss mse --lr 2e-3" SFT="--loss sft --lr 3e-4"
  UNLEARN_A="--loss mse --lr 5e-4 --negative-weight 0.5" UNLEARN_B="--loss mse --lr 5e-4 --negative-weight 1"
  UNLEARN_C="--loss mse --lr 1e-3 --negative-weight 1"
  DISTIL="--lr 3e-4 --kl-coef 1 --kl-kind exact" DISTIL_WEAK="--lr 3e-4 --kl-coef 0.3 --kl-kind exact" DISTIL_SAPO="--lr 1e-4"
  KL_HIGH="--kl-coef 3 --kl-kind exact" KL_MIDDLE="--kl-coef 1 --kl-kind exact" KL_LOW="--kl-coef 0.1 --kl-kind exact"
  ENTROPY="--entropy-coef 0.3"
}

paper() {                             # paper MODEL   settings of Sec. 4.1; on real models with MODEL, PROMPTS, BENCHMARKS
  local temperature=0.6 length=32768                          # ours: 32,768 for models that Sec. 4.1 does not name
  case $1 in
    *Qwen3.5*) temperature=1.0 length=192000 ;;
    *Qwen3-4B*) length=81920 ;;
    *Nanbeige*) length=65536 ;;
  esac
  base=$1 prompts=${PROMPTS:-polaris.jsonl} benchmarks=${BENCHMARKS:-hmmt=hmmt.jsonl:32} validation=       # the first benchmark, as in the paper
  COLLECT="--num-prompts 1000 --n 16 --temperature $temperature --max-tokens 32768"
  ONLINE="--num-prompts 32 --n 16 --temperature $temperature --max-tokens 32768" ONLINE_PART=1 FLAGS=
  if [ "$NPROC" -gt 1 ]; then FLAGS=--shard; fi             # from 4B on, 80 GB are too little without it (README, "Memory and speed")
  SCORE="--temperature $temperature --top-p 0.95 --max-tokens $length"
  SCORE_KL="--temperature $temperature --top-p 1 --top-k -1 --max-tokens $length"        # top-p below 1 would bias the KL
  BATCH32="--batch-prompts 32" BATCH64="--batch-prompts 64"
  CE="--loss ce --lr 1e-6" BETA_1E3="--beta 0.001" BETA_1E2="--beta 0.01" BETA_5E2="--beta 0.05" STAGE1_KL="--kl-coef 2" STAGE1_KL_5="--kl-coef 10"
  SAPO="--loss sapo --lr 1e-6" GRPO="--loss grpo --lr 1e-6" PPO="--loss ppo --lr 1e-6"
  MSE="--loss mse --lr 1e-6" UNLEARN_5E6="--loss mse --lr 5e-6" UNLEARN_1E5="--loss mse --lr 1e-5" SFT="--loss sft --lr 1e-6"
  UNLEARN_A="--loss mse --lr 2e-6 --negative-weight 0.5" UNLEARN_B="--loss mse --lr 2e-6 --negative-weight 1"
  UNLEARN_C="--loss mse --lr 5e-6 --negative-weight 1"
  DISTIL="--lr 1e-6" DISTIL_WEAK="--lr 1e-6" DISTIL_SAPO="--lr 1e-6"
  KL_HIGH="--kl-coef 0.2" KL_MIDDLE="--kl-coef 0.05" KL_LOW="--kl-coef 0.001"
  ENTROPY="--entropy-coef 0.5"
}

at() { case $1 in base) echo "$base" ;; old|none|live) echo "$1" ;; *) echo "$dir/$1" ;; esac; }      # a policy by its short name

collect() {                           # collect NAME POLICY NUMBER [FLAGS]   rollouts of a policy
  step "$dir/$1/rollouts.json" $PY rollout.py --model "$(at "$2")" --prompts "$prompts" --out "$dir/$1" --seed "$((100 * seed + $3))" $COLLECT "${@:4}"
}

teach() {                             # teach NAME START ROLLOUTS FLAGS   a teacher: many steps on fixed rollouts
  step "$dir/$1/final" $PY teacher.py --model "$(at "$2")" --rollouts "$dir/$3" --out "$dir/$1" --seed "$seed" "${@:4}" $FLAGS
}

distil() {                            # distil NAME START TEACHER DENOMINATOR ROLLOUTS FLAGS   a student
  step "$dir/$1/final" $PY distill.py --student "$(at "$2")" --teacher "$(at "$3")" --denominator "$(at "$4")" --rollouts "$dir/$5" \
    --out "$dir/$1" --seed "$seed" "${@:6}" $FLAGS
}

ONLINE_KEPT="10 25 40 50 60 70 100"   # steps whose weights stay, for all recipes: they share runs

onpolicy() {                          # onpolicy NAME START STEP...   one optimizer step on each fresh batch, Adam carried over; STEPs are measured
  local i previous= policy last=$(( ${*: -1} / ONLINE_PART )) keep=" " names=""
  policy=$(at "$2")
  for i in $ONLINE_KEPT; do keep="$keep$((i / ONLINE_PART)) "; done
  for i in "${@:3}"; do names="$names $1/update$(printf %03d $((i / ONLINE_PART)))/final"; done
  for ((i = 1; i <= last; i++)); do
    local out=$dir/$1/update$(printf %03d "$i") data=$dir/$1/rollouts$(printf %03d "$i")
    if [ -z "${DRY_RUN:-}" ] && [ -e "$out/final" ]; then previous=$out policy=$out/final; continue; fi
    step "$data/rollouts.json" $PY rollout.py --model "$policy" --prompts "$prompts" --out "$data" --seed "$((1000 * seed + i))" $ONLINE
    step "$out/final" $PY teacher.py --model "$policy" --rollouts "$data" --out "$out" --seed "$seed" $GRPO $BATCH32 --steps 1 \
      ${previous:+--optimizer-from "$previous"} $FLAGS
    if [ -n "$previous" ] && [ -z "${DRY_RUN:-}" ]; then       # the newest update holds what the next one needs
      rm -f "$previous/final/optimizer.pt"
      case $keep in *" $((i - 1)) "*) ;; *) rm -f "$previous"/final/*.safetensors ;; esac
    fi
    previous=$out policy=$out/final
  done
  measure $names
}

path() {                              # path RUN STEPS EVERY   the checkpoints that a run saves
  local i
  for ((i = $3; i < $2; i += $3)); do printf '%s/step-%04d ' "$1" "$i"; done
  echo "$1/final"
}

measure() {                           # measure CHECKPOINT...   those that results.jsonl does not have yet, on all benchmarks
  local checkpoint missing="" data=${code_benchmarks:-$benchmarks} first last
  first=${data%% *} last=${data##* }
  if [ -n "$SCORE_KL" ]; then last=kl; else last=${last%%=*}; fi
  for checkpoint in "$@"; do
    checkpoint=$(at "$checkpoint")
    if [ -n "${DRY_RUN:-}" ] || ! grep -qs "\"model\": \"$checkpoint\".*\"benchmark\": \"$last\".*\"seconds\": [^}]*}$" "$where/results.jsonl"; then missing="$missing $checkpoint"; fi
  done
  if [ -z "$missing" ]; then return; fi
  step "" $PY evaluate.py --model $missing --base "$base" --out "$where/results.jsonl" --data $data $SCORE ${code_benchmarks:+--task code}
  if [ -n "$SCORE_KL" ]; then
    step "" $PY evaluate.py --model $missing --base "$base" --out "$where/results.jsonl" --data "kl=$(cut -d= -f2 <<< "${first%:*}"):4" $SCORE_KL \
      ${code_benchmarks:+--task code}
  fi
}

validate() {                          # validate CHECKPOINT...   on the demonstration world's validation prompts too, where one is chosen by them
  if [ -n "$validation" ]; then benchmarks=$validation measure "$@"; fi
}

best() {                              # best CHECKPOINT...   the most accurate on validation; DRY_RUN takes the first
  local checkpoint finals="" first=${validation:-$benchmarks}
  if [ -n "${DRY_RUN:-}" ]; then echo "$1"; return; fi
  measure "$@" >&2
  validate "$@" >&2
  for checkpoint in "$@"; do finals="$finals $(at "$checkpoint")"; done
  checkpoint=$(python evaluate.py --pick "${first%%=*}" --model $finals --out "$where/results.jsonl")
  echo "${checkpoint#"$dir/"}"
}

table1() {                            # losses x distillation; the comments hold the paper's averages for Qwen3-4B and NBG4-3B
  collect rollouts base 1                                                                                    # base: 68.5, 72.5
  teach ppo  base rollouts $PPO $BATCH32 --steps 100                                                         # 68.1, 73.9
  teach grpo base rollouts $GRPO $BATCH32 --steps 100                                                        # 69.0, 73.6
  distil grpo-student base grpo/final old rollouts $DISTIL $BATCH64 --steps 16                               # 69.2, 73.5
  teach sapo base rollouts $SAPO $BATCH32 --steps 120                                                        # 69.9, 76.2
  distil sapo-student base sapo/final old rollouts $DISTIL_SAPO $BATCH32 --steps 32 --save-every 2           # 70.6, 77.5
  teach ce   base rollouts $CE $BETA_1E3 $BATCH32 --steps 100                                                # 72.9, 76.7
  distil ce-student base ce/final old rollouts $DISTIL $BATCH64 --steps 16                                   # 73.3, 77.7
  teach mse  base rollouts $MSE $BATCH32 --steps 70                                                          # 36.4, 37.1
  distil mse-min0 base mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16 --positive-signal min0     # 71.1, 74.9
  measure $(path ppo 100 50) $(path grpo 100 50) $(path sapo 120 20) $(path ce 100 20) mse/step-0010 mse/final \
    {grpo,sapo,ce}-student/final mse-min0/final
  validate $(path ppo 100 50) $(path grpo 100 50) $(path sapo 120 20) $(path ce 100 20)
}

batches() {                           # batches 1 to 4 of Table 2
  local n start=ce-student/step-0010
  collect rollouts base 1
  teach ce base rollouts $CE $BETA_1E3 $BATCH32 --steps 100                                                  # 73.8 at KL 0.041
  distil ce-student base ce/final old rollouts $DISTIL $BATCH64 --steps 16                                   # 71.1 at 0.010, after 10 steps
  for n in 2 3; do
    collect batch$n/rollouts $start $n
    teach batch$n/ce $start batch$n/rollouts $CE $BETA_1E3 $BATCH32 --steps 100                              # 75.6 at 0.044, 77.2 at 0.042
    distil batch$n/student $start batch$n/ce/final old batch$n/rollouts $DISTIL $BATCH64 --steps 10          # 73.6 at 0.026, 76.4 at 0.037
    start=batch$n/student/final
  done
  collect batch4/rollouts $start 4                                        # strategy 3: away from the student of batch 1
  teach batch4/ce $start batch4/rollouts $CE $BETA_1E3 $BATCH32 --steps 100                                  # 77.5 at 0.043
  distil batch4/student $start batch4/ce/final ce-student/step-0010 batch4/rollouts $DISTIL $BATCH64 --steps 10     # 79.3 at 0.062
  measure ce/final ce-student/step-0010 batch{2,3,4}/ce/final batch{2,3,4}/student/final
}

table2() {                            # rounds with and without distillation: average of three benchmarks, KL to the base
  local n start=batch4/student/final
  batches                                                                                                    # base: 67.9
  for n in 5 6; do                                                        # strategy 2: weak to strong; the CE teacher for comparison
    collect batch$n/rollouts $start $n
    teach batch$n/ce $start batch$n/rollouts $CE $BETA_1E3 $BATCH32 --steps 100                              # 79.4 at 0.066, 80.2 at 0.077
    teach batch$n/mse $start batch$n/rollouts $MSE $BATCH32 --steps 70
    distil batch$n/student $start batch$n/mse/final batch$n/mse/step-0010 batch$n/rollouts $DISTIL_WEAK $BATCH64 --steps 10    # 79.9, 80.6
    start=batch$n/student/final
  done
  collect a2/rollouts ce/final 2                                          # (a) goes on from the last teacher, (b) from an earlier checkpoint
  teach a2/ce ce/final a2/rollouts $CE $BETA_1E3 $BATCH32 --steps 100                                        # (a) 73.8, 74.0
  collect b2/rollouts ce/step-0030 2
  teach b2/ce ce/step-0030 b2/rollouts $CE $BETA_1E3 $BATCH32 --steps 100                                    # (b) 70.6, 68.4
  measure batch{5,6}/ce/final batch{5,6}/student/final ce/step-0030 a2/ce/final b2/ce/final
}

table3() {                            # on-policy GRPO from the base and from batch 4's student, HMMT Feb 25
  onpolicy online base 25 50                                                                                 # 56.0, 57.2, 53.2
  batches
  onpolicy online-batch4 batch4/student/final 40 60                                                          # 71.6, 70.4, 71.4
}

table4() {                            # time per stage: score and hours so far
  onpolicy online base 10 50 70 100                                                                          # 66.8, 67.2, 68.5, 66.8
  collect rollouts base 1                                                                                    # 7 h
  teach sapo base rollouts $SAPO $BATCH32 --steps 120                                                        # 40, 80, 100 steps: 68.9, 68.3, 70.5
  distil sapo-student base sapo/final old rollouts $DISTIL_SAPO $BATCH32 --steps 32 --save-every 2           # 10, 16, 32: 67.2, 68.3, 73.3
  measure sapo/step-00{40,80} sapo/step-0100 sapo-student/step-00{10,16} sapo-student/final
}

table5() {                            # steps and KL weight of the distillation: HMMT Feb 25 and KL
  collect rollouts base 1                                                                                    # base: 63.9
  teach sapo base rollouts $SAPO $BATCH32 --steps 120                                                        # 60: 68.1 at 0.016, 120: 70.2 at 0.023
  distil sapo-student base sapo/final old rollouts $DISTIL_SAPO $BATCH32 --steps 32 --save-every 2           # 16, 20, 32: 68.3, 70.2, 73.3
  distil sapo-kl-high base sapo/final old rollouts $DISTIL_SAPO $BATCH32 --steps 32 $KL_HIGH                 # 70.2 at 0.014
  distil sapo-kl-middle base sapo/final old rollouts $DISTIL_SAPO $BATCH32 --steps 32 $KL_MIDDLE             # 69.6 at 0.020
  distil sapo-kl-low base sapo/final old rollouts $DISTIL_SAPO $BATCH32 --steps 32 $KL_LOW                   # 71.7 at 0.018
  measure sapo/step-0060 sapo/final sapo-student/step-00{16,20} sapo-student/final sapo-kl-{high,middle,low}/final
}

table6() {                            # three batches without and with the entropy bonus: AIME 2025, entropy
  local n start=entropy1/final
  batches                                                                                                    # 82.5 at 0.19, 84.5 at 0.16, 84.5 at 0.14
  distil entropy1 base ce/final old rollouts $DISTIL $ENTROPY $BATCH64 --steps 10                            # 83.7 at 0.19
  for n in 2 3; do
    collect entropy$n/rollouts $start $n
    teach entropy$n/ce $start entropy$n/rollouts $CE $BETA_1E3 $BATCH32 --steps 100
    distil entropy$n/student $start entropy$n/ce/final old entropy$n/rollouts $DISTIL $ENTROPY $BATCH64 --steps 10     # 88.3 at 0.21, 85.6 at 0.25
    start=entropy$n/student/final
  done
  measure entropy1/final entropy{2,3}/student/final
}

table7() {                            # which steps of the MSE run make the signal: HMMT Feb 25
  local n
  collect rollouts base 1                                                                                    # base: 56.0
  teach mse base rollouts $MSE $BATCH32 --steps 70
  distil signal-70-10 base mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16                 # 60.1
  distil signal-70-20 base mse/final mse/step-0020 rollouts $DISTIL_WEAK $BATCH64 --steps 16                 # 59.1
  distil signal-70-30 base mse/final mse/step-0030 rollouts $DISTIL_WEAK $BATCH64 --steps 16                 # 53.1
  distil signal-60-10 base mse/step-0060 mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16             # 61.0
  distil signal-50-10 base mse/step-0050 mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16             # 64.3
  distil signal-40-10 base mse/step-0040 mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16             # 59.5
  distil signal-old-50 base old mse/step-0050 rollouts $DISTIL_WEAK $BATCH64 --steps 16                      # 59.1
  distil signal-10-old base mse/step-0010 old rollouts $DISTIL_WEAK $BATCH64 --steps 16                      # 61.3
  distil signal-10-none base mse/step-0010 none rollouts $DISTIL_WEAK $BATCH64 --steps 16                    # 56.3
  distil signal-none-50 base none mse/step-0050 rollouts $DISTIL_WEAK $BATCH64 --steps 16                    # 59.3
  distil signal-70-old base mse/final old rollouts $DISTIL_WEAK $BATCH64 --steps 16                          # Sec. 3.4: "does not lead to improvements"
  measure signal-70-{10,20,30,old}/final signal-{60,50,40}-10/final signal-old-50/final signal-10-{old,none}/final signal-none-50/final
}

table8() {                            # ensembles: an old-start teacher, then an unlearned-start one; each 16 or 32 steps by validation
  local strong weak
  collect rollouts base 1                                                                                    # HMMT Feb 25, base: 56.0
  teach mse base rollouts $MSE $BATCH32 --steps 70
  teach ce base rollouts $CE $BETA_1E3 $BATCH32 --steps 100
  teach ce-5e2 base rollouts $CE $BETA_5E2 $BATCH32 --steps 100
  teach unlearned-ce-1e3 mse/step-0010 rollouts $CE $BETA_1E3 --ref start $BATCH32 --steps 100
  teach unlearned-ce-1e2 mse/step-0010 rollouts $CE $BETA_1E2 --ref start $BATCH32 --steps 100
  distil mse-min0 base mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16 --positive-signal min0     # MSE alone: 62.7
  distil ce-student base ce/final old rollouts $DISTIL $BATCH64 --steps 16                                   # CE 1e-3 alone: 67.1
  distil ce-student-32 base ce/final old rollouts $DISTIL $BATCH32 --steps 32 --save-every 16
  distil ce-5e2-student base ce-5e2/final old rollouts $DISTIL $BATCH32 --steps 32 --save-every 16           # CE 5e-2 alone: 63.8
  weak=$(best ce-student-32/step-0016 ce-student-32/final)
  strong=$(best ce-5e2-student/step-0016 ce-5e2-student/final)
  distil ensemble-mse-5e2 $strong mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH32 --steps 32 --save-every 16               # 66.7
  distil ensemble-1e3-1e3 $weak unlearned-ce-1e3/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH32 --steps 32 --save-every 16    # 66.5
  distil ensemble-1e2-5e2 $strong unlearned-ce-1e2/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH32 --steps 32 --save-every 16  # 66.8
  distil ensemble-1e3-5e2 $strong unlearned-ce-1e3/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH32 --steps 32 --save-every 16  # 69.0
  measure mse-min0/final ce-student/final ensemble-{mse-5e2,1e3-1e3,1e2-5e2,1e3-5e2}/{step-0016,final}
  validate ensemble-{mse-5e2,1e3-1e3,1e2-5e2,1e3-5e2}/{step-0016,final}
}

table9() {                            # recovery of an unlearned policy by SFT or CE: students on HMMT Feb 25 and Nov 25
  local un
  collect rollouts base 1
  teach unlearned-a base rollouts $UNLEARN_A $BATCH32 --steps 10
  teach unlearned-b base rollouts $UNLEARN_B $BATCH32 --steps 10
  teach unlearned-c base rollouts $UNLEARN_C $BATCH32 --steps 10
  for un in unlearned-a unlearned-b unlearned-c; do                       # SFT: 57.6 66.4, 53.5 64.9, 63.5 67.9; CE: 62.5 71.0, 64.1 70.4, 62.6 67.9
    teach $un-sft $un/final rollouts $SFT $BATCH32 --steps 50
    distil $un-sft-student base $un-sft/final $un/final rollouts $DISTIL_WEAK $BATCH64 --steps 16
    teach $un-ce $un/final rollouts $CE $BETA_1E3 --ref start $BATCH32 --steps 50
    distil $un-ce-student base $un-ce/final $un/final rollouts $DISTIL_WEAK $BATCH64 --steps 16
  done
  measure unlearned-{a,b,c}/final unlearned-{a,b,c}-{sft,ce}-student/final
}

table10() {                           # MSE + distillation on five models: HMMT Feb 25 and AIME24 length
  collect rollouts base 1                                                 # 40.8 19.8K, 45.0 14.8K, 39.3 12.8K, 56.0 19.8K, 63.9 24.8K
  teach mse base rollouts $MSE $BATCH32 --steps 70
  distil mse-min0 base mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16 --positive-signal min0    # 44.3 18.0K ... 62.7 20.8K
  distil signal-70-10 base mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16                       # NBG4-3B: 67.6 23.3K
  measure mse/final mse-min0/final signal-70-10/final
}

table11() {                           # Qwen3.5: three batches of MSE + distillation on math; code with three unlearned policies
  local n start=signal-70-10/final code_benchmarks=
  collect rollouts base 1                                                                                    # 80.1 (9B), 86.5 (27B)
  teach mse base rollouts $MSE $BATCH32 --steps 70
  distil signal-70-10 base mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16                 # 82.8, 88.7
  for n in 2 3; do
    collect mse-batch$n/rollouts $start $n
    teach mse-batch$n/mse $start mse-batch$n/rollouts $MSE $BATCH32 --steps 70
    distil mse-batch$n/student $start mse-batch$n/mse/final mse-batch$n/mse/step-0010 mse-batch$n/rollouts \
      $DISTIL_WEAK $BATCH64 --steps 16                                                                       # 86.4, 89.5; then 86.7, 90.9
    start=mse-batch$n/student/final
  done
  measure signal-70-10/final mse-batch{2,3}/student/final
  case $model in *27B|long) return ;; esac
  teach ce base rollouts $CE $BETA_1E3 $BATCH32 --steps 100                                                  # 80.8
  measure ce/final
  if [ -n "$REAL" ]; then                                                 # code, trained apart; the demonstration world has no programs
    where=$where-code prompts=$CODE_PROMPTS code_benchmarks=$CODE_BENCHMARKS COLLECT="$COLLECT --task code"
    dir=$where/seed$seed
    collect rollouts base 1                                                                                  # 56.1
    measure base
    teach ce base rollouts $CE $BETA_1E3 $BATCH32 --steps 100                                                # 50.7
    measure ce/final
    teach mse base rollouts $MSE $BATCH32 --steps 70                      # the recovered teacher of all three
    distil signal-70-10 base mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16               # 1e-6: 40.2
    measure signal-70-10/final
  fi
  teach unlearned-5e6 base rollouts $UNLEARN_5E6 $BATCH32 --steps 10
  distil unlearned-5e6-student base mse/final unlearned-5e6/final rollouts $DISTIL_WEAK $BATCH64 --steps 16  # 5e-6: 63.7
  teach unlearned-1e5 base rollouts $UNLEARN_1E5 $BATCH32 --steps 10
  distil unlearned-1e5-student base mse/final unlearned-1e5/final rollouts $DISTIL_WEAK $BATCH64 --steps 16  # 1e-5: 62.4
  measure unlearned-{5e6,1e5}-student/final
}

table12() {                           # outliers on positive responses: HMMT Feb 25, Qwen3-4B and NBG4-3B
  collect rollouts base 1                                                                                    # 56.0, 63.9
  teach mse base rollouts $MSE $BATCH32 --steps 70
  distil signal-70-10 base mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16                 # 60.1, 67.6
  distil mse-max0 base mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16 --positive-signal max0     # 59.5, 65.7
  distil mse-min0 base mse/final mse/step-0010 rollouts $DISTIL_WEAK $BATCH64 --steps 16 --positive-signal min0     # 62.7, 68.6
  measure signal-70-10/final mse-max0/final mse-min0/final
}

fig4() {                              # accuracy over steps on one batch: SAPO (NBG4-3B), CE (Qwen3-4B); probabilities and entropy
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

fig6() {                              # accuracy against KL: CE at two betas and with a KL weight of 2, and students of the first two
  collect rollouts base 1
  teach ce base rollouts $CE $BETA_1E3 $BATCH32 --steps 100
  teach ce-1e2 base rollouts $CE $BETA_1E2 $BATCH32 --steps 100                                              # 61.0
  teach ce-kl base rollouts $CE $BETA_1E3 $STAGE1_KL $BATCH32 --steps 100                                    # "no significant improvement"
  teach ce-kl-5 base rollouts $CE $BETA_1E3 $STAGE1_KL_5 $BATCH32 --steps 100           # ours: a single stage at the student's own KL
  distil ce-student base ce/final old rollouts $DISTIL $BATCH64 --steps 16
  distil ce-1e2-student base ce-1e2/final old rollouts $DISTIL $BATCH64 --steps 16                           # 65.1 after 10 steps, 63.8 after 16
  measure $(path ce 100 20) $(path ce-1e2 100 20) ce-kl/step-0010 $(path ce-kl 100 20) ce-kl-5/step-0010 $(path ce-kl-5 100 20) {ce,ce-1e2}-student/{step-0010,final}
  validate $(path ce 100 20) $(path ce-kl 100 20)
}

fig7() {                              # pi_old or the live student as denominator
  collect rollouts base 1
  teach ce-1e2 base rollouts $CE $BETA_1E2 $BATCH32 --steps 100                                              # 61.0
  distil ce-1e2-student base ce-1e2/final old rollouts $DISTIL $BATCH64 --steps 16                           # 65.1 after 10 steps, 63.8 after 16
  distil ce-1e2-live base ce-1e2/final live rollouts $DISTIL $BATCH64 --steps 16                             # 61.2, 61.1
  measure ce-1e2/final ce-1e2-{student,live}/{step-0010,final}
  movement ce-1e2-student ce-1e2-live
}

fig8() {                              # online and offline phases in turn, SAPO; which phase starts where is ours
  collect rollouts base 1
  teach sapo base rollouts $SAPO $BATCH32 --steps 120
  distil sapo-student base sapo/final old rollouts $DISTIL_SAPO $BATCH32 --steps 32 --save-every 2           # Offline-1: 73.3
  offline offline2 sapo-student/final 2                                                                      # Offline-2: no improvement
  offline offline3 offline2/student/final 3
  onpolicy online2 offline2/student/final 50
  offline offline4 "online2/update$(printf %03d $((50 / ONLINE_PART)))/final" 4
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

fig10() {                             # outliers: probabilities of the MSE policy against the values of a linear critic (PPO's)
  collect rollouts base 1
  teach mse base rollouts $MSE $BATCH32 --steps 70
  teach ppo base rollouts $PPO $BATCH32 --steps 100
  movement mse ppo
}

movement() {                          # movement RUN...   what the tokens of a run did, into its run.json
  local run missing=""
  for run in "$@"; do
    if [ -n "${DRY_RUN:-}" ] || ! grep -qs '"movement"' "$dir/$run/run.json"; then missing="$missing $dir/$run"; fi
  done
  if [ -n "$missing" ]; then step "" $PY evaluate.py --movement $missing; fi
}

models() {                            # models TABLE   MODEL, else MODELS, else those of the paper or their stand-ins
  local qwen=Qwen/Qwen3-4B-Thinking-2507 nbg=Nanbeige/Nanbeige4-3B-Thinking-2511
  if [ -n "$REAL" ] && [ -n "${MODEL:-}${MODELS:-}" ]; then echo "${MODEL:-$MODELS}"; return; fi
  case $1${REAL:+-real} in
    table1-real|table12-real|fig4-real) echo "$qwen $nbg" ;;
    table4-real|table5-real|fig8-real) echo "$nbg" ;;
    table10-real) echo "nvidia/Llama-3.1-Nemotron-Nano-4B-v1.1 nvidia/AceReason-Nemotron-1.1-7B hbx/JustRL-Nemotron-1.5B $qwen $nbg" ;;
    table11-real) echo "Qwen/Qwen3.5-9B Qwen/Qwen3.5-27B" ;;
    *-real) echo "$qwen" ;;
    table10) echo "toy short long" ;;
    table11|table12) echo "toy long" ;;
    *) echo toy ;;
  esac
}

seeds() {                             # seeds TABLE   more where they are cheap and decide; one on real models, as in the paper
  if [ -n "$SEEDS" ]; then echo "$SEEDS"; return; fi
  case ${REAL:+real}$1-${model:-} in
    real*|table11-long) echo 0 ;;
    fig4*|fig7*) echo "0 1 2 3" ;;
    *) echo "0 1" ;;
  esac
}

tables() {                            # tables NAME...   every model and seed of these recipes, JOBS at a time, then one report
  local list="" model name
  for name in "$@"; do
    for model in $(models "$name"); do
      case " $list " in *" $model "*) continue ;; esac
      case $model in short|long) list="$model $list" ;; *) list="$list $model" ;; esac         # or a processor waits for them at the end
    done
  done
  if [ "$JOBS" -gt 1 ]; then export OMP_NUM_THREADS=1; fi     # on a small model two jobs of one thread do twice the work of one job of two
  for model in $list; do
    free
    where=$TABLES/runs/${model##*/}
    if [ -n "$REAL" ]; then paper "$model"; else demonstration "$model"; fi
    measure base
    validate base
    for seed in $(for name in "$@"; do seeds "$name" | tr ' ' '\n'; done | sort -nu); do
      dir=$where/seed$seed
      if [ -n "${DRY_RUN:-}" ]; then ( recipes "$@" ); continue; fi
      free
      mkdir -p "$where"
      set -m                          # a process group of its own, so that it can be stopped with its children
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
  local out=$TABLES/$1
  if [ "$#" -gt 1 ]; then out=$TABLES/all; fi
  step "" python evaluate.py --report "$out" --tables "$@" --runs "$TABLES/runs" --title "${REAL:-demonstration world}"
}

recipes() {                           # recipes NAME...   those that want this model and this seed, one after the other
  local name start
  for name in "$@"; do
    case " $(models "$name") " in *" $model "*) ;; *) continue ;; esac
    case " $(seeds "$name") " in *" $seed "*) ;; *) continue ;; esac
    start=$SECONDS
    "$name"
    if [ -z "${DRY_RUN:-}" ]; then echo "$name ${model##*/} seed$seed $((SECONDS - start)) s" | tee -a "$TABLES/seconds.txt" >&3; fi
  done
}

free() { while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n; done; }      # wait until fewer than JOBS jobs run; stop if one failed

trap 'stop SIGTERM 143' TERM
trap 'stop Ctrl-C 130' INT
ALL="table1 table2 table3 table4 table5 table6 table7 table8 table9 table10 table11 table12 fig4 fig5 fig6 fig7 fig8 fig9 fig10"
case "${1:-demo}" in
  demo) [ -n "${DRY_RUN:-}" ] || setup; lock "$OUT"; demo ;;
  table[1-9]|table1[0-2]|fig[4-9]|fig10) [ -n "${DRY_RUN:-}" ] || setup; lock "$TABLES"; tables "$1" ;;
  all) [ -n "${DRY_RUN:-}" ] || setup; lock "$TABLES"; tables $ALL ;;
  test) [ -n "${DRY_RUN:-}" ] || setup; ${DRY_RUN:+echo} python -m pytest tests -q "${@:2}" ;;
  help|-h|--help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" ;;
  *) echo "run_rounds.sh: unknown command '$1'; try ./run_rounds.sh help" >&2; exit 2 ;;
esac
