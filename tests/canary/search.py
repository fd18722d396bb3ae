"""Searches for a set of keys where they must not be, by nothing of kiln's.

usage: search.py watch PID          variables and arguments of all that PID starts, again and again until it ends
       search.py inside PID         the same once, with the memory and the open files of all but PID itself
       search.py below SECONDS FOLDER...    files that were changed since

Standard input has lines of a name and bytes in hexadecimal. Prints what was found where, and at last how much was searched.
"""

import os, stat, sys, time

needles = [(name, bytes.fromhex(text)) for name, text in (line.split("\t") for line in sys.stdin)]
longest = max(len(needle) for _, needle in needles)
found, count, size = set(), 0, 0


def look(where, chunks):
    global count, size
    count, rest = count + 1, b""
    for chunk in chunks:
        size += len(chunk)
        chunk = rest + chunk
        found.update((name, where) for name, needle in needles if needle in chunk)
        rest = chunk[1 - longest :]


def read(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:  # Gone, or a process that lets nobody look in.
        return b""


def content(path):
    """The chunks of a file, without its holes."""
    try:
        with open(path, "rb", buffering=0) as file:
            at = 0
            while True:
                at = file.seek(at, os.SEEK_DATA)
                chunk = file.read(16 << 20)
                if not chunk:
                    return
                at += len(chunk)
                yield chunk
    except OSError:  # No data behind this.
        return


def memory(pid):
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        for line in read(f"/proc/{pid}/maps").decode().splitlines():
            at, end = (int(text, 16) for text in line.split()[0].split("-"))
            while at < end and line.split()[1].startswith("r"):
                try:
                    file.seek(at)
                    chunk = file.read(min(end - at, 16 << 20))
                except (OSError, OverflowError, ValueError):  # Of a device, or of the kernel.
                    break
                if not chunk:  # The process is gone.
                    return
                at += len(chunk)
                yield chunk


def tree(leader):
    """The processes that `leader` started, and it."""
    parents = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        fields = read(f"/proc/{pid}/stat").rpartition(b") ")[2].split()
        if fields and fields[0] != b"Z":
            parents[int(pid)] = int(fields[1])
    family = {leader} & parents.keys()
    while True:
        more = {pid for pid, parent in parents.items() if parent in family} - family
        if not more:
            return family
        family |= more


def name(pid):
    return read(f"/proc/{pid}/comm").decode().strip()


mode, *words = sys.argv[1:]
if mode == "below":
    since, *folders = words
    for folder in folders:
        for place, _, names in os.walk(folder):
            for path in (os.path.join(place, name) for name in names):
                meta = os.lstat(path)
                if stat.S_ISREG(meta.st_mode) and meta.st_mtime >= float(since):
                    look(path, content(path))
else:
    leader = int(words[0])
    while family := tree(leader):
        for pid in family:
            for what in ["environ", "cmdline"]:
                look(f"{what} of {name(pid)}", [read(f"/proc/{pid}/{what}")])
            if mode == "inside" and pid != leader:
                look(f"memory of {name(pid)}", memory(pid))
                for number in os.listdir(f"/proc/{pid}/fd"):
                    path = f"/proc/{pid}/fd/{number}"
                    if stat.S_ISREG(os.stat(path).st_mode):
                        look(f"{os.readlink(path)} of {name(pid)}", content(path))
        if mode == "inside":
            break
        time.sleep(0.2)
for key, where in sorted(found):
    print(f"{key}\t{where}")
print(f"{count}\t{size}")
