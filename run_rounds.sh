#!/usr/bin/env bash
# Extreme Region Policy Distillation, from one command.
#
#   ./run_rounds.sh          the whole method on the demonstration world, CPU is enough; ends with runs/demo/report.md
#   ./run_rounds.sh table1   what each teacher loss extracts from one batch of rollouts (demonstration world, 3 seeds)
#   ./run_rounds.sh table3   on-policy GRPO: one optimizer step on each fresh batch, Adam carried over (ONPOLICY_STEPS=25)
#   ./run_rounds.sh fig6     accuracy against KL: every strategy, an ensemble, the entropy bonus, teachers and controls
#   ./run_rounds.sh test     the tests
#   ./run_rounds.sh help     this text
#
# Sets itself up first (.venv, requirements.txt). Steps whose output exists are skipped, so a run that was stopped goes on
# where it was, and SEEDS="0 1 2" ./run_rounds.sh adds seeds to a finished run. DRY_RUN=1 prints the commands only.
# STRATEGY=1|2|3|auto says where the signal of a round comes from (Fig. 3). auto follows Sec. 4.4: strategy 1 while the
# teacher clearly beats the policy it started from on the validation set, else the best of strategies 2 and 3 there.
set -euo pipefail
cd "$(dirname "$0")"

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
SAMPLE="-n 8 --temperature 1 --max-tokens 128 --engine hf --shard-prompts 100"
TRAIN="--micro-tokens 4096 --no-checkpointing"
MEASURE="--temperature 1 --top-p 1 --top-k -1 --max-tokens 128 --engine hf --shard-prompts 50 --micro-tokens 8192"

# glibc gives large blocks back to the system after each use; keeping them makes training on CPU a little faster
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456
export TOKENIZERS_PARALLELISM=false

if [ "$NPROC" -gt 1 ]; then PY="torchrun --standalone --nproc-per-node $NPROC"; else PY=python; fi

step() {                              # step OUTPUT COMMAND...   print the command, run it unless its output is there
  local output=$1; shift
  if [ -n "${DRY_RUN:-}" ]; then echo "$*"; return; fi
  if [ -e "$output" ]; then return; fi
  echo "+ $*"
  "$@" 9>&- & child=$!                # in the background, or a SIGTERM to this script would wait for the end of the stage
  wait "$child"
  child=
}

stop() {                              # stop SIGNAL CODE   the stage saves and leaves, and then so does this script
  trap '' TERM INT
  if [ -n "$child" ]; then kill -s TERM "$child" 2> /dev/null || true; wait "$child" || true; fi
  echo "run_rounds.sh: stopped by $1; the same command continues" >&2
  exit "$2"
}

lock() {                              # one run at a time in OUT, and none beside a stage that outlived a killed run
  [ -z "${DRY_RUN:-}" ] && command -v flock > /dev/null || return 0
  mkdir -p "$OUT"
  exec 8>> "$OUT/.stage.lock" 9>> "$OUT/.lock"                 # 8 stays open in the stages, 9 does not
  flock -n 9 || { echo "run_rounds.sh: another run is at work in $OUT: wait for it, or give another OUT" >&2; exit 2; }
  flock -n 8 || { echo "waiting for the stage that an earlier run left at work in $OUT"; flock 8; }
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

distil() {                            # distil NAME TEACHER DENOMINATOR FLAGS...   a student of $policy on the rollouts of this round
  step "$dir/$1/final" $PY distill.py --student "$policy" --teacher "$2" --denominator "$3" --rollouts "$data" \
    --out "$dir/$1" --seed "$seed" --lr 3e-4 --batch-prompts 64 --steps "${THESE_STEPS:-$DISTILL_STEPS}" --kl-kind exact "${@:4}" $TRAIN
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
    1) distil student "$dir/teacher/final" old --kl-coef 1 ;;
    2)                                # the unlearned checkpoint matters most (Table 7), so the students of three are compared
      step "$dir/mse/final" $PY teacher.py --model "$policy" --rollouts "$dir/rollouts" --out "$dir/mse" --seed "$seed" \
        --loss mse --lr 5e-4 --batch-prompts 16 --steps "$MSE_STEPS" --save-every 10 $TRAIN
      if [ "$MSE_STEPS" -le 30 ]; then echo "run_rounds.sh: strategy 2 compares the MSE run's steps 10, 20 and 30: MSE_STEPS must be above 30" >&2; exit 2; fi
      for best in 10 20 30; do
        distil "student-un$best" "$dir/mse/final" "$dir/mse/step-00$best" --kl-coef 0.1
        candidates="$candidates student-un$best"
      done
      for best in ${UNLEARNED_LR:-}; do                        # Table 11: unlearned apart, ten steps at another rate, same teacher
        step "$dir/unlearned-$best/final" $PY teacher.py --model "$policy" --rollouts "$dir/rollouts" --out "$dir/unlearned-$best" \
          --seed "$seed" --loss mse --lr "$best" --batch-prompts 16 --steps 10 $TRAIN
        distil "student-un-$best" "$dir/mse/final" "$dir/unlearned-$best/final" --kl-coef 0.1
        candidates="$candidates student-un-$best"
      done
      if [ "$STRATEGY" = auto ] && [ -n "$older" ]; then       # strategy 3 needs an older student
        distil student-older "$dir/teacher/final" "$older" --kl-coef 1
        candidates="$candidates student-older"
      fi
      for best in $candidates; do finals="$finals $dir/$best/final"; done
      evaluate $finals
      pick student $candidates ;;
    3) distil student "$dir/teacher/final" "${older:-old}" --kl-coef 1 ;;     # in round 1 nothing is older than pi_old
    *) echo "run_rounds.sh: STRATEGY is 1, 2, 3 or auto, not '$strategy'" >&2; exit 2 ;;
  esac
}

