# shellcheck shell=bash
# Commands as a user types them, each with the exit code and the output that it must have. Sourced.

count=0 failed=0

# A command that takes longer is told of, and ends the script with all that it has started. One watchdog for all of them: a `timeout`
# and a shell for each command took more time than most commands.
limit=300
watchdog() {
    local running=
    while read -r -d '' -t "$limit" next || (($? > 128)); do
        if [[ -z $next ]]; then
            printf 'FAILED: it has not ended within %s seconds: %s\n' "$limit" "$running"
            kill -KILL -- "-$$"
        fi
        running=$next
    done
}
exec {watched}> >(watchdog)

# try CODE PATTERN COMMAND: runs COMMAND, and compares what comes out on both streams with PATTERN, a glob of bash.
try() {
    local code=$1 pattern=$2 command=$3 got
    count=$((count + 1))
    printf '%s\0' "$command" >&"$watched"
    output=$(
        exec 2>&1 < /dev/null {watched}>&-
        set +u
        eval "$command"
    )
    got=$?
    # shellcheck disable=SC2053 # the right side is a pattern
    if [[ $got != "$code" || $output != $pattern ]]; then
        failed=$((failed + 1))
        printf 'FAILED: %s\n  exit code %s, expected %s\n  expected: %s\n  output: %s\n' "$command" "$got" "$code" "$pattern" "$output"
    fi
}

# What flyrun has on disk and in the kernel, but for what comes and goes with machines that run anyway.
leftovers() {
    find "$FLYRUN_ROOT/machines" "$FLYRUN_ROOT/snapshots" "$FLYRUN_ROOT/volumes" "$FLYRUN_ROOT/tmp" "$FLYRUN_RUN" -mindepth 1 -maxdepth 1 ! -name '.*' 2> /dev/null | sort
    ip -o link show | cut -d: -f2 | grep -o 'fly[0-9]*' | sort
    nft list tables 2> /dev/null | grep flyrun
    ls /sys/fs/cgroup/flyrun 2> /dev/null
}

# refuse PATTERN COMMAND: the same, of a command that is to fail with 125 and one clear error.
refuse() {
    local lines=3
    try 125 "$1" "$2"
    # What clap says of a flag has a hint and the usage with it.
    [[ $output == error:* ]] && lines=8
    if [[ $output == *panicked* || $output == *$'\e'* || ! $output =~ ^(flyrun|error): || $(wc -l <<< "$output") -gt $lines ]]; then
        failed=$((failed + 1))
        printf 'NOT CLEAR: %s\n  output: %s\n' "$2" "$output"
    fi
}

# unchanged WHAT: there is what there was at the last `unchanged`, or `remember`.
remember() { there_was=$(leftovers); }
unchanged() {
    local before=$there_was
    remember
    if [[ $before != "$there_was" ]]; then
        failed=$((failed + 1))
        printf 'LEFT BEHIND by %s\n  before: %s\n  after: %s\n' "$1" "$before" "$there_was"
    fi
}

summary() {
    echo "$((count - failed)) of $count one-liners passed"
    exit $((failed > 0))
}
