#!/usr/bin/env bash
# Start script of every VM, run at each boot; a second one finds the first one's lock and ends. Fetches the agent, checks
# its hash, and leaves the rest to it. The variables are for tests and for VMs that exist, started by ssh.
set -euo pipefail

metadata=${QWQ_JAX_METADATA:-http://metadata.google.internal}
storage=${QWQ_JAX_STORAGE:-https://storage.googleapis.com}
home=${QWQ_JAX_HOME:-/var/lib/qwq_jax}
mkdir -p "$home"

read_metadata() {
    curl --silent --show-error --fail --retry 5 --retry-connrefused --header 'Metadata-Flavor: Google' \
        "$metadata/computeMetadata/v1/instance/$1"
}

agent=${QWQ_JAX_AGENT:-$(read_metadata attributes/qwq-jax-agent)}
expected=${QWQ_JAX_AGENT_SHA256:-$(read_metadata attributes/qwq-jax-agent-sha256)}
bucket=${agent%%/*}
object=$(printf '%s' "${agent#*/}" | sed 's|/|%2F|g')
zip=$home/agent-$expected.zip

check() {
    printf '%s  %s\n' "$expected" "$1" | sha256sum --check --status
}

if ! { [ -f "$zip" ] && check "$zip"; }; then
    token=$(read_metadata service-accounts/default/token | sed 's/.*"access_token" *: *"\([^"]*\)".*/\1/')
    partial=$(mktemp "$home/agent.XXXXXX")
    curl --silent --show-error --fail --retry 5 --retry-connrefused --header "Authorization: Bearer $token" \
        --output "$partial" "$storage/storage/v1/b/$bucket/o/$object?alt=media"
    check "$partial" || { echo "error: $agent is not what its hash says" >&2; exit 1; }
    mv "$partial" "$zip"
fi

export PYTHONPATH=$zip${PYTHONPATH:+:$PYTHONPATH}
# An agent that fell over is started again: without one nobody ends this VM. 2 means that there is nothing to do.
# shellcheck disable=SC2016  # expanded by the inner shell
keep_running='code=1; until [ $code = 0 ] || [ $code = 2 ]; do code=0; python3 -m gcp.worker || code=$?; sleep 1; done'
if [ -n "${QWQ_JAX_FOREGROUND:-}" ]; then
    exec bash -c "$keep_running"
fi
# In a session of its own: the service that runs start scripts does not wait for it, and does not take it along.
nohup setsid bash -c "$keep_running" >>"$home/agent.log" 2>&1 </dev/null &