table1() {                            # Table 1: what each loss extracts from the same rollouts; learning rates chosen on validation
  local seed dir data out=$TABLES/table1 policy=$OUT/base
  local RESULTS=$out/results.jsonl DATA="validation=$OUT/prompts/validation.jsonl:8 test=$OUT/prompts/test.jsonl:8"
  for seed in ${SEEDS:-0 1 2}; do
    first_rollouts
    dir=$out/seed$seed
    teach ce   --loss ce --beta 0.5 --lr 3e-4 --batch-prompts 32      # paper: 72.9 Qwen3-4B, 76.7 NBG4-3B, averages of five benchmarks
    teach sapo --loss sapo --lr 1e-4 --batch-prompts 32               # paper: 69.9, 76.2
    teach grpo --loss grpo --lr 3e-4 --batch-prompts 32               # paper: 69.0, 73.6
    teach ppo  --loss ppo --lr 2e-4 --value-steps 100 --value-lr 1e-3 --batch-prompts 32      # paper: 68.1, 73.9
    teach mse  --loss mse --lr 1e-4 --batch-prompts 32                # paper: 36.4, 37.1
  done
  report "$out"
}

fig6() {                              # Fig. 6: accuracy against KL, of every strategy, an ensemble, teachers and controls
  local seed dir first data out=$TABLES/fig6 policy steps
  local RESULTS=$out/results.jsonl DATA="validation=$OUT/prompts/validation.jsonl:4 test=$OUT/prompts/test.jsonl:16"
  for seed in ${SEEDS:-0 1 2}; do
    policy=$OUT/base
    first_rollouts
    first=$out/seed$seed
    dir=$first
    teach teacher --loss ce --beta 0.5 --lr 3e-4 --batch-prompts 32
    teach control --loss ce --beta 0.5 --lr 3e-4 --batch-prompts 32 --kl-coef 3 --kl-kind exact     # one stage, the students' kind of KL
    teach control-10 --loss ce --beta 0.5 --lr 3e-4 --batch-prompts 32 --kl-coef 10 --kl-kind exact
    THESE_STEPS=48 teach control-sapo --loss sapo --lr 1e-4 --batch-prompts 32                      # one stage, no KL term
    step "$dir/mse/final" $PY teacher.py --model "$policy" --rollouts "$data" --out "$dir/mse" --seed "$seed" \
      --loss mse --lr 5e-4 --batch-prompts 16 --steps 64 --save-every 8 $TRAIN
    distil student-1 "$dir/teacher/final" old --kl-coef 1                                           # strategy 1
    distil student-1-of-control "$dir/control/final" old --kl-coef 1                                # a better teacher
    distil student-1-entropy "$dir/teacher/final" old --kl-coef 1 --entropy-coef 0.1                # Table 6
    THESE_STEPS=32 distil student-1-max-kl "$dir/teacher/final" old --max-kl 0.01                         # Eq. 7, no KL term
    distil student-1-live "$dir/teacher/final" live --kl-coef 1                                     # Fig. 7
    distil student-2 "$dir/mse/final" "$dir/mse/step-0008" --kl-coef 0.3                            # strategy 2
    policy=$dir/student-1/final
    for steps in 16 32; do            # Table 8: on from the first student with the second signal; pi_old wrote the rollouts as before
      THESE_STEPS=$steps distil "candidate-$steps" "$dir/mse/final" "$dir/mse/step-0008" --kl-coef 0.3
    done
    evaluate "$dir/mse/step-0008" "$dir/mse/final" "$dir/student-1/final" "$dir/student-1-of-control/final" \
      "$dir/student-1-entropy/final" "$dir/student-1-max-kl/final" \
      "$dir/student-1-live/final" "$dir/student-2/final" "$dir/candidate-16/final" "$dir/candidate-32/final"
    pick ensemble candidate-16 candidate-32
    evaluate "$dir/ensemble/final"
    if [ -n "${DRY_RUN:-}" ] || ! grep -qs '"movement"' "$dir/student-2/run.json"; then
      step "" $PY evaluate.py --movement "$dir/student-1" "$dir/student-1-live" "$dir/student-2"
    fi

    dir=$first/second                 # a second round: strategy 3 needs an older policy, here the base
    data=$dir/rollouts
    again
    teach teacher --loss ce --beta 0.5 --lr 3e-4 --batch-prompts 32
    distil student-1 "$dir/teacher/final" old --kl-coef 1
    distil student-3 "$dir/teacher/final" "$OUT/base" --kl-coef 1
    evaluate "$dir/student-1/final" "$dir/student-3/final"
    policy=$first/control/final       # and of the control
    data=$dir/control-rollouts
    again
    teach control --loss ce --beta 0.5 --lr 3e-4 --batch-prompts 32 --kl-coef 3 --kl-kind exact
  done
  report "$out"
}

