# Tables and figures. Hours: all their models on 8 GPUs, reckoned for 3B from Table 4 of the paper, which does
# not name its hardware; without evaluation. Minutes: one seed in the demonstration world, measured with three
# seeds at a time on two cores, in the order of `all` (80 minutes in all; yours: runs/tables/seconds.txt).
#     table1   teacher losses with and without distillation         113 h   8 min
#     table2   rounds with and without distillation                 143 h  10 min
#     table3   on-policy GRPO from the base and from a student      100 h   6 min
#     table4   score and time per stage                              51 h   5 min
#     table5   steps and KL weight of the distillation               31 h   2 min
#     table6   rounds with an entropy bonus in the distillation     100 h   3 min
#     table7   which checkpoints make the weak-to-strong signal      34 h   5 min
#     table8   ensembles of two teachers, unlearned starts           75 h   8 min
#     table9   recovery of an unlearned policy by SFT or CE          45 h   5 min
#     table10  weak to strong on models of other lengths             82 h   1 min
#     table11  weak to strong in rounds; unlearned policies for code  124 h   4 min
#     table12  outliers of the signal on right responses             36 h   1 min
#     fig4     many steps on one batch                               52 h   1 min
#     fig5     dynamics of the MSE loss                              13 h   2 min
#     fig6     accuracy against KL                                   52 h   9 min
#     fig7     the denominator: pi_old or the live student           19 h   1 min
#     fig8     online and offline phases in turn                    128 h   7 min
#     fig9     strength of the unlearning, and SFT after it          22 h   1 min
#     fig10    outliers against a linear critic                      21 h   1 min
# On real models: MODEL (else the models of the table; MODELS="A B"), PROMPTS, BENCHMARKS and NPROC, such as
#     MODEL=Qwen/Qwen3-4B-Thinking-2507 PROMPTS=POLARIS-Project/Polaris-Dataset-53K NPROC=8
#       BENCHMARKS="hmmt_feb25=MathArena/hmmt_feb_2025:32 mine=problems.csv:16" ./run_rounds.sh table1
# Default: the paper's prompts, and of its seven benchmarks (settings.sh) those of a table's columns.
# JUDGE_URL and JUDGE_MODEL add a judge. LENGTH=20000: tokens of a response, for what a rehearsal reckons.

# shellcheck shell=bash
# A recipe holds the commands for one model and one seed; `tables` loops over both. Sourced by run_rounds.sh.
# Runs live in TABLES/runs/MODEL/seedN and are shared: a command whose output is there is skipped, so every
# recipe names all that it needs. Sizes and models: settings.sh; the functions a recipe calls: commands.sh.
# A comment behind a command holds the paper's numbers for its result; "ours" names what it does not give.
# Ours everywhere: a teacher's batch (32 prompts), its last checkpoint as the one that is distilled, saving.
ALL=$(echo table{1..12} fig{4..10})

# ---- tables ------------------------------------------------------------------------------------------

table1() {            # losses x distillation: averages for Qwen3-4B and NBG4-3B
  collect rollouts base 1                                             # base: 68.5, 72.5
  teach ppo base rollouts $PPO_100                                    # 68.1, 73.9
  teach grpo base rollouts $GRPO_100                                  # 69.0, 73.6
  distil grpo-student base grpo/final old rollouts $STUDENT           # ours: 16 steps; paper: 69.2, 73.5
  teach sapo base rollouts $SAPO_120                                  # 69.9, 76.2
  distil sapo-student base sapo/final old rollouts $SAPO_STUDENT_2    # 70.6, 77.5
  teach ce base rollouts $CE_100                                      # 72.9, 76.7
  distil ce-student base ce/final old rollouts $STUDENT               # 73.3, 77.7
  teach mse base rollouts $MSE_70                                     # 36.4, 37.1
  distil mse-min0 base mse/final mse/step-0010 rollouts $WEAK --positive-signal min0  # 71.1, 74.9
  validate $(whole ppo 100 50) $(whole grpo 100 20) $(whole sapo 120 20) $(whole ce 100 20) mse/final
  measure $(best_of $(whole ppo 100 50)) $(best_of $(whole grpo 100 20)) grpo/final $(whole sapo 120 20) \
    $(whole ce 100 20) mse/step-0010 mse/final {grpo,sapo,ce}-student/final mse-min0/final
}

