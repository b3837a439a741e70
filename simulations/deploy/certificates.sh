#!/usr/bin/env bash
# Make a certificate authority and the server's two TLS certificates, or renew the certificates.
#
#     certificates.sh FOLDER HOST [HOST ...]
#
# HOST: the names and addresses under which the sites reach the server, without a port, such as
# link.hospital.example. FOLDER gets
#
#     ca.crt, ca.key                 the certificate authority: ca.crt goes to every site, ca.key is
#                                    kept offline; both are kept if they are there already
#     proxy.pem, proxy.key           for nginx, valid for the HOSTs and for loopback
#     superlink.pem, superlink.key   for the SuperLink, valid for loopback only
#
# The certificates are valid for 825 days. Run the script again to renew them: the sites change
# nothing, since they trust the authority.
set -euo pipefail

refuse() {  # refuse LINE...
    printf 'certificates.sh: %s\n' "$*" >&2
    exit 2
}

[ $# -gt 0 ] || refuse "expected FOLDER HOST [HOST ...], found nothing"
folder=$1
shift
[ $# -gt 0 ] || refuse "expected at least one HOST after the folder $folder, found none"

loopback=(IP:127.0.0.1 DNS:localhost)
names=("${loopback[@]}")
label='[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?'
for host in "$@"; do
    # An IPv6 address has two colons or more, and a name or an IPv4 address with a port has one.
    if [[ $host =~ ^[0-9]+(\.[0-9]+){3}$ || $host =~ ^[0-9A-Fa-f]*:[0-9A-Fa-f:]*:[0-9A-Fa-f.]*$ ]]; then
        names+=("IP:$host")
    elif [[ $host =~ ^(\*\.)?$label(\.$label)*$ && ! $host =~ ^[0-9.]+$ ]]; then
        names+=("DNS:$host")
    else
        refuse "expected a HOST that is a name or an address, without a port or a scheme, found" \
            "'$host'; the port is no part of a certificate"
    fi
done

quietly() {  # quietly COMMAND...: what the command says is shown only if it fails
    local said
    if ! said=$("$@" 2>&1); then
        printf 'certificates.sh: expected this command to work: %s\nIt said:\n%s\n' "$*" "$said" >&2
        exit 1
    fi
}

umask 077
mkdir -p "$folder"
cd "$folder"
# A new authority would lock out every site, so it is never made by accident.
again="bring it back from where it is kept, or use a new folder to make a new authority, whose ca.crt"
again+=" every site must be given"
for pair in "ca.key ca.crt" "ca.crt ca.key"; do
    read -r missing present <<<"$pair"
    if [ -e "$present" ] && [ ! -e "$missing" ]; then
        refuse "expected $missing beside $present in $folder, found none; $again"
    fi
done
if [ ! -e ca.key ]; then
    for issued in proxy superlink; do
        [ ! -e "$issued.pem" ] || refuse "expected ca.key and ca.crt, which issued $issued.pem," \
            "in $folder, found none; $again"
    done
    quietly openssl req -x509 -newkey rsa:4096 -nodes -sha256 -days 3650 -subj "/CN=flwr-colearn CA" \
        -keyout ca.key.new -out ca.crt.new
    # An interruption in between leaves a key alone, which is refused above.
    mv ca.key.new ca.key
    mv ca.crt.new ca.crt
    echo "Made a certificate authority: ca.crt, ca.key"
fi

issue() {  # issue NAME COMMON_NAME SUBJECT_ALTERNATIVE_NAMES...
    local name=$1 common=$2 alternatives
    shift 2
    alternatives=$(IFS=,; echo "$*")
    # Key and certificate replace the old ones together, once both are made.
    quietly openssl req -newkey rsa:3072 -nodes -sha256 -subj "/CN=$common" \
        -keyout "$name.key.new" -out "$name.csr"
    printf 'subjectAltName=%s\n' "$alternatives" >"$name.ext"
    quietly openssl x509 -req -in "$name.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -sha256 -days 825 \
        -extfile "$name.ext" -out "$name.pem.new"
    mv "$name.key.new" "$name.key"
    mv "$name.pem.new" "$name.pem"
    rm "$name.csr" "$name.ext"
    chmod 644 "$name.pem"
    echo "Issued $name.pem for $alternatives, $(openssl x509 -in "$name.pem" -noout -enddate)"
}

# A common name has at most 64 characters; nobody reads it beside the alternative names.
issue proxy "${1:0:64}" "${names[@]}"
issue superlink localhost "${loopback[@]}"
chmod 644 ca.crt