again() {                             # the second round's rollouts of $policy, in $data
  step "$data/rollouts.json" $PY rollout.py --model "$policy" --prompts "$OUT/prompts/train.jsonl" --out "$data" \
    --num-prompts "$PROMPTS_PER_ROUND" --seed "$((100 * seed + 2))" $SAMPLE
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

table3() {                            # Table 3: on-policy GRPO through the same two stages; paper: 56.0, 57.2, 53.2 at steps 0, 25, 50
  local seed i dir policy previous out=$TABLES/table3
  local RESULTS=$out/results.jsonl DATA="test=$OUT/prompts/test.jsonl:16"
  step "$OUT/base" python tests/toy.py --out "$OUT" $TOY
  evaluate "$OUT/base"
  for seed in ${SEEDS:-0}; do
    policy=$OUT/base
    previous=
    for ((i = 1; i <= ${ONPOLICY_STEPS:-25}; i++)); do
      dir=$out/seed$seed/update$(printf %03d "$i")
      step "$dir/rollouts/rollouts.json" $PY rollout.py --model "$policy" --prompts "$OUT/prompts/train.jsonl" --out "$dir/rollouts" \
        --num-prompts 32 --seed "$((1000 * seed + i))" $SAMPLE
      step "$dir/policy/final" $PY teacher.py --model "$policy" --rollouts "$dir/rollouts" --out "$dir/policy" --seed "$seed" \
        --loss grpo --lr 1e-4 --batch-prompts 32 --steps 1 ${previous:+--optimizer-from $previous} $TRAIN
      if [ "$((i % 5))" = 0 ] || [ "$i" = "${ONPOLICY_STEPS:-25}" ]; then evaluate "$dir/policy/final"; fi
      if [ -n "$previous" ] && [ -z "${DRY_RUN:-}" ]; then
        rm -f "$previous/final/optimizer.pt"                   # the newest update holds what the next needs
        if [ "$(((i - 1) % 5))" != 0 ]; then rm -f "$previous"/final/*.safetensors; fi
      fi
      previous=$dir/policy
      policy=$previous/final
    done
  done
  report "$out"
}

first_rollouts() {                    # the base, its rows, and the demonstration's first rollouts of a seed, in $data
  step "$OUT/base" python tests/toy.py --out "$OUT" $TOY
  evaluate "$OUT/base"
  data=$OUT/seed$seed/round1/rollouts
  step "$data/rollouts.json" $PY rollout.py --model "$OUT/base" --prompts "$OUT/prompts/train.jsonl" --out "$data" \
    --num-prompts "$PROMPTS_PER_ROUND" --seed "$((100 * seed + 1))" $SAMPLE
}

teach() {                             # teach NAME FLAGS...   a teacher of $policy on the rollouts of this round, with its path
  step "$dir/$1/final" $PY teacher.py --model "$policy" --rollouts "$data" --out "$dir/$1" --seed "$seed" "${@:2}" \
    --steps "${THESE_STEPS:-96}" --save-every 4 $TRAIN
  evaluate "$dir/$1/step-0004" "$dir/$1/step-0008" $(checkpoints "$dir/$1" "${THESE_STEPS:-96}" 16)
}

report() {                            # report FOLDER   anew if there are new results
  if [ -n "${DRY_RUN:-}" ] || [ ! -e "$1/report.md" ] || [ "$1/results.jsonl" -nt "$1/report.md" ]; then
    step "" python evaluate.py --report "$1" --title "demonstration world"
  fi
  echo "report: $1/report.md"
}

child=
trap 'stop SIGTERM 143' TERM
trap 'stop Ctrl-C 130' INT
case "${1:-demo}" in
  demo) [ -n "${DRY_RUN:-}" ] || setup; lock; demo ;;
  fig6) [ -n "${DRY_RUN:-}" ] || setup; lock; fig6 ;;
  table3) [ -n "${DRY_RUN:-}" ] || setup; lock; table3 ;;
  table1) [ -n "${DRY_RUN:-}" ] || setup; lock; table1 ;;
  test) [ -n "${DRY_RUN:-}" ] || setup; ${DRY_RUN:+echo} python -m pytest tests -q "${@:2}" ;;
  help|-h|--help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" ;;
  *) echo "run_rounds.sh: unknown command '$1'; try ./run_rounds.sh help" >&2; exit 2 ;;
esac