batches() {           # batches 1 to 4 of Table 2
  local n start=ce-student/step-0010
  collect rollouts base 1
  teach ce base rollouts $CE_100                                      # 73.8 at KL 0.041
  distil ce-student base ce/final old rollouts $STUDENT               # 71.1 at 0.010, after 10 steps
  for n in 2 3; do
    collect batch$n/rollouts $start $n
    teach batch$n/ce $start batch$n/rollouts $CE_100                  # 75.6, 77.2 at 0.044, 0.042
    distil batch$n/student $start batch$n/ce/final old batch$n/rollouts $STUDENT_10  # 73.6, 76.4
    start=batch$n/student/final                                       # at 0.026, 0.037
  done
  collect batch4/rollouts $start 4    # strategy 3: away from the student of batch 1
  teach batch4/ce $start batch4/rollouts $CE_100                      # 77.5 at 0.043; student: 79.3 at 0.062
  distil batch4/student $start batch4/ce/final ce-student/step-0010 batch4/rollouts $STUDENT_10
  measure ce/final ce-student/step-0010 batch{2,3,4}/ce/final batch{2,3,4}/student/final
}

table2() {            # rounds with and without distillation: average of three benchmarks, KL to base
  local n half start=batch4/student/final control=ce
  batches                                                             # base: 67.9
  distil batch4/student-1 batch3/student/final batch4/ce/final old batch4/rollouts $STUDENT_10  # ours
  for n in 5 6; do                    # strategy 2: weak to strong; the CE teacher for comparison
    collect batch$n/rollouts $start $n
    teach batch$n/ce $start batch$n/rollouts $CE_100                  # 79.4 at 0.066, 80.2 at 0.077
    teach batch$n/mse $start batch$n/rollouts $MSE_70
    distil batch$n/student $start batch$n/mse/final batch$n/mse/step-0010 batch$n/rollouts \
      $DISTIL_WEAK $BATCH64 --steps 10                                # 79.9, 80.6
    start=batch$n/student/final
  done
  if [ -n "$SAME_KL" ]; then control=ce-same; teach ce-same base rollouts $CE_100 $SAME_KL; fi
  collect a2/rollouts $control/final 2  # (a) goes on from the last teacher, (b) from an earlier checkpoint
  teach a2/ce $control/final a2/rollouts $CE_100 $SAME_KL             # (a) 73.8, 74.0
  half_kl half $control 100 10        # the paper's (b) has KL 0.022, (a) 0.041
  collect b2/rollouts $half 2
  teach b2/ce $half b2/rollouts $CE_100 $SAME_KL                      # (b) 70.6, 68.4
  measure batch4/student-1/final batch{5,6}/{ce,student}/final $control/final $half {a2,b2}/ce/final
}

table3() {            # on-policy GRPO from the base and from batch 4's student, HMMT Feb 25
  onpolicy online base 25 50                                          # 56.0, 57.2, 53.2
  batches
  onpolicy online-batch4 batch4/student/final 40 60                   # 71.6, 70.4, 71.4
}

table4() {            # time per stage: score and hours so far
  onpolicy online base 10 50 70 100                                   # 66.8, 67.2, 68.5, 66.8
  collect rollouts base 1                                             # 7 h
  teach sapo base rollouts $SAPO_120                                  # 40, 80, 100 steps: 68.9, 68.3, 70.5
  distil sapo-student base sapo/final old rollouts $SAPO_STUDENT_2    # 10, 16, 32: 67.2, 68.3, 73.3
  measure sapo/step-00{40,80} sapo/step-0100 sapo-student/step-00{10,16} sapo-student/final
}

table5() {            # steps and KL weight of the distillation: HMMT Feb 25 and KL
  collect rollouts base 1                                             # base: 63.9
  teach sapo base rollouts $SAPO_120                                  # 60: 68.1 at 0.016, 120: 70.2 at 0.023
  distil sapo-student base sapo/final old rollouts $SAPO_STUDENT_2    # 16, 20, 32: 68.3, 70.2, 73.3
  distil sapo-kl-high base sapo/final old rollouts $SAPO_STUDENT $KL_HIGH  # 70.2 at 0.014
  distil sapo-kl-middle base sapo/final old rollouts $SAPO_STUDENT $KL_MIDDLE  # 69.6 at 0.020
  distil sapo-kl-low base sapo/final old rollouts $SAPO_STUDENT $KL_LOW  # 71.7 at 0.018
  measure sapo/step-0060 sapo/final sapo-student/step-00{16,20} sapo-student/final \
    sapo-kl-{high,middle,low}/final
}

