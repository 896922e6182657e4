"""What lives through suspend and resume in tests/e2e/resident: a database with a writer, a counter in redis, nginx, clocks,
random numbers and open files. Whatever is not as it must be is written down as a sentence, and told to the host on port 7000.
"""

import ctypes
import fcntl
import json
import mmap
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time

import psycopg2

TICK_NS = 10_000_000
# Within one life the distance of the two clocks stays the same, but for what measuring it adds.
CLOCKS_TOLERANCE_NS = 2_000_000
RANDOMS_KEPT = 64
RECORD = 16
SLOTS = 4096
KEPT = "/var/kept"

problems = []
committed = 0
counter = 0
is_ending = threading.Event()


def wrong(sentence):
    if not is_ending.is_set() and len(problems) < 20:
        problems.append(sentence)
        print("WRONG:", sentence, flush=True)


def guarded(work):
    """A thread that ends by an error is a problem too."""

    def run():
        try:
            work()
        except Exception as error:
            wrong(f"{work.__name__} ended: {type(error).__name__}: {error}")

    threading.Thread(target=run, daemon=True).start()


def generation():
    with open("/dev/vm-generation-id") as file:
        return file.read().strip()


# The services.

NGINX = """
daemon off; error_log stderr; pid /tmp/nginx.pid; worker_processes 1; events { worker_connections 64; }
http { access_log off; keepalive_timeout 1h; keepalive_requests 1000000000; root /srv; server { listen 80; } }
"""
POSTGRES = "fsync=on synchronous_commit=on shared_buffers=16MB max_connections=10 max_wal_senders=0 wal_level=minimal"


def start_services():
    os.makedirs("/srv", exist_ok=True)
    with open("/srv/index.html", "w") as file:
        file.write("alive\n")
    with open("/tmp/nginx.conf", "w") as file:
        file.write(NGINX)
    os.makedirs("/var/redis", exist_ok=True)
    settings = [word for setting in POSTGRES.split() for word in ("-c", setting)]
    as_postgres = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
    place = ["-c", "listen_addresses=", "-c", "unix_socket_directories=/tmp"]
    redis = ["--save", "", "--appendonly", "yes", "--dir", "/var/redis", "--bind", "127.0.0.1"]
    commands = [
        as_postgres + ["postgres"] + place + settings,
        ["redis-server"] + redis,
        ["nginx", "-c", "/tmp/nginx.conf"],
    ]
    return [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]


def database():
    connection = psycopg2.connect(host="/tmp", user="postgres", dbname="postgres")
    return connection, connection.cursor()


def wait_for(what, attempt):
    for _ in range(1200):
        try:
            return attempt()
        except Exception as error:
            last = error
            time.sleep(0.1)
    sys.exit(f"{what} does not start: {last}")


def write_rows():
    global committed
    connection, cursor = database()
    number = committed
    while not is_ending.is_set():
        number += 1
        cursor.execute("insert into rows values (%s)", (number,))
        connection.commit()
        committed = number
        print("committed", number, flush=True)
        time.sleep(0.02)


def rows():
    """What a connection finds that was not there before."""
    known = committed
    connection, cursor = database()
    cursor.execute("select count(*), coalesce(min(number), 1), coalesce(max(number), 0) from rows")
    count, least, greatest = cursor.fetchone()
    connection.close()
    if count != greatest or least != 1 or greatest < known:
        wrong(f"of rows 1 to {known} that were committed there are {count}, from {least} to {greatest}")
    return greatest


def redis():
    return socket.create_connection(("127.0.0.1", 6379))


def count_in_redis():
    global counter
    stream = redis().makefile("rwb")
    last = None
    while not is_ending.is_set():
        stream.write(b"INCR count\r\n")
        stream.flush()
        value = int(stream.readline()[1:])
        if last is not None and value != last + 1:
            wrong(f"redis counts {value} after {last}")
        last = counter = value
        time.sleep(0.05)


# Clocks and random numbers.

libc = ctypes.CDLL(None, use_errno=True)
urandom = os.open("/dev/urandom", os.O_RDONLY)


class Life:
    """What is known of the time since the machine began or was resumed last."""

    def __init__(self, name, offset_ns, expirations):
        self.name = name
        self.offset_ns = offset_ns
        self.first_expirations = expirations
        self.randoms = []


life = None


def clocks():
    """Monotonic time, and how far real time is ahead of it, read so close that it is right to a tenth of a millisecond."""
    best = None
    for _ in range(50):
        before = time.monotonic_ns()
        real = time.time_ns()
        after = time.monotonic_ns()
        if best is None or after - before < best[0]:
            best = (after - before, after, real - (before + after) // 2)
        if best[0] < 100_000:
            break
    return best[1], best[2]


def interval_timer():
    timer = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_CLOEXEC)
    interval = (ctypes.c_long * 4)(0, TICK_NS, 0, TICK_NS)
    if timer < 0 or libc.timerfd_settime(timer, 0, interval, None) != 0:
        raise OSError(ctypes.get_errno(), "timerfd")
    return timer


