"""The HTTP client in Python of the comparison of languages: see client.c, which does the same."""

import asyncio
import http.client
import sys
from concurrent.futures import ThreadPoolExecutor

PORT = 7014
LIMIT = 20


def fetch(connection, path):
    connection.request("GET", path)
    with connection.getresponse() as answer:
        return answer.read().decode()


def once(name):
    connection = http.client.HTTPConnection(name, PORT, timeout=LIMIT)
    connection.connect()
    peer = connection.sock.getpeername()[:2]
    own = connection.sock.getsockname()[0]
    text = f"{name} at {peer} from {own}: {fetch(connection, '/once')}, {fetch(connection, '/chunked')}"
    connection.close()
    return text


def kept():
    connection = http.client.HTTPConnection("far.test", PORT, timeout=LIMIT)
    ports = set()
    for number in range(5):
        print("kept:", fetch(connection, f"/kept/{number}"))
        ports.add(connection.sock.getsockname()[1])
    print("connections:", len(ports))


def one(number):
    connection = http.client.HTTPConnection("far.test", PORT, timeout=LIMIT)
    return fetch(connection, f"/many/{number}") == f"you asked for /many/{number}"


async def one_more(number):
    reader, writer = await asyncio.open_connection("both.test", PORT)
    writer.write(f"GET /many/{number} HTTP/1.1\r\nHost: both.test\r\nConnection: close\r\n\r\n".encode())
    answer = await asyncio.wait_for(reader.read(), LIMIT)
    writer.close()
    return answer.endswith(f"you asked for /many/{number}".encode())


async def asynchronously():
    return sum(await asyncio.gather(*(one_more(number) for number in range(100))))


for name in sys.argv[1:]:
    print(once(name))
kept()
with ThreadPoolExecutor(20) as pool:
    print("many:", sum(pool.map(one, range(100))))
print("asynchronously:", asyncio.run(asynchronously()))
try:
    http.client.HTTPConnection("nowhere.test", PORT, timeout=LIMIT).connect()
except OSError as error:
    print("unknown name:", type(error).__name__)
