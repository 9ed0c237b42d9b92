#!/usr/bin/env bash
# shellcheck disable=SC2154  # The .sbatch files set the lower-case variables.
# What the .sbatch files have in common; they source it with the arguments CONFIG [overrides ...].
#
# 1. Make the run folder $run_root/JOBNAME-JOBID, or find it after a requeue, which keeps both. It
#    holds config.toml, which every later start uses, command.txt, commit.txt, uncommitted.diff
#    where there is one, starts.txt with a line for each start, and what the trainer writes.
# 2. Start a task for each GPU, and wait. No torchrun: SLURM signals the trainers themselves.
# 3. If the run was stopped and saved (exit code 75), by the signal before the time limit or by a
#    preemption, requeue the job. A preempted job is requeued whatever its exit code: SIGTERM reaches
#    all processes of a job, and may end a data loader's worker before the trainer has saved. Where
#    SLURM has ended the job (scancel), leave it ended.

EXIT_CODE_SAVED=75
MAX_STARTS_WITHOUT_PROGRESS=3

say() {
    echo "$(date '+%F %T') $*"
}

fail() {
    echo "error: $*" >&2
    exit 2
}

# Step of the newest whole checkpoint: its metadata is written last.
newest_step() {
    find "$run" -path '*/step-*/.metadata' | sed -n 's|.*/step-\([0-9]*\)/.metadata$|\1|p' \
        | sort -n | tail -n 1
}

commit() {
    git rev-parse HEAD 2>/dev/null || echo "unknown commit"
}

uncommitted() {
    git diff HEAD 2>/dev/null || true
}

# Keep in the run folder what it is made from, config.toml last: with it the folder is complete.
record() {
    mkdir -p "$run"
    printf '%q ' "${command[@]}" >"$run/command.txt"
    echo >>"$run/command.txt"
    commit >"$run/commit.txt"
    uncommitted >"$run/uncommitted.diff"
    [[ -s $run/uncommitted.diff ]] || rm "$run/uncommitted.diff"
    cp "$config" "$run/config.toml.partial"
    mv "$run/config.toml.partial" "$run/config.toml"
}

# The code is not kept: say so if it is not what the run began with.
compare_source() {
    if [[ $(commit) != "$(<"$run/commit.txt")" ]]; then
        say "warning: the run began with commit $(<"$run/commit.txt"), and this is $(commit)"
    elif [[ $(uncommitted) != "$(cat "$run/uncommitted.diff" 2>/dev/null)" ]]; then
        say "warning: the uncommitted changes are not those that the run began with"
    fi
}

# Whether SLURM has told this start of the job to make room. It requeues a job whose time of grace
# runs out, but not one that ends within it.
is_preempted() {
    [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --Format=PreemptTime) == *[0-9]* ]]
}

requeue() {
    local state step
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) || state=unknown
    if [[ $state != RUNNING ]]; then
        say "SLURM has ended the job ($state); it is not requeued here."
        return
    fi
    step=$(newest_step)
    step=${step:-none}
    if [[ -f $run/requeues.txt ]] && (($(tail -n "$MAX_STARTS_WITHOUT_PROGRESS" \
        "$run/requeues.txt" | grep -cx "$step") == MAX_STARTS_WITHOUT_PROGRESS)); then
        say "error: stopped $MAX_STARTS_WITHOUT_PROGRESS times without a checkpoint after step" \
            "$step: not requeued; 'scontrol requeue $SLURM_JOB_ID' does it"
        return
    fi
    echo "$step" >>"$run/requeues.txt"
    say "Stopped; the step of the newest checkpoint: $step. The job is requeued."
    scontrol requeue "$SLURM_JOB_ID"
}

cd "$SLURM_SUBMIT_DIR" || exit
# SLURM sends it when it ends the job. The trainers save then, and the shell waits for them.
trap : TERM

run=$run_root/${SLURM_JOB_NAME//[!A-Za-z0-9._-]/_}-$SLURM_JOB_ID
config=${1:-}
if [[ -z $config || $config == -* ]]; then
    fail "CONFIG must come first, got '$config'; sbatch scripts/slurm/NAME.sbatch CONFIG" \
        "[overrides ...]"
fi
for argument in "${@:2}"; do
    if [[ $argument =~ ^--job\.(config[_-]file|dump[_-]folder)(=|$) ]]; then
        fail "${BASH_REMATCH[0]%=} must not be given, since the job sets it; CONFIG is the file," \
            "and run_root in the .sbatch file holds the run folders"
    fi
done
command=(
    python -m torchtitan.experiments.lighthouse.train
    --job.config_file "$run/config.toml" --job.dump_folder "$run" "${@:2}"
)
if [[ ! -f $run/config.toml ]]; then
    [[ -f $config ]] || fail "CONFIG must be a TOML file, got '$config', which is none; correct it"
    record
    [[ -f $run/config.toml ]] || fail "run_root must be a folder to write to, got '$run_root'"
elif ((${SLURM_RESTART_COUNT:-0} == 0)); then
    fail "$run must not exist before the job first starts; move it away"
else
    compare_source
fi
activate || fail "activate() in the .sbatch file must succeed; correct it, or run scripts/setup.sh"

# Task 0 runs on the first node.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR MASTER_PORT=$port
# As with torchrun.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# srun does not take it from the job by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
if [[ -n $interface ]]; then
    export NCCL_SOCKET_IFNAME=$interface GLOO_SOCKET_IFNAME=$interface
fi
start="$(date '+%F %T') job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, $SLURM_NTASKS tasks on"
echo "$start $SLURM_JOB_NODELIST, $(commit)" >>"$run/starts.txt"
say "Run folder $run; $SLURM_NTASKS tasks on $SLURM_JOB_NODELIST, which meet at" \
    "$MASTER_ADDR:$MASTER_PORT"

srun --kill-on-bad-exit=1 --label scripts/slurm/task.sh "${command[@]}"
code=$?
if [[ $code == "$EXIT_CODE_SAVED" ]] || { [[ $code != 0 ]] && is_preempted; }; then
    requeue
fi
exit "$code"
