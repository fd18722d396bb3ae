#!/bin/sh
# Configures a root whose packages are unpacked. It runs as root, with that root as `/`, in a machine of its
# own; proc, sys, dev and a temporary folder are mounted. Exit status 0 and an empty /var/lib/kiln-configure.log
# are not asked for: the status alone counts.
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 LANG=C.UTF-8 TZ=UTC
export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true DEBCONF_NOWARNINGS=yes
export PERL_HASH_SEED=0 PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1
umask 022
exec </dev/null
cd /

# Nothing that a package installs is started.
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod 0755 /usr/sbin/policy-rc.d

# Maintainer scripts use awk before the package that provides it is configured.
if ! [ -e /usr/bin/awk ] && [ -e /usr/bin/mawk ]; then
    ln -s mawk /usr/bin/awk
    awk_was_made=1
fi

ldconfig
dpkg --force-depends --force-unsafe-io --configure -a

# A second look: a package that is not configured is a failure, whatever dpkg said.
unconfigured=$(dpkg-query -W -f '${db:Status-Abbrev} ${binary:Package}\n' | grep -v '^ii ' || true)
if [ -n "$unconfigured" ]; then
    printf 'packages that are not configured:\n%s\n' "$unconfigured" >&2
    exit 1
fi
