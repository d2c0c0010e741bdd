# shellcheck shell=bash
# Where the signal of a round comes from, STRATEGY=2, 3 or auto (Fig. 3); strategy 1 stands in run_rounds.sh.
# Sourced by it.
# auto follows Sec. 4.4: strategy 1 while the teacher clearly beats the policy it started from on the
# validation set, else
# the best of strategies 2 and 3 there.

pupil() {       # pupil NAME TEACHER DENOMINATOR FLAGS...   a student of $policy on the rollouts of this round
  step "$dir/$1/final" $PY distill.py --student "$policy" --teacher "$2" --denominator "$3" --rollouts \
    "$data" \
    --out "$dir/$1" --seed "$seed" --lr 3e-4 --batch-prompts 64 --steps "$DISTILL_STEPS" --kl-kind exact \
      "${@:4}" $TRAIN
}

student() {                           # the student of this round, by STRATEGY
  local strategy=$STRATEGY best candidates="" finals=""
  if [ "$strategy" = auto ]; then
    strategy=1                        # DRY_RUN prints this
    if [ -z "${DRY_RUN:-}" ]; then
      evaluate "$policy" "$dir/teacher/final"
      best=$(python evaluate.py --pick validation --margin 2 --model "$policy" "$dir/teacher/final" \
        --out "${RESULTS:-$OUT/results.jsonl}")
      if [ "$best" = "$policy" ]; then strategy=2; fi
      echo "round $round of seed $seed: strategy $strategy"
    fi
  fi
  case $strategy in
    1) pupil student "$dir/teacher/final" old --kl-coef 1 ;;
    2)                # the unlearned checkpoint matters most (Table 7), so the students of three are compared
      step "$dir/mse/final" $PY teacher.py --model "$policy" --rollouts "$dir/rollouts" --out "$dir/mse" \
        --seed "$seed" \
        --loss mse --lr 5e-4 --batch-prompts 16 --steps "$MSE_STEPS" --save-every 10 $TRAIN
      [ "$MSE_STEPS" -gt 30 ] || fail "strategy 2 compares steps 10, 20 and 30: MSE_STEPS must be above 30"
      for best in 10 20 30; do
        pupil "student-un$best" "$dir/mse/final" "$dir/mse/step-00$best" --kl-coef 0.1
        candidates="$candidates student-un$best"
      done
      for best in ${UNLEARNED_LR:-}; do   # Table 11: unlearned apart, ten steps at another rate, same teacher
        step "$dir/unlearned-$best/final" $PY teacher.py --model "$policy" --rollouts "$dir/rollouts" --out \
          "$dir/unlearned-$best" \
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
    # in round 1 nothing is older than pi_old
    3) pupil student "$dir/teacher/final" "${older:-old}" --kl-coef 1 ;;
    *) fail "STRATEGY is 1, 2, 3 or auto, not '$strategy'" ;;
  esac
}

pick() {       # pick NAME CANDIDATE...   the best student on validation gets the name too (links, not copies)
  local best candidate finals=""
  # the first, or another if it does better
  if [ -n "${DRY_RUN:-}" ]; then echo "cp -al $dir/$2 $dir/$1"; return; fi
  if [ -e "$dir/$1" ]; then return; fi
  for candidate in "${@:2}"; do finals="$finals $dir/$candidate/final"; done
  best=$(python evaluate.py --pick validation --model $finals --out "${RESULTS:-$OUT/results.jsonl}")
  rm -rf "$dir/$1.partial"
  cp -al "$(dirname "$best")" "$dir/$1.partial"
  mv "$dir/$1.partial" "$dir/$1"
  echo "$dir/$1 is $best"
}
