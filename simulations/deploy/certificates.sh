#!/usr/bin/env bash
# Make a certificate authority and the server's two TLS certificates, or renew the certificates.
#
#     certificates.sh FOLDER HOST [HOST ...]
#
# HOST: the names and addresses under which the sites reach the server, such as
# link.hospital.example. FOLDER gets
#
#     ca.crt, ca.key                 the certificate authority: ca.crt goes to every site, ca.key is
#                                    kept offline; both are kept if they are there already
#     proxy.pem, proxy.key           for nginx, valid for the HOSTs and for loopback
#     superlink.pem, superlink.key   for the SuperLink, valid for loopback only
#
# The certificates are valid for 825 days. Run the script again to renew them: the sites change
# nothing, since they trust the authority.
set -Eeuo pipefail
# openssl's progress goes to /dev/null, and its errors with it.
trap 'echo "certificates.sh: expected line $LINENO to succeed, found an error: $BASH_COMMAND" >&2' ERR

folder=${1:?"usage: certificates.sh FOLDER HOST [HOST ...]"}
shift
[ $# -gt 0 ] || { echo "certificates.sh: expected at least one HOST, found none" >&2; exit 2; }

loopback=(IP:127.0.0.1 DNS:localhost)
names=("${loopback[@]}")
for host in "$@"; do
    # A name or an IPv4 address has no colon, an IPv6 address has two or more: one is a port.
    if ! [[ $host =~ ^[A-Za-z0-9*]([A-Za-z0-9.-]*[A-Za-z0-9])?$ || $host =~ ^[0-9A-Fa-f.]*:[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*$ ]]; then
        echo "certificates.sh: expected a host name or an address without scheme, port and path," \
            "such as link.hospital.example, found '$host'" >&2
        exit 2
    fi
    if [[ $host =~ ^[0-9.]+$ || $host == *:* ]]; then names+=("IP:$host"); else names+=("DNS:$host"); fi
done

umask 077
mkdir -p "$folder"
cd "$folder"
if [ -e ca.crt ] && [ ! -e ca.key ]; then
    # A new authority would lock out every site, so it is never made by accident.
    echo "certificates.sh: expected ca.key beside ca.crt in $folder, found none; bring it back from" \
        "where it is kept, or move ca.crt away to make a new authority, which every site must be given" >&2
    exit 2
fi
if [ ! -e ca.key ]; then
    openssl req -x509 -newkey rsa:4096 -nodes -sha256 -days 3650 -subj "/CN=flwr-colearn CA" \
        -keyout ca.key -out ca.crt 2>/dev/null
    echo "Made a certificate authority: ca.crt, ca.key"
fi

issue() {  # issue NAME COMMON_NAME SUBJECT_ALTERNATIVE_NAMES...
    local name=$1 common=$2 alternatives
    shift 2
    alternatives=$(IFS=,; echo "$*")
    # Key and certificate replace the old ones together, once both are made.
    openssl req -newkey rsa:3072 -nodes -sha256 -subj "/CN=$common" \
        -keyout "$name.key.new" -out "$name.csr" 2>/dev/null
    openssl x509 -req -in "$name.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -sha256 -days 825 \
        -extfile <(printf 'subjectAltName=%s\n' "$alternatives") -out "$name.pem.new" 2>/dev/null
    mv "$name.key.new" "$name.key"
    mv "$name.pem.new" "$name.pem"
    rm "$name.csr"
    chmod 644 "$name.pem"
    echo "Issued $name.pem for $alternatives, $(openssl x509 -in "$name.pem" -noout -enddate)"
}

issue proxy "$1" "${names[@]}"
issue superlink localhost "${loopback[@]}"
chmod 644 ca.crt
