"""A Twisted peer that does what it is told and tells what it sees.

    twisted_peer.py listen|connect PATH PROTOCOL FILES

Descriptor 0 is the control socket. Each line that arrives on it is a list of
commands, done in one turn of the reactor (see Control); each line that leaves
it is an event. One connection is served: to PATH, or the first that PATH
accepts. Descriptors to be sent are those of FILES/0, FILES/1 and so on.
"""

import os
import platform
import socket
import sys
import zlib
from string import ascii_lowercase

import twisted
from twisted.internet import reactor
from twisted.internet.interfaces import (
    IFileDescriptorReceiver,
    IHalfCloseableProtocol,
    IPullProducer,
    IPushProducer,
)
from twisted.internet.protocol import ClientFactory, Factory, Protocol
from twisted.protocols.basic import (
    Int8StringReceiver,
    Int16StringReceiver,
    Int32StringReceiver,
    LineReceiver,
    NetstringReceiver,
)
from twisted.python import log
from zope.interface import implementer

from common import counted, identity


class Control(LineReceiver):
    """Obeys commands, each a word or WORD=ARGUMENT."""

    delimiter = b"\n"

    def connectionMade(self):
        self.files = []

    def lineReceived(self, line):
        for command in line.decode().split():
            name, _, argument = command.partition("=")
            getattr(self, f"do_{name}")(argument)

    def connectionLost(self, reason):
        # The test is over.
        if reactor.running:
            reactor.stop()

    def say(self, *words):
        self.sendLine(" ".join(map(str, words)).encode())

    def do_write(self, count):
        peer.write_counted(int(count))

    def do_string(self, count):
        """Sends one frame of so many bytes."""
        if isinstance(peer, LineReceiver):
            # The counted stream has line ends in it.
            peer.sendLine((ascii_lowercase * int(count)).encode()[: int(count)])
        else:
            peer.sendString(counted(0, int(count)))

    def do_fd(self, index):
        # Twisted wants the number to stay open until it was sent, and does
        # not say when that is: so the file stays open to the end.
        self.files.append(open(f"{FILES}/{index}", "rb"))
        peer.transport.sendFileDescriptor(self.files[-1].fileno())

    def do_seek(self, offset):
        """Moves in the file of the last descriptor received."""
        os.lseek(peer.descriptors[-1], int(offset), os.SEEK_SET)

    def do_adopt(self, _):
        """Serves the last descriptor received, a TCP connection."""
        fd = peer.descriptors.pop()
        reactor.adoptStreamConnection(fd, socket.AF_INET, quiet(Factory, Echo))
        os.close(fd)

    def do_listen_tcp(self, _):
        port = reactor.listenTCP(0, quiet(Factory, Held), interface="127.0.0.1")
        say("port", port.getHost().port)

    def do_pass_held(self, _):
        peer.transport.sendFileDescriptor(held.transport.fileno())

    def do_resume_held(self, _):
        held.transport.resumeProducing()

    def do_lose_held(self, _):
        held.transport.loseConnection()

    def do_pause(self, _):
        peer.transport.pauseProducing()

    def do_resume(self, _):
        peer.transport.resumeProducing()

    def do_watch(self, _):
        """Registers a push producer that only tells what it is told."""
        peer.transport.registerProducer(Watcher(), True)

    def do_push(self, total):
        source = PushSource(int(total))
        peer.transport.registerProducer(source, True)
        source.produce()

    def do_pull(self, total):
        peer.transport.registerProducer(PullSource(int(total)), False)

    def do_lose(self, _):
        peer.transport.loseConnection()

    def do_lose_write(self, _):
        peer.transport.loseWriteConnection()

    def do_abort(self, _):
        peer.transport.abortConnection()

    def do_report(self, _):
        peer.report()


@implementer(IPushProducer)
class Watcher:
    def pauseProducing(self):
        say("paused")

    def resumeProducing(self):
        say("resumed")

    def stopProducing(self):
        say("stopped")


