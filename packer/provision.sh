#!/bin/sh
# Make a Debian machine into the image of chatd.  It runs as root in the machine that is baked, with the bundle of
# scripts/bake at /tmp/bundle.tar, and in AGENTS the hash and the URL of each agent's package.
#
# Of the network it takes what Debian's image lacks of Debian's packages, and the agents; nothing that a hash does not
# hold, or Debian's signature.  Anything that fails here ends the bake, and then there is no image.
set -eu
export DEBIAN_FRONTEND=noninteractive
umask 022
bundle=$(mktemp -d)

say() {
    echo "== $*"
}

if command -v cloud-init >/dev/null; then
    say "wait until the machine is set up"
    cloud-init status --wait || [ $? -eq 2 ] # 2: it is, with warnings
fi

say "Debian's packages"
# Images are replaced, not patched: nothing in one changes by itself.
systemctl mask --now apt-daily.timer apt-daily-upgrade.timer apt-daily.service apt-daily-upgrade.service
if dpkg-query --show unattended-upgrades >/dev/null 2>&1; then
    apt-get --quiet --yes purge unattended-upgrades
fi
if ! dpkg-query --show python3-venv >/dev/null 2>&1; then
    apt-get --quiet update
    apt-get --quiet --yes --no-install-recommends install python3-venv
fi

say "chatd, from locked wheels"
tar --extract --no-same-owner --file=/tmp/bundle.tar --directory="$bundle"
python3 -m venv /opt/chatd
pip="/opt/chatd/bin/pip --disable-pip-version-check --no-cache-dir install --quiet --no-index"
$pip --find-links="$bundle/wheels" --require-hashes --requirement="$bundle/requirements.txt"
$pip --find-links="$bundle/wheels" --require-hashes --requirement="$bundle/instance-requirements.txt"
$pip --no-deps --require-hashes --find-links="$bundle/chatd" --requirement="$bundle/chatd/requirements.txt"
/opt/chatd/bin/twistd --help >/dev/null # writes the cache of Twisted's plug-ins, which the service may not

say "its units and settings"
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
systemctl enable chatd-boot.service # which starts the others, when it knows the store

say "the agents"
# shellcheck disable=SC2086 # pairs of words
set -- ${AGENTS:-}
while [ $# -gt 0 ]; do
    package=$bundle/${2##*/}
    python3 -c 'import sys, urllib.request; urllib.request.urlretrieve(*sys.argv[1:])' "$2" "$package"
    echo "$1  $package" | sha256sum --check
    dpkg --install "$package"
    shift 2
done
for agent in amazon-ssm-agent amazon-cloudwatch-agent; do
    if systemctl --quiet list-unit-files "$agent.service" >/dev/null; then
        systemctl enable "$agent.service"
    fi
done

say "what is in it"
/opt/chatd/bin/python "$bundle/sbom.py" "$bundle/wheels" "$bundle/chatd" >/usr/share/chatd/sbom.cdx.json
dpkg-query --show --showformat='${Package}\t${Version}\t${Architecture}\n' >/usr/share/chatd/packages.tsv

say "does it serve?"
# The programs of the instance find all that they import.
(cd /opt/chatd/bin && ./python -c 'import sys; from runpy import run_path as run; [run(name) for name in sys.argv[1:]]' \
    chatd-agent chatd-boot chatd-lifecycle)
# This machine has no store to learn of: while it runs there is one that ends with the process.
override=/run/systemd/system/chatd-boot.service.d
install -d "$override"
printf '%s\n' >"$override/smoke.conf" '[Service]' 'ExecStart=' \
    "ExecStart=/bin/sh -c 'echo CHATD_STORE=memory: >/run/chatd/chatd.env'"
systemctl daemon-reload
for name in chatd chatd@1; do
    timeout 120 systemctl start "$name.service"
    /opt/chatd/bin/python "$bundle/smoke.py"
    systemctl stop "$name.socket" "$name.service" # the socket first: a connection starts the service
    state=$(systemctl show --property=ActiveState --property=Result "$name.service" | sort | tr '\n' ' ')
    if [ "$state" != "ActiveState=inactive Result=success " ]; then
        echo "$name did not stop cleanly: $state" >&2
        exit 1
    fi
done
systemctl stop chatd-boot.service
rm -r "$override"

say "nobody logs in by SSH"
systemctl disable ssh.service # sessions come by the SSM agent

say "leave nothing that is this machine's own"
if command -v cloud-init >/dev/null; then
    cloud-init clean --logs --seed
fi
for agent in amazon-ssm-agent amazon-cloudwatch-agent; do
    if systemctl --quiet is-active "$agent"; then
        systemctl stop "$agent"
    fi
done
rm -rf /var/lib/amazon/ssm/i-* /var/lib/amazon/ssm/Vault
rm -rf /var/lib/chatd /var/lib/private/chatd "$bundle" /tmp/bundle.tar
rm -f /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub
rm -f /root/.ssh/authorized_keys /home/*/.ssh/authorized_keys /root/.*_history /home/*/.*_history
rm -f /var/lib/systemd/random-seed /var/lib/dbus/machine-id
apt-get --quiet clean
rm -rf /var/lib/apt/lists/*
find /var/log -type f -delete
rm -rf /var/log/journal/*
: >/etc/machine-id
sync
