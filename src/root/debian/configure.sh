#!/bin/sh
# Configures a root whose packages are unpacked. It runs as root with that root as `/`, in a machine of its
# own, with /proc, /sys, /dev and /dev/pts mounted and SOURCE_DATE_EPOCH set, which shadow and systemd write
# into files. Status 0: every package is configured, and what differs from one configuration to the next is gone.
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 LANG=C.UTF-8 TZ=UTC
export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true DEBCONF_NOWARNINGS=yes
export PERL_HASH_SEED=0 PYTHONHASHSEED=0
umask 022
exec </dev/null
cd /

# Nothing that a package installs is started.
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod 0755 /usr/sbin/policy-rc.d

dpkg --force-depends --force-unsafe-io --configure -a

# A second look: a package that is not configured is a failure, whatever dpkg said.
if dpkg-query -W -f '${db:Status-Abbrev} ${binary:Package}\n' | grep -v '^ii ' >&2; then
    echo 'the packages above are not configured' >&2
    exit 1
fi

# What tells when, where or in which order this ran, or is a secret of one machine: whoever needs it makes it anew.
rm -f /usr/sbin/policy-rc.d
rm -rf /var/cache/ldconfig/aux-cache /var/cache/debconf/*-old /var/cache/fontconfig/* /var/cache/man/* \
    /var/lib/dpkg/lock /var/lib/dpkg/lock-frontend /var/lib/dpkg/triggers/Lock /var/lib/dpkg/*-old \
    /var/lib/systemd/random-seed /var/lib/dbus/machine-id /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub \
    /root/.rnd /etc/.pwd.lock /etc/passwd- /etc/group- /etc/shadow- /etc/gshadow- /etc/subuid- /etc/subgid-
find /var/log -xdev -type f -exec rm -f {} +
for folder in /tmp /var/tmp /run; do
    # What is mounted there is the machine's own and not part of the root.
    mountpoint -q "$folder" || find "$folder" -xdev -mindepth 1 -delete
done
if [ -e /etc/machine-id ]; then
    : >/etc/machine-id
fi
