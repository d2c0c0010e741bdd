#!/usr/bin/env bash
# Extreme Region Policy Distillation, from one command.
#
#   ./run_rounds.sh          the method on the demonstration world, CPU is enough: runs/demo/report.md
#   ./run_rounds.sh small    one round and its control on a small pretrained model (tests/paper/small.sh)
#   ./run_rounds.sh all      every table and figure, and the paper's claims decided: runs/tables/all/report.md
#   ./run_rounds.sh NAME     one of these. Hours on 8 GPUs for a 3B model, reckoned from Table 4 of the paper,
#                            evaluation not counted; minutes in the demonstration world, one seed, one core:
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
#   MODEL=M PROMPTS=polaris.jsonl NPROC=8 BENCHMARKS="hmmt=hmmt.jsonl:32" ./run_rounds.sh NAME
#                            on real models: MODEL or MODELS="A B", else those of the table; POLARIS and the
#                            paper's seven benchmarks are the default (tests/paper/recipes.sh); JUDGE_URL and
#                            JUDGE_MODEL add a judge
#   REHEARSE=1 NPROC=2 ./run_rounds.sh NAME       the same commands at small sizes, and what the whole costs
#   ./run_rounds.sh test     the tests
#   ./run_rounds.sh help     this text
#
# Sets itself up first (.venv, requirements.txt). Steps whose output exists are skipped: the same command goes
# on where it was stopped, and SEEDS="0 1 2" adds seeds to a finished run. DRY_RUN=1 prints the commands only.
# STRATEGY=1|2|3|auto says where the signal of a round comes from (Fig. 3; tests/paper/strategies.sh).
set -euo pipefail
cd "$(dirname "$0")"
exec 3>&1                             # commands are announced here, also where output goes to a log

SEEDS=${SEEDS:-}       # seeds of rollouts and training, 0 for the demonstration; the base is the same for all
ROUNDS=${ROUNDS:-3}
STRATEGY=${STRATEGY:-1}
OUT=${OUT:-runs/demo}
TABLES=${TABLES:-runs/$([ -n "${REHEARSE:-}" ] && echo rehearsal || echo tables)}
NPROC=${NPROC:-1}                     # processes per stage; on a machine with GPUs one per GPU

# Sizes of the demonstration world, chosen on its validation prompts. The paper's sizes are the defaults of
# the scripts.
TOY=${TOY:-}                                                   # options of tests/toy.py
PROMPTS_PER_ROUND=${PROMPTS_PER_ROUND:-1000}            # as in the paper, with 8 responses each instead of 16
TEACHER_STEPS=${TEACHER_STEPS:-48}                             # 1.5 epochs
DISTILL_STEPS=${DISTILL_STEPS:-10}                             # paper: 10 when iterating rounds
MSE_STEPS=${MSE_STEPS:-60}
K=${K:-16}                                                     # samples per test problem
SAMPLE="-n 8 --temperature 1 --max-tokens 128 --engine hf --shard-prompts 100 --workers 1"
TRAIN="--micro-tokens 4096 --no-checkpointing"
MEASURE="--temperature 1 --top-p 1 --top-k -1 --max-tokens 128 --engine hf --shard-prompts 50 \
  --micro-tokens 8192 --workers 1"

# glibc gives large blocks back to the system after each use; keeping them makes training on CPU a little
# faster
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456
export TOKENIZERS_PARALLELISM=false

if [ "$NPROC" -gt 1 ]; then PY="torchrun --standalone --nproc-per-node $NPROC"; else PY=python; fi

step() {                       # step OUTPUT COMMAND...   print the command, run it unless its output is there
  local output=$1; shift
  local text start=${EPOCHREALTIME/[.,]/}
  printf -v text '%q ' "$@"           # quoted, so that it can be copied
  if [ -n "${DRY_RUN:-}" ]; then echo "${text% }"; return; fi
  if [ -e "$output" ]; then return; fi
  echo "+ ${text% }" >&3
  "$@" 9>&- & child=$!    # in the background, or a SIGTERM to this script would wait for the end of the stage
  wait "$child"
  child=
  if [ -z "${REHEARSE:-}" ]; then return; fi
  echo "$(((${EPOCHREALTIME/[.,]/} - start) / 1000)) ${text% }" >> "$TABLES/milliseconds.txt"
}

stop() {                          # stop SIGNAL CODE   the stages save and leave, and then so does this script
  trap '' TERM INT
  local pid
  for pid in $child; do kill -s TERM "$pid" 2> /dev/null || true; done
  for pid in $children; do kill -s TERM -- "-$pid" 2> /dev/null || true; done
  wait || true
  echo "run_rounds.sh: stopped by $1; the same command continues" >&2
  exit "$2"
}

fail() { echo "run_rounds.sh: $1" >&2; exit 2; }

lock() {           # lock FOLDER   one run at a time in it, and none beside a stage that outlived a killed run
  [ -z "${DRY_RUN:-}" ] && command -v flock > /dev/null || return 0
  mkdir -p "$1"
  exec 8>> "$1/.stage.lock" 9>> "$1/.lock"                     # 8 stays open in the stages, 9 does not
  flock -n 9 || fail "another run is at work in $1: wait for it, or give another folder"
  flock -n 8 || { echo "waiting for the stage that an earlier run left at work in $1"; flock 8; }
}

lacking() {                           # lacking RESULTS DATA FLAGS CHECKPOINT...   those without a row
  if [ -n "${DRY_RUN:-}" ]; then echo "${*:4}"; return; fi
  python evaluate.py --missing --out "$1" --data $2 $3 --model "${@:4}"
}

