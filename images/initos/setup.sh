#!/bin/sh
# initOS's build by its familiar words: all (or nothing), a step such as efi2 or mods_sqfs, sign, drun NAME|CMD….
# WORK, SRCDIR, SECRETS, REPO and TAG are kiln's settings: `kiln config` says what they are.
set -eu
recipe=$(cd "$(dirname "$0")" && pwd)
case ${1:-all} in
drun)
    shift
    exec kiln drun --directory "$recipe" "$@"
    ;;
sign)
    shift
    cd "$recipe"
    exec kiln sign "$@"
    ;;
*)
    cd "$recipe"
    exec kiln build "${@:-all}"
    ;;
esac
