"""Asks for names by Python's socket.getaddrinfo, and prints the addresses."""

import socket
import sys

for name in sys.argv[1:]:
    for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM):
        print(found[4][0])