table6() {            # three batches without and with the entropy bonus: AIME 2025, entropy
  local n start=entropy1/final student="$DISTIL $ENTROPY $BATCH64 --steps 10"
  batches                                                             # 82.5, 84.5, 84.5 at 0.19, 0.16, 0.14
  distil entropy1 base ce/final old rollouts $student                 # 83.7 at 0.19
  for n in 2 3; do
    collect entropy$n/rollouts $start $n
    teach entropy$n/ce $start entropy$n/rollouts $CE_100
    distil entropy$n/student $start entropy$n/ce/final old entropy$n/rollouts $student  # 88.3, 85.6
    start=entropy$n/student/final                                     # at 0.21, 0.25
  done
  measure entropy1/final entropy{2,3}/student/final
}

table7() {            # which steps of the MSE run make the signal: HMMT Feb 25
  collect rollouts base 1                                             # base: 56.0
  teach mse base rollouts $MSE_70
  distil signal-70-10 base mse/final mse/step-0010 rollouts $WEAK     # 60.1
  distil signal-70-20 base mse/final mse/step-0020 rollouts $WEAK     # 59.1
  distil signal-70-30 base mse/final mse/step-0030 rollouts $WEAK     # 53.1
  distil signal-60-10 base mse/step-0060 mse/step-0010 rollouts $WEAK  # 61.0
  distil signal-50-10 base mse/step-0050 mse/step-0010 rollouts $WEAK  # 64.3
  distil signal-40-10 base mse/step-0040 mse/step-0010 rollouts $WEAK  # 59.5
  distil signal-old-50 base old mse/step-0050 rollouts $WEAK          # 59.1
  distil signal-10-old base mse/step-0010 old rollouts $WEAK          # 61.3
  distil signal-10-none base mse/step-0010 none rollouts $WEAK        # 56.3
  distil signal-none-50 base none mse/step-0050 rollouts $WEAK        # 59.3
  distil signal-70-old base mse/final old rollouts $WEAK              # Sec. 3.4: no improvement
  distil signal-old-none base old none rollouts $WEAK                 # ours: sharpening alone
  measure signal-70-{10,20,30,old}/final signal-{60,50,40}-10/final signal-{old,none}-50/final \
    signal-10-{old,none}/final signal-old-none/final
}

table8() {            # ensembles: an old-start teacher, then an unlearned-start one
  # ours: the old-start teacher first; 16 steps of 64 or 32 of 32; each 16 or 32 steps by validation
  local strong weak ensemble="$DISTIL_WEAK $BATCH32 --steps 32 --save-every 16" run chosen=''
  collect rollouts base 1                                             # HMMT Feb 25, base: 56.0
  teach mse base rollouts $MSE_70
  teach ce base rollouts $CE_100
  teach ce-5e2 base rollouts $CE_5E2
  teach unlearned-ce-1e3 mse/step-0010 rollouts $CE $BETA_1E3 --ref start $BATCH32 --steps 100
  teach unlearned-ce-1e2 mse/step-0010 rollouts $CE $BETA_1E2 --ref start $BATCH32 --steps 100
  distil mse-min0 base mse/final mse/step-0010 rollouts $WEAK --positive-signal min0  # MSE alone: 62.7
  distil ce-student base ce/final old rollouts $STUDENT               # CE 1e-3 alone: 67.1
  distil ce-student-32 base ce/final old rollouts $DISTIL $BATCH32 --steps 32 --save-every 16
  distil ce-5e2-student base ce-5e2/final old rollouts $DISTIL $BATCH32 --steps 32 --save-every 16  # 63.8
  best weak ce-student-32/step-0016 ce-student-32/final
  best strong ce-5e2-student/step-0016 ce-5e2-student/final
  distil ensemble-mse-5e2 $strong mse/final mse/step-0010 rollouts $ensemble  # 66.7
  distil ensemble-1e3-1e3 $weak unlearned-ce-1e3/final mse/step-0010 rollouts $ensemble  # 66.5
  distil ensemble-1e2-5e2 $strong unlearned-ce-1e2/final mse/step-0010 rollouts $ensemble  # 66.8
  distil ensemble-1e3-5e2 $strong unlearned-ce-1e3/final mse/step-0010 rollouts $ensemble  # 69.0
  distil unlearned-ce-1e3-student base unlearned-ce-1e3/final mse/step-0010 rollouts $ensemble  # ours: alone
  for run in ensemble-{mse-5e2,1e3-1e3,1e2-5e2,1e3-5e2} unlearned-ce-1e3-student; do
    validate $run/{step-0016,final}
    chosen="$chosen $(best_of $run/{step-0016,final})"
  done
  measure mse-min0/final ce-student/final $chosen
}

