"""Questions from many sockets at once, each of a thread of its own: FLOOD.PY SOCKETS QUESTIONS NAME RESOLVER…

Half of the sockets ask several resolvers without a peer, the others are connected to one of them. Every question must be
answered, with its id, and by the resolver that was asked. Prints how many were."""

import socket
import struct
import sys
import threading

SOCKETS, QUESTIONS, NAME = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
RESOLVERS = sys.argv[4:]
lock = threading.Lock()
answered, faults = 0, []


def question(number):
    name = b"".join(bytes([len(label)]) + label.encode() for label in NAME.split("."))
    return struct.pack("!6H", number, 0x0100, 1, 0, 0, 0) + name + b"\0" + struct.pack("!2H", 1, 1)


def check(answer, number):
    told, flags, _, records = struct.unpack("!4H", answer[:8])
    if (told, flags & 0x800F, records) != (number, 0x8000, 1):
        raise ValueError(f"question {number}: {answer!r}")


def ask(thread):
    global answered
    version6 = thread % 4 == 3
    peers = [resolver for resolver in RESOLVERS if (":" in resolver) == version6]
    done = 0
    try:
        with socket.socket(socket.AF_INET6 if version6 else socket.AF_INET, socket.SOCK_DGRAM) as own:
            own.settimeout(10)
            connected = thread % 2 == 0
            if connected:
                own.connect((peers[0], 53))
            for number in range(QUESTIONS):
                peer = peers[0] if connected else peers[number % len(peers)]
                if connected:
                    own.send(question(number))
                else:
                    own.sendto(question(number), (peer, 53))
                answer, source = own.recvfrom(4096)
                check(answer, number)
                if source[:2] != (peer, 53):
                    raise ValueError(f"asked {peer}, answered by {source}")
                done += 1
    except (OSError, ValueError) as error:
        with lock:
            faults.append(f"socket {thread}: {error}")
    with lock:
        answered += done


threads = [threading.Thread(target=ask, args=(number,)) for number in range(SOCKETS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(answered, "answered")
print("\n".join(faults), file=sys.stderr)
sys.exit(bool(faults))
