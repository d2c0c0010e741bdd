# shellcheck shell=bash
# One function per kind of command, and jobs side by side, for recipes, strategies, the map and the first
# pretrained model. Sourced by run_rounds.sh. Runs have short names below $dir, the folder of a seed; results
# go to $where/results.jsonl.

at() {                # at NAME...   the paths of policies by their short names
  local name
  for name in "$@"; do
    case ${REHEARSE:+rehearsed}$name in                 # its first of three steps stands for any early one
      rehearsed*/step-00[0-3]?) name=${name%/*}/step-0001 ;;  # (Table 7 needs two)
      rehearsed*/step-*) name=${name%/*}/step-0002 ;;
    esac
    case $name in base|"$base") echo "$base" ;; old|none|live) echo "$name" ;; *) echo "$dir/$name" ;; esac
  done
}

collect() {           # collect NAME POLICY NUMBER   rollouts of a policy
  step "$dir/$1/rollouts.json" $PY rollout.py --model "$(at "$2")" --prompts "$prompts" --out "$dir/$1" \
    --seed "$((100 * seed + $3))" $COLLECT $SMALLER_COLLECT
}

teach() {             # teach NAME START ROLLOUTS FLAGS   a teacher: many steps on fixed rollouts
  step "$dir/$1/final" $PY teacher.py --model "$(at "$2")" --rollouts "$dir/$3" --out "$dir/$1" \
    --seed "$seed" "${@:4}" $FLAGS $SMALLER_TEACH
}

distil() {            # distil NAME START TEACHER DENOMINATOR ROLLOUTS FLAGS   a student
  step "$dir/$1/final" $PY distill.py --student "$(at "$2")" --teacher "$(at "$3")" \
    --denominator "$(at "$4")" --rollouts "$dir/$5" --out "$dir/$1" --seed "$seed" "${@:6}" $FLAGS \
    $SMALLER_DISTIL
}

ONLINE_KEPT="10 25 40 50 60 70 100"   # steps whose weights stay, for all recipes: they share runs

onpolicy() {          # onpolicy NAME START STEP...   each batch is used once; STEPs are measured
  local i out data policy previous='' number='' updates
  updates=$(seq "$ONLINE_PART" "$ONLINE_PART" "${*: -1}")  # demonstration: five steps share a batch
  if [ -n "${REHEARSE:-}" ]; then updates=${*:3}; fi
  policy=$(at "$2")
  for i in $updates; do
    out=$dir/$1/update$(printf %03d "$i") data=$dir/$1/rollouts$(printf %03d "$i")
    if [ -n "${DRY_RUN:-}" ] || [ ! -e "$out/final" ]; then
      step "$data/rollouts.json" $PY rollout.py --model "$policy" --prompts "$prompts" --out "$data" \
        --seed "$((1000 * seed + i / ONLINE_PART))" $ONLINE $SMALLER_COLLECT
      step "$out/final" $PY teacher.py --model "$policy" --rollouts "$data" --out "$out" --seed "$seed" \
        $GRPO $BATCH32 --steps "$ONLINE_PART" ${previous:+--optimizer-from "$previous"} $FLAGS
      if [ -n "$previous" ] && [ -z "${DRY_RUN:-}" ]; then  # the newest update holds what the next one needs
        rm -f "$previous/final/optimizer.pt"
        case " $ONLINE_KEPT " in *" $number "*) ;; *) rm -f "$previous"/final/*.safetensors ;; esac
      fi
    fi
    previous=$out policy=$out/final number=$i
  done
  measure $(printf "$1/update%03d/final " "${@:3}")
}

selection() {         # what checkpoints are chosen on: HMMT Feb 25 (Sec. 4.1), else the first
  case "${validation:+validation} $benchmarks" in
    validation*) echo validation ;;
    *" hmmt_feb25="*) echo hmmt_feb25 ;;
    *) echo "${benchmarks%%=*}" ;;
  esac
}

kl_data() {           # the problems that KL is measured on: those of HMMT Feb 25, else of the first benchmark
  local word chosen=''
  for word in ${code_benchmarks:-$SETS}; do
    case $word in hmmt_feb25=*) chosen=$word; break ;; *) chosen=${chosen:-$word} ;; esac
  done
  chosen=${chosen#*=}
  echo "kl=${chosen%:*}:$KL_SAMPLES"
}

measure() {           # measure CHECKPOINT...   accuracy on the table's benchmarks, and the KL
  score "${code_benchmarks:-$benchmarks}" "$SCORE $SMALLER_SCORE" $(at "$@")
  score "$(kl_data)" "$SCORE_KL $SMALLER_SCORE" $(at "$@")
}

whole() {             # whole RUN STEPS EVERY [EARLY]   its path: in the demonstration world 4, 8, 16, 32 ...
  if [ -z "$REAL" ]; then doubling "$1" "$2"; return; fi
  if [ -n "${4:-}" ]; then printf '%s/step-%04d ' "$1" "$4"; fi
  path "${@:1:3}"
}

validate() {          # validate CHECKPOINT...   on validation prompts too, in the demonstration world
  if [ -n "$validation" ]; then score "$validation" "$SCORE" $(at "$@"); fi
}

choose() {            # choose BENCHMARK FLAGS CHECKPOINT...   one of them, by the rows of that benchmark
  local best
  best=$(python evaluate.py --pick "$1" $2 --model $(at "${@:3}") --out "$where/results.jsonl")
  echo "${best#"$dir/"}"
}

best() {              # best VARIABLE CHECKPOINT...   the most accurate; a dry run takes the first
  local chosen=$2
  if [ -z "${DRY_RUN:-}" ]; then
    validate "${@:2}"
    measure $(best_of "${@:2}")
    chosen=$(choose "$(selection)" "" "${@:2}")
  fi
  printf -v "$1" %s "$chosen"
}

best_of() {           # best_of CHECKPOINT...   the one that RUN@best reads, by validation prompts; else all
  if [ -n "$validation" ] && [ -z "${DRY_RUN:-}" ]; then choose validation "" "$@"; else echo "$@"; fi
}

half_kl() {           # half_kl VARIABLE RUN STEPS EVERY   its checkpoint with half the last one's KL
  local chosen names
  names=($(whole "${@:2}"))
  chosen=${names[(${#names[@]} - 1) / 2]}               # a dry run takes the middle one
  if [ -z "${DRY_RUN:-}" ]; then
    score "$(kl_data)" "$SCORE_KL $SMALLER_SCORE" $(at "${names[@]}")
    chosen=$(choose kl "--nearest-kl 0.5" "${names[@]}")
  fi
  printf -v "$1" %s "$chosen"
}

movement() {          # movement RUN...   what the tokens of a run did, into its run.json
  step "" $PY evaluate.py --movement $(at "$@")
}

# ---- jobs --------------------------------------------------------------------------------------------

wanted() { [[ " $1 " = *" $2 "* ]]; }  # wanted LIST ITEM
room() { while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n; done; }  # ends where a job has failed

aside() {             # what follows in this subshell goes on beside others; its output to $dir.log
  trap 'trap - EXIT; finish; exit 143' TERM
  mkdir -p "$where"
  if [ "$JOBS" -gt 1 ]; then          # log is global: the trap runs when locals are gone
    log=$dir.log
    trap '[ $? = 0 ] || { tail -n 5 "$log"; echo "run_rounds.sh: stopped, see $log"; } >&3' EXIT
    exec >> "$log" 2>&1
  fi
}