unlearned() {         # three policies after ten MSE steps of different strength
  collect rollouts base 1
  teach unlearned-a base rollouts $UNLEARN_A $BATCH32 --steps 10
  teach unlearned-b base rollouts $UNLEARN_B $BATCH32 --steps 10
  teach unlearned-c base rollouts $UNLEARN_C $BATCH32 --steps 10
  validate unlearned-{a,c}/final
}

table9() {            # recovery by SFT or CE: students on HMMT Feb 25 and Nov 25
  local un                            # ours: 50 steps
  unlearned
  for un in unlearned-{a,b,c}; do
    teach $un-sft $un/final rollouts $SFT $BATCH32 --steps 50
    distil $un-sft-student base $un-sft/final $un/final rollouts $WEAK  # 57.6 66.4, 53.5 64.9, 63.5 67.9
    teach $un-ce $un/final rollouts $CE $BETA_1E3 --ref start $BATCH32 --steps 50
    distil $un-ce-student base $un-ce/final $un/final rollouts $WEAK  # 62.5 71.0, 64.1 70.4, 62.6 67.9
  done
  measure unlearned-{a,b,c}/final unlearned-{a,b,c}-{sft,ce}-student/final
}

table10() {           # MSE + distillation on five models: HMMT Feb 25 and AIME24 length
  collect rollouts base 1             # 40.8 19.8K, 45.0 14.8K, 39.3 12.8K, 56.0 19.8K, 63.9 24.8K
  teach mse base rollouts $MSE_70
  distil mse-min0 base mse/final mse/step-0010 rollouts $WEAK --positive-signal min0  # 44.3 18.0K
  distil signal-70-10 base mse/final mse/step-0010 rollouts $WEAK     # NBG4-3B: 67.6 23.3K
  measure mse/final mse-min0/final signal-70-10/final
  validate mse/final
}

table11() {           # Qwen3.5: three batches of MSE + distillation on math; code, three unlearned policies
  local n start=signal-70-10/final
  collect rollouts base 1                                             # 80.1 (9B), 86.5 (27B)
  teach mse base rollouts $MSE_70
  distil signal-70-10 base mse/final mse/step-0010 rollouts $WEAK     # 82.8, 88.7
  for n in 2 3; do
    collect mse-batch$n/rollouts $start $n
    teach mse-batch$n/mse $start mse-batch$n/rollouts $MSE_70
    distil mse-batch$n/student $start mse-batch$n/mse/final mse-batch$n/mse/step-0010 \
      mse-batch$n/rollouts $WEAK
    start=mse-batch$n/student/final                                   # 86.4, 89.5; then 86.7, 90.9
  done
  measure signal-70-10/final mse-batch{2,3}/student/final
  case $model in *27B|long) return ;; esac
  teach ce base rollouts $CE_100                                      # 80.8
  measure ce/final
  if [ -n "$REAL" ]; then code; else unlearned_rates; fi  # the demonstration has no programs
}

code() {              # the code half of Table 11, trained apart: programs in place of boxed answers
  local dir=$where-code/seed$seed where=$where-code code_benchmarks=$CODE_SETS
  local prompts=${CODE_PROMPTS:-areal-boba-2-rl-code.jsonl}  # train.jsonl of inclusionAI/AReaL-boba-2-RL-Code
  local COLLECT="${COLLECT/--ask-for-box/} --task code" SCORE_KL="${SCORE_KL/--ask-for-box/} --task code"
  local SCORE="${SCORE/--ask-for-box/} --task code"
  SCORE=${SCORE/--judge-url ${JUDGE_URL:-} --judge-model ${JUDGE_MODEL:-}/}  # programs are run, not judged
  collect rollouts base 1                                             # 56.1
  measure base
  teach ce base rollouts $CE_100                                      # 50.7
  teach mse base rollouts $MSE_70                                     # the recovered teacher of all three
  distil signal-70-10 base mse/final mse/step-0010 rollouts $WEAK     # 1e-6: 40.2
  measure ce/final signal-70-10/final
  unlearned_rates
}

