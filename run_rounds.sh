#!/usr/bin/env bash
# Extreme Region Policy Distillation, from one command.
#
#   ./run_rounds.sh         the whole method on the demonstration world, CPU is enough: runs/demo/report.md
#   ./run_rounds.sh NAME    a table or figure of the paper, from the list below: runs/tables/NAME/report.md
#   ./run_rounds.sh all     all of them, with verdicts on the paper's claims: runs/tables/all/report.md
#   REHEARSE=1 [MODEL=... PROMPTS=... BENCHMARKS=... NPROC=2] ./run_rounds.sh NAME|all
#                           the same commands, only sizes changed (a few prompts, 48 tokens, 3 steps, K = 2),
#                           to runs/rehearsal; then what each stage took, and what the whole would cost
#   ./run_rounds.sh map     when distillation beats a single stage, on the demonstration world: some hours
#   ./run_rounds.sh small   the first experiment on a pretrained model, with a GPU or two patient CPU cores
#   ./run_rounds.sh test    the tests
#   ./run_rounds.sh help    this text
#
# Sets itself up first (.venv, requirements.txt). Steps whose output exists are skipped, so a run that was
# stopped goes on where it was, and SEEDS="0 1 2" ./run_rounds.sh adds seeds to a finished run. DRY_RUN=1
# prints the commands only. STRATEGY=1|2|3|auto says where the signal of a round comes from (Fig. 3).
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")"
exec 3>&1                             # commands are announced here, also where output goes to a log

SEEDS=${SEEDS:-}                      # of rollouts and training, 0 for the demonstration; all share the base
ROUNDS=${ROUNDS:-2}
STRATEGY=${STRATEGY:-1}
OUT=${OUT:-runs/demo}
TABLES=${TABLES:-runs/$([ -n "${REHEARSE:-}" ] && echo rehearsal || echo tables)}
NPROC=${NPROC:-1}                     # processes per stage; on a machine with GPUs one per GPU
PY=python
if [ "$NPROC" -gt 1 ]; then PY="torchrun --standalone --nproc-per-node $NPROC"; fi

# Sizes of the demonstration world, chosen on its validation prompts; the scripts' defaults are the paper's.
TOY=${TOY:-}                                  # options of tests/toy.py, for a world of your own
PROMPTS_PER_ROUND=${PROMPTS_PER_ROUND:-100}   # few for the model, so that a teacher can drift as in the paper
TEACHER_STEPS=${TEACHER_STEPS:-64}            # 16 epochs
DISTILL_STEPS=${DISTILL_STEPS:-16}            # 8 epochs, on whole batches of half the prompts
MSE_STEPS=${MSE_STEPS:-60}
K=${K:-4}                                     # samples per test problem
SAMPLE="-n 8 --temperature 0.6 --max-tokens 128 --engine hf --shard-prompts 100 --workers 1"
TRAIN="--micro-tokens 4096 --no-checkpointing"
MEASURE="--temperature 0.6 --top-k -1 --max-tokens 128 --engine hf --shard-prompts 100 --micro-tokens 8192
  --workers 1"

# glibc gives large blocks back to the system after each use; keeping them makes training on CPU a bit faster
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456
export TOKENIZERS_PARALLELISM=false

# ---- the demonstration -------------------------------------------------------------------------------

