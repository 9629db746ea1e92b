#!/bin/sh
# Bring the Debian of the builder up to date.  Packer runs this as root, first.  It ends with a reboot, so that all that
# follows, and the image, run on the new kernel and libraries.
#
# Everything comes from Debian's servers, checked by Debian's signature.  If they cannot be reached, the bake ends.
set -eu
export DEBIAN_FRONTEND=noninteractive

say() {
    echo "== $*"
}

apt() { # waits for what Debian started at boot
    apt-get --quiet --yes --option=DPkg::Lock::Timeout=120 "$@"
}

# The reboot removes it.  Packer goes on only then, even if it loses its connection to this script.
: >/run/chatd-upgrading

if command -v cloud-init >/dev/null; then
    say "waiting for cloud-init"
    cloud-init status --wait || [ $? -eq 2 ] # 2: done, with warnings
fi

# Images are replaced and never patched, so nothing in one updates itself.
systemctl mask --now apt-daily.timer apt-daily-upgrade.timer apt-daily.service apt-daily-upgrade.service
if dpkg-query --show unattended-upgrades >/dev/null 2>&1; then
    apt purge unattended-upgrades
fi

say "upgrading Debian"
apt --error-on=any update
apt --option=Dpkg::Options::=--force-confold full-upgrade

say "reboot"
systemctl reboot
