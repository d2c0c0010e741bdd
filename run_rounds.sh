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
#                            On real models: MODEL (else the models of the table; MODELS="A B"), PROMPTS, BENCHMARKS, NPROC:
#     MODEL=Qwen/Qwen3-4B-Thinking-2507 PROMPTS=POLARIS-Project/Polaris-Dataset-53K NPROC=8 BENCHMARKS="aime24=HuggingFaceH4/aime_2024:32
#       aime25=MathArena/aime_2025:32 hmmt_feb25=MathArena/hmmt_feb_2025:32 hmmt_nov25=MathArena/hmmt_nov_2025:32
#       hmmt_feb26=MathArena/hmmt_feb_2026:32 beyond_aime=ByteDance-Seed/BeyondAIME:16 imo=answerbench_v2.csv:4" ./run_rounds.sh table1
#                            These PROMPTS and BENCHMARKS are the default. A table measures those of the seven that the paper's
#                            columns show; other names are yours and measured too. JUDGE_URL and JUDGE_MODEL add a judge.
#   REHEARSE=1 [MODEL=... PROMPTS=... BENCHMARKS=... NPROC=2] ./run_rounds.sh NAME|all
#                            the same commands, only sizes changed (a few prompts, 48 tokens, 3 steps, K = 2), to a report in
#                            runs/rehearsal; then what each stage took, and what the whole would cost (LENGTH=20000 tokens a response)
#   ./run_rounds.sh small    the first experiment on a pretrained model: one round and its control on SmolLM2-135M-Instruct, with a
#                            GPU or two patient CPU cores; settings and other models: tests/paper/small.sh
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
TABLES=${TABLES:-runs/$([ -n "${REHEARSE:-}" ] && echo rehearsal || echo tables)}
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

# glibc gives large blocks back to the system after each use; keeping them makes training on CPU a little faster
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456
export TOKENIZERS_PARALLELISM=false

if [ "$NPROC" -gt 1 ]; then PY="torchrun --standalone --nproc-per-node $NPROC"; else PY=python; fi

step() {                              # step OUTPUT COMMAND...   print the command, run it unless its output is there
  local output=$1; shift
  local text start=${EPOCHREALTIME/[.,]/}
  printf -v text '%q ' "$@"           # quoted, so that it can be copied
  if [ -n "${DRY_RUN:-}" ]; then echo "${text% }"; return; fi
  if [ -e "$output" ]; then return; fi
  echo "+ ${text% }" >&3
  "$@" 9>&- & child=$!                # in the background, or a SIGTERM to this script would wait for the end of the stage
  wait "$child"
  child=
  if [ -n "${REHEARSE:-}" ]; then echo "$(((${EPOCHREALTIME/[.,]/} - start) / 1000)) ${text% }" >> "$TABLES/milliseconds.txt"; fi
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

# shellcheck source=tests/paper/recipes.sh
. tests/paper/recipes.sh
# shellcheck source=tests/paper/small.sh
. tests/paper/small.sh
trap 'stop SIGTERM 143' TERM
trap 'stop Ctrl-C 130' INT
ALL="table1 table2 table3 table4 table5 table6 table7 table8 table9 table10 table11 table12 fig4 fig5 fig6 fig7 fig8 fig9 fig10"
command=${1:-demo}
case "$command" in
  demo) [ -n "${DRY_RUN:-}" ] || setup; lock "$OUT"; demo ;;
  table[1-9]|table1[0-2]|fig[4-9]|fig10) [ -n "${DRY_RUN:-}" ] || setup; lock "$TABLES"; tables "$1" ;;
  all) [ -n "${DRY_RUN:-}" ] || setup; lock "$TABLES"; tables $ALL ;;
  small) [ -n "${DRY_RUN:-}" ] || setup; lock "${SMALL:-runs/small}"; small ;;
  test) [ -n "${DRY_RUN:-}" ] || setup; ${DRY_RUN:+echo} python -m pytest tests -q "${@:2}" ;;
  help|-h|--help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" ;;
  *) echo "run_rounds.sh: unknown command '$1'; try ./run_rounds.sh help" >&2; exit 2 ;;
esac
