#!/usr/bin/env bash
# Make a certificate authority and the SuperLink's TLS certificate.
#
#     certificates.sh FOLDER HOST [HOST ...]
#
# HOST: the names and addresses under which the sites reach the SuperLink, such as
# link.hospital.example; 127.0.0.1 is always added, since the SuperLink's own processes reach it
# there. FOLDER gets ca.crt (give it to every site), ca.key (keep it
# offline), server.pem and server.key (for the SuperLink only).
set -euo pipefail

folder=${1:?"usage: certificates.sh FOLDER HOST [HOST ...]"}
shift
[ $# -gt 0 ] || { echo "certificates.sh: expected at least one HOST, found none" >&2; exit 2; }

names=(IP:127.0.0.1)
for host in "$@"; do
    if [[ $host =~ ^[0-9.]+$ || $host == *:* ]]; then names+=("IP:$host"); else names+=("DNS:$host"); fi
done
san=$(IFS=,; echo "${names[*]}")

umask 077
mkdir -p "$folder"
cd "$folder"
openssl req -x509 -newkey rsa:4096 -nodes -sha256 -days 3650 -subj "/CN=flwr-colearn CA" \
    -keyout ca.key -out ca.crt 2>/dev/null
openssl req -newkey rsa:4096 -nodes -sha256 -subj "/CN=$1" \
    -keyout server.key -out server.csr 2>/dev/null
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -sha256 -days 825 \
    -extfile <(printf 'subjectAltName=%s\n' "$san") -out server.pem 2>/dev/null
rm server.csr
chmod 644 ca.crt server.pem
echo "Wrote ca.crt, ca.key, server.pem and server.key for $san to $folder"
