# shellcheck shell=bash
# Students beyond strategy 1 (Fig. 3) in the rounds of the demonstration. Sourced by run_rounds.sh.
#
#   STRATEGY=2     weak to strong: an MSE teacher over its own unlearned checkpoint
#   STRATEGY=3     the teacher of the round over an older student
#   STRATEGY=auto  Sec. 4.4: strategy 1 while the teacher clearly beats the policy it started from on the
#                  validation set, else the best of strategies 2 and 3 there
#   UNLEARNED_LR="5e-6 1e-5"  adds to strategy 2 policies that were unlearned apart at these rates (Table 11)

student_by_strategy() {  # makes $this/student from $policy on the rollouts of this round
  local strategy=$STRATEGY i candidates="" r=${this#"$dir/"} start=${policy#"$dir/"} before=${older#"$dir/"}
  local FLAGS=$TRAIN
  local train="--lr 3e-4 --batch-prompts 50 --steps $DISTILL_STEPS --save-every 4 --kl-kind exact"
  local mse="--batch-prompts 16 --steps $MSE_STEPS --save-every 10"
  if [ "$strategy" = auto ]; then
    strategy=1                        # DRY_RUN prints this
    if [ -z "${DRY_RUN:-}" ]; then
      validate "$start" "$r/teacher/final"
      if [ "$(choose validation "--margin 2" "$start" "$r/teacher/final")" = "$start" ]; then strategy=2; fi
      echo "round $round of seed $seed: strategy $strategy"
    fi
  fi
  case $strategy in
    1) distil "$r/student" "$start" "$r/teacher/final" old "$r/rollouts" $train --kl-coef 1 ;;
    2)                                # the unlearned checkpoint matters most (Table 7), so three are compared
      teach "$r/mse" "$start" "$r/rollouts" --loss mse --lr 5e-4 $mse
      if [ "$MSE_STEPS" -le 30 ]; then
        echo "run_rounds.sh: strategy 2 compares the MSE run's steps 10 to 30: MSE_STEPS must be above 30" >&2
        exit 2
      fi
      for i in 10 20 30; do
        distil "$r/student-un$i" "$start" "$r/mse/final" "$r/mse/step-00$i" "$r/rollouts" $train --kl-coef 0.1
        candidates="$candidates $r/student-un$i/final"
      done
      for i in ${UNLEARNED_LR:-}; do  # ten steps at another rate, the same teacher
        teach "$r/unlearned-$i" "$start" "$r/rollouts" --loss mse --lr "$i" --batch-prompts 16 --steps 10
        distil "$r/student-un-$i" "$start" "$r/mse/final" "$r/unlearned-$i/final" "$r/rollouts" $train \
          --kl-coef 0.1
        candidates="$candidates $r/student-un-$i/final"
      done
      if [ "$STRATEGY" = auto ] && [ -n "$older" ]; then  # strategy 3 needs an older student
        distil "$r/student-older" "$start" "$r/teacher/final" "$before" "$r/rollouts" $train --kl-coef 1
        candidates="$candidates $r/student-older/final"
      fi
      validate $candidates
      pick $candidates ;;
    3)                                # in round 1 nothing is older than pi_old
      distil "$r/student" "$start" "$r/teacher/final" "${before:-old}" "$r/rollouts" $train --kl-coef 1 ;;
    *) echo "run_rounds.sh: STRATEGY is 1, 2, 3 or auto, not '$strategy'" >&2; exit 2 ;;
  esac
}

pick() {              # pick CANDIDATE...   the best on validation becomes $this/student (by links)
  local best=$1
  if [ -n "${DRY_RUN:-}" ]; then                        # the first, or another if it does better
    echo "cp -al $dir/${best%/final} $this/student"
    return
  fi
  if [ -e "$this/student" ]; then return; fi
  best=$(choose validation "" "$@")
  rm -rf "$this/student.partial"
  cp -al "$dir/${best%/final}" "$this/student.partial"
  mv "$this/student.partial" "$this/student"
  echo "$this/student is $dir/$best"
}
