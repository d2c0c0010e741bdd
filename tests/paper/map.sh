# shellcheck shell=bash
# When does distillation beat a single stage? One stage and two, without a KL term, with the sampled and with
# the exact one, at equal KL, over the number of prompts and two sizes of the model. Sourced by run_rounds.sh.
#
#   ./run_rounds.sh map     runs/map/report.md, some hours on two cores; stopped, the same command continues
#
# The protocol, which stood here before the seeds that decide were run: every arm has four settings to try;
# seed 0 of the small model with 100 prompts chooses one per arm by the best checkpoint on validation
# problems, for both sizes and all numbers of prompts; seeds 1, 2 and 3 decide, on test problems. map.py says
# how the arms are compared.

MAP=${MAP:-runs/map}
MAP_PROMPTS=${MAP_PROMPTS:-30 100 300 1000}
MAP_STEPS=${MAP_STEPS:-64}            # of a single stage; students have half, and half is 32

map() {
  local size n seed stage kind arms=''
  SEEDS=${SEEDS:-1 2 3}
  if [ "$JOBS" -gt 1 ]; then export OMP_NUM_THREADS=1; fi
  map_world small
  map_world large &                   # is trained here, beside the choice
  map_job small 100 0 arm one none 3 &                  # the teacher of all students
  wait $!
  for stage in one two; do
    room
    map_job small 100 0 choosing $stage &
  done
  while [ -n "$(jobs -p)" ]; do wait -n; done
  for stage in one two; do
    for kind in none sampled exact; do
      arms="$arms $stage-$kind-$(chosen $stage $kind)"
    done
  done
  for size in small large; do
    for n in $MAP_PROMPTS; do
      room
      map_job "$size" "$n" "${SEEDS%% *}" measure base &  # once, before the seeds run beside each other
      wait $!
      for seed in $SEEDS; do
        room
        map_job "$size" "$n" "$seed" deciding &
      done
    done
    while [ -n "$(jobs -p)" ]; do wait -n; done
  done
  step "" python tests/paper/map.py "$MAP"
}

map_world() {         # map_world SIZE   328,032 parameters, or 761,216
  local toy=${TOY:---base tests/base}
  if [ "$1" = large ]; then toy="$TOY --hidden 128 --layers 4"; fi
  step "$MAP/worlds/$1/base" python tests/toy.py --out "$MAP/worlds/$1" $toy
}

map_job() {           # map_job SIZE PROMPTS SEED COMMAND...   one cell and seed, in a subshell
  local size=$1 seed=$3 where=$MAP/$1-$2 dir=$MAP/$1-$2/seed$3 validation=''
  local world=$MAP/worlds/$1 base=$MAP/worlds/$1/base prompts=$MAP/worlds/$1/prompts/train.jsonl
  if [ -z "${DRY_RUN:-}" ]; then aside; fi
  local benchmarks="test=$world/prompts/test.jsonl:4" KL_SAMPLES=1 FLAGS=$TRAIN
  local SETS=$benchmarks SCORE="$MEASURE --top-p 0.95" SCORE_KL="$MEASURE --top-p 1"
  local COLLECT="--num-prompts $2 $SAMPLE"
  collect rollouts base 1
  "${@:4}"
}

arm() {               # arm STAGE KIND TRY   trains an arm on the rollouts of this seed, with one setting
  local kl="--lr 3e-4 --kl-kind $2 --kl-coef"
  local flags
  case $2$3 in
    none1) flags="--lr 3e-5" ;;       # no weight to try: learning rates
    none2) flags="--lr 1e-4" ;;
    none3) flags="--lr 3e-4" ;;
    none4) flags="--lr 1e-3" ;;
    *1) flags="$kl 0.3" ;;
    *2) flags="$kl 1" ;;
    *3) flags="$kl 3" ;;
    *4) flags="$kl 10" ;;
  esac
  case $1 in
    one) teach "one-$2-$3" base rollouts --loss ce --beta 0.5 $flags --batch-prompts 16 --steps "$MAP_STEPS" \
      --save-every 4 ;;
    two) distil "two-$2-$3" base one-none-3/final old rollouts $flags --batch-prompts 16 \
      --steps "$((MAP_STEPS / 2))" --save-every 4 ;;
  esac
}

arm_path() {          # arm_path ARM   the checkpoints that are measured
  case $1 in
    one-*) doubling "$1" "$MAP_STEPS" ;;
    two-*) doubling "$1" "$((MAP_STEPS / 2))" ;;
  esac
}

choosing() {          # choosing STAGE   all tries of its arms, on validation problems
  local validation="validation=$world/prompts/validation.jsonl:4" kind i tried=''
  for kind in none sampled exact; do
    for i in 1 2 3 4; do
      arm $1 $kind $i
      tried="$tried $(arm_path $1-$kind-$i)"
    done
  done
  validate $tried
}

deciding() {          # the chosen try of each arm, on test problems
  local name
  arm one none 3                      # the teacher of both stages, as in the demonstration
  for name in $arms; do arm ${name//-/ }; done
  measure base $(for name in $arms; do arm_path $name; done)
}

chosen() {            # chosen STAGE KIND   the try that was best on validation problems; a dry run takes 3
  local best where=$MAP/small-100 dir=$MAP/small-100/seed0 base=$MAP/worlds/small/base
  if [ -n "${DRY_RUN:-}" ]; then echo 3; return; fi
  best=$(choose validation "" $(for i in 1 2 3 4; do arm_path "$1-$2-$i"; done))
  best=${best%%/*}
  echo "${best##*-}"
}
