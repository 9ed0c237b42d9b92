#!/usr/bin/env bash
# shellcheck disable=SC2154  # The .sbatch files set the lower-case variables.
# Shared by the .sbatch files, which source it with the arguments CONFIG [overrides ...].
#
# 1. Create the run folder $run_root/JOBNAME-JOBID, or use the folder RUN. After a requeue it exists,
#    because name and number stay. It holds config.toml, which every later start uses, command.txt,
#    commit.txt, uncommitted.diff if there are changes, starts.txt with one line per start, and the
#    trainer's output.
# 2. Start one task per GPU and wait. There is no torchrun, so SLURM signals the trainers directly.
# 3. Requeue the job if the run has saved and stopped (exit code 75), by the signal before the time
#    limit or by a preemption. A preempted job is requeued with any exit code. SIGTERM reaches all
#    processes of a job and can end a worker of the data loader before the trainer has saved. Do not
#    requeue a job that SLURM has ended (scancel).

EXIT_CODE_SAVED=75
MAX_STARTS_WITHOUT_PROGRESS=3

say() {
    echo "$(date '+%F %T') $*"
}

fail() {
    echo "error: $*" >&2
    exit 2
}

# Step of the newest complete checkpoint. Its metadata is written last.
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

# Record the sources of the run in its folder. config.toml is last and completes the folder.
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

# The code is not copied. Warn if it has changed since the run began.
compare_source() {
    if [[ $(commit) != "$(<"$run/commit.txt")" ]]; then
        say "warning: the run began with commit $(<"$run/commit.txt"), and this is $(commit)"
    elif [[ $(uncommitted) != "$(cat "$run/uncommitted.diff" 2>/dev/null)" ]]; then
        say "warning: the uncommitted changes are not those that the run began with"
    fi
}

# Whether SLURM has preempted this start of the job. SLURM requeues a job that outlasts its grace
# time, but not one that ends within it.
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
# SLURM sends this signal when it ends the job. The trainers save, and the shell waits for them.
trap : TERM

run=${RUN:-$run_root/${SLURM_JOB_NAME//[!A-Za-z0-9._-]/_}-$SLURM_JOB_ID}
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
if [[ -n ${RUN:-} && ! -f $RUN/config.toml ]]; then
    fail "RUN must be the folder of a run, got '$RUN' without config.toml; correct it"
fi
if [[ ! -f $run/config.toml ]]; then
    [[ -f $config ]] || fail "CONFIG must be a TOML file, got '$config', which is none; correct it"
    record
    [[ -f $run/config.toml ]] || fail "run_root must be a folder to write to, got '$run_root'"
elif ((${SLURM_RESTART_COUNT:-0} == 0)) && [[ -z ${RUN:-} ]]; then
    fail "$run must not exist before the job first starts; move it away"
else
    compare_source
fi
activate || fail "activate() in the .sbatch file must succeed; correct it, or run scripts/setup.sh"

# Task 0 runs on the first node.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR MASTER_PORT=$port
# The default of torchrun.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# srun does not inherit this from the job.
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