unlearned_rates() {   # unlearned apart at other rates, under the same recovered teacher
  teach unlearned-5e6 base rollouts $UNLEARN_5E6 $BATCH32 --steps 10
  distil unlearned-5e6-student base mse/final unlearned-5e6/final rollouts $WEAK # 63.7
  teach unlearned-1e5 base rollouts $UNLEARN_1E5 $BATCH32 --steps 10
  distil unlearned-1e5-student base mse/final unlearned-1e5/final rollouts $WEAK # 62.4
  measure unlearned-{5e6,1e5}-student/final
}

table12() {           # outliers on positive responses: HMMT Feb 25, Qwen3-4B and NBG4-3B
  collect rollouts base 1                                             # 56.0, 63.9
  teach mse base rollouts $MSE_70
  distil signal-70-10 base mse/final mse/step-0010 rollouts $WEAK     # 60.1, 67.6
  distil mse-max0 base mse/final mse/step-0010 rollouts $WEAK --positive-signal max0  # 59.5, 65.7
  distil mse-min0 base mse/final mse/step-0010 rollouts $WEAK --positive-signal min0  # 62.7, 68.6
  measure signal-70-10/final mse-max0/final mse-min0/final
}

# ---- figures -----------------------------------------------------------------------------------------

fig4() {              # accuracy over steps on one batch: SAPO (NBG4-3B), CE (Qwen3-4B); entropy
  collect rollouts base 1
  teach sapo base rollouts $SAPO_120
  teach sapo-4 base rollouts $SAPO $BATCH32 --steps 4                 # what common practice stops at
  teach ce base rollouts $CE_100
  teach ce-4 base rollouts $CE $BETA_1E3 $BATCH32 --steps 4
  measure {sapo,ce}-4/final $(whole sapo 120 20) $(whole ce 100 20)
  validate $(whole sapo 120 20) $(whole ce 100 20)
}

fig5() {              # MSE: unlearning, then recovery; explained variance
  collect rollouts base 1
  teach mse base rollouts $MSE_70
  measure $(path mse 70 10)
}

fig6() {              # accuracy against KL: CE at three betas and with KL terms, students of the first two
  local run runs="ce ce-1e2 ce-5e2 ce-kl ce-kl-5" paths=''
  collect rollouts base 1
  teach ce base rollouts $CE_100
  teach ce-1e2 base rollouts $CE_1E2                                  # 61.0
  teach ce-5e2 base rollouts $CE_5E2                                  # ours: Table 8's
  teach ce-kl base rollouts $CE_100 $STAGE1_KL                        # "no significant improvement"
  teach ce-kl-5 base rollouts $CE_100 $STAGE1_KL_5                    # ours: KL of a student
  if [ -n "$EXACT" ]; then runs="$runs ce-kl-exact"; teach ce-kl-exact base rollouts $CE_100 $EXACT; fi
  distil ce-student base ce/final old rollouts $STUDENT
  distil ce-1e2-student base ce-1e2/final old rollouts $STUDENT       # 65.1 after 10 steps, 63.8 after 16
  for run in $runs; do paths="$paths $(whole $run 100 20 10)"; done
  measure $paths {ce,ce-1e2}-student/{step-0010,final}
  validate $paths
}

fig7() {              # pi_old or the live student as denominator
  collect rollouts base 1
  teach ce-1e2 base rollouts $CE_1E2                                  # 61.0
  distil ce-1e2-student base ce-1e2/final old rollouts $STUDENT       # 65.1 after 10 steps, 63.8 after 16
  distil ce-1e2-live base ce-1e2/final live rollouts $STUDENT         # 61.2, 61.1
  measure ce-1e2/final ce-1e2-{student,live}/{step-0010,final}
  movement ce-1e2-student ce-1e2-live
}

