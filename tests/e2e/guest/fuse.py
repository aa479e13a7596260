"""Mounts a FUSE file system with one file, reads the file, and unmounts it.

Root mounts with mount(2), any other user with fusermount3, as every FUSE library does. Speaks the kernel's protocol
(linux/fuse.h, version 7.31) by itself, because the image has no FUSE library for Python.
"""
import array
import ctypes
import errno
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading

CONTENT = b"served by fuse\n"
NAME = b"file"
DIRECTORY, FILE = 1, 2


def attributes(node):
    mode, size = (0o40755, 0) if node == DIRECTORY else (0o100644, len(CONTENT))
    # ino, size, blocks, three times, their nanoseconds, mode, nlink, uid, gid, rdev, blksize, flags
    return struct.pack("<6Q10I", node, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, os.getuid(), os.getgid(), 0, 4096, 0)


def answer(opcode, node, body):
    """Returns the body of the reply, an error number, or None if the request has no reply."""
    if opcode == 26:  # INIT
        return struct.pack("<4I2H2I2H8I", 7, 31, 4096, 0, 12, 9, 4096, 1, 1, 0, *[0] * 8)
    if opcode == 1:  # LOOKUP
        if body.rstrip(b"\0") != NAME:
            return errno.ENOENT
        return struct.pack("<4Q2I", FILE, 0, 0, 0, 0, 0) + attributes(FILE)
    if opcode == 3:  # GETATTR
        return struct.pack("<Q2I", 0, 0, 0) + attributes(node)
    if opcode in (14, 27):  # OPEN, OPENDIR
        return struct.pack("<Q2I", 0, 0, 0)
    if opcode == 15:  # READ
        _, offset, size = struct.unpack_from("<QQI", body)
        return CONTENT[offset:offset + size]
    if opcode in (18, 25, 29):  # RELEASE, FLUSH, RELEASEDIR
        return b""
    if opcode in (2, 42):  # FORGET, BATCH_FORGET
        return None
    return errno.ENOSYS


def serve(device):
    while True:
        try:
            request = os.read(device, 1 << 20)
        except OSError:
            return  # unmounted
        _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
        reply = answer(opcode, node, request[40:])
        if reply is None:
            continue
        code, body = (-reply, b"") if isinstance(reply, int) else (0, reply)
        os.write(device, struct.pack("<IiQ", 16 + len(body), code, unique) + body)


def mount_as_root(place):
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    if ctypes.CDLL(None, use_errno=True).mount(b"test", place.encode(), b"fuse", 0, options) != 0:
        raise OSError(ctypes.get_errno(), "mount")
    return device


def mount_as_user(place):
    ours, theirs = socket.socketpair()
    environment = {**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}
    subprocess.run(["fusermount3", "--", place], env=environment, pass_fds=[theirs.fileno()], check=True)
    _, messages, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
    return array.array("i", messages[0][2])[0]


def main():
    is_root = os.getuid() == 0
    place = tempfile.mkdtemp()
    device = (mount_as_root if is_root else mount_as_user)(place)
    threading.Thread(target=serve, args=[device], daemon=True).start()
    # Not read by this process, which would wait for itself.
    sys.stdout.write(subprocess.run(["cat", f"{place}/file"], stdout=subprocess.PIPE, check=True, text=True).stdout)
    subprocess.run(["umount", place] if is_root else ["fusermount3", "-u", place], check=True)
    os.rmdir(place)


main()
