# Runs each program in its folder under strace, which tells of every call that names a file or reads one.
# $1 is where programs put what they make; "." is their own folder.
set -u
into=$1
calls=%file,fchdir,getdents64,read,pread64,readv,preadv,mmap,copy_file_range,sendfile,fgetxattr,flistxattr
calls=$calls,clone,clone3,fork,vfork
traced() { # traced PROGRAM COMMAND ARGUMENT...
    name=$1
    shift
    mkdir -p "/tmp/trace/$name"
    cd "$SRCDIR/$name" || exit 1
    echo "[$name]"
    strace -ff -y -s 0 -qq -e signal=none -e trace="$calls" -o "/tmp/trace/$name/t" "$@" >/tmp/said 2>&1
    status=$?
    cat -v /tmp/said
    echo "exit $status"
}
export GIT_CONFIG_GLOBAL=/dev/null PYTHONDONTWRITEBYTECODE=1
[ "$into" = . ] && unset PYTHONDONTWRITEBYTECODE
mkdir -p /tmp/made
out() { # out NAME: where to put it
    if [ "$into" = . ]; then echo "$1"; else echo "/tmp/made/$1"; fi
}
traced tool gcc -o /tmp/tool tool.c
traced find find . -name '*.c' -o -type f -size +0 -newer ref
traced git git status --porcelain
traced gcc gcc -Ifirst -Isecond -I/opt/include -I/opt/none -c -o "$(out main.o)" main.c
traced make make "O=$into" CC=cc
traced python python3 main.py
traced ld ld -o "$(out linked)" -Lnone -Llib -e start start.o -l:libother.a
if [ "$into" = . ]; then
    traced configure ./configure
else
    mkdir -p /tmp/made/configured
    traced configure sh -c "cd /tmp/made/configured && $SRCDIR/configure/configure"
fi
traced tar tar -cf "$(out packed.tar)" one sub
traced mmap /tmp/tool map large none
traced list /tmp/tool list . none
traced absent /tmp/tool look present no none/none present/no "$(printf 'odd\377')" . ..
traced links /tmp/tool look to-real/below/read loop dangling over/real/none out/etc \
    real/../real/by-descriptor at to-real
traced exec sh -c 'PATH=none:bin:$PATH; script; ./bin/script; none/script || true'
cd /tmp && tar -cf "$WORK/trace.tar" trace
