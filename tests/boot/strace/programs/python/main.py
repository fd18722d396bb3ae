import os
import sys

import module
import pkg.inner.leaf
import space.member

try:
    import absent
except ImportError:
    pass
try:
    import pkg.absent
except ImportError:
    pass
# Entries' kinds come with the listing; only one is stated.
for entry in os.scandir("pkg"):
    entry.is_dir()
os.stat("data")
print(os.listxattr("main.py"), os.path.exists("nothing"), len(open("data").read()))
try:
    os.getxattr("data", "user.none")
except OSError:
    pass
