"""Twisted, for the bench: the same small servers and timers as in src/peers/.

Started by the bench with the Python of tests/interop/setup.
"""

import os
import socket
import struct
import sys
import time

from twisted.internet import epollreactor

epollreactor.install()

from twisted.internet import error, interfaces, reactor, stdio
from twisted.internet.protocol import DatagramProtocol, Factory, ProcessProtocol, Protocol
from zope.interface import implementer

LISTENER = 3
CHUNK = 65536
WRITES = 10


class Echo(Protocol):
    def dataReceived(self, data):
        self.transport.write(data)


class Ten(Protocol):
    def dataReceived(self, data):
        for _ in range(WRITES):
            self.transport.write(data)


@implementer(interfaces.IHalfCloseableProtocol)
class Sink(Protocol):
    count = 0

    def dataReceived(self, data):
        self.count += len(data)

    def readConnectionLost(self):
        self.transport.write(struct.pack("<Q", self.count))
        self.transport.loseConnection()

    def writeConnectionLost(self):
        pass


@implementer(interfaces.IPushProducer)
class Source(Protocol):
    chunk = bytes(CHUNK)

    def dataReceived(self, data):
        (self.count,) = struct.unpack("<Q", data)
        self.paused = False
        self.transport.registerProducer(self, True)
        self.resumeProducing()

    def pauseProducing(self):
        self.paused = True

    def stopProducing(self):
        self.count = 0

    def resumeProducing(self):
        self.paused = False
        while self.count and not self.paused:
            length = min(self.count, CHUNK)
            self.count -= length
            self.transport.write(self.chunk[:length] if length < CHUNK else self.chunk)
        if not self.count:
            self.transport.unregisterProducer()
            self.transport.loseConnection()


@implementer(interfaces.IFileDescriptorReceiver, interfaces.IHalfCloseableProtocol)
class Receiver(Protocol):
    count = 0

    def fileDescriptorReceived(self, descriptor):
        os.close(descriptor)
        self.count += 1

    def dataReceived(self, data):
        pass

    def readConnectionLost(self):
        self.transport.write(struct.pack("<Q", self.count))
        self.transport.loseConnection()

    def writeConnectionLost(self):
        pass


class Sender(Source):
    def resumeProducing(self):
        self.paused = False
        while self.count and not self.paused:
            # Duplicated in the call; each travels with a byte.
            self.transport.sendFileDescriptor(NULL)
            self.transport.write(b"\0")
            self.count -= 1
        if not self.count:
            self.transport.unregisterProducer()
            self.transport.loseConnection()


NULL = os.open("/dev/null", os.O_RDONLY)
PROTOCOLS = {
    "echo": Echo,
    "echo-mixin": Echo,
    "ten": Ten,
    "sink": Sink,
    "source": Source,
    "receive-descriptors": Receiver,
    "receive-trusted": Receiver,
    "send-descriptors": Sender,
}


def serve(task, family):
    family = socket.AF_INET if family == "tcp" else socket.AF_UNIX
    reactor.adoptStreamPort(LISTENER, family, Factory.forProtocol(PROTOCOLS[task]))
    # The parent waits for it.
    reactor.callWhenRunning(os.write, 1, b"R")
    reactor.run()


# Datagrams, pipes and children, as in src/peers/messages.rs.

BURST = 32
DATAGRAM = 1200
CHILDREN = 4


class DatagramEcho(DatagramProtocol):
    def datagramReceived(self, data, address):
        self.transport.write(data, address)


class DatagramSink(DatagramProtocol):
    count = 0

    def datagramReceived(self, data, address):
        self.count += 1
        if self.count % BURST == 0:
            self.transport.write(struct.pack("<Q", self.count), address)


class DatagramSource(DatagramProtocol):
    payload = bytes(DATAGRAM)

    def datagramReceived(self, data, address):
        (count,) = struct.unpack("<Q", data)
        for _ in range(count):
            self.transport.write(self.payload, address)


