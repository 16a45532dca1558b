"""A peer made of Python's own socket module: send_fds and recv_fds.

    socket_peer.py listen|connect ADDRESS FILES

ADDRESS is a path, or @ and a name in the abstract namespace. Descriptor 0 is
the control socket, as for twisted_peer.py: a line of commands in, lines of
events out. All calls block.
"""

import os
import platform
import socket
import struct
import sys
import zlib

from common import counted, identity


def say(*words):
    control.write(" ".join(map(str, words)) + "\n")
    control.flush()


def send(count, indices):
    """Sends so many bytes of the counted stream, with these files."""
    send_message(counted(0, int(count)), indices)


def frame(count, indices):
    """The same as a frame behind its length, in four bytes."""
    send_message(struct.pack(">I", int(count)) + counted(0, int(count)), indices)


def send_message(data, indices):
    files = [open(f"{FILES}/{index}", "rb") for index in indices.split(",") if index]
    sent = socket.send_fds(connection, [data], [file.fileno() for file in files])
    connection.sendall(data[sent:])
    for file in files:
        file.close()


def receive(count, room):
    """Receives at most so many bytes, with room for so many descriptors."""
    data, fds, flags, _ = socket.recv_fds(connection, int(count), int(room))
    for fd in fds:
        say("fd", identity(fd))
        os.close(fd)
    truncated = "truncated" if flags & socket.MSG_CTRUNC else "complete"
    say("received", len(data), zlib.adler32(data), truncated)


def close():
    connection.close()


def done():
    """Tells that the commands before it were carried out."""
    say("done")


COMMANDS = {
    "done": done,
    "send": send,
    "frame": frame,
    "receive": receive,
    "close": close,
}

how, address, FILES = sys.argv[1:]
if address.startswith("@"):
    address = "\0" + address[1:]
control = socket.socket(fileno=0).makefile("rw")
say("Python", platform.python_version())
connection = socket.socket(socket.AF_UNIX)
if how == "listen":
    listener = connection
    listener.bind(address)
    listener.listen()
    say("listening")
    connection, _ = listener.accept()
else:
    connection.connect(address)
say("made")
for line in control:
    for command in line.split():
        name, *arguments = command.split("=")
        COMMANDS[name](*arguments)
