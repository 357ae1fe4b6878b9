#!/bin/sh
# A certificate for both doors of a server, by a CA of your own: make_certificate.sh FOLDER NAME...
#
# FOLDER gets ca.pem, which callers need, ca.key, which you alone keep, and server.pem with server.key. The names are those under
# which callers reach the server, also addresses. Run it again to renew: the CA stays, and the files are written in place, so that
# those who have them mounted see the new ones. A server takes them up within a second.
set -eu
[ $# -ge 2 ] || { sed -n '2s/# //p' "$0" >&2; exit 2; }
folder=$1; shift
names=
for name; do
    case $name in *:* | *[0-9].[0-9]*.[0-9]*.[0-9]*) kind=IP ;; *) kind=DNS ;; esac
    names=$names${names:+,}$kind:$name
done

umask 077
new=$(mktemp -d)
trap 'rm -r "$new"' EXIT
quietly() { "$@" 2> "$new/said" || { cat "$new/said" >&2; exit 1; }; }
key="-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"

mkdir -p -m 0700 "$folder"
if [ ! -e "$folder/ca.key" ]; then
    quietly openssl req -x509 $key -days 3650 -subj "/CN=pushstep CA" -addext keyUsage=critical,keyCertSign,cRLSign \
        -keyout "$new/ca.key" -out "$new/ca.pem"
    mv "$new/ca.pem" "$new/ca.key" "$folder"
fi
cat > "$new/extensions" <<END
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = $names
END
quietly openssl req $key -subj "/CN=pushstep" -keyout "$new/key" -out "$new/request"
quietly openssl x509 -req -in "$new/request" -CA "$folder/ca.pem" -CAkey "$folder/ca.key" \
    -set_serial "0x$(openssl rand -hex 16)" -days 90 -extfile "$new/extensions" -out "$new/pem"
cat "$new/key" > "$folder/server.key"
cat "$new/pem" > "$folder/server.pem"
# for a container's user; the folder keeps others of this host out
chmod 0644 "$folder/ca.pem" "$folder/server.pem" "$folder/server.key"
