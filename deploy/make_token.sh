#!/bin/sh
# A token: make_token.sh FOLDER ROLE COMMAND..., where COMMAND is pushstep-server, or a docker run of its image
#
# ROLE is worker, viewer or operator. FOLDER/ROLE.token gets the token, for who calls; FOLDER/tokens gets the line that lets it in,
# for the server. A token of that role that was there is replaced: its line goes once the server has been told (SIGHUP).
set -eu
[ $# -ge 3 ] || { sed -n '2s/# //p' "$0" >&2; exit 2; }
folder=$1 role=$2; shift 2

mkdir -p -m 0700 "$folder"
umask 077
new=$(mktemp)
trap 'rm "$new"' EXIT
made=$("$@" --make-token "$role" 2> "$new") || { cat "$new" >&2; exit 1; }
touch "$folder/tokens"
others=$(grep -v "^$role " "$folder/tokens" || :)
printf '%s\n' "$made" | head -n 1 > "$folder/$role.token"
printf '%s\n' ${others:+"$others"} "$(printf '%s\n' "$made" | tail -n 1)" > "$folder/tokens"
chmod 0644 "$folder/$role.token" "$folder/tokens" # for a container's user; the folder keeps others of this host out
