#!/usr/bin/env bash
# Make the key pair with which a site's SuperNode proves who it is.
#
#     site-key.sh FOLDER
#
# FOLDER gets site.key, which never leaves the site, and site.key.pub, which the operator of the
# SuperLink registers: flwr supernode register site.key.pub LINK
set -euo pipefail

folder=${1:?"usage: site-key.sh FOLDER"}
umask 077
mkdir -p "$folder"
ssh-keygen -q -t ecdsa -b 384 -N "" -f "$folder/site.key" -C ""
echo "Wrote site.key and site.key.pub to $folder"