def tick():
    global life
    began = time.monotonic_ns()
    timer = interval_timer()
    last, total, ticks = began, 0, 0
    while not is_ending.is_set():
        expirations = int.from_bytes(os.read(timer, 8), sys.byteorder)
        # Nothing that was read before a snapshot and is looked at behind it counts.
        name = generation()
        now, offset = clocks()
        random = [os.read(urandom, 16).hex(), os.getrandom(16).hex()]
        is_one_life = generation() == name
        if now < last:
            wrong(f"monotonic time went back by {last - now} ns")
        total += expirations
        if total > (now - began) // TICK_NS + 1:
            wrong(f"a timer of 10 ms has fired {total} times in {(now - began) / 1e6} ms")
        last = now
        if not is_one_life:
            continue
        if life is None or life.name != name:
            life = Life(name, offset, expirations)
        if abs(offset - life.offset_ns) > CLOCKS_TOLERANCE_NS:
            wrong(f"real time moved by {(offset - life.offset_ns) / 1e6} ms after the machine went on")
            life.offset_ns = offset
        if len(life.randoms) < RANDOMS_KEPT:
            life.randoms += random
        ticks += 1
        if ticks % 10 == 0:
            kept.write()
        # As long as it has worked: on a slow host the other threads would have no time.
        time.sleep((time.monotonic_ns() - now) / 1e9)


# Files that are open, mapped, locked, unlinked.


class Kept:
    def __init__(self):
        os.makedirs(KEPT, exist_ok=True)
        self.lock = threading.Lock()
        self.count = 0
        self.appended = os.open(f"{KEPT}/appended", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        mapped = self.mapped_file = os.open(f"{KEPT}/mapped", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.ftruncate(mapped, RECORD * SLOTS)
        self.mapped = mmap.mmap(mapped, RECORD * SLOTS)
        self.locked = os.open(f"{KEPT}/locked", os.O_RDWR | os.O_CREAT)
        fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.unlinked = os.open(f"{KEPT}/unlinked", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.unlink(f"{KEPT}/unlinked")
        self.reader, self.writer = os.pipe()

    def write(self):
        with self.lock:
            record = b"%015d\n" % self.count
            at = self.count % SLOTS * RECORD
            os.write(self.appended, record)
            self.mapped[at : at + RECORD] = record
            os.pwrite(self.unlinked, record, at)
            os.write(self.writer, record)
            if os.read(self.reader, RECORD) != record:
                wrong("a pipe gives something else than was written to it")
            self.count += 1

    def check(self):
        with self.lock:
            expected = b"".join(b"%015d\n" % number for number in range(self.count))
            if os.pread(self.appended, len(expected) + 1, 0) != expected:
                wrong("an open file has lost what was appended to it")
            ring = {number % SLOTS: b"%015d\n" % number for number in range(self.count)}
            expected = b"".join(ring[slot] for slot in range(len(ring)))
            places = [
                ("mapped", self.mapped[: len(expected)]),
                ("mapped and read", os.pread(self.mapped_file, len(expected), 0)),
                ("unlinked", os.pread(self.unlinked, RECORD * SLOTS, 0)),
            ]
            for name, found in places:
                if found != expected:
                    wrong(f"a file that is {name} has other contents than were written")
            if os.fstat(self.unlinked).st_nlink != 0:
                wrong("an unlinked file has a name again")
        if subprocess.run(["flock", "-n", f"{KEPT}/locked", "true"]).returncode == 0:
            wrong("a lock is not held any more")


# What the kernel says.

BAD_WORDS = ["EXT4-fs error", "EXT4-fs warning", "I/O error", "BUG:", "WARNING: CPU", "Oops", "stall", "lockup", "hung task"]


def kernel_complaints():
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    lines = []
    while True:
        try:
            lines.append(os.read(log, 8192).decode(errors="replace").split("\n")[0])
        except BlockingIOError:
            break
        except BrokenPipeError:
            continue
    os.close(log)
    complaints = [line for line in lines if any(word in line for word in BAD_WORDS)]
    for name in os.listdir("/sys/fs/ext4"):
        path = f"/sys/fs/ext4/{name}/errors_count"
        if os.path.exists(path):
            with open(path) as file:
                count = file.read().strip()
            if count != "0":
                complaints.append(f"{path}: {count}")
    return complaints


# The host's questions.


class Questions(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True

    def handle(self):
        for line in self.rfile:
            word = line.decode().strip()
            if word == "time":
                monotonic, offset = clocks()
                answer = f"{monotonic} {monotonic + offset}"
            elif word == "state":
                answer = json.dumps(state())
            else:
                answer = "?"
            self.wfile.write(answer.encode() + b"\n")


def state():
    for service in services:
        if service.poll() is not None:
            wrong(f"{service.args[0]} has ended with {service.returncode}")
    kept.check()
    now = life
    return {
        "generation": now.name,
        "offset_ns": now.offset_ns,
        "first_expirations": now.first_expirations,
        "randoms": list(now.randoms),
        "found": found,
        "committed": committed,
        "rows": rows(),
        "counter": counter,
        "kept": kept.count,
        "kernel": kernel_complaints(),
        "problems": list(problems),
    }


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def end(*_):
    is_ending.set()
    for service, number in zip(services, [signal.SIGINT, signal.SIGTERM, signal.SIGTERM]):
        service.send_signal(number)
    for service in services:
        service.wait()
    os._exit(0)


services = start_services()
signal.signal(signal.SIGTERM, end)
connection, cursor = wait_for("postgres", database)
cursor.execute("create table if not exists rows (number bigint primary key)")
connection.commit()
connection.close()
found = rows()
committed = found
kept = Kept()
guarded(write_rows)
wait_for("redis", redis).close()
guarded(count_in_redis)
guarded(tick)
while life is None or counter == 0 or committed == found:
    time.sleep(0.1)
Server(("", 7000), Questions).serve_forever()
