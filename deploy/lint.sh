#!/bin/sh
# Looks at everything here that a program can look at: lint.sh BIN, where BIN is the venv's. What this machine lacks is named.
set -eu
bin=$(cd "$1" && pwd)
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

"$bin/hadolint" Dockerfile
for script in *.sh slurm/*.sh; do sh -n "$script"; done

# Compose's own tag, which takes the place of a list, is no YAML that a schema knows.
for overlay in tls shards; do sed "s/ !override//" compose.$overlay.yaml > "$work/compose.$overlay.yaml"; done
"$bin/check-jsonschema" --quiet --builtin-schema vendor.compose-spec compose.yaml "$work/compose.tls.yaml" "$work/compose.shards.yaml"

# The oldest Kubernetes that they are for, and the newest that there is a schema of.
manifests=$(ls kubernetes/*.yaml | grep -v kustomization)
if [ -x "$bin/helm" ]; then
    "$bin/helm" lint --quiet --strict helm/pushstep
    "$bin/helm" template pushstep helm/pushstep --namespace pushstep > "$work/default.yaml"
    "$bin/helm" template other helm/pushstep --namespace training --values helm/every_value.yaml > "$work/other.yaml"
    "$bin/kubectl" kustomize kubernetes > "$work/kustomized.yaml"
    manifests="$manifests $work/default.yaml $work/other.yaml $work/kustomized.yaml"
else
    echo "deploy/lint.sh: the chart is not rendered: there is no helm in $1" >&2
fi
for version in 1.27 1.37; do
    "$bin/kubernetes-validate" --quiet --strict --kubernetes-version "$version" $manifests
done

if command -v systemd-analyze > /dev/null; then
    sed "s,/opt/pushstep/bin,$bin," systemd/pushstep.service > "$work/pushstep.service"
    systemd-analyze verify "$work/pushstep.service" > "$work/said" 2>&1 || :
    if [ -s "$work/said" ]; then cat "$work/said" >&2; exit 1; fi
    # from 0, shut away, to 100, the whole machine; it is 14
    systemd-analyze security --offline=yes --threshold=15 --no-pager "$work/pushstep.service" > "$work/said" || {
        cat "$work/said" >&2; exit 1; }
else
    echo "deploy/lint.sh: the systemd unit is not verified: this machine has no systemd-analyze" >&2
fi