evaluate() {                          # evaluate CHECKPOINT...   those that RESULTS does not have yet
  local missing results=${RESULTS:-$OUT/results.jsonl} data=${DATA:-}
  data=${data:-validation=$OUT/prompts/validation.jsonl:2 test=$OUT/prompts/test.jsonl:$K}
  missing=$(lacking "$results" "$data" "$MEASURE" "$@")
  if [ -z "$missing" ]; then return; fi
  step "" $PY evaluate.py --model $missing --base "$OUT/base" --out "$results" --data $data $MEASURE
}

path() {                              # path RUN STEPS EVERY   the checkpoints that a training run saves
  local s
  for ((s = $3; s < $2; s += $3)); do printf '%s/step-%04d ' "$1" "$s"; done
  echo "$1/final"
}

setup() {                            # .venv unless an environment is active; requirements.txt when it changed
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -e .venv/bin/activate ] || python3 -m venv .venv
    # shellcheck disable=SC1091
    . .venv/bin/activate
  fi
  local wanted="$VIRTUAL_ENV/erpd-requirements.txt"
  if command -v nvidia-smi > /dev/null; then cp requirements.txt \
    "$wanted.new"; else grep -v '^vllm' requirements.txt > "$wanted.new"; fi
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
      step "$data/rollouts.json" $PY rollout.py --model "$policy" --prompts "$OUT/prompts/train.jsonl" \
        --out "$data" --num-prompts "$PROMPTS_PER_ROUND" --seed "$((100 * seed + round))" $SAMPLE
      # Stage 1: a weakly constrained teacher, for dozens of steps on that batch. beta acts through beta x
      # length:
      # 0.5 at 40 tokens is what 0.001 is at 20,000.
      step "$dir/teacher/final" $PY teacher.py --model "$policy" --rollouts "$dir/rollouts" --out \
        "$dir/teacher" --seed "$seed" \
        --loss ce --beta 0.5 --lr 1e-4 --batch-prompts 32 --steps "$TEACHER_STEPS" --save-every 16 $TRAIN
      # Stage 2: back to the policy that wrote the rollouts, and distil.
      if [ "$STRATEGY" = 1 ]; then
        step "$dir/student/final" $PY distill.py --student "$policy" --teacher "$dir/teacher/final" \
          --denominator old --rollouts "$data" --out "$dir/student" --seed "$seed" \
          --lr 3e-4 --batch-prompts 64 --steps "$DISTILL_STEPS" --kl-kind exact --kl-coef 1 $TRAIN
      else
        student                       # tests/paper/strategies.sh
      fi
      older=$policy
      policy=$dir/student/final

      # The control: one stage, the teacher's loss with the student's KL term, iterated without distillation.
      single=$OUT/seed$seed/control$round
      if [ "$round" -gt 1 ]; then
        data=$single/rollouts         # round 1 shares its rollouts: both start from the base
        step "$data/rollouts.json" $PY rollout.py --model "$control" --prompts "$OUT/prompts/train.jsonl" \
          --out "$data" \
          --num-prompts "$PROMPTS_PER_ROUND" --seed "$((100 * seed + round))" $SAMPLE
      fi
      step "$single/teacher/final" $PY teacher.py --model "$control" --rollouts "$data" --out \
        "$single/teacher" --seed "$seed" \
        --loss ce --beta 0.5 --kl-coef 1 --kl-kind exact --lr 1e-4 --batch-prompts 32 --steps \
          "$TEACHER_STEPS" --save-every 16 $TRAIN
      control=$single/teacher/final

      evaluate "$OUT/base" $(path "$dir/teacher" "$TEACHER_STEPS" 16) \
        "$dir/student/final" "$single/teacher/final"
    done

    # Weak to strong (strategy 2): an MSE teacher, worse than the base, over its own early "unlearned"
    # checkpoint.
    dir=$OUT/seed$seed/mse
    step "$dir/teacher/final" $PY teacher.py --model "$OUT/base" --rollouts "$OUT/seed$seed/round1/rollouts" \
      --out "$dir/teacher" \
      --seed "$seed" --loss mse --lr 5e-4 --batch-prompts 16 --steps "$MSE_STEPS" --save-every 10 $TRAIN
    step "$dir/student/final" $PY distill.py --student "$OUT/base" --teacher "$dir/teacher/final" \
      --denominator "$dir/teacher/step-0010" \
      --rollouts "$OUT/seed$seed/round1/rollouts" --out "$dir/student" --seed "$seed" \
      --lr 3e-4 --batch-prompts 64 --steps "$DISTILL_STEPS" --kl-coef 0.1 --kl-kind exact $TRAIN
    evaluate "$dir/teacher/step-0010" "$dir/teacher/final" "$dir/student/final"
  done
  report "$OUT"
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
# shellcheck source=tests/paper/strategies.sh
. tests/paper/strategies.sh
trap 'stop SIGTERM 143' TERM
trap 'stop Ctrl-C 130' INT
ALL=$(echo table{1..12} fig{4..10})
command=${1:-demo}
case "$command" in
  demo) [ -n "${DRY_RUN:-}" ] || setup; lock "$OUT"; demo ;;
  table[1-9]|table1[0-2]|fig[4-9]|fig10) [ -n "${DRY_RUN:-}" ] || setup; lock "$TABLES"; tables "$1" ;;
  all) [ -n "${DRY_RUN:-}" ] || setup; lock "$TABLES"; tables $ALL ;;
  small) [ -n "${DRY_RUN:-}" ] || setup; lock "${SMALL:-runs/small}"; small ;;
  test) [ -n "${DRY_RUN:-}" ] || setup; ${DRY_RUN:+echo} python -m pytest tests -q "${@:2}" ;;
  help|-h|--help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" ;;
  *) fail "unknown command '$1'; try ./run_rounds.sh help" ;;
esac