fig8() {              # ours: which phase starts where, and the lengths of the online phases
  collect rollouts base 1
  teach sapo base rollouts $SAPO_120
  distil sapo-student base sapo/final old rollouts $SAPO_STUDENT_2    # Offline-1: 73.3
  offline offline2 sapo-student/final 2                               # Offline-2: no improvement
  offline offline3 offline2/student/final 3
  onpolicy online2 offline2/student/final 50
  offline offline4 online2/update050/final 4
  onpolicy online base 100
  measure sapo-student/final offline{2,3,4}/student/final
  validate sapo-student/final offline2/student/final
}

offline() {           # offline NAME START NUMBER   one round of SAPO + distillation
  collect $1/rollouts $2 $3
  teach $1/sapo $2 $1/rollouts $SAPO_120
  distil $1/student $2 $1/sapo/final old $1/rollouts $SAPO_STUDENT
}

fig9() {              # unlearning strength, and SFT from the policy after ten steps
  local un                            # ours: 50 steps
  unlearned
  for un in unlearned-{a,b,c}; do teach $un-sft $un/final rollouts $SFT $BATCH32 --steps 50; done
  measure unlearned-{a,b,c}/final
  movement unlearned-{a,b,c}-sft
}

fig10() {             # outliers: probabilities of the MSE policy against a linear critic's values (PPO's)
  collect rollouts base 1
  teach mse base rollouts $MSE_70
  teach ppo base rollouts $PPO_100
  movement mse ppo
}

# ---- models, seeds, jobs -----------------------------------------------------------------------------

tables() {            # tables NAME...   their models and seeds, JOBS at a time, then one report
  local list='' name model short seed base where out=$TABLES/$1 worlds=''
  local title=${REAL:+${MODEL:-${MODELS:-models of the paper}}}
  list=$(for name in "$@"; do models "$name"; done | tr ' ' '\n' | awk '!seen[$0]++')
  if [ -z "$REAL" ]; then list=$(sort <<< "$list"); fi                # long, short, toy: the longest begin
  if [ "$JOBS" -gt 1 ]; then export OMP_NUM_THREADS=1; fi             # two jobs of one thread beat one of two
  if [ -n "${REHEARSE:-}" ]; then rehearsal; fi
  for model in $list; do
    room
    short=$(basename "$model") where=$TABLES/runs/$short worlds="$worlds $short $short-code"
    if [ -n "$REAL" ]; then paper "$model"; else demonstration "$model"; fi
    shared_settings
    for name in "$@"; do              # once, before the seeds run beside each other
      if wanted "$(models "$name")" "$model"; then benchmarks=$(reads "$name"); measure base; fi
    done
    validate base
    for seed in $(for name in "$@"; do seeds "$name" | tr ' ' '\n'; done | sort -nu); do
      dir=$where/seed$seed
      if [ -n "${DRY_RUN:-}" ]; then recipes "$@"; continue; fi
      room
      recipes "$@" &
    done
  done
  while [ -n "$(jobs -p)" ]; do wait -n; done
  if [ "$#" -gt 1 ]; then out=$TABLES/all; fi
  step "" python evaluate.py --report "$out" --tables "$@" --runs "$TABLES/runs" --models $worlds \
    --title "${title:-demonstration world}"
  if [ -n "${REHEARSE:-}" ] && [ -z "${DRY_RUN:-}" ]; then                      # what it took, and would cost
    DRY_RUN=1 REHEARSE='' PROMPTS=$prompts TABLES=$TABLES ./run_rounds.sh "$command" |
      python tests/paper/cost.py "$TABLES" --length "${LENGTH:-20000}"
  fi
}

recipes() {           # recipes NAME...   those that want this model and this seed, one after the other
  local name start
  if [ -z "${DRY_RUN:-}" ]; then aside; fi
  for name in "$@"; do
    if ! wanted "$(models "$name")" "$model" || ! wanted "$(seeds "$name")" "$seed"; then continue; fi
    start=$SECONDS benchmarks=$(reads "$name")
    "$name"
    if [ -z "${DRY_RUN:-}" ]; then
      echo "$name ${model##*/} seed$seed $((SECONDS - start)) s" | tee -a "$TABLES/seconds.txt" >&3
    fi
  done
}
