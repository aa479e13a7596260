"""Holds data in anonymous memory, in a tmpfs and on the disk, and answers requests over HTTP.

One process answers all requests, because the start of a process takes seconds in some guests.
Modules that use AVX or that take long to load are avoided for the same reason.
"""
import _sha256, mmap, os, socket

PAGE = 4096
PAGES = 1024
FILE = 64 * PAGE
memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
direct = mmap.mmap(-1, FILE)


def sha256(data):
    return _sha256.sha256(data).hexdigest()


def fill(first, count, generation):
    for page in range(first, first + count):
        word = (generation << 32 | page).to_bytes(8, "little")
        memory[page * PAGE:(page + 1) * PAGE] = word * 512
    keep()


def zero(first, count):
    memory[first * PAGE:(first + count) * PAGE] = bytes(count * PAGE)
    keep()


def keep():
    """Writes the first part of the memory to both files."""
    for path in "/dev/shm/witness", "/root/witness":
        with open(path, "wb") as file:
            file.write(memory[:FILE])
            file.flush()
            os.fsync(file.fileno())


def sums():
    """Reads the disk past the page cache."""
    with open("/dev/shm/witness", "rb") as file:
        tmpfs = file.read()
    disk = os.open("/root/witness", os.O_RDONLY | os.O_DIRECT)
    os.preadv(disk, [direct], 0)
    os.close(disk)
    return "\n".join([sha256(memory), sha256(tmpfs), sha256(direct)])


def is_zero(first, count):
    return memory[first * PAGE:(first + count) * PAGE] == bytes(count * PAGE)


def identity():
    paths = "/etc/machine-id", "/proc/sys/kernel/random/uuid", "/run/wrenn/generation-id"
    texts = [socket.gethostname(), os.urandom(16).hex()] + [open(path).read() for path in paths]
    return "\n".join(text.strip() for text in texts)


QUESTIONS = {"fill": fill, "zero": zero, "sums": sums, "is_zero": is_zero, "identity": identity}


def serve(peer):
    file = peer.makefile("rw", newline="")
    head = list(iter(lambda: file.readline().strip(), ""))
    name, *numbers = head[0].split()[1].strip("/").split("/")
    body = str(QUESTIONS[name](*map(int, numbers)))
    file.write(f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}")
    file.flush()


server = socket.create_server(("0.0.0.0", 9000))
while True:
    peer, _ = server.accept()
    # A connection may end in the middle of a request, and be empty.
    try:
        serve(peer)
    except (OSError, IndexError) as error:
        print(error, flush=True)
    finally:
        peer.close()
