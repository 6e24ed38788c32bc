#!/usr/bin/env bash
# Start script of every VM, run at each boot; a second one finds the first one's lock and ends. Fetches the agent, checks
# its hash, and leaves the rest to it. At the deadline, where there is no agent to do it, deletes the VM's resource. The
# variables are for tests and for VMs that exist, started by ssh.
set -uo pipefail

export metadata=${QWQ_JAX_METADATA:-http://metadata.google.internal}
export storage=${QWQ_JAX_STORAGE:-https://storage.googleapis.com}
export tpu=${QWQ_JAX_TPU:-https://tpu.googleapis.com}
export home=${QWQ_JAX_HOME:-/var/lib/qwq_jax}
export pause=${QWQ_JAX_PAUSE:-10}
mkdir -p "$home"

ask() {
    curl --silent --show-error --fail --connect-timeout 10 --max-time 300 "$@"
}

read_metadata() {
    ask --header 'Metadata-Flavor: Google' "$metadata/computeMetadata/v1/instance/$1"
}

read_token() {
    read_metadata service-accounts/default/token | sed 's/.*"access_token" *: *"\([^"]*\)".*/\1/'
}

check() {
    printf '%s  %s\n' "$expected" "$1" | sha256sum --check --status
}

fetch() {
    [ -f "$zip" ] && check "$zip" && return
    local object partial token
    object=$(printf '%s' "${agent#*/}" | sed 's|/|%2F|g')
    partial=$home/agent.$$
    token=$(read_token) && ask --header "Authorization: Bearer $token" --output "$partial" \
        "$storage/storage/v1/b/${agent%%/*}/o/$object?alt=media" || return
    check "$partial" || { echo "error: $agent is not what its hash says" >&2; return 1; }
    mv "$partial" "$zip"
}

# Between two tries. Past the deadline the resource is deleted, again and again until this VM is gone; a VM that is its
# owner's is let alone.
wait_or_end() {
    sleep "$pause"
    [ "$(date +%s)" -ge "$deadline" ] || return 0
    [ -n "$resource" ] || exit 1
    ask --request DELETE --header "Authorization: Bearer $(read_token)" "$tpu/v2/$resource?force=true"
}

# An agent that fell over is started again: without one nobody ends this VM. 2 means that there is nothing to do.
keep_running() {
    local code
    until fetch; do wait_or_end; done
    export PYTHONPATH=$zip${PYTHONPATH:+:$PYTHONPATH}
    while true; do
        code=0
        python3 -m gcp.worker || code=$?
        [ $code != 0 ] && [ $code != 2 ] || return 0
        wait_or_end
    done
}

until
    agent=${QWQ_JAX_AGENT:-$(read_metadata attributes/qwq-jax-agent)} &&
        expected=${QWQ_JAX_AGENT_SHA256:-$(read_metadata attributes/qwq-jax-agent-sha256)} &&
        deadline=${QWQ_JAX_DEADLINE:-$(read_metadata attributes/qwq-jax-deadline)} &&
        resource=${QWQ_JAX_RESOURCE-$(read_metadata attributes/qwq-jax-resource)}
do sleep "$pause"; done
export agent expected deadline resource zip=$home/agent-$expected.zip

if [ -n "${QWQ_JAX_FOREGROUND:-}" ]; then
    keep_running
    exit
fi
# In a session of its own: the service that runs start scripts does not wait for it, and does not take it along.
functions=$(declare -f ask read_metadata read_token check fetch wait_or_end keep_running)
nohup setsid bash -uo pipefail -c "$functions; keep_running" >>"$home/agent.log" 2>&1 </dev/null &