DATAGRAM_PROTOCOLS = {
    "echo": DatagramEcho,
    "sink": DatagramSink,
    "sink-merged": DatagramSink,
    "source": DatagramSource,
}


def serve_datagrams(task):
    reactor.adoptDatagramPort(LISTENER, socket.AF_INET, DATAGRAM_PROTOCOLS[task]())
    reactor.callWhenRunning(os.write, 1, b"R")
    reactor.run()


class PipeSink(Protocol):
    count = 0

    def dataReceived(self, data):
        self.count += len(data)

    def connectionLost(self, reason):
        os.write(1, struct.pack("<Q", self.count))


class PipeSource(Source):
    def connectionMade(self):
        self.count = 1 << 62
        self.paused = False
        self.transport.registerProducer(self, True)
        self.resumeProducing()


def serve_pipe(task):
    # What is not used is a pipe that stays open.
    reading, writing = os.pipe()
    if task == "source":
        stdio.StandardIO(PipeSource(), stdin=reading, stdout=LISTENER)
    else:
        stdio.StandardIO(PipeSink(), stdin=LISTENER, stdout=writing)
    reactor.callWhenRunning(os.write, 1, b"R")
    reactor.run()


class Parent(ProcessProtocol):
    left = 0
    running = 0

    @classmethod
    def start(cls):
        cls.left -= 1
        cls.running += 1
        reactor.spawnProcess(cls(), "/bin/true", ["true"], {}, childFDs={0: 0, 1: 1, 2: 2})

    def processEnded(self, reason):
        assert reason.check(error.ProcessDone), reason
        Parent.running -= 1
        if Parent.left > 0:
            Parent.start()
        elif Parent.running == 0:
            reactor.stop()


def spawn(count):
    Parent.left = count
    cpu, began = time.process_time_ns(), time.monotonic()
    for _ in range(CHILDREN):
        reactor.callWhenRunning(Parent.start)
    reactor.run()
    print(count / (time.monotonic() - began), (time.process_time_ns() - cpu) / count, sep="\n")


# Timers, as in src/timers.rs.

SPAN = 100_000_000
FAR = 30_000_000_000
BESIDE_PENDING = 1_000


def scattered(count):
    return ((n * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF) >> 8 for n in range(1, count + 1))


def delays(count):
    return (n % SPAN / 1e9 for n in scattered(count))


def far_delays(count):
    return ((FAR + n % FAR) / 1e9 for n in scattered(count))


def nothing():
    pass


def timers(timed, count):
    operations = count
    before = time.process_time_ns()
    if timed == "fire":
        for delay in delays(count):
            reactor.callLater(delay, nothing)
        reactor.callLater(SPAN / 1e9, reactor.stop)
        reactor.run()
    elif timed == "lateness":
        late = []

        def note(due):
            late.append(max(0.0, time.monotonic() - due) * 1e3)
            if len(late) == count:
                reactor.stop()

        for delay in delays(count):
            reactor.callLater(delay, note, time.monotonic() + delay)
        reactor.run()
        late.sort()
        print(sum(late) / count, late[count * 99 // 100], sep="\n")
        return
    else:
        calls = [reactor.callLater(delay, nothing) for delay in far_delays(count)]
        if timed == "cancel":
            for call in calls:
                call.cancel()
        elif timed == "reset":
            before = time.process_time_ns()
            for call, delay in zip(calls, far_delays(count)):
                call.reset(delay)
        else:
            operations = BESIDE_PENDING
            before = time.process_time_ns()
            for delay in far_delays(operations):
                reactor.callLater(delay, nothing).cancel()
    print((time.process_time_ns() - before) / operations)


if sys.argv[1] == "serve":
    {"udp": serve_datagrams, "pipe": serve_pipe}.get(
        sys.argv[4], lambda task: serve(task, sys.argv[4])
    )(sys.argv[3])
elif sys.argv[1] == "spawn":
    spawn(int(sys.argv[3]))
else:
    timers(sys.argv[3], int(sys.argv[4]))
