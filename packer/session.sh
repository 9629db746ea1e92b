# Install the SSM agent on the builder, whose image lacks it.  cloud-init runs this at the first boot, if the bake goes
# through Session Manager.  AGENT holds the hash and the URL of its package, as in agents.json.
set -eu
export DEBIAN_FRONTEND=noninteractive
folder=$(mktemp -d)
sha256=${AGENT%% *}
url=${AGENT#* }
python3 -c 'import sys, urllib.request; urllib.request.urlretrieve(*sys.argv[1:])' "$url" "$folder/agent.deb"
echo "$sha256  $folder/agent.deb" | sha256sum --check
dpkg --install "$folder/agent.deb"
rm -r "$folder"
