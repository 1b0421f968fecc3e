#!/usr/bin/env bash
# Install what the loopback cluster needs, where that is possible: Debian's SLURM, without its services,
# and modules, which sites have.
set -euo pipefail
packages=(slurm-wlm slurmdbd munge mariadb-server-core mariadb-client-core environment-modules)
missing=()
for one in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$one" 2>/dev/null | grep -q 'ok installed' || missing+=("$one")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "SLURM cannot be installed here (${missing[*]}): its tests are skipped" >&2
    exit 0
fi
# Services that the packages bring must not start: tests start their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' > $policy
    chmod 755 $policy
    trap 'rm -f $policy' EXIT
fi
get=(env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 -qq -y)
"${get[@]}" install --no-install-recommends "${missing[@]}" >/dev/null 2>&1 || {
    "${get[@]}" update
    "${get[@]}" install --no-install-recommends "${missing[@]}"
}
