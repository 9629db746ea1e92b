#!/bin/sh
# Turn a Debian machine into the image of chatd.  Packer runs this as root on the builder, with the bundle of
# scripts/bake at /tmp/bundle.tar.  AGENTS holds the hash and the URL of each agent's package.
#
# upgrade.sh has run before.  This downloads only missing packages of Debian, checked by Debian's signature, and the
# agents, checked by their hashes.
# Any failure here ends the bake without an image.
set -eu
export DEBIAN_FRONTEND=noninteractive
umask 022
bundle=$(mktemp -d)

say() {
    echo "== $*"
}

if command -v cloud-init >/dev/null; then
    say "waiting for cloud-init"
    cloud-init status --wait || [ $? -eq 2 ] # 2: done, with warnings
fi

say "packages of Debian"
apt-get --quiet --yes autoremove --purge # the kernel from before the reboot
if ! dpkg-query --show python3-venv >/dev/null 2>&1; then
    apt-get --quiet --yes --no-install-recommends install python3-venv
fi

say "chatd, from locked wheels"
tar --extract --no-same-owner --file=/tmp/bundle.tar --directory="$bundle"
python3 -m venv /opt/chatd
pip="/opt/chatd/bin/pip --disable-pip-version-check --no-cache-dir install --quiet --no-index"
$pip --find-links="$bundle/wheels" --require-hashes --requirement="$bundle/requirements.txt"
$pip --find-links="$bundle/wheels" --require-hashes --requirement="$bundle/instance-requirements.txt"
$pip --no-deps --require-hashes --find-links="$bundle/chatd" --requirement="$bundle/chatd/requirements.txt"
/opt/chatd/bin/twistd --help >/dev/null # writes the plug-in cache of Twisted, which the service may not write

say "units and settings"
install -d /etc/chatd /usr/share/chatd
for file in "$bundle"/files/*; do
    name=${file##*/}
    case $name in
    *.service.conf) install -D -m 644 "$file" "/usr/lib/systemd/system/${name%.conf}.d/ec2.conf" ;;
    *.service | *.socket) install -m 644 -t /usr/lib/systemd/system "$file" ;;
    *.cfg) install -D -m 644 -t /etc/cloud/cloud.cfg.d "$file" ;;
    *.py | *.json | *.yml) install -m 644 -t /opt/chatd/bin "$file" ;;
    *) install -m 755 -t /opt/chatd/bin "$file" ;;
    esac
done
systemctl daemon-reload
systemctl enable chatd-boot.service # it starts the other units once it knows the store

say "agents"
# shellcheck disable=SC2086 # split into words: pairs of hash and URL
set -- ${AGENTS:-}
while [ $# -gt 0 ]; do
    package=$bundle/${2##*/}
    python3 -c 'import sys, urllib.request; urllib.request.urlretrieve(*sys.argv[1:])' "$2" "$package"
    echo "$1  $package" | sha256sum --check
    # A bake through Session Manager has this version already, and to install it again would cut the connection.
    what=$(dpkg-deb --show --showformat='${Package} ${Version} install ok installed' "$package")
    has=$(dpkg-query --show --showformat='${Package} ${Version} ${Status}' "${what%% *}" 2>/dev/null) || has=
    if [ "$what" != "$has" ]; then
        dpkg --install "$package"
    fi
    shift 2
done
for agent in amazon-ssm-agent amazon-cloudwatch-agent; do
    if systemctl --quiet list-unit-files "$agent.service" >/dev/null; then
        systemctl enable "$agent.service"
    fi
done

say "lists of components"
/opt/chatd/bin/python "$bundle/sbom.py" "$bundle/wheels" "$bundle/chatd" >/usr/share/chatd/sbom.cdx.json
dpkg-query --show --showformat='${Package}\t${Version}\t${Architecture}\n' >/usr/share/chatd/packages.tsv

say "smoke test"
# All imports of the programs of an instance must resolve.
(cd /opt/chatd/bin && ./python -c 'import sys; from runpy import run_path as run; [run(name) for name in sys.argv[1:]]' \
    chatd-agent chatd-boot chatd-lifecycle)
# The builder has no store: for this test chatd keeps messages in memory.
override=/run/systemd/system/chatd-boot.service.d
install -d "$override"
printf '%s\n' >"$override/smoke.conf" '[Service]' 'ExecStart=' \
    "ExecStart=/bin/sh -c 'echo CHATD_STORE=memory: >/run/chatd/chatd.env'"
systemctl daemon-reload
for name in chatd chatd@1; do
    timeout 120 systemctl start "$name.service"
    /opt/chatd/bin/python /opt/chatd/bin/chatd_echo.py ws://127.0.0.1:8085/ 30
    systemctl stop "$name.socket" "$name.service" # stop the socket first, because a connection starts the service
    state=$(systemctl show --property=ActiveState --property=Result "$name.service" | sort | tr '\n' ' ')
    if [ "$state" != "ActiveState=inactive Result=success " ]; then
        echo "$name did not stop cleanly: $state" >&2
        exit 1
    fi
done
systemctl stop chatd-boot.service
rm -r "$override"

say "disable SSH"
systemctl disable ssh.service # the SSM agent provides sessions

say "remove the identity of this machine"
if command -v cloud-init >/dev/null; then
    cloud-init clean --logs --seed
fi
if systemctl --quiet is-active amazon-cloudwatch-agent; then
    systemctl stop amazon-cloudwatch-agent
fi
# The SSM agent may carry the connection of this script, and writes files until it ends.
install -d /run/systemd/system/amazon-ssm-agent.service.d
printf '%s\n' '[Service]' \
    "ExecStopPost=/bin/sh -c 'rm -rf /var/lib/amazon/ssm/i-* /var/lib/amazon/ssm/Vault /var/log/amazon/ssm'" \
    >/run/systemd/system/amazon-ssm-agent.service.d/identity.conf
systemctl daemon-reload
rm -rf /var/lib/chatd /var/lib/private/chatd "$bundle" /tmp/bundle.tar
rm -f /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub
rm -f /root/.ssh/authorized_keys /home/*/.ssh/authorized_keys /root/.*_history /home/*/.*_history
rm -f /var/lib/systemd/random-seed /var/lib/dbus/machine-id
apt-get --quiet clean
rm -rf /var/lib/apt/lists/*
journalctl --relinquish-var # otherwise journald would create its files again
find /var/log -type f -delete
rm -rf /var/log/journal/*
: >/etc/machine-id
sync