demo() {
  # The world: see tests/toy.py. Its base is committed, so that everybody starts from the same policy.
  step "$OUT/base" python tests/toy.py --out "$OUT" ${TOY:---base tests/base}

  local seed round dir policy older control rollouts this base=$OUT/base where=$OUT prompts=$OUT/prompts
  # As in Sec. 4.1: accuracy at top-p 0.95, KL on samples of its own, since top-p below 1 would bias it.
  local SETS="test=$prompts/test.jsonl:$K" benchmarks="test=$prompts/test.jsonl:$K" KL_SAMPLES=1
  local SCORE="$MEASURE --top-p 0.95" SCORE_KL="$MEASURE --top-p 1"
  local validation="validation=$prompts/validation.jsonl:$K"
  for seed in ${SEEDS:-0}; do
    dir=$OUT/seed$seed policy=$base older='' control=$base
    for ((round = 1; round <= ROUNDS; round++)); do
      this=$dir/round$round
      # Stage 0: sample the current policy once.
      step "$this/rollouts/rollouts.json" $PY rollout.py --model "$policy" --prompts "$prompts/train.jsonl" \
        --out "$this/rollouts" --num-prompts "$PROMPTS_PER_ROUND" --seed "$((100 * seed + round))" $SAMPLE
      # Stage 1: a weakly constrained teacher, for dozens of steps on that batch. beta acts through beta x
      # length: 0.5 at 40 tokens is what 0.001 is at 20,000.
      step "$this/teacher/final" $PY teacher.py --model "$policy" --rollouts "$this/rollouts" \
        --out "$this/teacher" --seed "$seed" --loss ce --beta 0.5 --lr 3e-4 --batch-prompts 25 \
        --steps "$TEACHER_STEPS" --save-every 4 $TRAIN
      # Stage 2: back to the policy that wrote the rollouts, and distil.
      if [ "$STRATEGY" = 1 ]; then
        step "$this/student/final" $PY distill.py --student "$policy" --teacher "$this/teacher/final" \
          --denominator old --rollouts "$this/rollouts" --out "$this/student" --seed "$seed" --lr 3e-4 \
          --batch-prompts 50 --steps "$DISTILL_STEPS" --kl-kind exact --kl-coef 0.3 --save-every 4 $TRAIN
      else
        student_by_strategy
      fi
      older=$policy policy=$this/student/final

      # The control: one stage, the teacher's loss with a KL term of its own, iterated without distillation.
      this=$dir/control$round rollouts=$dir/round1/rollouts  # both start from the base, on the same rollouts
      if [ "$round" -gt 1 ]; then
        rollouts=$this/rollouts
        step "$rollouts/rollouts.json" $PY rollout.py --model "$control" --prompts "$prompts/train.jsonl" \
          --out "$rollouts" --num-prompts "$PROMPTS_PER_ROUND" --seed "$((100 * seed + round))" $SAMPLE
      fi
      step "$this/teacher/final" $PY teacher.py --model "$control" --rollouts "$rollouts" \
        --out "$this/teacher" --seed "$seed" --loss ce --beta 0.5 --kl-coef 10 --kl-kind exact --lr 3e-4 \
        --batch-prompts 25 --steps "$TEACHER_STEPS" --save-every 4 $TRAIN
      control=$this/teacher/final

      measure base $(doubling "round$round/student" "$DISTILL_STEPS") \
        $(for i in {round,control}$round; do doubling "$i/teacher" "$TEACHER_STEPS"; done)
      validate base {round$round/{teacher,student},control$round/teacher}/final
      report_demo
    done

    # Weak to strong (strategy 2): an MSE teacher, worse than the base, over its early "unlearned" checkpoint.
    this=$dir/mse rollouts=$dir/round1/rollouts
    step "$this/teacher/final" $PY teacher.py --model "$base" --rollouts "$rollouts" --out "$this/teacher" \
      --seed "$seed" --loss mse --lr 5e-4 --batch-prompts 16 --steps "$MSE_STEPS" --save-every 10 $TRAIN
    step "$this/student/final" $PY distill.py --student "$base" --teacher "$this/teacher/final" \
      --denominator "$this/teacher/step-0010" --rollouts "$rollouts" --out "$this/student" --seed "$seed" \
      --lr 3e-4 --batch-prompts 64 --steps "$DISTILL_STEPS" --kl-coef 0.1 --kl-kind exact $TRAIN
    measure mse/teacher/{step-0010,final} mse/student/final
  done
  report_demo
  echo "report: $OUT/report.md"
}

report_demo() {       # where there is news
  if [ -n "${DRY_RUN:-}" ] || [ ! -e "$OUT/report.md" ] || [ "$OUT/results.jsonl" -nt "$OUT/report.md" ]; then
    step "" python evaluate.py --report "$OUT" --title "demonstration world"
  fi
}

# ---- what the recipes share --------------------------------------------------------------------------

step() {              # step OUTPUT COMMAND...   print the command, run it unless its output is there
  local output=$1 text start=${EPOCHREALTIME/[.,]/}
  shift
  printf -v text '%q ' "$@"           # quoted, so that it can be copied
  if [ -n "${DRY_RUN:-}" ]; then echo "${text% }"; return; fi
  if [ -e "$output" ]; then return; fi
  echo "+ ${text% }" >&3
  "$@" 9>&- &                         # in the background, or a SIGTERM here would wait for the stage's end
  wait $!
  if [ -n "${REHEARSE:-}" ]; then
    echo "$(((${EPOCHREALTIME/[.,]/} - start) / 1000)) ${text% }" >> "$TABLES/milliseconds.txt"
  fi
}

