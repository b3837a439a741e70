#!/usr/bin/env bash
# Write the configuration of the nginx in front of the SuperLink.
#
#     proxy.sh FOLDER CERTIFICATES [LISTEN [SUPERLINK]]
#
# FOLDER gets nginx.conf, and in use nginx's logs and pid file. CERTIFICATES is the folder of
# certificates.sh. LISTEN is the port, or address:port, that the sites reach (9092); SUPERLINK is
# the SuperLink's port on 127.0.0.1 (9192). Then run, as any user but root:
#
#     nginx -e stderr -c FOLDER/nginx.conf
set -euo pipefail

usage="usage: proxy.sh FOLDER CERTIFICATES [LISTEN [SUPERLINK]]"
folder=${1:?"$usage"}
certificates=${2:?"$usage"}
template=$(cd "$(dirname "$0")" && pwd)/nginx.conf
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
certificates=$(cd "$certificates" && pwd)
# nginx splits its file at blanks, and sed replaces what lies between bars.
for path in "$folder" "$certificates"; do
    if [[ $path =~ [[:space:]\;\{\}\|\&\\\"\'\$] ]]; then
        echo "proxy.sh: expected a path of plain characters, found '$path'" >&2
        exit 2
    fi
done
sed -e "s|@FOLDER@|$folder|g" -e "s|@CERTIFICATES@|$certificates|g" \
    -e "s|@LISTEN@|${3:-9092}|g" -e "s|@SUPERLINK@|${4:-9192}|g" "$template" > "$folder/nginx.conf"
echo "Wrote $folder/nginx.conf"
