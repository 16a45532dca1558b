"""sd-bus as a service: sd_bus_service.py bus|peer SOCKET. On a bus it is
com.example.Systemd; without one it takes a single client."""

import ctypes
import os
import socket
import sys

sd = ctypes.CDLL("libsystemd.so.0")
pointer = ctypes.c_void_p


class Id(ctypes.Structure):
    _fields_ = [("low", ctypes.c_uint64), ("high", ctypes.c_uint64)]


sd.sd_bus_set_server.argtypes = [pointer, ctypes.c_int, Id]
sd.sd_bus_request_name.argtypes = [pointer, ctypes.c_char_p, ctypes.c_uint64]
sd.sd_bus_wait.argtypes = [pointer, ctypes.c_uint64]


def check(result):
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def memory(text):
    fd = os.memfd_create("given")
    os.write(fd, text)
    return fd


def read(message, kind, value):
    check(sd.sd_bus_message_read_basic(message, ord(kind), ctypes.byref(value)))
    return value.value


def reply(bus, call, kind, value):
    message = pointer()
    check(sd.sd_bus_message_new_method_return(call, ctypes.byref(message)))
    check(sd.sd_bus_message_append_basic(message, ord(kind), value))
    check(sd.sd_bus_send(bus, message, None))
    sd.sd_bus_message_unref(message)


def answer(bus, call):
    def is_of(member):
        return sd.sd_bus_message_is_method_call(call, b"com.example.Files", member) > 0

    if is_of(b"Open"):
        fd = memory(read(call, "s", ctypes.c_char_p()))
        reply(bus, call, "h", ctypes.byref(ctypes.c_int(fd)))
        os.close(fd)
    elif is_of(b"Store"):
        # They stay the message's.
        fds = [read(call, "h", ctypes.c_int()) for _ in range(2)]
        first, second = [os.pread(fd, 100, 0) for fd in fds]
        reply(bus, call, "s", ctypes.c_char_p(first + b" and " + second))


def main(kind, path):
    bus = pointer()
    check(sd.sd_bus_new(ctypes.byref(bus)))
    if kind == "bus":
        check(sd.sd_bus_set_address(bus, f"unix:path={path}".encode()))
        check(sd.sd_bus_set_bus_client(bus, 1))
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(1)
        print("serving", flush=True)
        client = listener.accept()[0].detach()
        check(sd.sd_bus_set_fd(bus, client, client))
        check(sd.sd_bus_set_server(bus, 1, Id(1, 2)))
    check(sd.sd_bus_negotiate_fds(bus, 1))
    check(sd.sd_bus_start(bus))
    if kind == "bus":
        check(sd.sd_bus_request_name(bus, b"com.example.Systemd", 0))
        print("serving", flush=True)
    while True:
        call = pointer()
        result = sd.sd_bus_process(bus, ctypes.byref(call))
        if result < 0:
            break
        if call:
            answer(bus, call)
            sd.sd_bus_message_unref(call)
        elif result == 0:
            check(sd.sd_bus_wait(bus, 2**64 - 1))


main(*sys.argv[1:])