path() {              # path RUN STEPS EVERY   the checkpoints that a training run saves
  local i
  for ((i = $3; i < $2; i += $3)); do printf '%s/step-%04d ' "$1" "$i"; done
  echo "$1/final"
}

doubling() {          # doubling RUN STEPS   its checkpoints 4, 8, 16, 32 ... and the last
  local i
  for ((i = 4; i < $2; i *= 2)); do printf '%s/step-%04d ' "$1" "$i"; done
  echo "$1/final"
}

score() {             # score DATA FLAGS CHECKPOINT...   those that $where/results.jsonl lacks
  local checkpoint names="" results=$where/results.jsonl
  for checkpoint in "${@:3}"; do
    case " $names " in *" $checkpoint "*) ;; *) names="$names $checkpoint" ;; esac
  done
  if [ -z "${DRY_RUN:-}" ]; then
    names=$(python evaluate.py --missing --model $names --data $1 --out "$results" $2)
  fi
  if [ -z "$names" ]; then return; fi
  step "" $PY evaluate.py --model $names --base "$base" --out "$results" --data $1 $2
}

# ---- set-up, locks, signals --------------------------------------------------------------------------

setup() {             # .venv unless an environment is active; requirements.txt when it changed
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -e .venv/bin/activate ] || python3 -m venv .venv
    # shellcheck disable=SC1091
    . .venv/bin/activate
  fi
  local wanted="$VIRTUAL_ENV/erpd-requirements.txt" without='^vllm'
  if command -v nvidia-smi > /dev/null; then without='^$'; fi
  grep -v "$without" requirements.txt > "$wanted.new"
  if cmp -s "$wanted.new" "$wanted"; then return; fi
  echo "+ pip install -r requirements.txt   (once; later runs skip this)"
  python -m pip install --quiet --disable-pip-version-check -r "$wanted.new"
  mv "$wanted.new" "$wanted"
}

lock() {              # lock FOLDER   one run at a time, none beside a stage that outlived a kill
  command -v flock > /dev/null || return 0
  mkdir -p "$1"
  exec 8>> "$1/.stage.lock" 9>> "$1/.lock"    # 8 stays open in the stages, 9 does not
  if ! flock -n 9; then
    echo "run_rounds.sh: another run is at work in $1: wait for it, or give another folder" >&2
    exit 2
  fi
  flock -n 8 || { echo "waiting for the stage that an earlier run left at work in $1"; flock 8; }
}

begin() {             # begin FOLDER   nothing of this in a dry run
  if [ -z "${DRY_RUN:-}" ]; then setup; lock "$1"; fi
}

finish() {            # stages that still run save and leave
  trap '' TERM INT
  kill $(jobs -p) 2> /dev/null || true
  wait || true
}

stop() {              # stop CODE SIGNAL
  finish
  echo "run_rounds.sh: stopped by $2; the same command continues" >&2
  exit "$1"
}

for part in settings commands strategies recipes small map; do
  # shellcheck disable=SC1090
  . "tests/paper/$part.sh"
done
trap 'stop 143 SIGTERM' TERM
trap 'stop 130 Ctrl-C' INT
trap finish EXIT
command=${1:-demo}
case "$command" in
  demo) REHEARSE=''; begin "$OUT"; demo ;;
  table[1-9]|table1[0-2]|fig[4-9]|fig10) begin "$TABLES"; tables "$command" ;;
  all) begin "$TABLES"; tables $ALL ;;
  map) REHEARSE=''; begin "$MAP"; map ;;
  small) REHEARSE=''; begin "${SMALL:-runs/small}"; small ;;
  test) [ -n "${DRY_RUN:-}" ] || setup; ${DRY_RUN:+echo} python -m pytest tests -q "${@:2}" ;;
  help|-h|--help)
    for file in "$0" tests/paper/recipes.sh; do sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$file"; done ;;
  *) echo "run_rounds.sh: unknown command '$command'; try ./run_rounds.sh help" >&2; exit 2 ;;
esac