@implementer(IPushProducer)
class PushSource(Watcher):
    """Writes so many bytes, as fast as it may."""

    CHUNK = 16384

    def __init__(self, total):
        self.left = total
        self.is_paused = False

    def pauseProducing(self):
        super().pauseProducing()
        self.is_paused = True

    def resumeProducing(self):
        super().resumeProducing()
        self.is_paused = False
        self.produce()

    def produce(self):
        while self.left and not self.is_paused:
            self.write_portion()

    def write_portion(self):
        count = min(self.CHUNK, self.left)
        self.left -= count
        peer.write_counted(count)
        if not self.left:
            peer.transport.unregisterProducer()
            say("produced")


@implementer(IPullProducer)
class PullSource(PushSource):
    def resumeProducing(self):
        say("asked")
        self.write_portion()


class Plain(Protocol):
    """Does not want descriptors."""

    written = received = 0
    checksum = 1

    def connectionMade(self):
        global peer
        peer = self
        say("made")

    def dataReceived(self, data):
        self.received += len(data)
        self.checksum = zlib.adler32(data, self.checksum)
        say("data", len(data))

    def connectionLost(self, reason):
        self.report()
        say("lost", reason.type.__name__)

    def write_counted(self, count):
        self.transport.write(counted(self.written, count))
        self.written += count

    def report(self):
        say("received", self.received, self.checksum)


@implementer(IFileDescriptorReceiver)
class Receiver(Plain):
    def connectionMade(self):
        self.descriptors = []
        super().connectionMade()

    def fileDescriptorReceived(self, fd):
        self.descriptors.append(fd)
        say("fd", identity(fd))


@implementer(IHalfCloseableProtocol)
class HalfCloser(Receiver):
    def readConnectionLost(self):
        say("read-lost")

    def writeConnectionLost(self):
        say("write-lost")


class Framed(Receiver):
    """Tells each frame, with the number of descriptors that came before it."""

    received_before = 0

    def stringReceived(self, data):
        came_with = len(self.descriptors) - self.received_before
        self.received_before += came_with
        say("string", len(data), zlib.adler32(data), came_with)

    lineReceived = stringReceived


def framed(receiver):
    """The protocol with the frames of `receiver` and the rest of Framed."""

    class FramedBy(Framed, receiver):
        dataReceived = receiver.dataReceived
        connectionLost = Framed.connectionLost

    return FramedBy


class Echo(Protocol):
    def dataReceived(self, data):
        self.transport.write(data)


class Held(Echo):
    """Reads nothing until it is told to."""

    def connectionMade(self):
        global held
        held = self
        self.transport.pauseProducing()
        say("held")


PROTOCOLS = {
    "plain": Plain,
    "receiver": Receiver,
    "half-closer": HalfCloser,
    "line": framed(LineReceiver),
    "netstring": framed(NetstringReceiver),
    "int8": framed(Int8StringReceiver),
    "int16": framed(Int16StringReceiver),
    "int32": framed(Int32StringReceiver),
}


def observe(event):
    text = log.textFromEventDict(event) or ""
    if event["isError"]:
        print(text, file=sys.stderr, flush=True)
        say("error", text.replace("\n", " | "))
    else:
        say("log", text.replace("\n", " | "))


def quiet(factory, protocol):
    made = factory.forProtocol(protocol)
    made.noisy = False
    return made


def serve_control():
    connection = socket.socket(fileno=0)
    connection.setblocking(False)
    factory = quiet(Factory, Control)
    control = factory.buildProtocol(None)
    factory.buildProtocol = lambda _: control
    reactor.adoptStreamConnection(connection.fileno(), socket.AF_UNIX, factory)
    return control


how, path, protocol, FILES = sys.argv[1:]
control = serve_control()
say = control.say
peer = held = None
log.addObserver(observe)
say("Python", platform.python_version(), "Twisted", twisted.__version__)

if how == "listen":
    reactor.listenUNIX(path, quiet(Factory, PROTOCOLS[protocol]))
    say("listening")
else:
    # Not by an endpoint: its wrapper hides all but one of the interfaces that
    # a protocol provides.
    reactor.connectUNIX(path, quiet(ClientFactory, PROTOCOLS[protocol]))
reactor.run()
