"""asyncvarlink at the other end: varlink_peer.py client|service PATH."""

import asyncio
import os
import sys

import asyncvarlink as varlink


class Files(varlink.VarlinkInterface, name="com.example.files"):
    @varlink.varlinkmethod(return_parameter="fileDescriptor")
    def Open(self, *, text: str) -> varlink.FileDescriptor: ...

    @varlink.varlinkmethod(return_parameter="content")
    def Read(self, *, fileDescriptor: varlink.FileDescriptor) -> str: ...


def memory(text):
    fd = os.memfd_create("given")
    os.write(fd, text.encode())
    return varlink.FileDescriptor(fd, should_close=True)


class Service(Files):
    @varlink.varlinkmethod(return_parameter="fileDescriptor")
    def Open(self, *, text: str) -> varlink.FileDescriptor:
        return memory(text)

    @varlink.varlinkmethod(return_parameter="content")
    def Read(self, *, fileDescriptor: varlink.FileDescriptor) -> str:
        with fileDescriptor as fd:
            return os.pread(fd.fileno(), 100, 0).decode()


async def client(path):
    _, protocol = await varlink.connect_unix_varlink(varlink.VarlinkClientProtocol, path)
    files = protocol.make_proxy(Files)
    counts = []
    for _ in range(3):
        with await files.Open(text="for Python") as opened:
            print(os.pread(opened["fileDescriptor"].fileno(), 100, 0).decode())
        with memory("of Python") as fd:
            print((await files.Read(fileDescriptor=fd))["content"])
        counts.append(len(os.listdir("/proc/self/fd")))
    print("leaked", counts[-1] - counts[0])


async def service(path):
    registry = varlink.VarlinkInterfaceRegistry()
    registry.register_interface(Service())
    await varlink.create_unix_server(registry.protocol_factory, path)
    print("serving", flush=True)
    await asyncio.Event().wait()


asyncio.run({"client": client, "service": service}[sys.argv[1]](sys.argv[2]))
